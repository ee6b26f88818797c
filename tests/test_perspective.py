"""The bound of a reconstruction: valid for any witness, tight where it can be, better with a better witness."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import random_layer
from table import LAYERS, PATTERNS, reconstruction

from convexprune.layer import Layer
from convexprune.patterns import Blocks, PerRow, Unstructured
from convexprune.problems import Reconstruction
from convexprune.solution import Status
from convexprune.solve import solve
from convexprune.solvers import Bounded, BranchAndBound, ColumnSweep, Fast, Magnitude, Refit
from convexprune.solvers.least_squares.on_support import best_on_support
from convexprune.solvers.least_squares.perspective import centred

SEEDS = st.integers(0, 2**32 - 1)
LAW = settings(max_examples=15)


def normal(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@functools.cache
def optimum(layer, pattern):
    problem = reconstruction(layer, pattern)
    return problem, solve(problem, BranchAndBound()).certificate.value


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layer", LAYERS)
@LAW
@given(seed=SEEDS, log_scale=st.floats(-3, 3), log_diagonal=st.floats(-3, 3))
def test_the_optimum_is_not_below_the_bound_of_any_witness(layer, pattern, seed, log_scale, log_diagonal):
    problem, least = optimum(layer, pattern)
    noise, d = normal(seed, problem.target.shape), 10**log_diagonal * normal(seed + 1, (8,)).abs()
    for v in (10**log_scale * noise, problem.target + 10 ** (log_scale - 3) * noise):
        for witness in (v, (v, d), (v, d * problem.gram.diagonal())):
            assert 0 <= problem.lower_bound(witness) <= least + 1e-12 * problem.layer.energy


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layer", LAYERS)
@LAW
@given(seed=SEEDS, log_scale=st.floats(-8, 0))
def test_nor_of_a_witness_near_the_best(layer, pattern, seed, log_scale):
    """Perturbed and scaled near-optimal witnesses are where an invalid bound would show."""
    problem, (v, d) = bounded(layer, pattern)
    mask = problem.select(normal(seed + 1, problem.target.shape).square())
    points = [best_on_support(problem.gram, problem.cross, mask, problem.target)]
    least = problem.value(problem.completed(points[0]))
    least = min(least, optimum(layer, pattern)[1])
    for scale in (0.9, 1.0, 1.1):
        moved = v + 10**log_scale * v.abs().max() * normal(seed, v.shape)
        assert problem.lower_bound((moved, scale * d)) <= least + 1e-12 * problem.layer.energy


@functools.cache
def bounded(layer, pattern):
    problem = reconstruction(layer, pattern)
    witness = solve(problem, Bounded(Magnitude())).witness
    return problem, witness if isinstance(witness, tuple) else (problem.target, problem.diagonal)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layer", ["plain", "bias", "cascade"])
def test_a_better_witness_gives_a_better_bound_and_leaves_the_point_alone(layer, pattern):
    problem = reconstruction(layer, pattern)
    plain, better = solve(problem, Refit(Magnitude())), solve(problem, Bounded(Refit(Magnitude())))
    torch.testing.assert_close(plain.x, better.x)
    if pattern != "support" and better.certificate.bound > 0:
        assert plain.certificate.bound < better.certificate.bound


def test_the_relaxation_comes_close_to_the_optimum():
    """Well-conditioned inputs: there the gap that is left is small, and it is the relaxation's own."""
    problem = Reconstruction(random_layer(50, samples=4000, inputs=12, out=6, bias=False), Unstructured(0.4))
    assert solve(problem, Bounded(Fast())).certificate.bound > 0.97 * solve(problem, BranchAndBound()).certificate.value


def test_the_bound_is_tight_for_orthogonal_inputs():
    layer = Layer.from_moments(normal(0, (3, 6)), torch.diag(torch.arange(1.0, 7.0)))
    for pattern in (Unstructured(0.5), PerRow(2)):
        certificate = solve(Reconstruction(layer, pattern), Refit(ColumnSweep())).certificate
        assert certificate.relative_gap == pytest.approx(0, abs=1e-9)


