"""The share that an allocation gave each layer, and the predicted distortion beside the measured one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
