"""The share that an allocation gave each layer, and the predicted distortion beside the measured one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convexprune.report.pictures import plain_numbers
from convexprune.report.row import literal
from convexprune.solution import Certificate


@dataclass(frozen=True)
class Share:
    """The share of one layer: weights to keep, the distortion predicted for them, and the layer's curve."""

    name: str
    kept: int
    total: int
    distortion: float
    fractions: tuple[float, ...] = ()
    distortions: tuple[float, ...] = ()


@dataclass(frozen=True)
class Shares:
    """The layers' shares of the budget, with the certificate of the knapsack.

    dominated  number of levels dropped because another level of the same curve costs less and loses less
    """

    layers: tuple[Share, ...]
    budget: float
    cost: float
    certificate: Certificate
    solver: str
    dominated: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Weights to keep by module."""
        return {share.name: share.kept for share in self.layers}

    def by_layer(self, names: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Weights to keep by layer: a module's count in even parts, which add up to it exactly.

        names  module -> the names of its layers, one for each group
        """
        counts = self.counts
        shared = {module: divmod(counts[module], len(layers)) for module, layers in names.items() if module in counts}
        return {
            layer: each + (group < left)
            for module, (each, left) in shared.items()
            for group, layer in enumerate(names[module])
        }

    def lines(self, measured: float | None = None) -> tuple[str, ...]:
        """The allocation in sentences; `measured` is the pruned network's distortion, in the unit of the curves."""
        proof = self.certificate
        found = [
            f"allocation: {self.cost:,.10g} of a budget of {self.budget:,.10g}, within {proof.relative_gap:.0e} of the "
            f"best for these curves ({self.dominated} dominated levels dropped)",
            f"distortion, predicted by the curves: {proof.value:.6g}",
        ]
        if measured is not None:
            ratio = f", {measured / proof.value:.2f} of the prediction" if proof.value > 0 else ""
            found.append(f"distortion of the network's output, measured: {measured:.6g}{ratio}")
        return tuple(found)


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
