"""Inputs of unlike scales, of deficient rank and with a common mean: solved, or refused, but never in silence wrong."""

import numpy as np
import pytest
import torch
from scales import KINDS, instance
from torch import tensor

from convexprune import (
    ADMM,
    CVXPY,
    Balanced,
    Best,
    BranchAndBound,
    Certificate,
    Curve,
    DynamicProgramming,
    ExactOBS,
    Fast,
    L1Reconstruction,
    Magnitude,
    MinimalCore,
    NetTrim,
    NeuronMerging,
    PerRow,
    Reconstruction,
    Report,
    SparsityAllocation,
    SwapSearch,
    Unstructured,
    WorkingSet,
    prune,
    solve,
)  # fmt: skip
from convexprune.layer import Layer
from convexprune.solution import Status

WENT_ON = "float32 ended MAX_ITER, float64 went on from its best point"
BEGAN_ANEW = "float32 ended NUMERICAL, float64 began anew"
SINGULAR = "the Gram matrix is nearly singular: the support was chosen with a ridge of 1e-06 of its diagonal"


def drawn(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# the convex problems


@pytest.mark.parametrize("seed", range(3))
def test_inputs_of_deficient_rank_in_float32_are_solved(seed):
    draw = drawn(seed)
    layer = Layer.from_samples(draw(20, 50), (draw(500, 10) @ draw(10, 50)).float(), draw(20))
    solution = solve(NetTrim(layer, 0.1))
    assert solution.status is Status.CONVERGED
    assert solution.certificate.violation <= 1e-6


def test_a_run_that_fails_in_float32_says_that_it_went_on_in_float64():
    draw = drawn(0)
    problem = NetTrim(Layer.from_samples(draw(20, 50), draw(100, 10) @ draw(10, 50), draw(20)), 0.1)
    found = solve(problem, ADMM(max_iter=60, finish=None))
    assert found.status is Status.MAX_ITER
    assert found.note == WENT_ON
    assert found.iterations == 120
    double = solve(problem, ADMM(max_iter=60, finish=None, dtype=torch.float64))
    assert double.note == ""
    assert double.iterations == 60


@pytest.mark.parametrize("kind", ["columns", "channel", "rows", "samples and inputs"])
@pytest.mark.parametrize("seed", range(4))
def test_inputs_of_unlike_scales_are_solved(seed, kind):
    draw = drawn(100 + seed)
    x, weight = draw(60, 8), draw(4, 8)
    if kind == "columns":
        x = x * 10 ** draw(8).clamp(-3, 3)
    if kind == "channel":
        x[:, 3] *= 1e4
    if kind == "rows":
        x = x * 10 ** (0.5 * draw(60, 1))
    if kind == "samples and inputs":
        x = x * 10 ** (0.3 * draw(60, 1)) * 10 ** draw(8)
    solution = solve(NetTrim(Layer.from_samples(weight, x), 0.1))
    assert solution.status is Status.CONVERGED
    assert solution.certificate.violation <= 1e-6


@pytest.mark.parametrize("turn", [0, 3, 5])
@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_scales_from_a_millionth_to_a_million_are_solved(kind, turn):
    """A slice of tests/scales.py."""
    solution = solve(instance(kind + len(KINDS) * turn))
    assert solution.status is Status.CONVERGED
    assert solution.certificate.violation <= 1e-6
    assert abs(solution.certificate.relative_gap) <= 1e-5


@pytest.mark.parametrize("seed", [645, 741])
def test_newton_directions_are_refined_to_the_last_digits(seed):
    """Two of the thousand that fail where a residual of 1e-10 is left."""
    assert solve(instance(seed)).status is Status.CONVERGED


@pytest.mark.parametrize("seed", [13, 69, 109, 175, 237])
def test_the_finish_needs_no_start(seed):
    """A bias beside inputs a million times as large; prices a million million times another; too little rank."""
    assert solve(instance(seed), WorkingSet(eps_rel=1e-5)).status is Status.CONVERGED


def test_a_bound_says_what_float64_can_where_one_row_is_a_million_million_times_another():
    """A radius of 0 leaves equations: dividing a multiplier by what its row was multiplied by leaves the bound."""
    draw = drawn(12)
    x, weight = draw(60, 8), draw(4, 8)
    layer = Layer.from_samples(weight, x, None, None)
    plain = NetTrim(layer, 0.1)
    witness = solve(plain).witness
    rows = 10.0 ** (12 * torch.rand(60, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 6)
    scaled = NetTrim(Layer.from_samples(weight, x * rows, None, None), 0.0)
    exact = NetTrim(layer, 0.0)
    assert scaled.lower_bound(witness / rows) == pytest.approx(exact.lower_bound(witness), rel=1e-9)


@pytest.mark.parametrize("lam", [1e-6, 0.1])
@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e18, 1e30])
def test_a_lasso_whose_price_is_far_from_its_data_does_not_crash(size, lam):
    draw = drawn(8)
    x, weight = draw(60, 8), draw(4, 8)
    for layer in (Layer.from_samples(weight * size, x), Layer.from_samples(weight, x * size)):
        solution = solve(L1Reconstruction(layer, lam), ADMM(max_iter=100))
        assert solution.status in (Status.CONVERGED, Status.MAX_ITER)
        if size < 1:  # a weight costs more than it is worth
            assert solution.status is Status.CONVERGED
            assert not solution.x.any()


