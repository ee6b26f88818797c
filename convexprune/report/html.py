"""The report as one self-contained HTML page: the table, and plots as images inside it."""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import TYPE_CHECKING, Any

from convexprune.extras import extras
from convexprune.report import blocks as by_block
from convexprune.report.pictures import (
    ACCENT,
    FLOOR,
    INK,
    PALE,
    SECOND,
    curves_plot,
    errors,
    figure,
    gaps,
    height_of,
    kept,
    plain_numbers,
)
from convexprune.report.risk_path import path_plot
from convexprune.report.row import HEADINGS, LEGEND, WORDS, Row, literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convexprune.report import Report

SHOWN = 12  # runs, or patterns, that a page draws: those of the layers with the largest gaps where there are more
STYLE = """
body { font: 16px/1.5 Georgia, 'Times New Roman', serif; color: #222; background: #fff; margin: 3em auto;
       max-width: 62em; padding: 0 1.5em; }
h1 { font-size: 1.7em; font-weight: normal; margin: 0 0 .2em; }
h2 { font-size: 1.15em; font-weight: normal; margin: 2.4em 0 .6em; }
p { margin: .4em 0; max-width: 46em; }
.lead { font-size: 1.1em; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font: 13px/1.4 'Helvetica Neue', Arial, sans-serif;
        font-variant-numeric: tabular-nums; border-top: 1.5px solid #222; border-bottom: 1.5px solid #222; }
th { font-weight: normal; color: #666; border-bottom: .75px solid #222; }
th, td { padding: .4em .8em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { padding-left: .2em; }
td.word, th.word { text-align: left; }
dl { font-size: .85em; color: #555; display: grid; grid-template-columns: max-content auto; gap: .1em 1.2em;
     margin: 1em 0; }
dt { font-style: italic; } dd { margin: 0; overflow-wrap: anywhere; }
.plot { width: 100%; max-width: 54em; display: block; }
.patterns { display: flex; flex-wrap: wrap; gap: 2em; align-items: flex-end; }
figure { margin: 0; } figcaption { font-size: .85em; color: #555; margin-top: .3em; }
.pattern { image-rendering: pixelated; border: 1px solid #d9d9d9; display: block; }
"""


def page(report: Report) -> str:
    """The whole page; it needs no other file."""
    sections = [
        _section("The network", _network(report)),
        _section("Layers", _layers(report.rows) + _list(LEGEND)),
        _section("Risk on data not seen", _path(report)),
        _section("Guaranteed and measured, layer by layer", _links(report)),
        _section("Allocation", _allocation(report)),
        _section("Kept, and proven gap, by layer", image(_layers_plot(report.rows), "kept fraction and gap by layer")),
        _section("Moments", _moments(report.rows)),
        _section("Convergence", _convergence(report.rows)),
        _section("Weight patterns", _patterns(report.rows)),
        _section("Settings", _list(_settings(report))),
    ]
    kept = f"{report.share().capitalize()}."
    covered = () if report.coverage is None else report.coverage.lines()
    later = (report.afterwards,) if report.afterwards else ()
    lines = "".join(f"<p>{escape(line[0].upper() + line[1:])}.</p>\n" for line in (*later, *covered))
    return document("Pruning report", f'<p class="lead">{kept}</p>\n{lines}{"".join(sections)}')


def excerpt(report: Report) -> str:
    """The table and the summary, for a notebook: no plots, and no style but the notebook's own."""
    words = "".join(f"<p>{escape(line)}</p>\n" for line in report.summary())
    return f"<div>\n{_layers(report.rows)}{words}</div>"


