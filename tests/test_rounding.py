"""No certificate is false under rounding: every figure against rational arithmetic, and the faults that were found."""

import math
from fractions import Fraction

import exact
import fuzz
import numpy as np
import pytest
import torch

import convexprune as cp
from convexprune import rounding
from convexprune.layer import Layer
from convexprune.moments import InputMoments, TargetMoments
from convexprune.problem import judge
from convexprune.problems import increase, saliencies
from convexprune.solution import Attempt, Certificate, Status
from convexprune.solve import UNPROVEN, solve
from convexprune.solvers import (
    ADMM,
    CVXPY,
    KKT,
    ActivationMagnitude,
    Balanced,
    Bounded,
    BranchAndBound,
    ClosedForm,
)

INSTANCES, PARTS = 300, 6


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", fuzz.PROBLEMS)
def test_no_figure_is_on_the_wrong_side_of_the_exact_one(name, part):
    for seed in range(part, INSTANCES, PARTS):
        fuzz.PROBLEMS[name](fuzz.Draw(seed))


# the allowances


@pytest.mark.parametrize("count", [0, 1, 7, 1024, 1025, 5001])
def test_a_total_is_within_its_doubt(count):
    values = normal(count, count) * 10 ** normal(count + 1, count).mul(4)
    true = sum(map(Fraction, values.tolist()), Fraction(0))
    assert abs(Fraction(rounding.total(values)) - true) <= Fraction(rounding.total_doubt(values))
    assert rounding.total(values.abs()) == math.fsum(values.abs().tolist())


def test_products_keep_what_rounding_loses():
    a, b, c = normal(0, 1000), normal(1, 1000), normal(2, 1000)
    c[:500] = a[:500] * b[:500]  # what is left is the rounding of the product alone
    for got, x, y, z in zip(*(each.tolist() for each in (rounding.product_minus(a, b, c), a, b, c)), strict=True):
        true = Fraction(z) - Fraction(x) * Fraction(y)
        unit, product = Fraction(rounding.UNIT), Fraction(x) * Fraction(y)
        assert abs(Fraction(got) - true) <= 2 * unit * abs(true) + unit**2 * abs(product)
    assert rounding.exact_dot(a, b) == float(exact.dot(exact.rational(a), exact.rational(b)))


def definite(matrix):
    """Whether a matrix of fractions is positive semidefinite, by elimination."""
    rows = [row[:] for row in matrix]
    for i in range(len(rows)):
        if rows[i][i] < 0 or (rows[i][i] == 0 and any(rows[i][i:])):
            return False
        for j in range(i + 1, len(rows)):
            factor = rows[j][i] / rows[i][i] if rows[i][i] else 0
            rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return True


def shifted(matrix, shift):
    return [[value + shift * (i == j) for j, value in enumerate(row)] for i, row in enumerate(matrix)]


@pytest.mark.parametrize("seed", range(20))
def test_eigenvalues_are_certain(seed):
    size, rank = 6, 1 + seed % 6
    x = normal(seed, rank, size)
    matrix = x.T @ x if seed % 2 else torch.corrcoef(normal(seed, size, 2 * size)) - 0.1 * torch.eye(size).double()
    matrix = torch.tril(matrix) + torch.tril(matrix, -1).T
    least, largest = rounding.least_eigenvalue(matrix), rounding.spectral_norm(x) ** 2
    assert definite(shifted(exact.rational(matrix), -Fraction(least)))
    assert least >= float(torch.linalg.eigvalsh(matrix)[0]) - 1e-12 * float(matrix.abs().max())
    rows = exact.rational(x.T)
    assert definite(shifted([[-exact.dot(a, b) for b in rows] for a in rows], Fraction(largest)))
    assert largest <= float(torch.linalg.matrix_norm(x, 2)) ** 2 * (1 + 1e-12)


def test_nothing_is_certain_of_what_is_no_number():
    assert rounding.least_eigenvalue(torch.full((2, 2), math.nan)) == -math.inf
    assert rounding.down(math.inf - math.inf) == -math.inf
    assert rounding.up(math.nan) == math.inf
    assert rounding.gamma(2.0**52) == math.inf


