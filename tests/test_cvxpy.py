"""The bridge to CVXPY: what it refuses, and how it tells why a solver stopped."""

import math
import warnings

import pytest
import torch
from instances import random_layer

from convexprune.problems import L1Reconstruction, NetTrim
from convexprune.solution import Status
from convexprune.solve import UNPROVEN, solve
from convexprune.solvers import CVXPY

SOLVERS = ["CLARABEL", "SCS", "MOREAU"]
LASSO_SOLVERS = [*SOLVERS, "OSQP", "HIGHS"]


def net_trim(**changes):
    return NetTrim(random_layer(), **{"epsilon": 0.1, **changes})


def test_repr_reads_as_it_is_written():
    assert repr(CVXPY("scs", eps_abs=1e-8, max_iter=10)) == "CVXPY('SCS', eps_abs=1e-08, max_iter=10)"
    assert CVXPY("SCS", eps_abs=1e-8) == CVXPY("scs", eps_abs=1e-8)


def test_a_solver_that_is_not_installed_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'nope' is not installed.*CLARABEL"):
        CVXPY("nope")


@pytest.mark.parametrize("solver", ["OSQP", "HIGHS"])
def test_a_cone_program_is_refused_with_the_solvers_that_take_it(solver):
    with pytest.raises(TypeError, match=rf"{solver} cannot take a NetTrim problem.*CLARABEL.*SCS"):
        solve(net_trim(), CVXPY(solver))


@pytest.mark.parametrize("solver", LASSO_SOLVERS)
def test_an_unknown_option_is_named(solver):
    with pytest.raises(ValueError, match=f"{solver} does not take granularity=3"):
        solve(L1Reconstruction(random_layer(), 0.1), CVXPY(solver, granularity=3))


@pytest.mark.parametrize("option", ["max_iter", "time_limit"])
def test_limits_are_positive(option):
    with pytest.raises(ValueError, match=f"{option} is 0"):
        CVXPY("SCS", **{option: 0})


@pytest.mark.parametrize("solver", LASSO_SOLVERS)
def test_too_few_steps_are_reported_and_judged(solver):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(L1Reconstruction(random_layer(), 0.1), CVXPY(solver, max_iter=2))
    assert solution.status is Status.MAX_ITER
    assert solution.certificate.relative_gap > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_too_little_time_is_reported(solver):
    solution = solve(net_trim(epsilon=0.05), CVXPY(solver, time_limit=1e-9))
    assert solution.status is Status.TIME_LIMIT


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
def test_the_ray_of_an_infeasible_problem_is_its_certificate(solver):
    problem = net_trim(epsilon=0.01, slack=-3.0)
    solution = solve(problem, CVXPY(solver))
    assert solution.status is Status.INFEASIBLE
    assert solution.certificate.bound == math.inf
    torch.testing.assert_close(solution.x, problem.dense)


def test_infeasibility_without_a_ray_is_a_claim():
    """Moreau recognises it, and returns no dual point to prove it."""
    solution = solve(net_trim(epsilon=0.01, slack=-3.0), CVXPY("MOREAU"))
    assert solution.status is Status.NUMERICAL
    assert solution.note == UNPROVEN


def test_points_come_back_as_the_solver_left_them():
    solution = solve(net_trim(), CVXPY("CLARABEL"))
    assert ((solution.x != 0) & (solution.x.abs() < 1e-6)).any()


def test_epsilon_zero_is_an_equality():
    problem = net_trim(epsilon=0.0)
    solution = solve(problem, CVXPY("CLARABEL"))
    assert solution.status is Status.CONVERGED
    assert solution.certificate.violation < 1e-8
    assert solution.certificate.relative_gap < 1e-6
