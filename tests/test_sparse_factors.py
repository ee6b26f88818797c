"""Two sparse factors: the judge against samples and against SVD, the halves, and what the solver promises."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import cascade_layer, random_layer

import convexprune as cp
from convexprune.solvers.factors.half import Metric, right_half

SEEDS = st.integers(0, 2**32 - 1)
LAW = settings(max_examples=15)
WIDE, TALL = {"inputs": 8, "out": 5}, {"inputs": 5, "out": 8}
QUICK = cp.Alternation(shares=(0.2,), falling=8, rounds=2, steps=15)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYERS = {
    "wide": random_layer(0, **WIDE),
    "tall": random_layer(1, **TALL),
    "without_bias": random_layer(2, bias=False, **WIDE),
    "tall_without_bias": random_layer(3, bias=False, **TALL),
    "cascade": cascade_layer(4, **WIDE),
    "rank_deficient": random_layer(5, samples=4, **WIDE),
}


def point(problem, seed):
    """Any point, of about the layer's size."""
    x = normal(seed, *problem.shape)
    x[len(problem.target) :, problem.width :] = 0
    return x


def made(problem, x):
    """What the pair makes of the samples: two maps, one after the other."""
    left, right = problem.factors(x)
    out = problem.layer.inputs.double() @ right.T @ left.T
    return out if problem.bias(x) is None else out + problem.bias(x)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("inner", [None, 2, 9])
def test_the_value_is_the_error_of_the_pair_on_the_samples(layer, inner):
    problem = cp.SparseFactors(layer, 12, inner)
    x = point(problem, 1)
    errors = (made(problem, x) - layer.targets_or_dense).square().sum(0)
    assert problem.value(x) == pytest.approx(float(errors.sum()) / layer.samples, rel=1e-9)
    assert bool((problem.product_errors(x) >= errors.sqrt()).all())
    assert problem.rounding(x) <= 1e-9 * problem.value(x)


@LAW
@given(seed=SEEDS)
def test_the_exact_product_is_within_what_the_judge_allows_for(seed):
    """W = Q (Q^T W): all that is left is the rounding of the factors and of their product."""
    problem = cp.SparseFactors(random_layer(seed % 1000, **WIDE), 12)
    x = problem.dense.clone()
    left, right = problem.factors(x)
    turn = torch.linalg.qr(normal(seed, 5, 5)).Q
    x = problem.joined(left @ turn, turn.T @ right)
    exact = problem.factors(x)
    fine = [[_exactly(row, column) for column in exact[1].T.tolist()] for row in exact[0].tolist()]
    off = [
        [float(w - Fraction(v)) for w, v in zip(*rows, strict=True)]
        for rows in zip(fine, problem.target.tolist(), strict=True)
    ]
    off = torch.tensor(off, dtype=torch.float64)
    true = float(((problem.layer.inputs - problem.layer.inputs.mean(0)).double() @ off.T).square().sum())
    assert abs(problem.value(x) - true / problem.layer.samples) <= problem.rounding(x)


def _exactly(row, column):
    return sum(Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True))


def test_violation_counts_both_factors_and_what_is_under_the_bias():
    problem = cp.SparseFactors(random_layer(0, **WIDE), 10)
    x = torch.zeros(problem.shape)
    assert problem.violation(x) == 0
    x[:5, :5] = torch.eye(5)
    x[5:10, 0] = 1.0  # five of B
    x[:5, 5] = 1.0  # the bias is free
    assert problem.violation(x) == 0
    x[12, 3] = 1e-30
    assert problem.violation(x) == pytest.approx(1 / 40)
    x[12, 5] = 1.0  # under the bias there is nothing that the point could mean
    assert problem.violation(x) == pytest.approx(2 / 40)
    x[0, 0] = math.nan
    assert problem.violation(x) == problem.value(x) == math.inf


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_dense_point_is_the_dense_layer(layer):
    for inner in (None, 8, 11):
        problem = cp.SparseFactors(layer, 0.5, inner)
        assert torch.equal(problem.product(problem.dense), layer.affine_weight)
        assert tuple(problem.dense.shape) == problem.shape


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_left_half_has_the_same_value(layer):
    problem = cp.SparseFactors(layer, 20)
    left, right = problem.factors(point(problem, 3))
    half = problem.left(right, 7)
    assert half.value(left) == pytest.approx(problem.value(problem.joined(left, right)), rel=1e-9)
    assert half.violation(left) == pytest.approx((left.numel() - 7) / left.numel())


