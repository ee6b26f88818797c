"""The bridge to the solvers behind CVXPY: Clarabel, SCS, OSQP, HiGHS, Moreau and whatever else is installed."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

from convexprune.extras import extras
from convexprune.options import positive, text, whole
from convexprune.problem import Problem
from convexprune.solution import Attempt, Status

if TYPE_CHECKING:
    import cvxpy as cp
    from torch import Tensor

# the solvers' own names of the two limits, if not max_iter and time_limit; HiGHS has one for each of its algorithms
LIMIT_NAMES: Final = {
    ("SCS", "max_iter"): ("max_iters",),
    ("SCS", "time_limit"): ("time_limit_secs",),
    ("HIGHS", "max_iter"): ("simplex_iteration_limit", "ipm_iteration_limit", "qp_iteration_limit"),
}
LIMITS: Final = {"max_iter": whole(1), "time_limit": positive}  # leave one out for no limit
# CVXPY's "inaccurate" means out of steps or time for a first-order method, and a stall for the others
FIRST_ORDER: Final = ("SCS", "OSQP")


@dataclass(frozen=True, init=False, repr=False)
class CVXPY:
    """A solver behind CVXPY, by its CVXPY name: CVXPY("CLARABEL"), CVXPY("SCS", eps_abs=1e-8).

    Points come back as the solver left them: an entry that should be zero may be 1e-9. It cannot begin from a start.

    Args:
        solver: CVXPY's name of the solver, in any case.
        options: `max_iter` and `time_limit` (seconds) are translated to the solver's own names, `verbose` is CVXPY's;
            every other option goes to the solver unchanged.

    Raises:
        ValueError: For a solver that is not installed, a limit out of its range, and an option that the solver does
            not know.
        TypeError: For a problem that the solver cannot take, and a name or limit of another type.
        ModuleNotFoundError: Without CVXPY.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.L1Reconstruction(layer, lam=0.1), cp.CVXPY("CLARABEL"))
        >>> solution.status.name, round(solution.certificate.value, 3)
        ('CONVERGED', 1.425)
    """

    takes: ClassVar[type] = Problem
    starts: ClassVar[bool] = False

    solver: str
    options: tuple[tuple[str, Any], ...]

    def __init__(self, solver: str, **options: Any) -> None:
        text("solver", solver)
        for name, check in LIMITS.items():
            if name in options:
                check(name, options[name])
        installed = _installed()
        if solver.upper() not in installed:
            raise ValueError(f"solver {solver!r} is not installed; CVXPY finds {', '.join(installed)}")
        object.__setattr__(self, "solver", solver.upper())
        object.__setattr__(self, "options", tuple(options.items()))

    def __repr__(self) -> str:
        """As it is written: CVXPY('SCS', eps_abs=1e-08)."""
        return f"CVXPY({', '.join([repr(self.solver), *(f'{key}={value!r}' for key, value in self.options)])})"

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """Write the problem in CVXPY and hand it over; a point that the solver does not have comes back as NaN."""
        formulation = problem.to_cvxpy()
        program = formulation.problem
        self._refuse_if_unfit(program, type(problem).__name__)
        begun = time.perf_counter()
        self._run(program)
        seconds = time.perf_counter() - begun
        stats = program.solver_stats
        iterations = int(stats.num_iters or 0) if stats is not None else 0
        status = self._status(program.status, iterations, seconds)
        if status is Status.INFEASIBLE:
            return Attempt(problem.dense, formulation.witness(), status, iterations)
        if formulation.x.value is None:
            return Attempt(torch.full(problem.shape, float("nan"), dtype=torch.float64), None, status, iterations)
        x = torch.from_numpy(formulation.x.value).reshape(problem.shape)
        return Attempt(x, formulation.witness(), status, iterations)

    def _run(self, program: cp.Problem) -> None:
        """Solve; the program's status says what went wrong. Raises ValueError for an option that the solver lacks."""
        with extras():
            import cvxpy as cp

        options = {name: value for key, value in self.options for name in LIMIT_NAMES.get((self.solver, key), (key,))}
        try:
            with warnings.catch_warnings():
                # CVXPY's "may be inaccurate": the status says it, and the certificate by how much
                warnings.filterwarnings("ignore", message="Solution may be inaccurate", category=UserWarning)
                program.solve(solver=self.solver, **options)
        except (TypeError, ValueError, cp.SolverError) as error:
            for name in options:
                if name in str(error):
                    raise ValueError(f"{self.solver} does not take {name}={options[name]!r}: {error}") from error
            if not isinstance(error, cp.SolverError):
                raise

    def _status(self, status: str | None, iterations: int, seconds: float) -> Status:
        """CVXPY's status in our words; it does not say which limit was met, so that is worked out."""
        options = dict(self.options)
        full = iterations >= options.get("max_iter", float("inf"))
        late = seconds >= options.get("time_limit", float("inf")) and not full
        if status == "optimal":
            return Status.CONVERGED
        if status == "infeasible":
            return Status.INFEASIBLE
        if status == "user_limit" or (status == "optimal_inaccurate" and (full or self.solver in FIRST_ORDER)):
            return Status.TIME_LIMIT if late else Status.MAX_ITER
        return Status.NUMERICAL

    def _refuse_if_unfit(self, program: cp.Problem, name: str) -> None:
        if _takes(self.solver, program):
            return
        able = [other for other in _installed() if _takes(other, program)]
        if not able:
            kind = "a mixed-integer quadratic program" if program.is_mixed_integer() else "of its kind"
            raise TypeError(
                f"{self.solver} cannot take a {name} problem, which is {kind}, and no installed solver can; "
                "install one that does (SCIP, GUROBI, ...), or use the solvers of this package"
            )
        raise TypeError(f"{self.solver} cannot take a {name} problem; these installed solvers can: {', '.join(able)}")


def _installed() -> list[str]:
    with extras():
        import cvxpy as cp

    return list(cp.installed_solvers())


def _takes(solver: str, program: cp.Problem) -> bool:
    """Whether CVXPY finds a chain of reductions from the program to the solver; nothing is compiled for it."""
    with extras():
        import cvxpy as cp

    try:
        program._construct_chain(solver=solver)
    except cp.SolverError:
        return False
    return True