def test_a_feasible_point_far_below_its_bound_does_not_count_as_solved():
    hidden = Certificate(value=0.0, bound=1.0, violation=0.0)
    assert not hidden.meets(eps_abs=1e-6, eps_rel=1e-5)
    assert Certificate(value=1 - 1e-6, bound=1.0, violation=0.0).meets(eps_abs=1e-6, eps_rel=1e-5)
    assert Certificate(value=0.9, bound=1.0, violation=1e-7).meets(eps_abs=1e-6, eps_rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "relu", "mean", "low rank"])
def test_a_radius_of_zero_is_solved(kind):
    draw = drawn(3)
    x, weight = draw(120, 20), draw(6, 20)
    x = {"plain": x, "relu": x.relu(), "mean": x + 1, "low rank": draw(120, 5) @ draw(5, 20)}[kind]
    solution = solve(NetTrim(Layer.from_samples(weight, x), 0.0))
    assert solution.status is Status.CONVERGED
    assert solution.certificate.violation <= 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-6, 1e6, 1e18, 1e30])
def test_the_optimum_follows_the_unit(size):
    draw = drawn(5)
    x, weight = draw(60, 8), draw(4, 8)
    value = solve(NetTrim(Layer.from_samples(weight, x), 0.1)).certificate.value
    inputs = solve(NetTrim(Layer.from_samples(weight, x * size), 0.1))
    weights = solve(NetTrim(Layer.from_samples(weight * size, x), 0.1))
    assert inputs.status is weights.status is Status.CONVERGED
    assert inputs.certificate.value == pytest.approx(value, rel=1e-4)
    assert weights.certificate.value == pytest.approx(value * size, rel=1e-4)


def test_a_feasible_problem_is_never_called_infeasible():
    """Dense weights of zero with targets of their own: their value is 0, any bound is a thousand times that."""
    draw = drawn(6)
    x, targets = draw(60, 8), draw(60, 4).abs() * 0.1
    problem = NetTrim(Layer.from_samples(torch.zeros(4, 8), x, None, None, targets=targets), 1.0)
    assert solve(problem).status is Status.CONVERGED


def test_a_finish_that_needs_too_much_memory_leaves_the_point_of_admm():
    draw = drawn(7)
    problem = NetTrim(Layer.from_samples(draw(4, 8), draw(60, 8)), 0.1)
    alone = solve(problem, ADMM(finish=None, eps_rel=1e-3, eps_abs=1e-4))
    crowded = solve(problem, ADMM(finish=WorkingSet(memory=10.0), eps_rel=1e-3, eps_abs=1e-4))
    assert alone.status is crowded.status is Status.CONVERGED
    assert torch.equal(alone.x, crowded.x)
    assert crowded.note.startswith("the finish did not run: the restricted problems need")
    assert alone.note == ""
    with pytest.raises(MemoryError, match=r"raise WorkingSet\(memory"):
        solve(problem, WorkingSet(memory=10.0))


