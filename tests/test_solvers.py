"""Every solver on every problem that it takes: the optimum, certified."""

import functools
import math

import pytest
import torch
from instances import random_layer
from table import PAIRS, PROBLEMS, SOLVERS

from convexprune.layer import Layer
from convexprune.problem import judge
from convexprune.problems import L1Reconstruction, NetTrim
from convexprune.solution import Status
from convexprune.solve import solve
from convexprune.solvers import ADMM, WorkingSet
from convexprune.solvers.cvxpy import CVXPY


@functools.cache
def optimum(problem):
    """Clarabel's verdict, the oracle."""
    return solve(PROBLEMS[problem](), CVXPY("CLARABEL")).certificate


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 1e-7])
def test_a_ball_without_an_interior_is_solved_to_the_tolerance(seed, epsilon):
    """Outputs that must be met exactly, from inputs that are nearly dependent."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = (draw(150, 8) @ draw(8, 40) + 0.1 * draw(150, 40)).relu()
    problem = NetTrim(Layer.from_samples(draw(3, 40) * (torch.rand(3, 40, generator=generator) < 0.1), x), epsilon)
    solution, oracle = solve(problem), solve(problem, CVXPY("CLARABEL")).certificate
    assert solution.status is Status.CONVERGED
    assert solution.certificate.violation <= 1e-6
    assert solution.certificate.value == pytest.approx(oracle.value, rel=1e-4)


@pytest.mark.parametrize("seed", [458, 482, 515])
def test_the_finish_gets_over_neurons_that_their_rows_pin(seed):
    """458, 515: a neuron alone cannot fill its share of the ball; 482: the first columns cannot meet the rows."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight, _, _, bias = draw(8, 5), draw(7, 8), draw(4, 7), draw(8)
    draw(7), draw(4)
    problem = NetTrim(Layer.from_samples(weight, draw(40, 5), bias), 0.2)
    solution = solve(problem)
    assert solution.status is Status.CONVERGED
    assert solution.iterations <= 200  # without it the first-order steps had to go on, to 5,000


@pytest.mark.parametrize("finish", [None, WorkingSet()])
@pytest.mark.parametrize("seed", range(20))
def test_what_is_called_converged_meets_the_rule(seed, finish):
    problem = NetTrim(random_layer(seed, out=8), 0.2)
    solution = solve(problem, ADMM(eps_abs=1e-6, eps_rel=1e-5, max_iter=1000, finish=finish))
    certificate = solution.certificate
    met = certificate.violation <= 1e-6 and certificate.relative_gap <= 1e-5
    assert met == (solution.status is Status.CONVERGED)


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


@pytest.mark.parametrize("state", [lambda layer: L1Reconstruction(layer, 1e6), lambda layer: NetTrim(layer, 2.0)])
def test_a_working_set_that_begins_empty_may_be_the_answer(state):
    generator = torch.Generator().manual_seed(0)
    problem = state(Layer.from_samples(torch.randn(3, 4, generator=generator), torch.randn(9, 4, generator=generator)))
    found = WorkingSet().refine(problem, torch.zeros(problem.shape).double(), torch.zeros(9, 3).double(), math.inf)
    assert found.status is Status.CONVERGED
    assert not found.x.any()


@pytest.mark.parametrize("seed", range(3))
def test_a_larger_gap_stops_earlier_at_a_sparse_and_feasible_point(seed):
    """`eps_rel` is the gap that is left: the point is inside, as stored in float32 too, and has no weights of dust."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    problem = NetTrim(Layer.from_samples(draw(12, 30), (draw(300, 30) @ draw(30, 30)).relu(), draw(12)), 0.1)
    finest, steps = solve(problem, ADMM(eps_rel=1e-7, finish=WorkingSet(margin=1e-8))), []
    for gap in (1e-2, 1e-3, 1e-4, 1e-5):
        found = solve(problem, ADMM(eps_rel=gap))
        stored = judge(problem, found.x.float(), found.witness)
        assert found.status is Status.CONVERGED
        assert found.certificate.violation == stored.violation == 0
        assert finest.certificate.bound <= found.certificate.value <= finest.certificate.value * (1 + gap)
        assert 0 <= stored.relative_gap <= gap
        assert int((found.x != 0).sum()) <= 1.1 * int((finest.x != 0).sum())
        steps.append(solve(problem, WorkingSet(eps_rel=gap)).iterations)
    assert steps[0] < steps[-1]
