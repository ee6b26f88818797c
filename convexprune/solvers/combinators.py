"""Solvers made of solvers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares, SparseLeastSquares, StackedProblem, adapted, taken
from convexprune.problem import Problem, Solver, can_start, check_solver
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.on_support import refitted
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class Refit:
    """Exact least squares on the support that another solver has chosen."""

    inner: Solver

    def __post_init__(self) -> None:
        check_solver(self.inner)

    @property
    def takes(self) -> type:
        """The groups of a module together, where the inner solver takes them."""
        together = not {GroupedLeastSquares, StackedProblem}.isdisjoint(taken(self.inner))
        return GroupedLeastSquares if together else SparseLeastSquares

    @property
    def starts(self) -> bool:
        """Whether the inner solver can begin from a start."""
        return can_start(self.inner)

    def adapted(self, problem: Problem) -> Refit:
        """With the inner solver as it will run."""
        return Refit(adapted(self.inner, problem))

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """The inner solver's proposal, with its weights replaced by the best on its support."""
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
    """A second solver that begins where the first one ended.

    Raises ValueError if the second cannot begin from a start: the first one's point would be lost.
    """

    first: Solver
    second: Solver

    def __post_init__(self) -> None:
        check_solver(self.first)
        if not can_start(check_solver(self.second)):
            name = type(self.second).__name__
            raise ValueError(f"{name} cannot begin where {type(self.first).__name__} ends; put one second that can")

    @property
    def starts(self) -> bool:
        """Whether the first solver can begin from a start."""
        return can_start(self.first)

    def adapted(self, problem: Problem) -> Then:
        """With both solvers as they will run."""
        return Then(adapted(self.first, problem), adapted(self.second, problem))

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """The second's proposal; iterations are those of both."""
        begun = self.first.solve(problem, start)
        if begun.status in (Status.INFEASIBLE, Status.NUMERICAL):
            return replace(begun, note=_joined(begun.note, f"{type(self.second).__name__} did not run"))
        ended = self.second.solve(problem, begun.x)
        witness = begun.witness if ended.witness is None else ended.witness
        iterations, note = begun.iterations + ended.iterations, _joined(begun.note, ended.note)
        return replace(ended, witness=witness, iterations=iterations, note=note)


@dataclass(frozen=True, init=False)
class BestOf:
    """The best proposal of several solvers: the least violation, then the least value, then the first."""

    solvers: tuple[Solver, ...]

    def __init__(self, *solvers: Solver) -> None:
        if not solvers:
            raise ValueError("BestOf needs at least one solver")
        object.__setattr__(self, "solvers", tuple(check_solver(solver) for solver in solvers))

    @property
    def starts(self) -> bool:
        """Whether any of the solvers can begin from a start."""
        return any(can_start(solver) for solver in self.solvers)

    def adapted(self, problem: Problem) -> BestOf:
        """With all solvers as they will run."""
        return BestOf(*(adapted(solver, problem) for solver in self.solvers))

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """Every solver, from the start where it can begin from one; the problem says which point is best."""
        attempts = [solver.solve(problem, start if can_start(solver) else None) for solver in self.solvers]
        finite = [i for i, attempt in enumerate(attempts) if bool(torch.isfinite(attempt.x).all())] or [0]
        won = min(finite, key=lambda i: (problem.violation(attempts[i].x), problem.value(attempts[i].x)))
        note = _joined(attempts[won].note, f"the point is that of {type(self.solvers[won]).__name__}")
        return replace(attempts[won], iterations=sum(attempt.iterations for attempt in attempts), note=note)


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