@pytest.mark.parametrize("seed", range(5))
def test_working_sets_that_outgrow_their_memory_leave_the_point_they_had(seed):
    """The first restricted problems need 8,112 or 8,424 bytes, the second more than 11,000."""
    draw = drawn(seed)
    problem = NetTrim(Layer.from_samples(draw(2, 12), draw(60, 12), draw(2)), 0.2)
    found = solve(problem, WorkingSet(memory=1e4))
    assert found.status is Status.MAX_ITER
    assert found.note.startswith("the working sets could not grow: the restricted problems need")
    assert found.iterations > 0
    assert found.certificate.bound > 0
    assert found.certificate.bound <= solve(problem).certificate.value * (1 + 1e-9)
    with pytest.raises(MemoryError):
        solve(problem, WorkingSet(memory=8e3))


@pytest.mark.parametrize("size", [1e-18, 1e18, 1e30])
def test_a_lasso_follows_the_unit(size):
    draw = drawn(8)
    x, weight = draw(60, 8), draw(4, 8)
    value = solve(L1Reconstruction(Layer.from_samples(weight, x), 0.1)).certificate.value
    scaled = solve(L1Reconstruction(Layer.from_samples(weight * size, x), 0.1 * size))
    assert scaled.status is Status.CONVERGED
    assert scaled.certificate.value == pytest.approx(value * size**2, rel=1e-4)


# the reconstructions


@pytest.mark.parametrize("pattern", [Unstructured(0.3), Unstructured(0.5), PerRow(0.5)])
@pytest.mark.parametrize("kind", [Balanced, Best, ExactOBS, SwapSearch])
def test_inputs_with_a_common_mean_are_solved_at_least_as_well_as_by_admm(kind, pattern):
    draw = drawn(9)
    x = 1 + 0.02 * draw(600, 60)
    problem = Reconstruction(Layer.from_samples(draw(12, 60), x), pattern)
    found, plain = solve(problem, kind()), solve(problem, ADMM(dtype=torch.float64))
    assert found.status in (Status.CONVERGED, Status.MAX_ITER)
    assert found.certificate.violation == 0
    assert found.certificate.value <= plain.certificate.value
    assert found.note in ("", BEGAN_ANEW)


def test_what_float32_cannot_solve_is_said():
    draw = drawn(10)
    problem = Reconstruction(Layer.from_samples(draw(30, 150), 1 + 0.02 * draw(1000, 150)), Unstructured(0.3))
    for solver in (Balanced(), Best(), ExactOBS(), SwapSearch()):
        found = solve(problem, solver)
        assert found.note == BEGAN_ANEW
        assert found.status is not Status.NUMERICAL
        assert found.certificate.violation == 0


@pytest.mark.parametrize("spread", [0.2, 0.07, 0.05, 0.02, 0.003])
@pytest.mark.parametrize("kind", [Balanced, Best, ExactOBS, SwapSearch])
def test_a_common_mean_costs_float32_nothing(kind, spread):
    """What float32's inverses would lose, up to 59% at a spread of 0.05, is done in float64, and that is said."""
    for seed in (9, 20, 21):
        draw = drawn(seed)
        x, weight = 1 + spread * draw(600, 60), draw(12, 60)
        for keep in (0.3, 0.5):
            problem = Reconstruction(Layer.from_samples(weight, x), Unstructured(keep))
            single, double = solve(problem, kind()), solve(problem, kind(dtype=torch.float64))
            assert single.certificate.violation == 0
            assert single.certificate.value <= 1.01 * double.certificate.value
            assert single.note == ("" if spread > 0.1 else BEGAN_ANEW)