def document(title: str, body: str) -> str:
    """A page with this title."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{title}</h2>\n{body}\n" if body else ""


def _list(entries: Any) -> str:
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in entries)
    return f"<dl>{items}</dl>"


def _layers(rows: Sequence[Row]) -> str:
    """The table; of many layers one for each block, which opens at a click."""
    if len(rows) <= by_block.MANY:
        return _table(rows)
    return "".join(_folded(block) for block in by_block.blocks(rows))


def _folded(block: by_block.Block) -> str:
    name, *figures = block.cells()
    words = ", ".join(f"{heading} {cell}" for heading, cell in zip(by_block.HEADINGS[1:], figures, strict=True))
    return f"<details><summary>{escape(name)}: {escape(words)}</summary>\n{_table(block.rows)}</details>\n"


def _table(rows: Sequence[Row]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        marks = ('class="word"' if heading in WORDS else "" for heading in HEADINGS)
        inside = (f"<{tag} {mark}>{escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        return f"<tr>{''.join(inside)}</tr>\n"

    body = "".join(line("td", row.cells()) for row in rows)
    return f'<div class="table"><table>\n<thead>{line("th", HEADINGS)}</thead>\n<tbody>{body}</tbody></table></div>\n'


def _settings(report: Report) -> list[tuple[str, object]]:
    """The problems, the most frequent ones first, and the settings of the run."""
    stated = sorted(report.problems.items(), key=lambda pair: -pair[1])
    shown = [("problem", f"{words}: {count} {'layer' if count == 1 else 'layers'}") for words, count in stated[:SHOWN]]
    more = [("problem", f"and {len(stated) - SHOWN} more")] if len(stated) > SHOWN else []
    return [*shown, *more, *vars(report.settings).items()]


def _network(report: Report) -> str:
    network = report.network
    words = "".join(f"<p>{escape(line)}</p>" for line in (*network.lines(), *report.remarks()))
    bars = [("guaranteed", network.guaranteed, PALE), ("measured", network.measured, ACCENT)]
    drawn = [(name, value, colour) for name, value, colour in bars if value is not None and math.isfinite(value)]
    if len(drawn) < 2:
        return words
    drawing = figure(1.5)
    axes = drawing.subplots()
    for place, (name, value, colour) in enumerate(reversed(drawn)):
        axes.barh(place, value, color=colour, height=0.6)
        axes.annotate(f" {name} {value:.4g}", (value, place), va="center", fontsize=9)
    axes.set_yticks([])
    axes.set_xlim(0, 1.3 * max(value for _, value, _ in drawn))
    axes.set_xlabel("change of the network's output, Frobenius norm over the calibration samples")
    axes.spines["left"].set_visible(True)
    return words + image(drawing, "guaranteed and measured error of the network")


def _path(report: Report) -> str:
    if report.path is None:
        return ""
    drawing = figure(2.8)
    path_plot(drawing, report.path, (ACCENT, SECOND, INK))
    words = "".join(f"<p>{escape(line)}</p>" for line in report.path.lines())
    return words + image(drawing, "risk, its upper bound and the weights kept, along the path")


def _links(report: Report) -> str:
    links = report.network.layers
    if len(links) < 2:
        return ""
    drawing = figure(height_of(len(links), 0.26))
    errors(drawing.subplots(), links)
    words = "<p>How the errors of the layers before, and its own, arrive at each layer.</p>"
    return words + image(drawing, "guaranteed and measured change of the outputs of each layer")


def _moments(rows: Sequence[Row]) -> str:
    """The numbers of wanted and kept weights, and the damping, rank and condition of each layer with moments."""
    entries = []
    for row in rows:
        if row.moments is not None:
            wanted = "" if row.wanted is None else f"; {row.wanted:,} weights wanted, {row.kept:,} kept"
            entries.append((row.name, row.moments.line("Gram matrix") + wanted))
    return _list(entries) if entries else ""


def _allocation(report: Report) -> str:
    if report.allocation is None:
        return ""
    drawing = figure(max(2.4, 0.22 * len(report.allocation.layers) + 1.0))
    curves_plot(drawing, report.allocation, (ACCENT, SECOND))
    words = "".join(f"<p>{escape(line)}</p>" for line in report.allocation.lines(report.distortion))
    return words + image(drawing, "rate-distortion curves, and the share of each layer")


def _layers_plot(rows: Sequence[Row]) -> Any:
    drawing = figure(height_of(len(rows), 0.32))
    left, right = drawing.subplots(1, 2, sharey=True)
    kept(left, rows)
    gaps(right, rows)
    return drawing


def _convergence(rows: Sequence[Row]) -> str:
    runs = _worst([row for row in rows if len(row.trace) > 1])
    images = "".join(image(_run_plot(row), f"convergence of {row.name}") for row in runs)
    note = (
        "<p>Each look of the solver at the certificate of the point it held: the objective and its proven lower bound, "
        f"then the relative gap between them and the violation of the constraints, drawn at {FLOOR:.0e} where less.</p>"
    )
    return note + images if images else ""


def _worst(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows with the largest gaps where there are many, in their order."""
    if len(rows) <= by_block.MANY:
        return rows
    worst = sorted(rows, key=lambda row: -math.inf if row.gap is None else row.gap)[-SHOWN:]
    return [row for row in rows if any(row is each for each in worst)]


def _run_plot(row: Row) -> Any:
    drawing = figure(2.1)
    left, right = drawing.subplots(1, 2)
    seconds = [point.seconds for point in row.trace]
    looks = [point.certificate for point in row.trace]
    left.plot(seconds, [look.value for look in looks], color=ACCENT, label="objective")
    left.plot(seconds, [look.bound for look in looks], color=SECOND, label="bound")
    left.set_title(literal(row.name), loc="left", fontsize=10)
    right.plot(seconds, [max(look.relative_gap, FLOOR) for look in looks], color=INK, label="gap")
    right.plot(seconds, [max(look.violation, FLOOR) for look in looks], color=SECOND, label="violation", ls="--")
    right.set_yscale("log")
    plain_numbers(right.yaxis)
    for axes in (left, right):
        axes.set_xlabel("seconds")
        axes.legend(frameon=False, fontsize=8)
    return drawing


def _patterns(rows: Sequence[Row]) -> str:
    figures = "".join(_pattern(row) for row in _worst([row for row in rows if row.pattern is not None]))
    note = (
        "Dark: kept. A cell of a large layer stands for several weights, and is the darker the more of them are kept."
    )
    return f'<p>{note}</p><div class="patterns">{figures}</div>' if figures else ""


def _pattern(row: Row) -> str:
    assert row.pattern is not None
    height, width = row.pattern.shape
    scale = max(1, min(4, 480 // width, 360 // height))
    return (
        f'<figure><img class="pattern" width="{width * scale}" height="{height * scale}" '
        f'alt="kept weights of {escape(row.name)}" src="data:image/png;base64,{_png(row.pattern)}">'
        f"<figcaption>{escape(row.name)}: {row.shape[0]} outputs (down), {row.shape[1]} inputs</figcaption></figure>"
    )


def _png(pattern: Any) -> str:
    with extras():
        from matplotlib import image

    file = io.BytesIO()
    image.imsave(file, pattern.numpy(), cmap="Blues", vmin=0, vmax=1, format="png")
    return base64.b64encode(file.getvalue()).decode()


def image(drawing: Any, words: str) -> str:
    """A figure as an element of the page."""
    with extras():
        import matplotlib as mpl

    for axes in drawing.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#888888")
        axes.tick_params(colors="#555555", labelsize=8.5)
        axes.xaxis.label.set(color="#555555", size=9)
    file = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "convexprune"}):
        drawing.savefig(file, format="svg", metadata={"Date": None})
    data = base64.b64encode(file.getvalue().encode()).decode()
    return f'<img class="plot" alt="{escape(words)}" src="data:image/svg+xml;base64,{data}">\n'
