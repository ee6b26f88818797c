"""Laws of reconstruction under a pattern: exact counts, bounds, greedy and brute-force oracles, swaps never go up."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import random_layer
from table import LAYERS, PATTERNS, RECONSTRUCTIONS, RECONSTRUCTORS, reconstruction, some

from convexprune import products
from convexprune.layer import Layer
from convexprune.layout import Layout
from convexprune.patterns import NM, Blocks, Channels, PerRow, Unstructured
from convexprune.problem import judge
from convexprune.problems import NetTrim, Reconstruction
from convexprune.solution import Status
from convexprune.solve import solve
from convexprune.solvers import (
    CVXPY,
    Balanced,
    Best,
    BranchAndBound,
    ColumnSweep,
    ExactOBS,
    LayerwiseOBS,
    Magnitude,
    Refit,
    RisingPenalty,
    SwapSearch,
    Then,
)
from convexprune.solvers.least_squares.grams import Grams
from convexprune.solvers.least_squares.on_support import best_on_support
from convexprune.solvers.least_squares.support_inverses import SupportInverses

SEEDS = st.integers(0, 2**32 - 1)
LAW = settings(max_examples=15)


@dataclass(frozen=True)
class Thirds:
    """Sets of 1, 2, 3, 2, 1 and 3 inputs, for the rows 0-2, 3-5 and 6-7: no two cells need have one size."""

    keep: int = 9
    inputs = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5])
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])

    def quota(self, shape, kernel=1):
        return self.keep

    def folded(self, values, kernel=1):
        sets = values.new_zeros(8, 6).index_add_(1, self.inputs, values)
        return values.new_zeros(3, 6).index_add_(0, self.rows, sets).reshape(1, 18)

    def unfolded(self, cells, shape, kernel=1):
        return cells.reshape(3, 6)[self.rows][:, self.inputs]


def normal(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def support_value(problem, neuron, support):
    """The least value of one neuron on a list of inputs, by numpy."""
    if not support:
        return float(problem.energies[neuron])
    block, right = problem.gram[support][:, support].numpy(), problem.cross[neuron, support].numpy()
    return float(problem.energies[neuron]) - right @ np.linalg.lstsq(block, right, rcond=None)[0]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("solver", "pattern"), RECONSTRUCTIONS)
def test_every_solver_keeps_the_pattern_and_its_bound_holds(solver, pattern, layer):
    problem = reconstruction(layer, pattern)
    solution = solve(problem, RECONSTRUCTORS[solver][0]())
    assert solution.certificate.violation == 0
    assert solution.status in (Status.CONVERGED, Status.MAX_ITER)
    assert solution.certificate.bound <= solution.certificate.value
    optimum = solve(problem, BranchAndBound()).certificate.value
    assert solution.certificate.value >= optimum - 1e-9 * problem.layer.energy


# of few channels on few samples no single swap leads to the optimum
NEAR = [(layer, name) for layer in LAYERS for name in PATTERNS if (layer, name) != ("rank_deficient", "channels")]


@pytest.mark.parametrize(("layer", "pattern"), NEAR)
def test_the_best_preset_is_near_the_optimum(layer, pattern):
    problem = reconstruction(layer, pattern)
    optimum = solve(problem, BranchAndBound()).certificate.value
    assert solve(problem, Best()).certificate.value <= optimum + 0.03 * problem.layer.energy


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "pattern", [Channels(3), Channels(0.6), Blocks((5, 2), 2), Blocks((1, 8), 2), Blocks((5, 1), 4)]
)
def test_branch_and_bound_is_brute_force_for_whole_cells(pattern, layer):
    problem = Reconstruction(LAYERS[layer](), pattern)
    layout = Layout.of(pattern, (5, 8))
    values = []
    for kept in itertools.combinations(range(layout.never.numel()), layout.quota):
        mask = torch.isin(layout.cell, torch.tensor(kept))
        values.append(sum(support_value(problem, m, row.nonzero()[:, 0].tolist()) for m, row in enumerate(mask)))
    solution = solve(problem, BranchAndBound())
    assert solution.certificate.value == pytest.approx(min(values), rel=1e-8, abs=1e-9 * problem.layer.energy)
    assert solution.certificate.violation == 0


@pytest.mark.parametrize("pattern", [PerRow(3), NM(2, 4), Unstructured(9)])
def test_branch_and_bound_is_brute_force(pattern):
    problem = Reconstruction(random_layer(30, inputs=8, out=3), pattern)
    found = solve(problem, BranchAndBound()).certificate.value
    subsets = [list(c) for k in range(9) for c in itertools.combinations(range(8), k)]
    each = [{tuple(c): support_value(problem, m, c) for c in subsets} for m in range(3)]
    if isinstance(pattern, Unstructured):
        by_count = [[min(v for c, v in values.items() if len(c) == k) for k in range(9)] for values in each]
        counts = itertools.product(range(9), repeat=3)
        best = min(sum(by_count[m][k] for m, k in enumerate(ks)) for ks in counts if sum(ks) <= 9)
    elif isinstance(pattern, PerRow):
        best = sum(min(v for c, v in values.items() if len(c) == 3) for values in each)
    else:
        fits = [c for c in each[0] if sum(i < 4 for i in c) == 2 and len(c) == 4]
        best = sum(min(values[c] for c in fits) for values in each)
    assert found == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("pattern", ["unstructured", "per_row", "blocks"])
def test_a_judge_of_some_rows_at_a_time_says_the_same(layer, pattern, monkeypatch):
    def verdict(span):
        monkeypatch.setattr(products, "SPAN", span)
        problem = reconstruction(layer, pattern)
        x = solve(problem, Magnitude()).x
        bounds = [problem.lower_bound(witness) for witness in (None, problem.target, 0.5 * x[:, :8])]
        return problem.value(x), *bounds, problem.rounding(x), *problem.output_errors(x).tolist()

    whole, parts = verdict(2**21), verdict(9)
    assert parts == pytest.approx(whole, rel=1e-9, abs=1e-12)


def test_neurons_with_the_same_mask_share_a_factorisation():
    """Many more neurons than masks take another path than neurons of their own; both are numpy's least squares."""
    problem = Reconstruction(random_layer(31, inputs=100, out=700, samples=300), Unstructured(0.5))
    few = torch.rand(3, 100, generator=torch.Generator().manual_seed(0)) < 0.9
    mask = few[torch.arange(700) % 3]
    together = best_on_support(problem.gram, problem.cross, mask, problem.target)
    assert (together[~mask] == 0).all()
    assert ((together @ problem.gram - problem.cross)[mask].abs().max()) < 1e-10
    apart = best_on_support(problem.gram, problem.cross[:3], mask[:3], problem.target[:3])
    torch.testing.assert_close(together[:3], apart)


