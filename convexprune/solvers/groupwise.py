"""A solver for the groups of a module, made of a solver for one.

Where the groups share a pattern's count, it is divided first: ADMM with a rising penalty on all groups at once, which
compete for the largest weights in coordinates where every input has second moment 1. So each count is where the last
weight of every group is worth about the same. Then each group is solved under its count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares, SharedPattern, StackedProblem, adapted, declared, taken
from convexprune.options import check_options, whole
from convexprune.problem import Problem, Solver, can_start, check_solver
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.branch_and_bound import BranchAndBound
from convexprune.solvers.least_squares.elimination import layout_of
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty
from convexprune.solvers.least_squares.scaling import Scaled


@dataclass(frozen=True)
class Groupwise:
    """Solve each group by the inner solver, or all at once if that takes them together (`GroupedLeastSquares`).

    The status is the worst of the groups' statuses, in the order of `Status`; iterations are the sum.

    Args:
        inner: Solver of one group; a time limit holds for each group.
        exact: Reconstructions of at most `exact` inputs in a group are solved to the optimum instead, all groups at
            once, by `BranchAndBound`; up to 10 inputs that takes about a millisecond for each neuron. 0: none are.

    Raises:
        ValueError: For a negative `exact`; TypeError for one that is no whole number, and for what is no solver.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> from convexprune.problems import Stacked
        >>> problem = Stacked((cp.L1Reconstruction(layer, lam=0.1), cp.L1Reconstruction(layer, lam=0.1)))
        >>> cp.solve(problem, cp.Groupwise(cp.ADMM())).x.shape
        torch.Size([4, 3])
    """

    takes: ClassVar[type] = StackedProblem

    inner: Solver
    exact: int = 0

    def __post_init__(self) -> None:
        check_solver(self.inner)
        check_options(self, exact=whole(0))

    @property
    def starts(self) -> bool:
        """Whether the inner solver can begin from a start."""
        return can_start(self.inner)

    def adapted(self, problem: StackedProblem) -> Solver:
        """The solver that takes all groups at once, if there is one; else itself, where the inner one takes each."""
        if self._small(problem):
            return adapted(BranchAndBound(max_inputs=self.exact), problem)
        if not {type(problem), *declared(problem)}.isdisjoint(taken(self.inner)):
            return adapted(self.inner, problem)
        for part in problem.parts:
            adapted(self.inner, part)
        return self

    def solve(self, problem: StackedProblem, start: Tensor | None = None) -> Attempt:
        """Propose a point; each group begins at its rows of `start` (M, P)."""
        if (whole := self.adapted(problem)) is not self:
            return whole.solve(problem, start)
        parts = _parts(problem)
        starts = [None] * len(parts) if start is None else torch.split(start, len(start) // len(parts))
        each = zip(parts, starts, strict=True)
        return _together(parts, [adapted(self.inner, part).solve(part, own) for part, own in each])

    def _small(self, problem: Any) -> bool:
        """Whether it is a reconstruction that is solved to the optimum."""
        if GroupedLeastSquares not in declared(problem) or problem.target.shape[1] > self.exact:
            return False
        return layout_of(problem).single


def _parts(problem: Any) -> tuple[Problem, ...]:
    """The groups, each with a count of its own where they share one."""
    if SharedPattern in declared(problem) and problem.spans:
        return problem.divided(_support(problem))  # type: ignore[no-any-return]
    return problem.parts  # type: ignore[no-any-return]


def _support(problem: GroupedLeastSquares) -> Tensor:
    """(M, N) bool: where ADMM over all groups settles."""
    solver = RisingPenalty()
    sparse, _, _ = solver.descend(problem, Scaled.of(problem, solver.device, solver.dtype))
    return problem.select(sparse.square())


def _together(parts: tuple[Problem, ...], attempts: list[Attempt]) -> Attempt:
    for part, attempt in zip(parts, attempts, strict=True):
        if tuple(attempt.x.shape) != part.shape:
            raise ValueError(f"the inner solver returned a point of shape {tuple(attempt.x.shape)}, not {part.shape}")
    order = list(Status)
    worst = max((attempt.status for attempt in attempts), key=order.index)
    held = sum(attempt.status is worst for attempt in attempts)
    note = next((attempt.note for attempt in attempts if attempt.status is worst), "")
    if worst is not Status.CONVERGED and held < len(attempts):
        note = f"{held} of {len(attempts)} groups" + (f": {note}" if note else "")
    witness: Any = tuple(attempt.witness for attempt in attempts)
    if all(each is None for each in witness):
        witness = None
    x = torch.cat([attempt.x.detach().cpu().double() for attempt in attempts])
    return Attempt(x, witness, worst, sum(attempt.iterations for attempt in attempts), note=note)
