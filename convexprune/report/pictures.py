"""The main pictures of a report, each on axes that the caller may bring."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from convexprune.extras import extras
from convexprune.report.row import Row, literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexprune.report import Link, Report
    from convexprune.report.shares import Shares

INK, ACCENT, SECOND, PALE = "#222222", "#1f5f8b", "#b5651d", "#d9d9d9"
WIDTH: Final = 8.6  # inches, the width of a page's text column
TALLEST: Final = 14.0  # inches
NAMED: Final = 45  # layers whose names are written at an axis
FLOOR: Final = 1e-12  # a logarithmic axis ends here; smaller numbers, also zero, are drawn here


def drawn(report: Report, what: str, ax: Any = None) -> Any:
    """The axes with one of the pictures; see `Report.plot`."""
    if what not in ("kept", "gap", "errors"):
        raise ValueError(f"what is {what!r}; it must be 'kept', 'gap' or 'errors'")
    links = report.network.layers
    if what == "errors" and not links:
        raise ValueError("the report has no errors by layer: there is no guarantee; draw 'kept' or 'gap'")
    axes = figure(height_of(len(report.rows), 0.32)).subplots() if ax is None else ax
    if what == "errors":
        errors(axes, links)
    else:
        {"kept": kept, "gap": gaps}[what](axes, report.rows)
    return axes


def kept(axes: Any, rows: Sequence[Row]) -> None:
    """The share of weights kept, a bar for each layer."""
    axes.barh(range(len(rows)), [100 * row.kept_fraction for row in rows], color=ACCENT, height=0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("weights kept, %")
    _name(axes, [row.name for row in rows])


def gaps(axes: Any, rows: Sequence[Row]) -> None:
    """The proven gap, a dot for each layer whose point is feasible."""
    for place, row in enumerate(rows):
        if row.gap is not None and math.isfinite(row.gap):
            axes.plot(max(row.gap, FLOOR), place, "o", color=SECOND, markersize=5)
    axes.set_xscale("log")
    axes.set_xlim(FLOOR, 2)
    _ticks_in_words(axes)
    axes.set_xlabel("proven relative gap to the optimum")
    axes.grid(axis="x", color=PALE, linewidth=0.5)
    _name(axes, [row.name for row in rows])


def errors(axes: Any, links: Sequence[Link]) -> None:
    """The guaranteed and the measured change of each layer's outputs, joined by a line."""
    places = range(len(links))
    for place, link in zip(places, links, strict=True):
        axes.plot([link.measured or FLOOR, link.guaranteed or FLOOR], [place] * 2, color=PALE, linewidth=2, zorder=1)
    hollow = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.5}
    axes.plot([link.guaranteed or FLOOR for link in links], places, "o", color=SECOND, label="guaranteed", **hollow)
    axes.plot([link.measured or FLOOR for link in links], places, "o", color=ACCENT, markersize=5, label="measured")
    axes.set_xscale("log")
    plain_numbers(axes.xaxis)
    axes.set_xlabel("change of the layer's outputs in the pruned network, Frobenius norm over the calibration samples")
    axes.legend(frameon=False, fontsize=8)
    _name(axes, [link.name for link in links])


def curves_plot(figure: Any, shares: Shares, colours: tuple[str, str]) -> None:
    """The curves of all layers with the levels chosen, on the left; the shares on the right."""
    line, point = colours
    left, right = figure.subplots(1, 2)
    for share in shares.layers:
        pairs = sorted(zip(share.fractions, share.distortions, strict=True))
        left.plot([f for f, _ in pairs], [max(d, 1e-12) for _, d in pairs], color=line, linewidth=0.8, alpha=0.6)
        left.plot(share.kept / max(share.total, 1), max(share.distortion, 1e-12), "o", color=point, markersize=3.5)
    if any(share.distortion > 0 for share in shares.layers):
        left.set_yscale("log")
        plain_numbers(left.yaxis)
    left.set_xlabel("kept fraction of the layer")
    left.set_title("distortion predicted", loc="left", fontsize=10)
    places = list(range(len(shares.layers)))
    right.barh(places, [100 * share.kept / max(share.total, 1) for share in shares.layers], color=line, height=0.6)
    right.set_yticks(places, [literal(share.name) for share in shares.layers], fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("weights allotted, %")


def plain_numbers(axis: Any) -> None:
    """0.2 and 1e-06 at a logarithmic axis, in place of powers with raised digits."""
    with extras():
        from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """LogFormatter says where a number is written, and this how."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def height_of(count: int, each: float) -> float:
    """Inches for so many lines."""
    return min(max(1.8, each * count + 1.0), TALLEST)


def figure(height: float) -> Any:
    """An empty figure of the page's width; matplotlib's global state is not touched."""
    with extras():
        from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def _name(axes: Any, names: Sequence[str]) -> None:
    """The layers from top to bottom, by name; every second, third, ... where there are too many."""
    step = math.ceil(len(names) / NAMED)
    axes.set_yticks(range(0, len(names), max(step, 1)), [literal(name) for name in names[:: max(step, 1)]])
    axes.set_ylim(len(names) - 0.5, -0.5)


def _ticks_in_words(axes: Any) -> None:
    """1e-06 in place of a power with raised digits, and percent where they are usual."""
    ticks = (1e-12, 1e-9, 1e-6, 1e-3, 1.0)
    axes.set_xticks(ticks, ["0", "1e-9", "1e-6", "0.1%", "100%"])
    axes.minorticks_off()