@pytest.mark.parametrize("inner", [1, 2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
@LAW
@given(seed=SEEDS)
def test_the_bound_is_that_of_the_best_matrix_of_the_rank(inner, bias, seed):
    layer = random_layer(seed, bias=bias, **WIDE)
    problem = cp.SparseFactors(layer, 40, inner)
    inputs = layer.inputs - layer.inputs.mean(0) if bias else layer.inputs
    left, values, _ = torch.linalg.svd(layer.weight @ inputs.T, full_matrices=False)
    best = float(values[inner:].square().sum()) / layer.samples
    assert problem.lower_bound(None) <= best * (1 + 1e-12)
    assert problem.lower_bound(None) == pytest.approx(best, rel=1e-6)
    x = problem.joined(left[:, :inner], left[:, :inner].T @ layer.weight)
    assert problem.value(x) == pytest.approx(best, rel=1e-9)
    assert problem.lower_bound(None) <= problem.value(x) + problem.rounding(x)
    assert problem.value(problem.dense) == pytest.approx(best, rel=1e-6)


def test_few_nonzeros_make_a_small_rank():
    layer = random_layer(1, bias=False, **WIDE)
    values = torch.linalg.svdvals(layer.weight @ layer.inputs.T).square() / layer.samples
    assert cp.SparseFactors(layer, 5).lower_bound(None) == pytest.approx(float(values[2:].sum()), rel=1e-6)
    assert cp.SparseFactors(layer, 0).lower_bound(None) == pytest.approx(layer.energy, rel=1e-6)
    assert cp.SparseFactors(layer, 10).lower_bound(None) == 0  # any rank is possible
    assert cp.SparseFactors(cascade_layer(1, **WIDE), 5, 2).lower_bound(None) == 0  # targets of another layer


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e120])
def test_the_bound_holds_at_any_scale(scale):
    layer = random_layer(2, bias=False, **WIDE)
    layer = cp.Layer.from_samples(layer.weight * scale, layer.inputs)
    problem = cp.SparseFactors(layer, 40, 2)
    assert 0 <= problem.lower_bound(None) <= problem.value(problem.dense) + problem.rounding(problem.dense)


@settings(max_examples=8)
@given(seed=SEEDS, count=st.integers(0, 40))
def test_the_solver_is_feasible_and_not_worse_than_one_matrix_beside_the_identity(seed, count):
    layer = random_layer(seed, bias=seed % 2 == 0, **(WIDE if seed % 3 else TALL))
    problem = cp.SparseFactors(layer, count)
    found = cp.solve(problem, QUICK)
    assert found.certificate.violation == 0
    assert found.certificate.bound <= found.certificate.value + problem.rounding(found.x)
    if count >= 5:
        one = cp.solve(cp.Reconstruction(layer, cp.Unstructured(count - 5)), cp.Balanced())
        assert found.certificate.value <= one.certificate.value * (1 + 1e-9) + 1e-12 * layer.energy


@pytest.mark.parametrize("inner", [1, 3, 7])
def test_other_widths_are_solved(inner):
    layer = random_layer(3, **WIDE)
    found = cp.solve(cp.SparseFactors(layer, 24, inner), QUICK)
    assert found.status is cp.Status.CONVERGED
    assert found.certificate.violation == 0
    assert found.certificate.bound <= found.certificate.value < layer.energy


