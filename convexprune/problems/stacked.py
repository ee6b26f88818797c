"""The groups of a module as one problem: the sum of their objectives, a point the groups' points one below the other.

    minimise  sum_g f_g(x_g)   over x_g feasible for g = 1, ..., G

The groups of a convolution meet only in a pattern: a count of weights is the module's, and the groups compete for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeGuard

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import SharedPattern, SparseLeastSquares, StackedProblem, declared, undeclared
from convexprune.patterns import Pattern, counted, excess, joined, select, spans
from convexprune.problem import Formulation, LayerProblem
from convexprune.problems.reconstruction import Minorant, Reconstruction, mixed_integer, strongest
from convexprune.rounding import down, raised, total, total_doubt, up


def stacked(problems: Sequence[LayerProblem]) -> LayerProblem:
    """The problems of a module's groups as one; the problem itself where there is only one.

    Reconstructions under one pattern share its budget: `Unstructured(0.3)` is 30% of the module, rounded once, and
    counts add up to the module's. Where the patterns differ, as for any other problem, each group is by itself.

    Raises ValueError for no problems, and for problems of different kinds or shapes.
    """
    if len(problems) == 1:
        return problems[0]
    parts = tuple(problem for problem in problems if _is_reconstruction(problem))
    if parts and len(parts) == len(problems) and joined([part.pattern for part in parts]) is not None:
        return StackedReconstruction(parts)
    return Stacked(tuple(problems))


@dataclass(frozen=True, eq=False)
class Stacked(StackedProblem):
    """Problems over the layers of a module's groups, each by itself.

    parts  of one kind and shape (M, P)

    A witness is None, or a tuple with a witness or None for each part. Raises ValueError for no parts, and for parts of
    different kinds or shapes.
    """

    parts: tuple[Any, ...] = field(repr=False)

    def __post_init__(self) -> None:
        kinds = {(type(part).__name__, tuple(part.shape)) for part in self.parts}
        if not self.parts:
            raise ValueError("no problems; give one for each group of the module")
        if len(kinds) > 1:
            found = ", ".join(f"{name} {shape}" for name, shape in sorted(kinds))
            raise ValueError(
                f"the groups of a module state different problems: {found}; `build` must state one kind for all of them"
            )

    @property
    def needs_samples(self) -> bool:
        """Whether a part reads Layer.inputs."""
        return any(getattr(part, "needs_samples", True) for part in self.parts)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, P): the rows of all parts."""
        rows, width = self.parts[0].shape
        return rows * len(self.parts), width

    @cached_property
    def dense(self) -> Tensor:
        """(M, P): the parts' dense layers."""
        return torch.cat([part.dense for part in self.parts])

    def rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """The point of each part, out of one of the module."""
        return torch.split(x, len(x) // len(self.parts))

    def value(self, x: Tensor) -> float:
        """The sum of the parts' values."""
        return _total(part.value(own) for part, own in zip(self.parts, self.rows(x), strict=True))

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        pairs = [(part.value(own), part.rounding(own)) for part, own in zip(self.parts, self.rows(x), strict=True)]
        values, doubts = torch.tensor(pairs, dtype=torch.float64).T
        return up(float(raised(doubts.sum(), len(doubts))), total_doubt(values))

    def violation(self, x: Tensor) -> float:
        """The largest of the parts' violations."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        return max(float(part.violation(own)) for part, own in zip(self.parts, self.rows(x), strict=True))

    def output_errors(self, x: Tensor) -> Tensor:
        """(M,): the parts' output errors."""
        return torch.cat([part.output_errors(own) for part, own in zip(self.parts, self.rows(x), strict=True)])

    def lower_bound(self, witness: tuple[Any, ...] | None) -> float:
        """The sum of the parts' bounds, each at its own witness; rounded down."""
        each = self.witnesses(witness)
        return _least(part.lower_bound(own) for part, own in zip(self.parts, each, strict=True))

    def witnesses(self, witness: tuple[Any, ...] | None) -> tuple[Any, ...]:
        """A witness or None for each part. Raises ValueError for anything but None or a tuple of so many."""
        if witness is None:
            return (None,) * len(self.parts)
        if not isinstance(witness, tuple) or len(witness) != len(self.parts):
            given = f"{len(witness)} of them" if isinstance(witness, tuple) else type(witness).__name__
            raise ValueError(f"witness is {given}; give a tuple of {len(self.parts)}, one for each group, or None")
        return witness

    def to_cvxpy(self) -> Formulation:
        """The parts' programs side by side; x is an expression of their variables."""
        with extras():
            import cvxpy as cp

        each = [part.to_cvxpy() for part in self.parts]
        program = sum((formulation.problem for formulation in each[1:]), each[0].problem)
        x = cp.vstack([formulation.x for formulation in each])
        return Formulation(program, x, lambda: tuple(formulation.witness() for formulation in each))


@dataclass(frozen=True, eq=False)
class StackedReconstruction(Stacked, SharedPattern):
    """Reconstructions of a module's groups under one pattern over all their weights.

        minimise  sum_g  tr(V_g G_g V_g^T) - 2 <C_g, V_g> + energy_g   over V = (V_1; ...; V_G) in the pattern

    A witness is None, or a tuple with v, (v, d) or None for each part, as of `Reconstruction`.

    Raises ValueError where the parts have no pattern in common, TypeError where one is no reconstruction or, as a
    subclass, may minimise something else, and as `Stacked`.
    """

    parts: tuple[Reconstruction, ...] = field(repr=False)
    pattern: Pattern = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.parts:
            if not _is_reconstruction(part):
                why = undeclared(part, SparseLeastSquares)
                raise TypeError(f"StackedReconstruction is made of Reconstruction problems; {why}")
        pattern = joined([part.pattern for part in self.parts])
        if pattern is None:
            raise ValueError("the groups have different patterns, which no pattern of the module says; see `stacked`")
        object.__setattr__(self, "pattern", pattern)

    @cached_property
    def target(self) -> Tensor:
        """(M, N): the parts' targets."""
        return torch.cat([part.target for part in self.parts])

    @property
    def kernel(self) -> int:
        """The number of kernel positions behind each input channel; 1 if linear."""
        return self.parts[0].kernel

    @cached_property
    def always(self) -> Tensor | None:
        """(M, N) bool: weights that must stay in the support."""
        if all(part.always is None for part in self.parts):
            return None
        free = torch.zeros(self.parts[0].target.shape, dtype=torch.bool)
        return torch.cat([free if part.always is None else part.always for part in self.parts])

    @property
    def spans(self) -> bool:
        """Whether the parts compete for one count."""
        return spans(self.pattern)

    def select(self, scores: Tensor, grow: float = 1.0) -> Tensor:
        """(M, N) bool: the support in the pattern with the largest sum of scores (M, N) >= 0; see `patterns.select`."""
        return select(self.pattern, scores, self.kernel, self.always, grow)

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: W for V (M, N), with the best bias as the last column, if the layers have one."""
        return torch.cat([part.completed(own) for part, own in zip(self.parts, self.rows(weight), strict=True)])

    def divided(self, mask: Tensor) -> tuple[Reconstruction, ...]:
        """The parts, each under the pattern with the count that a support (M, N) bool of the module gives it."""
        return tuple(
            replace(part, pattern=counted(self.pattern, own, self.kernel))
            for part, own in zip(self.parts, self.rows(mask), strict=True)
        )

    def violation(self, x: Tensor) -> float:
        """Weights (or blocks) kept beyond the pattern, as a fraction of the module's weights."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        mask = x.detach().cpu()[:, : self.target.shape[1]] != 0
        return excess(self.pattern, mask, self.kernel) / mask.numel()

    def lower_bound(self, witness: tuple[Any, ...] | None) -> float:
        """The perspective bound: the parts' constants, less the largest sum of all their scores in the pattern.

            value >= sum_g constant_g - sum_{i in S} score_i      for W with support S; see `Reconstruction`

        A part for which this is below 0 is taken at 0, without scores. At least 0.
        """
        return self._unaided if witness is None else self._bounded(self.witnesses(witness))

    @cached_property
    def _unaided(self) -> float:
        """The bound without a witness, whichever point is judged."""
        return self._bounded(self.witnesses(None))

    def _bounded(self, witness: tuple[Any, ...]) -> float:
        each = [part.minorants(own) for part, own in zip(self.parts, witness, strict=True)]
        tried = max(map(len, each))
        return max(self._joint([found[min(turn, len(found) - 1)] for found in each]) for turn in range(tried))

    def to_cvxpy(self) -> Formulation:
        """The mixed-integer quadratic program of `Reconstruction`, over all parts."""
        return mixed_integer(self.parts, self.pattern, self.always)

    def _joint(self, minorants: Sequence[Minorant]) -> float:
        constants = torch.tensor([constant for constant, _ in minorants], dtype=torch.float64)
        scores = torch.cat([own for _, own in minorants])
        gains = torch.where(self.select(scores), scores, 0.0).reshape(len(constants), -1).sum(1)
        useful = constants >= gains
        fewer = torch.where(useful, constants, 0.0)
        less = torch.where(useful.repeat_interleave(len(scores) // len(useful))[:, None], scores, 0.0)
        return strongest([(_least(constants.tolist()), scores), (_least(fewer.tolist()), less)], self)


def _is_reconstruction(problem: Any) -> TypeGuard[Reconstruction]:
    """Whether it minimises what `Reconstruction` does: a subclass says so by naming the form."""
    return isinstance(problem, Reconstruction) and SparseLeastSquares in declared(problem)


def _total(values: Iterable[float]) -> float:
    """The sum, to the nearest: infinities are no errors."""
    return total(torch.tensor(list(values), dtype=torch.float64))


def _least(values: Iterable[float]) -> float:
    """The sum, rounded down."""
    each = torch.tensor(list(values), dtype=torch.float64)
    found, doubt = total(each), total_doubt(each)
    return down(found, doubt) if 0 < doubt < math.inf else found