# moments


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e7])
def test_sums_meet_whichever_samples_each_has_seen(mean):
    x, y = normal(0, 50, 4) + mean, normal(1, 50, 2) - mean
    parts = []
    for rows in (slice(0, 3), slice(3, 30), slice(30, 30), slice(30, 50)):
        parts.append((InputMoments(4), TargetMoments(2, 4)))
        parts[-1][0].add(x[rows])
        parts[-1][1].add(x[rows], y[rows])
    whole, goal = InputMoments(4), TargetMoments(2, 4)
    whole.add(x)
    goal.add(x, y)
    for order in (parts, parts[::-1]):
        read, aimed = order[0]
        for other, others in order[1:]:
            read, aimed = read + other, aimed + others
        assert read.count == aimed.count == 50
        for merged, single in ((read.finished(), whole.finished()), (aimed.finished(), goal.finished())):
            torch.testing.assert_close(
                merged.covariance, single.covariance, rtol=1e-12, atol=1e-12 * (1 + mean * 1e-14)
            )
            torch.testing.assert_close(merged.mean, single.mean, rtol=1e-15, atol=1e-15)


def test_a_constant_input_is_constant_and_a_small_one_is_not():
    x = normal(0, 500, 4) * torch.tensor([1.0, 0.0, 1e-30, 1e6]) + torch.tensor([1e5, 0.1, 0.0, 1.7e9])
    read = Layer.from_samples(torch.ones(1, 4), x, torch.zeros(1)).read
    assert read.live.tolist() == [True, False, True, True]
    assert (read.covariance[1] == 0).all()
    assert read.doubt[1] == 0


def test_moments_that_were_given_cancel_once():
    x = normal(0, 40, 3) + 1e6
    gram, mean = x.T @ x / 40, x.mean(0)
    given = Layer.from_moments(torch.ones(2, 3), gram, bias=torch.ones(2), mean=mean, samples=40)
    true = [
        [Fraction(g) - Fraction(a) * Fraction(b) for g, b in zip(row, mean.tolist(), strict=True)]
        for row, a in zip(gram.tolist(), mean.tolist(), strict=True)
    ]
    for i in range(3):
        for j in range(3):
            off = abs(Fraction(float(given.read.covariance[i, j])) - true[i][j])
            assert off <= Fraction(float(given.read.doubt[i])) * Fraction(float(given.read.doubt[j]))


@pytest.mark.parametrize("bias", [True, False])
def test_a_gram_matrix_from_above(bias):
    x = (normal(0, 60, 3) + 1e3) * torch.tensor([1e-3, 1.0, 1e5])
    layer = Layer.from_samples(torch.ones(2, 3), x, torch.ones(2) if bias else None)
    above = exact.rational(layer.affine_gram_above)
    true = exact.moments(layer).gram
    assert definite([[a - b for a, b in zip(*rows, strict=True)] for rows in zip(above, true, strict=True)])
    torch.testing.assert_close(layer.affine_gram_above, layer.affine_gram, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e-75, 1e-150])
def test_a_gram_matrix_from_above_covers_its_means(size):
    x = size * (1 + normal(0, 60, 3)) * torch.tensor([1.0, 0.0, 1e3])
    layer = Layer.from_samples(torch.ones(2, 3), x, torch.ones(2))
    above = [[Fraction(value) for value in row] for row in layer.affine_gram_above.tolist()]
    for i in range(3):  # a minor of the difference
        column = [Fraction(value) for value in x[:, i].tolist()]
        own = above[i][i] - sum(value**2 for value in column) / 60
        assert own >= 0
        assert own * (above[3][3] - 1) >= (above[i][3] - sum(column) / 60) ** 2
    assert not layer.read.mean_doubt[layer.read.raw.doubt == 0].any()


# F1: certificates that were false