def test_a_layer_of_low_rank_is_found():
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    left, right, inputs = draw(16, 2), draw(2, 64), draw(400, 64) @ (torch.eye(64) + 0.2 * draw(64, 64))
    layer = cp.Layer.from_samples(left @ right, inputs)
    count = left.numel() + right.numel() + 32
    two = cp.solve(cp.SparseFactors(layer, count), cp.Alternation(shares=(0.25,), falling=20)).certificate.value
    one = cp.solve(cp.Reconstruction(layer, cp.Unstructured(count)), cp.Best()).certificate.value
    assert two < one / 10


@LAW
@given(seed=SEEDS)
def test_the_right_half_is_least_squares_with_the_kronecker_hessian(seed):
    layer = random_layer(seed, bias=False, samples=60, inputs=5, out=4)
    metric = Metric.of(layer.gram, layer.cross, torch.float64)
    left, start = normal(seed + 1, 4, 3), torch.zeros(3, 5, dtype=torch.float64)
    unit, right = right_half(metric, left, start, 15, 60)
    assert torch.allclose(unit.norm(dim=0), torch.ones(3, dtype=torch.float64))
    hessian = torch.kron(unit.T @ unit, metric.gram)
    best = torch.linalg.solve(hessian, (unit.T @ metric.cross).flatten())
    gap = right.flatten() - best
    assert float(gap @ hessian @ gap) <= 1e-6 * float(best @ hessian @ best)
    few = right_half(metric, left, start, 7, 60)[1]
    assert int((few != 0).sum()) <= 7


def test_a_row_that_nothing_reads_takes_no_weights():
    layer = random_layer(6, bias=False, **WIDE)
    metric = Metric.of(layer.gram, layer.cross, torch.float64)
    left, start = normal(1, 5, 5), normal(2, 5, 8)
    left[:, 3] = 0
    right = right_half(metric, left, start, 20, 60)[1]
    assert not right[3].any()
    assert int((right != 0).sum()) == 20


def test_constant_zero_inputs_and_zero_weights_are_no_trouble():
    layer = random_layer(4, **WIDE)
    inputs = layer.inputs.clone()
    inputs[:, 2] = 0
    for weight in (layer.weight, torch.zeros_like(layer.weight)):
        silent = cp.Layer.from_samples(weight, inputs, layer.bias)
        found = cp.solve(cp.SparseFactors(silent, 0.5), QUICK)
        assert found.certificate.violation == 0
        assert math.isfinite(found.certificate.value)
    assert found.certificate.value == 0


def test_wrong_calls_are_refused_by_name():
    layer = random_layer(0, **WIDE)
    with pytest.raises(ValueError, match="keep is 41, but the layer has only 40"):
        cp.SparseFactors(layer, 41)
    with pytest.raises(ValueError, match="inner is 0"):
        cp.SparseFactors(layer, 5, 0)
    with pytest.raises(TypeError, match="the layer is a"):
        cp.SparseFactors(layer.weight, 5)
    with pytest.raises(ValueError, match="multiplies two unknowns"):
        cp.SparseFactors(layer, 5).to_cvxpy()
    with pytest.raises(TypeError, match="Balanced takes GroupedLeastSquares problems"):
        cp.solve(cp.SparseFactors(layer, 5), cp.Balanced())
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with pytest.raises(TypeError, match="SparseFactors is not a problem over the weights of a layer"):
        cp.prune(model, [torch.randn(9, 4)], lambda each: cp.SparseFactors(each, 0.5))


def test_a_time_limit_returns_the_best_so_far():
    found = cp.solve(cp.SparseFactors(random_layer(0, **WIDE), 20), cp.Alternation(falling=10**6, time_limit=0.05))
    assert found.status is cp.Status.TIME_LIMIT
    assert found.certificate.violation == 0
