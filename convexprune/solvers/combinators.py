"""Solvers made of solvers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares, SparseLeastSquares
from convexprune.problem import Problem, Solver
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.on_support import refitted
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class Refit:
    """Exact least squares on the support that another solver has chosen."""

    inner: Solver

    @property
    def takes(self) -> type:
        """The groups of a module together, where the inner solver takes them."""
        return getattr(self.inner, "takes", SparseLeastSquares)

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """What `inner` proposes, its weights replaced by the best on its support."""
        attempt = self.inner.solve(problem, start)
        if not bool(torch.isfinite(attempt.x).all()):
            return attempt
        mask = attempt.x.detach().cpu()[:, : problem.target.shape[1]] != 0
        try:
            weights = refitted(problem, mask)
        except NotDefinite:
            return replace(attempt, status=Status.NUMERICAL)
        return replace(attempt, x=problem.completed(weights))


@dataclass(frozen=True)
class Then:
    """A second solver that begins where the first one ended."""

    first: Solver
    second: Solver

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """The second's proposal; iterations are those of both."""
        begun = self.first.solve(problem, start)
        if begun.status in (Status.INFEASIBLE, Status.NUMERICAL):
            return begun
        ended = self.second.solve(problem, begun.x)
        witness = begun.witness if ended.witness is None else ended.witness
        return replace(ended, witness=witness, iterations=begun.iterations + ended.iterations)


@dataclass(frozen=True, init=False)
class BestOf:
    """The best proposal of several solvers: the least violation, then the least value, then the first."""

    solvers: tuple[Solver, ...]

    def __init__(self, *solvers: Solver) -> None:
        if not solvers:
            raise ValueError("BestOf needs at least one solver")
        object.__setattr__(self, "solvers", solvers)

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """Every solver from the same start; the problem says which point is best."""
        attempts = [solver.solve(problem, start) for solver in self.solvers]
        finite = [attempt for attempt in attempts if bool(torch.isfinite(attempt.x).all())] or attempts[:1]
        best = min(finite, key=lambda attempt: (problem.violation(attempt.x), problem.value(attempt.x)))
        return replace(best, iterations=sum(attempt.iterations for attempt in attempts))