@pytest.mark.parametrize("layer", ["plain", "bias", "cascade"])
def test_exact_obs_is_greedy_elimination(layer):
    problem = reconstruction(layer, "unstructured")
    out, width = problem.target.shape
    traces = ExactOBS(dtype=torch.float64).traces(problem)
    left = [list(range(width)) for _ in range(out)]
    for removed in range(1, out * width + 1):
        trials = [
            (support_value(problem, m, [i for i in s if i != j]) - support_value(problem, m, s), m, j)
            for m, s in enumerate(left)
            for j in s
        ]
        _, m, j = min(trials)
        left[m].remove(j)
        mask = traces.support(out * width - removed)
        assert [row.nonzero()[:, 0].tolist() for row in mask] == left


def test_each_elimination_costs_what_its_closed_form_says():
    problem = reconstruction("bias", "unstructured")
    traces = ExactOBS(dtype=torch.float64).traces(problem)
    for m in range(len(traces.order)):
        support = list(range(problem.target.shape[1]))
        for j, cost in zip(traces.order[m].tolist(), traces.cost[m].tolist(), strict=True):
            before = support_value(problem, m, support)
            support.remove(j)
            assert cost == pytest.approx(support_value(problem, m, support) - before, abs=1e-7 * problem.layer.energy)


@LAW
@given(seed=SEEDS, pattern=st.sampled_from([*PATTERNS]))
def test_swap_search_never_goes_up(seed, pattern):
    problem = reconstruction("bias", pattern)
    mask = problem.select(torch.rand(problem.target.shape, generator=torch.Generator().manual_seed(seed)).double())
    start = problem.completed(problem.target * mask)
    refitted = problem.completed(best_on_support(problem.gram, problem.cross, mask, problem.target))
    for begun in (start, refitted):
        found = solve(problem, SwapSearch(), start=begun)
        assert found.certificate.value <= problem.value(begun)
        assert found.certificate.violation == 0