@pytest.mark.parametrize("spread", [0.05, 0.01, 0.003])
def test_a_common_mean_costs_the_fast_preset_nothing(spread):
    """Conjugate gradients in float32 alone ended up to twice as high."""
    for seed in (20, 21):
        draw = drawn(seed)
        x, weight = 1 + spread * draw(1000, 200), draw(12, 200)
        for keep in (0.3, 0.5):
            problem = Reconstruction(Layer.from_samples(weight, x), Unstructured(keep))
            single, double = solve(problem, Fast()), solve(problem, Fast(dtype=torch.float64))
            assert single.certificate.value <= 1.01 * double.certificate.value
            assert single.note == ""


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_four_hundred_inputs_with_a_common_mean(keep):
    draw = drawn(3)
    problem = Reconstruction(
        Layer.from_samples(draw(16, 400), (1 + 0.02 * draw(4000, 400)).float()), Unstructured(keep)
    )
    plain = solve(problem, ADMM())
    for solver in (Balanced(), Best(), ExactOBS()):
        found = solve(problem, solver)
        assert found.status in (Status.CONVERGED, Status.MAX_ITER)
        assert found.certificate.violation == 0
        assert found.certificate.value <= 0.97 * plain.certificate.value
        assert found.note == BEGAN_ANEW


@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_standardised_images(data, keep):
    """LeNet's first layer, bias-free: a fifth of its 784 pixels are always -0.42 on these images."""
    with np.load(data / "lenet300.npz") as arrays:
        weight = torch.from_numpy(arrays["fc1.weight"][:16])
    with np.load(data / "mnist.npz") as arrays:
        images = torch.from_numpy(arrays["x_train"][:4000].reshape(4000, -1))
    layer = Layer.from_samples(weight, (images / 255.0 - 0.1307) / 0.3081)
    problem = Reconstruction(layer, Unstructured(keep))
    found, plain = solve(problem), solve(problem, ADMM())
    assert found.status is Status.CONVERGED
    assert found.certificate.violation == plain.certificate.violation == 0
    assert found.certificate.value <= 0.95 * plain.certificate.value
    assert found.note == f"{BEGAN_ANEW}; {SINGULAR}"
    model = torch.nn.Sequential(torch.nn.Linear(784, 16, bias=False))
    model[0].weight.data = weight
    batches = [(images[i : i + 500] / 255.0 - 0.1307) / 0.3081 for i in range(0, 4000, 500)]
    _, report = prune(model, batches, lambda layer: Reconstruction(layer, Unstructured(keep)))
    assert report.kept == round(keep * weight.numel())
    assert report.rows[0].moments.rank < 784
    assert f"rank {report.rows[0].moments.rank} of 784" in str(report)
    assert f"{BEGAN_ANEW}; {SINGULAR}: 0" in str(report)
    assert Report.from_json(report.to_json()).rows[0].note == report.rows[0].note


@pytest.mark.parametrize("size", [1e-25, 1e-15, 1e15, 1e25])
@pytest.mark.parametrize("kind", [Fast, Balanced, Best, ExactOBS, SwapSearch, ADMM])
def test_a_reconstruction_follows_the_unit(kind, size):
    draw = drawn(11)
    x, weight = draw(200, 20), draw(12, 20)
    alone = solve(Reconstruction(Layer.from_samples(weight, x), Unstructured(0.4)), kind())
    inputs = solve(Reconstruction(Layer.from_samples(weight, x * size), Unstructured(0.4)), kind())
    weights = solve(Reconstruction(Layer.from_samples(weight * size, x), Unstructured(0.4)), kind())
    assert inputs.certificate.violation == weights.certificate.violation == 0
    for scaled in (inputs, weights):
        assert scaled.status is alone.status
        assert scaled.certificate.value == pytest.approx(alone.certificate.value * size**2, rel=0.02)


# the budgets


