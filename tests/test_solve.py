"""The driver trusts no solver: whatever one claims, the problem's own verdict is what comes back."""

import dataclasses
import math

import pytest
import torch
from instances import random_layer

from convexprune.problems import L1Reconstruction, NetTrim
from convexprune.solution import Attempt, Status
from convexprune.solve import default_solver, rejudged, solve
from convexprune.solvers import CVXPY


@dataclasses.dataclass(frozen=True, eq=False)
class Liar:
    """Claims to have converged, whatever it returns."""

    x: torch.Tensor
    witness: object = None

    def solve(self, problem, start=None):
        return Attempt(self.x, self.witness, Status.CONVERGED, 1)


@pytest.fixture(scope="module")
def problem():
    return NetTrim(random_layer(), epsilon=0.1)


@pytest.fixture(scope="module")
def optimum(problem):
    return solve(problem, CVXPY("CLARABEL"))


def test_an_infeasible_point_is_caught(problem):
    solution = solve(problem, Liar(torch.zeros(problem.shape)))
    assert solution.status is Status.CONVERGED  # what the solver says of itself
    assert solution.certificate.violation == pytest.approx(0.9)
    assert solution.certificate.value == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_point_is_caught(problem, value):
    x = problem.dense.clone()
    x[0, 0] = value
    solution = solve(problem, Liar(x))
    assert solution.status is Status.NUMERICAL
    assert solution.certificate.violation == math.inf


def test_a_point_of_another_shape_is_refused(problem):
    with pytest.raises(ValueError, match=r"the point that Liar returned has shape \(2, 2\)"):
        solve(problem, Liar(torch.zeros(2, 2)))


@pytest.mark.parametrize("scale", [-1e12, -1.0, 1e-12, 1.0, 1e12, math.nan])
def test_a_garbage_witness_cannot_make_the_bound_false(problem, optimum, scale):
    witness = scale * torch.randn(problem.outputs.shape, generator=torch.Generator().manual_seed(0))
    solution = solve(problem, Liar(problem.dense, witness))
    assert 0 <= solution.certificate.bound <= optimum.certificate.value * (1 + 1e-7)


def test_a_witness_of_another_shape_is_refused(problem):
    with pytest.raises(ValueError, match="witness has shape"):
        solve(problem, Liar(problem.dense, torch.zeros(1, 1)))


def test_a_low_precision_point_is_judged_in_float64_as_it_is(problem, optimum):
    rounded = optimum.x.half()
    solution = solve(problem, Liar(rounded))
    assert solution.x.dtype is torch.float64
    assert solution.certificate.value == problem.value(rounded.double())
    assert solution.certificate.violation == problem.violation(rounded.double())


def test_rejudged_speaks_of_the_new_point(problem, optimum):
    stored = optimum.x.bfloat16().double()
    again = rejudged(optimum, problem, stored)
    assert again.certificate.violation == problem.violation(stored)
    assert again.certificate.violation > optimum.certificate.violation
    assert again.certificate.bound == optimum.certificate.bound


def test_a_solution_records_what_was_asked(problem):
    solution = solve(problem, CVXPY("SCS", max_iter=5))
    assert solution.solver == "CVXPY('SCS', max_iter=5)"
    assert solution.iterations == 5
    assert solution.seconds > 0


def test_every_problem_has_a_default_solver(problem):
    import convexprune.defaults  # noqa: F401

    for each in (problem, L1Reconstruction(random_layer(), 0.1)):
        assert callable(default_solver(each).solve)


def test_wrong_calls_are_refused(problem):
    with pytest.raises(TypeError, match="not a problem"):
        solve(random_layer(), Liar(torch.zeros(1)))
    with pytest.raises(ValueError, match="start has shape"):
        solve(problem, Liar(problem.dense), start=torch.zeros(1, 1))
    with pytest.raises(TypeError, match="no default solver"):
        default_solver(object())


class Returns:
    """A solver that returns what it is told to."""

    def __init__(self, found):
        self.found = found

    def solve(self, problem, start=None):
        return self.found


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        ("admm", "'admm' is not a solver"),
        (CVXPY, r"the solver is the class CVXPY; give an object of it: CVXPY\(\)"),
        (Returns(None), "Returns returned NoneType; return Attempt"),
        (Returns(torch.zeros(2, 2)), "Returns returned Tensor"),
        (Returns(Attempt([1.0], None, Status.CONVERGED, 1)), "Returns returned an Attempt of a list"),
    ],
)
def test_what_is_no_solver_is_named(problem, solver, message):
    with pytest.raises(TypeError, match=message):
        solve(problem, solver)


def test_a_point_without_its_bias_is_told_where_it_goes():
    problem = NetTrim(random_layer(bias=True), epsilon=0.1)
    with pytest.raises(ValueError, match="the last column is the bias"):
        solve(problem, Liar(problem.dense[:, :-1]))
