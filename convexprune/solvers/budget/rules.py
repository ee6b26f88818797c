"""The field's rules for dividing a budget among layers; none of them looks at the distortions.

For a strength t, each rule gives the number of weights that every layer should keep. Each layer takes its largest level
that keeps no more than this number, and t is the largest strength within the budget.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.curve import Curve
from convexprune.forms import KnapsackProblem
from convexprune.solution import Attempt, Status
from convexprune.solvers.budget.lagrangian_price import infeasible

HALVINGS = 60
LAST = 0.2  # the smallest fraction of the last layer that Uniform+ keeps


@dataclass(frozen=True)
class Rule:
    """A rule as a solver; it gives no witness."""

    takes: ClassVar[type] = KnapsackProblem
    starts: ClassVar[bool] = False

    @abstractmethod
    def targets(self, curves: Sequence[Curve]) -> Callable[[float], Tensor]:
        """A function from a strength t in [0, 1] to the number of weights (L,) to keep, rising with t."""

    def solve(self, problem: KnapsackProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used. Status INFEASIBLE if the cheapest choice, or the rule's smallest, is too expensive."""
        if problem.cheapest > problem.room:
            return infeasible(problem)
        wanted = self.targets(problem.curves)
        low, high, best = 0.0, 1.0, self._levels(problem, wanted(0.0))
        if problem.violation(best) > 0:
            note = f"{type(self).__name__} keeps more than the budget in some layers whatever the others lose"
            return Attempt(best, None, Status.INFEASIBLE, 0, note=note)
        whole = self._levels(problem, wanted(1.0))
        if problem.violation(whole) == 0:
            return Attempt(whole, None, Status.CONVERGED, 1)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            x = self._levels(problem, wanted(middle))
            if problem.violation(x) == 0:
                low, best = middle, x
            else:
                high = middle
        return Attempt(best, None, Status.CONVERGED, HALVINGS)

    @staticmethod
    def _levels(problem: KnapsackProblem, wanted: Tensor) -> Tensor:
        """The largest level (L, 1) that keeps at most the wanted number; tied curves take the level of their first."""
        x = torch.zeros(len(problem.curves), 1, dtype=torch.float64)
        for group in problem.groups:
            curve, target = problem.curves[group[0]], float(wanted[group[0]])
            fits = curve.kept <= target + 1e-9
            level = torch.where(fits, curve.kept, -1.0).argmax() if bool(fits.any()) else curve.kept.argmin()
            x[list(group), 0] = float(level)
        return x


@dataclass(frozen=True)
class Uniform(Rule):
    """Every layer keeps the same share."""

    def targets(self, curves: Sequence[Curve]) -> Callable[[float], Tensor]:
        """The fraction t of every layer."""
        sizes = _sizes(curves)
        return lambda t: t * sizes


@dataclass(frozen=True)
class UniformPlus(Rule):
    """`Uniform` with the first layer dense and at least 20% of the last one kept (Gale, Elsen, Hooker 2019)."""

    def targets(self, curves: Sequence[Curve]) -> Callable[[float], Tensor]:
        """The fraction t of every layer except these two."""
        sizes = _sizes(curves)

        def at(t: float) -> Tensor:
            share = torch.full_like(sizes, t)
            share[-1] = max(t, LAST)
            share[0] = 1.0
            return share * sizes

        return at


@dataclass(frozen=True)
class ErdosRenyiKernel(Rule):
    """ERK: the kept share grows with (in + out + kernel sides) / (in out kernel), at most 1 (Evci et al. 2020)."""

    def targets(self, curves: Sequence[Curve]) -> Callable[[float], Tensor]:
        """All shares grow by one factor. Raises ValueError for curves without `weight`."""
        sizes = _sizes(curves)
        raw = []
        for curve in curves:
            out, width = _weight(curve).shape
            channels = width // curve.kernel
            raw.append((channels + out + 2 * math.sqrt(curve.kernel)) / (channels * out * curve.kernel))
        share = torch.tensor(raw, dtype=torch.float64)
        return lambda t: (t * share / share.min()).clamp(max=1) * sizes


@dataclass(frozen=True)
class GlobalMagnitude(Rule):
    """One threshold for the weights of all layers."""

    def targets(self, curves: Sequence[Curve]) -> Callable[[float], Tensor]:
        """Raises ValueError for curves without `weight`."""
        return _thresholded([_weight(curve).abs().flatten() for curve in curves])


@dataclass(frozen=True)
class LAMP(Rule):
    """One threshold for w^2 / sum of the squares that are no smaller in its layer (Lee et al., ICLR 2021)."""

    def targets(self, curves: Sequence[Curve]) -> Callable[[float], Tensor]:
        """Raises ValueError for curves without `weight`."""
        scores = []
        for curve in curves:
            squares = _weight(curve).square().flatten().sort(descending=True).values
            scores.append(squares / squares.cumsum(0).clamp(min=1e-300))
        return _thresholded(scores)


def _thresholded(scores: Sequence[Tensor]) -> Callable[[float], Tensor]:
    """A function from t to the number of scores of each layer among the largest fraction t of all scores."""
    ordered = [score.double().sort().values for score in scores]
    everything = torch.cat(ordered).sort().values

    def at(t: float) -> Tensor:
        count = round(t * len(everything))
        if count == 0:
            return torch.zeros(len(ordered), dtype=torch.float64)
        least = everything[len(everything) - count]
        counts = [len(score) - int(torch.searchsorted(score, least)) for score in ordered]
        return torch.tensor(counts, dtype=torch.float64)

    return at


def _sizes(curves: Sequence[Curve]) -> Tensor:
    return torch.tensor([float(curve.total or 0) for curve in curves], dtype=torch.float64)


def _weight(curve: Curve) -> Tensor:
    if curve.weight is None:
        raise ValueError(f"curve {curve.name!r} has no `weight`; this rule looks at the weights")
    return curve.weight.detach().cpu().double()
