"""Every solver on every problem that it takes: the optimum, certified."""

import functools

import pytest
from table import PAIRS, PROBLEMS, SOLVERS

from convexprune.solution import Status
from convexprune.solve import solve
from convexprune.solvers.cvxpy import CVXPY


@functools.cache
def optimum(problem):
    """Clarabel's verdict, the oracle."""
    return solve(PROBLEMS[problem](), CVXPY("CLARABEL")).certificate


@pytest.mark.parametrize(("solver", "problem"), PAIRS)
def test_agrees_with_clarabel_and_certifies_it(solver, problem):
    solution = solve(PROBLEMS[problem](), SOLVERS[solver][0]())
    certificate = solution.certificate
    assert solution.status is Status.CONVERGED
    assert certificate.value == pytest.approx(optimum(problem).value, rel=1e-6)
    assert certificate.violation <= 1e-6
    assert certificate.relative_gap <= 1e-4
    # no feasible point is below the bound, so neither is the oracle's
    assert certificate.bound <= optimum(problem).value * (1 + 1e-6)