def test_weights_that_must_stay_tighten_the_bound():
    always = torch.zeros(5, 8, dtype=torch.bool)
    always[:, 2] = True
    for pattern in ("unstructured", "per_row", "two_of_four"):
        free, held = (reconstruction("plain", pattern, kept) for kept in (None, always))
        bounds = [solve(problem, Bounded(Magnitude())).certificate.bound for problem in (free, held)]
        assert bounds[0] < bounds[1] <= solve(held, BranchAndBound()).certificate.value


def test_constant_inputs_leave_the_bound_alone():
    """A zero input and, next to a bias, a constant one are nobody's business."""
    x = normal(1, (200, 6))
    x[:, 1], x[:, 4] = 0.0, 0.3
    live = [0, 2, 3, 5]
    weight, bias = normal(2, (3, 6)), normal(3, (3,))
    whole = Reconstruction(Layer.from_samples(weight, x, bias), Unstructured(6))
    part = Reconstruction(Layer.from_samples(weight[:, live], x[:, live], bias), Unstructured(6))
    bounds = [solve(problem, Bounded(Magnitude())).certificate.bound for problem in (whole, part)]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6)
    assert bounds[0] > 0


def test_a_singular_gram_matrix_has_the_trivial_bound_and_damping_a_better_one():
    layer = random_layer(2, samples=5, inputs=8)
    assert solve(Reconstruction(layer, PerRow(2)), Bounded(Fast())).certificate.bound == 0
    assert solve(Reconstruction(layer.damped(0.1), PerRow(2)), Bounded(Fast())).certificate.bound > 0


def test_useless_witnesses_give_the_trivial_bound():
    problem = reconstruction("bias", "per_row")
    nan = torch.full(problem.target.shape, math.nan)
    trivial = problem.lower_bound(problem.target)
    assert problem.lower_bound(nan) == 0
    assert problem.lower_bound(None) == trivial
    assert problem.lower_bound((problem.target, torch.full((8,), math.nan))) == trivial
    assert problem.lower_bound((problem.target, torch.full((8,), -1.0))) == trivial
    assert problem.lower_bound(problem.dense) == trivial  # the bias is not looked at
    with pytest.raises(ValueError, match="witness has shape"):
        problem.lower_bound(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="a d of shape"):
        problem.lower_bound((problem.target, torch.zeros(3)))


def test_bounded_needs_steps():
    with pytest.raises(ValueError, match="rounds is -1"):
        Bounded(Magnitude(), rounds=-1)
    problem = reconstruction("plain", "per_row")
    few, many = (solve(problem, Bounded(Magnitude(), rounds=n)).certificate.bound for n in (0, 6))
    assert few < many


@LAW
@given(seed=SEEDS)
def test_the_centred_diagonal_is_a_maximum(seed):
    gram = torch.corrcoef(normal(seed, (6, 40)))
    weights, barrier = normal(seed + 1, (6,)).abs(), 0.1

    def value(d):
        return float(weights @ d + barrier * (torch.logdet(gram - torch.diag(d)) + d.log().sum()))

    d = centred(gram, weights, torch.full((6,), 1e-3, dtype=torch.float64), barrier, steps=50)
    for shift in 1e-2 * torch.eye(6, dtype=torch.float64):
        assert value(d) >= max(value(d * (1 + shift)), value(d * (1 - shift))) - 0.02 * barrier


def test_blocks_of_orthogonal_inputs_are_tight():
    problem = Reconstruction(Layer.from_moments(normal(5, (4, 8)), torch.eye(8)), Blocks((1, 2), 0.5))
    certificate = solve(problem, Bounded(Magnitude())).certificate
    assert certificate.relative_gap == pytest.approx(0, abs=1e-9)


def test_broken_moments_are_reported():
    gram = torch.eye(8, dtype=torch.float64)
    gram[:3, :3] = 1.9 * gram[:3, :3] - 0.9  # every pair is possible, the three together are not
    problem = Reconstruction(Layer.from_moments(normal(6, (5, 8)), gram), PerRow(3))
    for solver in (BranchAndBound(), ColumnSweep(), Refit(Magnitude())):
        assert solve(problem, solver).status is Status.NUMERICAL
    assert solve(problem, Bounded(Magnitude())).certificate.bound == 0