@pytest.mark.parametrize("mean", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("seed", range(6))
def test_a_bound_with_a_bias_and_inputs_of_large_mean(seed, mean):
    layer = Layer.from_samples(normal(seed, 2, 4), normal(seed + 100, 200, 4) + mean, normal(seed + 200, 2), None)
    problem = cp.Reconstruction(layer, cp.Unstructured(3))
    certificate = solve(problem, Bounded(BranchAndBound())).certificate
    best = exact.reconstruction(problem)
    assert Fraction(certificate.bound) <= best
    assert certificate.value == pytest.approx(float(best), rel=1e-9)
    assert certificate.relative_gap >= 0
    assert certificate.bound > 0.2 * float(best)


def test_a_lasso_bound_near_interpolation():
    layer = Layer.from_samples(torch.tensor([[1, -1, 0.5, -0.5], [1, -1, 0, 0.1]]), normal(0, 200, 4) + 100, None, None)
    problem = cp.L1Reconstruction(layer, 0.1 * float(layer.affine_cross.abs().max()))
    least = min(exact.lasso_value(problem, problem.dense * t) for t in (0.5, 0.9, 0.99, 1.0))
    for step in (0.0, 1e-16, 1e-12, 1e-7, 1e-3):
        assert problem.lower_bound(problem.dense * (1 - step)) <= least


@pytest.mark.parametrize("seed", range(20))
def test_surgery_on_columns_of_all_scales(seed):
    scales = 10 ** torch.linspace(-6, 6, 5).double()[torch.randperm(5, generator=torch.Generator().manual_seed(seed))]
    layer = Layer.from_samples(normal(seed, 3, 5), normal(seed + 50, 30, 5) * scales, normal(seed + 99, 3), None)
    removed = torch.cat([normal(seed + 7, 3, 5) > 0.3, torch.zeros(3, 1, dtype=torch.bool)], 1)
    problem = cp.OptimalBrainSurgeon(layer, removed)
    best = float(exact.surgeon(problem))
    for solver in (ClosedForm(), KKT()):
        solution = solve(problem, solver)
        assert solution.status is Status.CONVERGED
        assert solution.certificate.value == pytest.approx(best, rel=1e-9)
        assert solution.certificate.bound == pytest.approx(best, rel=1e-6)
    assert float(increase(layer, problem.removed).sum()) == pytest.approx(best, rel=1e-9)


def test_errors_of_many_samples_of_a_nearly_constant_input():
    x = 1 + 1e-7 * normal(0, 100_000, 1)
    layer = Layer.from_samples(torch.ones(1, 1), x, torch.zeros(1), None)
    for point in ([[0.5, 0.5]], [[0.0, 1.0]], [[0.9, 0.1 + 1e-9]]):
        w = torch.tensor(point, dtype=torch.float64)
        left = np.longdouble(x[:, 0].numpy()) * np.longdouble(w[0, 0] - 1) + np.longdouble(w[0, 1])
        true = float(np.sqrt((left**2).sum()))
        claimed = float(layer.error_norms(w))
        assert true <= claimed <= 1.001 * true


def test_a_price_without_measure_bounds_nothing():
    problem = cp.ErrorBudget(torch.tensor([2.0, 5.0]), torch.tensor([30.0, 10.0]), torch.tensor([1e3, 1e3]), 8.0)
    assert problem.lower_bound(1e300) == 0
    least = float(exact.budget_optimum(problem))
    assert all(0 <= problem.lower_bound(10.0**power) <= least for power in range(-300, 301))
    most = torch.tensor([1e200], dtype=torch.float64)
    large = cp.ErrorBudget(most, torch.ones(1), most, 1e-100)
    assert 0 <= large.lower_bound(1e200) <= large.value(torch.tensor([[1e-300]], dtype=torch.float64))


def judged():
    """A problem of each kind and a point."""
    layer = Layer.from_samples(normal(0, 2, 3), normal(1, 20, 3), normal(2, 2))
    curve = cp.Curve("a", torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    return [
        cp.NetTrim(layer, 0.1),
        cp.L1Reconstruction(layer, 0.1),
        cp.OptimalBrainSurgeon(layer, torch.zeros(2, 3, dtype=torch.bool)),
        cp.Reconstruction(layer, cp.Unstructured(0.5)),
        cp.SparsityAllocation([curve], 1.0),
        cp.NeuronMerging(normal(3, 3, 2), normal(4, 2, 3), keep=2),
        cp.ErrorBudget(torch.ones(2), torch.ones(2), torch.ones(2), 1.0),
    ]


@pytest.mark.parametrize("problem", judged(), ids=lambda problem: type(problem).__name__)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_point_that_is_no_point_is_infinitely_bad(problem, poison):
    x = problem.dense.clone() + 0.5 * isinstance(problem, cp.ErrorBudget)
    x[0, 0] = poison
    certificate = judge(problem, x)
    assert certificate.value == certificate.violation == math.inf
    assert certificate.bound < math.inf


@pytest.mark.parametrize("factor", [1e-6, 1e-9, 1e9])
def test_an_input_in_another_unit_changes_nothing(factor):
    """A unit of measurement: the input times a factor, its weights over it."""
    x, weight, bias = normal(0, 60, 5), normal(1, 3, 5), normal(2, 3)
    scaled, other = x.clone(), weight.clone()
    scaled[:, 1] *= factor
    other[:, 1] /= factor
    for shift in (None, bias):
        plain, unit = (Layer.from_samples(w, each, shift, None) for w, each in ((weight, x), (other, scaled)))
        for solver in (BranchAndBound(), Balanced(dtype=torch.float64)):
            values = [
                solve(cp.Reconstruction(layer, cp.Unstructured(7)), solver).certificate for layer in (plain, unit)
            ]
            assert values[1].value == pytest.approx(values[0].value, rel=1e-9)
            assert values[1].bound == pytest.approx(values[0].bound, rel=1e-6)
        torch.testing.assert_close(saliencies(unit), saliencies(plain), rtol=1e-8, atol=1e-12)
        removed = torch.zeros(plain.affine_weight.shape, dtype=torch.bool)
        removed[:, 1:3] = True
        torch.testing.assert_close(increase(unit, removed), increase(plain, removed), rtol=1e-8, atol=1e-12)


class Claims:
    """A solver that claims infeasibility, whatever it is asked."""

    def __init__(self, witness=None):
        self.witness = witness

    def solve(self, problem, start=None):
        return Attempt(problem.dense, self.witness, Status.INFEASIBLE, 1, note="no")


@pytest.mark.parametrize("problem", judged(), ids=lambda problem: type(problem).__name__)
def test_a_claim_of_infeasibility_is_not_believed(problem):
    solution = solve(problem, Claims())
    assert solution.status is Status.NUMERICAL
    assert solution.note == f"no; {UNPROVEN}"


def test_dense_weights_of_zero_are_not_infeasible():
    x, weight = normal(0, 60, 4), normal(1, 2, 4)
    layer = Layer.from_samples(torch.zeros(2, 4), x, targets=x @ weight.T)
    for solver in (ADMM(), CVXPY("CLARABEL")):
        solution = solve(cp.NetTrim(layer, 0.3), solver)
        assert solution.status is Status.CONVERGED
        assert solution.certificate.violation <= 1e-6


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_slack_below_zero_may_be_met(size):
    layer = Layer.from_samples(normal(0, 3, 4), size * normal(1, 50, 4), normal(2, 3) * size)
    solution = solve(cp.NetTrim(layer, 0.9, slack=-0.1 * size))
    assert solution.status is not Status.INFEASIBLE


@pytest.mark.parametrize("activation", ["relu", None])
def test_what_no_weights_can_do_is_proven(activation):
    """Targets outside the range of the inputs: a least-squares residual is the proof, at any scale of the columns."""
    scales = torch.tensor([1e-6, 1.0, 1e4, 1e9], dtype=torch.float64)
    x = normal(0, 60, 4) * scales
    layer = Layer.from_samples(normal(1, 2, 4), x, targets=normal(2, 60, 2).abs(), activation=activation)
    problem = cp.NetTrim(layer, 0.1)
    y = problem.outputs
    best = torch.linalg.lstsq(x / scales, y).solution
    witness = y - x / scales @ best
    assert problem.lower_bound(witness) == math.inf
    assert solve(problem, Claims(witness)).status is Status.INFEASIBLE
    assert cp.NetTrim(layer, 1.0).lower_bound(witness) < math.inf
    loose = cp.NetTrim(layer, 1.001 * float((y - x / scales @ best).norm()) / problem.scale)
    if activation is None:
        assert loose.lower_bound(witness) < math.inf


# F4: dead is zero, or below the rounding of the column itself


@pytest.mark.parametrize("bias", [True, False])
def test_a_time_stamp_beside_flags_loses_no_flag(bias):
    generator = torch.Generator().manual_seed(0)
    flags = (torch.rand(500, 15, generator=generator) < 0.3).double()
    x = torch.cat([1.7e9 + 60 * torch.arange(500).double()[:, None], flags], 1)
    weight = normal(1, 8, 16)
    weight[:, 0] *= 1e-9
    layer = Layer.from_samples(weight, x, normal(2, 8) if bias else None, None)
    problem = cp.Reconstruction(layer, cp.Unstructured(0.4))
    plain = solve(problem, ActivationMagnitude()).certificate.value
    for solver in (Balanced(), Balanced(dtype=torch.float64), BranchAndBound()):
        solution = solve(problem, solver)
        assert int((solution.x[:, :16] != 0).sum()) == 51
        assert solution.certificate.value < plain
        assert 0 < solution.certificate.bound <= solution.certificate.value


# F7: the gap


@pytest.mark.parametrize(
    ("value", "bound", "gap"),
    [
        (0.0, 0.0, 0.0), (0.0, 8.0, -1.0), (8.0, 0.0, 1.0), (2.0, 1.0, 0.5), (1.0, 2.0, -0.5), (1e-300, 0.0, 1.0),
        (1.0, -math.inf, math.inf), (math.inf, 1.0, math.inf), (1.0, math.inf, -math.inf), (-1.0, -2.0, 0.5),
    ],
)  # fmt: skip
def test_the_gap_has_a_scale(value, bound, gap):
    assert Certificate(value, bound, 0.0).relative_gap == gap
