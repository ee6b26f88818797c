"""Additivity of the layers' distortions, which allocation assumes: measured, with the terms that break it.

Let delta_l be the change of the network's output when layer l alone is pruned, and delta the change when all are. Then

    delta = sum_l delta_l + rest,     E|sum_l delta_l|^2 = sum_l E|delta_l|^2 + cross terms

so E|delta|^2 is the sum of the layers' distortions if the rest and the cross terms are small. They are small for small
errors of mean zero that are uncorrelated between layers. Source: Xu et al., ICCV 2023, section 3, assumes both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.bounds.statement import Figure, Hypothesis, Statement
from convexprune.rounding import gamma

PAPER = "Xu et al., ICCV 2023"


@dataclass(frozen=True)
class Additivity:
    """Mean squared changes of the network's output over the samples.

    alone      E|delta_l|^2, layer by layer
    superposed E|sum_l delta_l|^2
    measured   E|delta|^2
    rest       E|delta - sum_l delta_l|^2
    doubt      by how much the root of each of these may be off, as computed
    """

    alone: tuple[float, ...]
    superposed: float
    measured: float
    rest: float
    doubt: float = 0.0

    def __str__(self) -> str:
        """Two sentences."""
        return (
            f"squared change of the outputs: {self.measured:.4g} measured, {self.predicted:.4g} the sum over "
            f"{len(self.alone)} layers, each pruned alone (ratio {self.ratio:.3g})\n"
            f"cross terms {self.crossing:+.1%} of the sum; {self.bending:.1%} of the change is beyond the layers' own"
        )

    @classmethod
    def of(cls, alone: Sequence[Tensor], together: Tensor) -> Additivity:
        """Compute the means from delta_l (n, outputs) of each layer, and delta."""
        if not alone:
            raise ValueError("no layer has changed; there is nothing to add up")
        total = torch.stack([each.double() for each in alone]).sum(0)
        size = _mean(sum((each.double().abs() for each in alone), start=together.double().abs()))
        doubt = gamma(len(alone) + together.numel() + 8) * math.sqrt(size)
        return cls(tuple(map(_mean, alone)), _mean(total), _mean(together), _mean(together.double() - total), doubt)

    @property
    def predicted(self) -> float:
        """sum_l E|delta_l|^2."""
        return math.fsum(self.alone)

    @property
    def ratio(self) -> float:
        """measured / predicted: 1 where the distortions add."""
        return self.measured / self.predicted if self.predicted else math.nan

    @property
    def crossing(self) -> float:
        """The cross terms divided by the sum; 0 if the layers' changes are uncorrelated."""
        return self.superposed / self.predicted - 1 if self.predicted else math.nan

    @property
    def bending(self) -> float:
        """The norm of the rest divided by the norm of the change; 0 if the network is linear in the layers' changes."""
        return math.sqrt(self.rest / self.measured) if self.measured else 0.0

    def statement(self, tolerance: float = 0.25) -> Statement:
        """E|delta|^2 <= (1 + t) / (1 - t)^2 sum_l E|delta_l|^2, if bending and crossing are at most the tolerance t.

        Proof. |delta| <= |sum delta_l| + |rest| in the norm sqrt(E|.|^2). The first term is at most
        sqrt((1 + t) sum), the second at most t |delta|. Raises ValueError for a tolerance outside (0, 1).
        """
        if not 0 < tolerance < 1:
            raise ValueError(f"tolerance is {tolerance}; it must be in (0, 1)")
        rest, whole = (self._root(part).times(by) for part, by in ((self.rest, 1.0), (self.measured, tolerance)))
        summed, apart = self._root(self.superposed), self._root(self.predicted).times(math.sqrt(1 + tolerance))
        hypotheses = (
            Hypothesis(f"the changes add: what is left over is {self.bending:.1%} of them", rest.at_most(whole)),
            Hypothesis(f"they are uncorrelated: cross terms {self.crossing:+.1%}", summed.at_most(apart)),
        )
        factor = (1 + tolerance) / (1 - tolerance) ** 2
        guaranteed, measured = self._root(self.predicted).times(math.sqrt(factor)), self._root(self.measured)
        doubt = sum(2 * each.value * each.doubt + each.doubt**2 for each in (guaranteed, measured))
        return Statement("additivity", PAPER, hypotheses, factor * self.predicted, self.measured, doubt)

    def _root(self, mean: float) -> Figure:
        return Figure(math.sqrt(mean), self.doubt)


def _mean(change: Tensor) -> float:
    return float(change.double().square().sum()) / max(len(change), 1)