@pytest.mark.parametrize("buckets", [None, 1, 10, 10_000])
@pytest.mark.parametrize(
    ("costs", "budget", "cost"),
    [
        ([[0, 1], [0, 1]], 0, 0),
        ([[0, 1], [0, 2], [0, 3]], 0, 0),
        ([[0, 1], [0, 1]], 1, 1),
        ([[0, 1e15], [0, 1e15]], 1e15, 1e15),
        ([[0, 7], [0, 9]], 1, 0),
        ([[2, 7], [0, 9]], 2, 2),
    ],
)
def test_dynamic_programming_keeps_to_small_budgets(costs, budget, cost, buckets):
    buckets = 10 if buckets is None and budget > 1e6 else buckets  # a bucket for each unit would be too many
    curves = [
        Curve(str(i), tensor([0, 1]), tensor([1.0, 0.0]), cost=tensor(each, dtype=torch.float64))
        for i, each in enumerate(costs)
    ]
    problem = SparsityAllocation(curves, budget)
    found = solve(problem, DynamicProgramming(buckets))
    assert found.certificate.violation == 0
    assert problem.cost(found.x) == cost
    assert found.certificate.value == solve(problem, MinimalCore()).certificate.value


def test_a_time_stamp_does_not_hide_the_flags_beside_it():
    """An input of 1.7e9 next to inputs of 0 and 1: none of the 16 may be lost, and no error exceed magnitude's."""
    draw = drawn(12)
    x = (draw(500, 16) > 0).double()
    x[:, 0] = 1.7e9 + 60.0 * torch.arange(500)
    weight = draw(8, 16)
    weight[:, 0] *= 1e-9
    for bias in (None, torch.zeros(8)):
        layer = Layer.from_samples(weight, x, bias, activation=None)
        for keep in (0.3, 0.5):
            problem = Reconstruction(layer, Unstructured(keep))
            for solver in (Balanced(), Best(), ExactOBS(), SwapSearch(), Fast(), ADMM()):
                found = solve(problem, solver)
                assert int((found.x[:, :16] != 0).sum()) == round(keep * 128)
                assert found.certificate.value <= solve(problem, Magnitude()).certificate.value


@pytest.mark.parametrize("size", [1e-150, 1e-12, 1e-6, 1e8, 1e60])
@pytest.mark.parametrize("bias", [True, False])
def test_one_input_in_another_unit_changes_nothing(size, bias):
    draw = drawn(13)
    x, weight = draw(300, 6), draw(4, 6)
    units = torch.ones(6, dtype=torch.float64)
    units[2] = size
    values = []
    for inputs, weights in ((x, weight), (x * units, weight / units)):
        layer = Layer.from_samples(weights, inputs, torch.zeros(4) if bias else None, activation=None)
        problem = Reconstruction(layer, Unstructured(12))
        values.append([solve(problem, kind()).certificate.value for kind in (Balanced, Best, ExactOBS, BranchAndBound)])
    assert values[1] == pytest.approx(values[0], rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_highs_merges_neurons_of_unlike_sizes(seed):
    """Whatever HiGHS makes of it is a solution with a status: no error of CVXPY gets out."""
    draw = drawn(seed)
    incoming = draw(6, 4) * 10 ** (3 * draw(6, 1))
    problem = NeuronMerging(incoming, draw(3, 6) * 10 ** float(4 * draw(1)), keep=1 + seed % 5)
    found = solve(problem, CVXPY("HIGHS"))
    assert found.status in (Status.CONVERGED, Status.NUMERICAL)
    if found.status is Status.CONVERGED:
        assert found.certificate.violation == 0
        assert found.certificate.bound <= found.certificate.value < float("inf")


def test_a_gap_at_nothing_has_a_scale():
    assert Certificate(0.0, 8e300, 0.0).relative_gap == -1
    assert Certificate(0.0, 1e-300, 0.0).relative_gap == -1
    assert Certificate(1e-300, 0.0, 0.0).relative_gap == 1
    assert Certificate(0.0, 0.0, 0.0).relative_gap == 0
    assert Certificate(float("inf"), 1.0, 0.0).relative_gap == float("inf")
