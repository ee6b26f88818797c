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

from convexprune.forms import GroupedLeastSquares, SharedPattern, StackedProblem
from convexprune.problem import Problem, Solver
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.branch_and_bound import BranchAndBound
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty
from convexprune.solvers.least_squares.scaling import Scaled


@dataclass(frozen=True)
class Groupwise:
    """Each group by the inner solver, or all at once by one that takes them together (`GroupedLeastSquares`).

    inner  for one group; a time limit is each group's
    exact  a reconstruction with at most so many inputs in a group is solved to the optimum instead, all groups at once,
           by `BranchAndBound`: up to 10 it takes about a millisecond a neuron. 0: none is

    The status is the worst of the groups', in the order of `Status`; iterations are the sum.

    Raises ValueError for a negative `exact`.
    """

    takes: ClassVar[type] = StackedProblem

    inner: Solver
    exact: int = 0

    def __post_init__(self) -> None:
        if self.exact < 0:
            raise ValueError(f"exact is {self.exact}; it must be a number of inputs >= 0")

    def solve(self, problem: StackedProblem, start: Tensor | None = None) -> Attempt:
        """Propose a point; each group begins at its rows of `start` (M, P)."""
        whole = self._whole(problem)
        if whole is not None:
            return whole.solve(problem, start)
        parts = problem.parts
        if isinstance(problem, SharedPattern) and problem.spans:
            parts = problem.divided(_support(problem))
        starts = [None] * len(parts) if start is None else torch.split(start, len(start) // len(parts))
        return _together(parts, [self.inner.solve(part, own) for part, own in zip(parts, starts, strict=True)])

    def _whole(self, problem: StackedProblem) -> Solver | None:
        """The solver that takes all groups at once, if there is one."""
        if isinstance(problem, GroupedLeastSquares) and problem.target.shape[1] <= self.exact:
            cells = problem.pattern.folded(torch.zeros_like(problem.target), problem.kernel)
            if cells.numel() == problem.target.numel():  # no blocks
                return BranchAndBound(max_inputs=self.exact)
        takes = getattr(self.inner, "takes", None)
        return self.inner if takes is not None and isinstance(problem, takes) else None


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
