"""The driver: time the solver, let the problem judge what it returns."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from convexprune.forms import LassoProblem, adapted, declared, undeclared
from convexprune.problem import Problem, Solver, can_start, check_point, check_problem, judge
from convexprune.solution import Attempt, Solution, Status, TracePoint

if TYPE_CHECKING:
    from collections.abc import Callable

UNPROVEN: Final = "the solver claims that no point is feasible, which its witness does not prove"

_defaults: dict[type, Callable[[], Solver]] = {}


def set_default(kind: type, factory: Callable[[], Solver]) -> None:
    """Set the default solver of a form, or of exactly one class of problems."""
    _defaults[kind] = factory


def default_solver(problem: Problem) -> Solver:
    """The solver that `solve(problem)` uses: that of the problem's own class, else that of the form it declares."""
    for kind in (type(problem), *declared(problem)):
        if kind in _defaults:
            return _defaults[kind]()
    why = undeclared(problem, LassoProblem)
    raise TypeError(f"no default solver for {type(problem).__name__}: name one, solve(problem, solver). {why}")


def solve(problem: Problem, solver: Solver | None = None, *, start: Tensor | None = None) -> Solution:
    """Solve a problem and certify the answer: the problem judges the point in float64, never the solver.

    Args:
        problem: The problem, such as `NetTrim(layer, epsilon=0.05)`.
        solver: The solver; None takes the problem's default.
        start: A point (M, P) to begin from.

    Returns:
        The point with its certificate, the solver's status, and the seconds and iterations that it took.

    Raises:
        TypeError: For what is no problem, no solver or no tensor, and for a problem that the solver does not take.
        ValueError: For a start that does not fit, and for a solver that cannot begin from one.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.Reconstruction(layer, cp.Unstructured(3)))
        >>> solution.x.round(decimals=3).tolist()
        [[5.0, 0.0, 0.0], [0.0, -4.0, 3.0]]
        >>> solution.status.name, round(solution.certificate.value, 3), solution.certificate.violation
        ('CONVERGED', 1.667, 0.0)
    """
    return proposed(problem, solver, start=start).certified(problem)


@dataclass(frozen=True, eq=False)
class Proposal:
    """What a solver proposed and how long it took, before the problem has judged it.

    x       (M, P), float64 on the CPU
    status  NUMERICAL where the point is not finite
    """

    x: Tensor
    witness: Any
    status: Status
    seconds: float
    iterations: int
    solver: str
    trace: tuple[TracePoint, ...] = ()
    note: str = ""

    def certified(self, problem: Problem) -> Solution:
        """With the problem's verdict, which also says whether no point is feasible."""
        certificate, status, note = judge(problem, self.x, self.witness), self.status, self.note
        if status is Status.INFEASIBLE and certificate.bound < math.inf:
            status, note = Status.NUMERICAL, f"{note}; {UNPROVEN}" if note else UNPROVEN
        return Solution(
            self.x, self.witness, status, certificate, self.seconds, self.iterations, self.solver, self.trace, note
        )


def proposed(problem: Problem, solver: Solver | None = None, *, start: Tensor | None = None) -> Proposal:
    """Run the solver, without a certificate; arguments and errors as of `solve`."""
    check_problem(problem)
    shape = (problem.shape[0], problem.shape[1])
    solver = adapted(default_solver(problem) if solver is None else solver, problem)
    if start is not None:
        _check_start(start, shape, solver)
    begun = time.perf_counter()
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # of the caller's
            attempt = solver.solve(problem, start)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        # a matrix that should be positive definite is not: return the dense layer with status NUMERICAL
        attempt = Attempt(problem.dense, None, Status.NUMERICAL, 0)
    seconds = time.perf_counter() - begun
    if not isinstance(attempt, Attempt) or not isinstance(attempt.x, Tensor):
        kind = f"an Attempt of a {type(attempt.x).__name__}" if isinstance(attempt, Attempt) else type(attempt).__name__
        raise TypeError(f"{type(solver).__name__} returned {kind}; return Attempt(x, witness, status, iterations)")
    check_point(f"the point that {type(solver).__name__} returned", attempt.x, shape)
    x = attempt.x.detach().cpu().double()
    status = attempt.status if bool(torch.isfinite(x).all()) else Status.NUMERICAL
    return Proposal(x, attempt.witness, status, seconds, attempt.iterations, repr(solver), attempt.trace, attempt.note)


def rejudged(solution: Solution, problem: Problem, x: Tensor) -> Solution:
    """The solution with another point, judged anew, so that its certificate is that of the point `prune` writes."""
    return replace(solution, x=x, certificate=judge(problem, x, solution.witness))


def _check_start(start: Any, shape: tuple[int, int], solver: Solver) -> None:
    check_point("start", start, shape)
    if not bool(torch.isfinite(start).all()):
        raise ValueError("start holds NaN or inf; give a point of finite numbers")
    if not can_start(solver):
        raise ValueError(
            f"{type(solver).__name__} cannot begin from a start; leave `start` out, or name a solver that can: "
            "ADMM or WorkingSet for a convex problem, SwapSearch for a reconstruction, Exchange for a merging"
        )
