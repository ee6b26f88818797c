"""The driver: time the solver, let the problem judge what it returns."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from convexprune.problem import Problem, Solver, judge
from convexprune.solution import Attempt, Certificate, Solution, Status

if TYPE_CHECKING:
    from collections.abc import Callable

UNPROVEN: Final = "the solver claims that no point is feasible, which its witness does not prove"

_defaults: dict[type, Callable[[], Solver]] = {}


def set_default(kind: type, factory: Callable[[], Solver]) -> None:
    """Name the solver that problems of this type get when the caller names none."""
    _defaults[kind] = factory


def default_solver(problem: Problem) -> Solver:
    """The solver that `solve(problem)` uses."""
    for kind in type(problem).__mro__:
        if kind in _defaults:
            return _defaults[kind]()
    raise TypeError(f"no default solver for {type(problem).__name__}; name one: solve(problem, solver)")


def solve(problem: Problem, solver: Solver | None = None, *, start: Tensor | None = None) -> Solution:
    """Solve a problem and certify the answer: the point is judged by the problem, in float64, never by the solver.

    `start` (M, P) is a point to begin from. Without `solver` the problem's default, our best, is used.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"{type(problem).__name__} is not a problem: it lacks value, violation, lower_bound or shape")
    if start is not None and tuple(start.shape) != problem.shape:
        raise ValueError(f"start has shape {tuple(start.shape)}, expected {problem.shape}")
    solver = default_solver(problem) if solver is None else check_solver(solver)
    takes = getattr(solver, "takes", Problem)
    if not isinstance(problem, takes):
        raise TypeError(f"{type(solver).__name__} takes {takes.__name__} problems; {type(problem).__name__} is none")
    begun = time.perf_counter()
    try:
        attempt = solver.solve(problem, start)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # a matrix that should have been positive definite was not: the dense layer, and the status says why
        attempt = Attempt(problem.dense, None, Status.NUMERICAL, 0)
    seconds = time.perf_counter() - begun
    if not isinstance(attempt, Attempt) or not isinstance(attempt.x, Tensor):
        kind = f"an Attempt of a {type(attempt.x).__name__}" if isinstance(attempt, Attempt) else type(attempt).__name__
        raise TypeError(f"{type(solver).__name__} returned {kind}; return Attempt(x, witness, status, iterations)")
    x, status = attempt.x.detach().cpu().double(), attempt.status
    if tuple(x.shape) != problem.shape:
        bias = problem.shape[0], problem.shape[1] - 1
        hint = " (the last column is the bias)" if tuple(x.shape) == bias else ""
        raise ValueError(
            f"{type(solver).__name__} returned a point of shape {tuple(x.shape)}, not {problem.shape}{hint}"
        )
    if bool(torch.isfinite(x).all()):
        certificate = judge(problem, x, attempt.witness)
    else:
        status = Status.NUMERICAL
        certificate = Certificate(float("inf"), problem.lower_bound(attempt.witness), float("inf"))
    note = attempt.note
    if status is Status.INFEASIBLE and certificate.bound < math.inf:
        status, note = Status.NUMERICAL, f"{note}; {UNPROVEN}" if note else UNPROVEN
    return Solution(
        x, attempt.witness, status, certificate, seconds, attempt.iterations, repr(solver), attempt.trace, note
    )


def check_solver(solver: Solver) -> Solver:
    """The solver; raises TypeError for what is none: a name, a class."""
    if isinstance(solver, type):
        raise TypeError(f"the solver is the class {solver.__name__}; give an object of it: {solver.__name__}()")
    if not callable(getattr(solver, "solve", None)):
        raise TypeError(
            f"{solver!r} is not a solver, which has a method solve(problem, start); give one such as ADMM()"
        )
    return solver


def rejudged(solution: Solution, problem: Problem, x: Tensor) -> Solution:
    """The solution with another point, judged anew: what `prune` writes is what its certificate speaks of."""
    return replace(solution, x=x, certificate=judge(problem, x, solution.witness))