@LAW
@given(seed=SEEDS)
@pytest.mark.parametrize(
    "pattern", [Unstructured(40), Blocks((2, 3), 8), Blocks((1, 4), 9), Blocks((4, 1), 20), Thirds()]
)
def test_inverses_stay_inverses_while_cells_leave_and_enter(pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = Layout.of(pattern, (8, 12)).grid
    gram = torch.corrcoef(torch.randn(12, 60, generator=generator, dtype=torch.float64))
    cross, mask = normal(seed, (8, 12)), torch.rand(grid.group.shape, generator=generator) < 0.5
    grams, ridge = Grams.of(gram[None], len(mask)), torch.full((len(mask), 1), 1e-9, dtype=torch.float64)
    inverses = SupportInverses(grams, grid.bundled(cross), mask, ridge, grid=grid)

    def best():
        return best_on_support(gram, cross, grid.spread(mask), torch.zeros_like(cross))

    def values():
        rows = ((best() @ gram) * best()).sum(1) - 2 * (best() * cross).sum(1)
        return torch.zeros(len(mask), dtype=torch.float64).index_add_(0, grid.rows, rows)

    for _ in range(4):
        for _ in range(2):
            cheapest, slots = inverses.costs.min(1)
            going = torch.isfinite(cheapest) & (torch.rand(len(mask), generator=generator) < 0.7)
            gone, before = inverses.index.gather(1, slots[:, None]), values()
            mask = mask & ~torch.zeros_like(mask).scatter_(1, gone, going[:, None])
            inverses.leave(slots, going)
            rises = torch.where(going, cheapest, 0.0)
            torch.testing.assert_close(values() - before, rises, rtol=1e-4, atol=1e-6)
        columns = torch.where(mask, 1.0, torch.rand(mask.shape, generator=generator)).argsort(1)[:, :2]
        coming = ~mask.gather(1, columns)
        inverses.enter(columns, coming)
        mask = mask.scatter(1, columns, mask.gather(1, columns) | coming)
        assert (inverses.mask == mask).all()
    torch.testing.assert_close(grid.unbundled(inverses.scattered), best(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("solver", "pattern"), RECONSTRUCTIONS)
def test_weights_that_must_stay_do(solver, pattern):
    if pattern == "support":
        return
    always = torch.zeros(5, 8, dtype=torch.bool)
    always[1, :2] = always[3, 4] = True
    problem = reconstruction("bias", pattern, always)
    x = solve(problem, RECONSTRUCTORS[solver][0]()).x[:, :8]
    assert (x[always] != 0).all()
    assert problem.violation(x) == 0


@pytest.mark.parametrize("solver", RECONSTRUCTORS)
def test_keeping_everything_keeps_the_layer(solver):
    problem = Reconstruction(LAYERS["bias"](), Unstructured(1.0))
    solution = solve(problem, RECONSTRUCTORS[solver][0]())
    assert solution.certificate.value <= 1e-5 * problem.layer.energy


@pytest.mark.parametrize("solver", RECONSTRUCTORS)
def test_keeping_nothing_leaves_the_mean(solver):
    problem = Reconstruction(LAYERS["bias"](), Unstructured(0))
    solution = solve(problem, RECONSTRUCTORS[solver][0]())
    assert (solution.x[:, :8] == 0).all()
    torch.testing.assert_close(solution.x[:, 8], problem.layer.target_mean)


@pytest.mark.parametrize("solver", RECONSTRUCTORS)
def test_importance_weighs_the_outputs(solver):
    layer, importance = LAYERS["bias"](), torch.tensor([1e4, 1.0, 1.0, 1.0, 1e-4])
    problem = Reconstruction(layer, Unstructured(0.5), importance=importance)
    solution = solve(problem, RECONSTRUCTORS[solver][0]())
    certificate = solution.certificate
    assert certificate.violation == 0
    assert certificate.bound <= certificate.value
    errors = problem.layer.squared_errors(solution.x)
    assert certificate.value == pytest.approx(float((errors * importance).sum()))
    kept = (solution.x[:, :8] != 0).sum(1)
    assert kept[0] >= kept[4]
    formulation = problem.to_cvxpy()
    formulation.x.value = solution.x.numpy()
    assert formulation.problem.objective.value == pytest.approx(certificate.value)


def test_the_bias_is_the_best_one():
    problem = reconstruction("bias", "unstructured")
    x = solve(problem).x
    for shift in (-0.01, 0.01):
        moved = x.clone()
        moved[:, -1] += shift
        assert problem.value(moved) > problem.value(x)


@pytest.mark.parametrize("solver", [name for name in RECONSTRUCTORS if name != "branch_and_bound"])
def test_dead_and_repeated_inputs_are_no_trouble(solver):
    x = normal(5, (50, 20))
    x[:, 3] = 0.0
    x[:, 7] = x[:, 8]
    layer = Layer.from_samples(normal(6, (10, 20)), x)
    solution = solve(Reconstruction(layer, Unstructured(0.3)), RECONSTRUCTORS[solver][0]())
    assert solution.certificate.violation == 0
    assert torch.isfinite(solution.x).all()
    assert 0 < solution.certificate.value < layer.energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [ExactOBS, SwapSearch, Balanced, Best])
def test_many_inputs_and_few_samples(solver, dtype):
    layer = random_layer(42, inputs=120, out=6, samples=30)
    for keep in (0.1, 0.6):
        problem = Reconstruction(layer, Unstructured(keep))
        solution = solve(problem, solver(dtype=dtype))
        assert solution.status is not Status.NUMERICAL
        assert solution.certificate.violation == 0
        assert solution.certificate.value < solve(problem, Magnitude()).certificate.value


@pytest.mark.parametrize(
    "solver", [name for name in RECONSTRUCTORS if name not in ("magnitude", "activation_magnitude")]
)
def test_an_indefinite_gram_matrix_is_said(solver):
    gram = torch.eye(8, dtype=torch.float64)
    gram[:3, :3] = 1.9 * gram[:3, :3] - 0.9  # every pair is possible, the three together are not
    problem = Reconstruction(Layer.from_moments(normal(0, (5, 8)), gram, torch.ones(5, 8), torch.ones(5)), PerRow(6))
    assert solve(problem, RECONSTRUCTORS[solver][0]()).status is Status.NUMERICAL


def test_swaps_in_turns_keep_the_count():
    problem = Reconstruction(random_layer(40, inputs=24, out=16, samples=200), Unstructured(0.3))
    whole, turns = solve(problem, SwapSearch()), solve(problem, SwapSearch(memory=2e4))
    assert whole.certificate.violation == turns.certificate.violation == 0
    assert turns.certificate.value < solve(problem, Refit(Magnitude())).certificate.value


def test_presets_are_in_order():
    problem = Reconstruction(random_layer(41, inputs=48, out=32, samples=300), Unstructured(0.3))
    best, balanced, plain = (solve(problem, s).certificate.value for s in (Best(), Balanced(), Magnitude()))
    assert best <= 1.01 * balanced
    assert balanced < 0.9 * plain
    assert solve(problem).certificate == judge(problem, solve(problem, Balanced()).x)


def test_solvers_refuse_what_they_cannot_take():
    with pytest.raises(TypeError, match="takes GroupedLeastSquares problems; NetTrim is of the form BallProblem"):
        solve(NetTrim(random_layer(), epsilon=0.1), Magnitude())
    with pytest.raises(ValueError, match="up to 30 inputs"):
        solve(Reconstruction(random_layer(0, inputs=31), Unstructured(0.5)), BranchAndBound())
    with pytest.raises(TypeError, match="mixed-integer quadratic"):
        solve(reconstruction("plain", "per_row"), CVXPY("CLARABEL"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_program_in_cvxpy_admits_the_optimum_and_has_its_value(pattern):
    problem = reconstruction("bias", pattern)
    formulation = problem.to_cvxpy()
    x = solve(problem, Best()).x
    formulation.x.value = x.numpy()
    kept = formulation.problem.var_dict["kept"]
    cell = Layout.of(problem.pattern, (5, 8), problem.kernel).cell
    cells = torch.zeros(kept.size).index_add_(0, cell.flatten(), (x[:, :8] != 0).float().flatten()) > 0
    kept.value = cells.double().numpy()
    assert formulation.problem.objective.value == pytest.approx(problem.value(x))
    assert all(constraint.violation().max() < 1e-9 for constraint in formulation.problem.constraints)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RisingPenalty(rho=0.0),
        lambda: RisingPenalty(grow=0.5),
        lambda: RisingPenalty(rises=(1.3, 1.0, 1.1)),
        lambda: RisingPenalty(every=0),
        lambda: SwapSearch(enter=0.0),
        lambda: SwapSearch(cooling=1.5),
        lambda: SwapSearch(rounds=-1),
        lambda: ColumnSweep(damping=0.0),
        lambda: ColumnSweep(block=0),
        lambda: LayerwiseOBS(alpha=float("inf")),
        lambda: Reconstruction(random_layer(), Unstructured(0.5), always=some(0.5).double()),
        lambda: Reconstruction(random_layer(), NM(2, 4)),
        lambda: Reconstruction(random_layer(), Unstructured(0.5), importance=torch.ones(3)),
        lambda: Reconstruction(random_layer(), Unstructured(0.5), importance=torch.tensor([1.0, 0.0, 1.0, 1.0])),
        lambda: Reconstruction(random_layer(), Blocks((3, 3), 1)),
    ],
)
def test_bad_options_are_refused(make):
    with pytest.raises(ValueError, match=r"\S"):
        make()


def test_then_passes_the_point_on():
    problem = reconstruction("bias", "unstructured")
    first = solve(problem, Refit(Magnitude()))
    both = solve(problem, Then(Refit(Magnitude()), SwapSearch()))
    assert both.certificate.value <= first.certificate.value


def test_the_published_layer_errors_are_reached(data):
    """One small real layer against the best published figure for it."""
    with np.load(data / "layers" / "resnet20_layer2.1.conv1.npz") as arrays:
        weight, gram = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["gram"])
    layer = Layer.from_moments(weight, gram)
    problem = Reconstruction(layer, Unstructured(round(0.1 * weight.numel())))
    assert solve(problem, Best()).certificate.value / layer.energy < 0.06543
