"""Report of a merging: the survivors and the saliency of each layer, and the change of the network's outputs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from html import escape
from typing import Any

from convexprune.network.compact import Compaction
from convexprune.report.plain import to_plain
from convexprune.report.row import literal
from convexprune.solution import Certificate
from convexprune.whole_file import write_whole


@dataclass(frozen=True)
class MergedLayer:
    """The merges of one layer.

    saliency  total saliency; each merge's share times E|x|^2 (times 1 if data was given) bounds its change (Lemma 1)
    change    (sum of the square roots of the saliencies)^2: the same bound for all merges together
    curve     saliency of each merge of the greedy, down to one neuron
    cutoff    number of neurons that the published rule removes
    with_data True if the saliencies use the Gram matrix of the inputs
    """

    name: str
    neurons: int
    survivors: int
    saliency: float
    change: float
    certificate: Certificate
    curve: tuple[float, ...] = field(repr=False)
    cutoff: int
    with_data: bool

    def line(self) -> str:
        """A sentence."""
        unit = "" if self.with_data else " times E|x|^2, x with a 1 for the biases"
        return (
            f"{self.name}: {self.neurons} -> {self.survivors} neurons "
            f"(published cut-off: {self.neurons - self.cutoff}); "
            f"mean square change of what reads them at most {self.change:.4g}{unit}"
        )


@dataclass(frozen=True)
class MergeReport:
    """The layers in forward order, the modules that got smaller, and the change of the network's output.

    measured  mean square change of the outputs on the batches; None without batches
    scale     mean square of the outputs on the batches; None without batches
    """

    layers: tuple[MergedLayer, ...]
    compaction: Compaction
    measured: float | None = None
    scale: float | None = None

    def __str__(self) -> str:
        """A few lines."""
        lines = [*(layer.line() for layer in self.layers), str(self.compaction)]
        if self.measured is not None and self.scale is not None:
            share = self.measured / self.scale if self.scale else 0.0
            lines.append(f"outputs moved by {self.measured:.4g} in the mean square, {share:.2%} of their size")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The report as JSON; numbers that JSON has no word for are strings ("inf")."""
        return json.dumps(to_plain(self), indent=1, allow_nan=False)

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with the saliency curves. Raises OSError naming the path."""
        from convexprune.report.html import document, image
        from convexprune.report.pictures import ACCENT, SECOND, figure

        parts = [f"<p>{escape(line)}</p>" for line in str(self).splitlines()]
        for layer in self.layers:
            drawing = figure(2.2)
            _curve(drawing.subplots(1, 2), layer, (ACCENT, SECOND))
            parts.append(image(drawing, f"saliency of each merge of {layer.name}"))
        write_whole(path, document("Merging report", "".join(parts)))


def _curve(axes: Any, layer: MergedLayer, colours: tuple[str, str]) -> None:
    left, right = axes
    left.plot(range(1, len(layer.curve) + 1), layer.curve, color=colours[0])
    left.set_yscale("symlog", linthresh=max(max(layer.curve, default=1.0) * 1e-6, 1e-300))
    for place, style in ((layer.neurons - layer.survivors, "-"), (layer.cutoff, ":")):
        left.axvline(place, color=colours[1], linewidth=0.9, linestyle=style)
    left.set_title(literal(layer.name), loc="left", fontsize=10)
    left.set_xlabel("merges (line: taken; dotted: published cut-off)")
    right.hist(layer.curve, bins="sturges", color=colours[0])
    right.set_xlabel("saliency of a merge")
