"""A pattern of one's own needs its three methods and nothing else: every solver takes it, or says truly why not."""

import functools
import itertools
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from instances import cascade_layer, random_layer
from table import PATTERNS, RECONSTRUCTORS
from torch import nn

import convexprune as cp
from convexprune import solvers
from convexprune.layer import Layer
from convexprune.layout import Layout, check_pattern, ranks
from convexprune.patterns import NM, Blocks, Channels, PerRow, Support, Unstructured, excess, select
from convexprune.problems import Reconstruction
from convexprune.solution import Status
from convexprune.solve import solve
from convexprune.solvers import (
    KKT,
    Balanced,
    Best,
    BestOf,
    BranchAndBound,
    ColumnSweep,
    ExactOBS,
    Exchange,
    Fast,
    Magnitude,
    Refit,
    SwapSearch,
    Then,
)

SHAPE = (4, 6)


@dataclass(frozen=True)
class Own:
    """A pattern from the number of each weight's group and place in it."""

    keep: int

    def cells(self, shape):
        """(M, N) group, (M, N) cell in the group."""
        raise NotImplementedError

    def never(self, shape):
        """(M, N) bool."""
        return torch.zeros(shape, dtype=torch.bool)

    def quota(self, shape, kernel=1):
        return self.keep

    def folded(self, values, kernel=1):
        group, cell = self.cells(values.shape)
        sums = values.new_zeros(int(group.max()) + 1, int(cell.max()) + 1)
        sums.index_put_((group, cell), values, accumulate=True)
        out = self.never(values.shape)
        sums[group[out], cell[out]] = -1
        return sums

    def unfolded(self, cells, shape, kernel=1):
        group, cell = self.cells(shape)
        return cells[group, cell]


def grid(shape):
    return torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")


class PerInput(Own):
    """So many outputs of each input: the groups join all neurons."""

    def cells(self, shape):
        row, column = grid(shape)
        return column, row


class Pairs(Own):
    """So many weights of two neurons each."""

    def cells(self, shape):
        row, column = grid(shape)
        return row // 2, row % 2 * shape[1] + column


class Squares(Own):
    """So many weights of each colour of a chess board."""

    def cells(self, shape):
        row, column = grid(shape)
        return (row + column) % 2, (row * shape[1] + column) // 2


class Band(Own):
    """So many weights near the diagonal, and none elsewhere."""

    def cells(self, shape):
        row, column = grid(shape)
        return torch.zeros_like(row), row * shape[1] + column

    def never(self, shape):
        row, column = grid(shape)
        return (row - column).abs() > 1


class Ends(Own):
    """So many weights of each neuron, none of them its first: every group has a cell that it can never keep."""

    def cells(self, shape):
        return grid(shape)

    def never(self, shape):
        return grid(shape)[1] == 0


class Triangle(Own):
    """So many weights of each neuron, of those beside one another that it may keep: fewer than that, or none."""

    def cells(self, shape):
        return grid(shape)

    def never(self, shape):
        row, column = grid(shape)
        return column < 2 * row


class Neurons(Own):
    """Whole neurons."""

    def cells(self, shape):
        row, _ = grid(shape)
        return torch.zeros_like(row), row


class Uneven(Own):
    """The first input, the next two, the last three: of all neurons."""

    def cells(self, shape):
        row, column = grid(shape)
        return torch.zeros_like(row), torch.tensor([0, 1, 1, 2, 2, 2])[column]


class Halves(Own):
    """Of every two neurons as one, so many pairs of inputs."""

    def cells(self, shape):
        row, column = grid(shape)
        return row // 2, column // 2


class Corners(Own):
    """Diagonals: cells that are no rows times inputs."""

    def cells(self, shape):
        row, column = grid(shape)
        return torch.zeros_like(row), (column - row) % shape[1]


class Bent(Own):
    """Cells of a weight, and of two in different rows and columns."""

    def cells(self, shape):
        row, column = grid(shape)
        number = row * shape[1] + column
        number[1, 1] = 0
        number[number > shape[1] + 1] -= 1
        return torch.zeros_like(row), number


OWN = {
    "per_input": PerInput(2), "pairs": Pairs(3), "squares": Squares(3), "band": Band(5), "ends": Ends(2),
    "triangle": Triangle(3), "neurons": Neurons(2), "uneven": Uneven(2), "halves": Halves(1), "corners": Corners(3),
    "bent": Bent(4),
}  # fmt: skip
NO_GRID = ("corners", "bent")
LAYERS = {
    "plain": lambda: random_layer(60, inputs=6, out=4, bias=False),
    "bias": lambda: random_layer(61, inputs=6, out=4),
    "cascade": lambda: cascade_layer(62, inputs=6, out=4),
    "rank_deficient": lambda: random_layer(63, samples=4, inputs=6, out=4),
}
SOLVERS = {**RECONSTRUCTORS, "branch_and_bound": (lambda: BranchAndBound(max_inputs=24), ())}


@functools.cache
def optimum(layer, pattern):
    """The problem and its least value, by trying every mask with a table of all subsets of each neuron."""
    problem = Reconstruction(LAYERS[layer](), OWN[pattern])
    table = np.zeros((4, 64))
    for m, bits in itertools.product(range(4), range(64)):
        on = [j for j in range(6) if bits >> j & 1]
        if on:
            block, right = problem.gram[on][:, on].numpy(), problem.cross[m, on].numpy()
            table[m, bits] = -right @ np.linalg.lstsq(block, right, rcond=None)[0]
    layout = Layout.of(problem.pattern, SHAPE)
    allowed = [(~never).nonzero()[:, 0].tolist() for never in layout.never]
    each = [itertools.combinations(cells, min(layout.quota, len(cells))) for cells in allowed]
    size = layout.never.shape[1]
    kept = [[sum(1 << (group * size + c) for c in choice) for choice in chosen] for group, chosen in enumerate(each)]
    masks = np.array([sum(pick) for pick in itertools.product(*kept)], dtype=np.int64)
    held = (masks[:, None, None] >> layout.cell.numpy()) & 1
    bits = (held << np.arange(6)).sum(2)
    return problem, float(table[np.arange(4), bits].sum(1).min() + problem.energies.sum())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("pattern", OWN)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_takes_it_or_says_truly_why_not(solver, pattern, layer):
    problem, least = optimum(layer, pattern)
    made = SOLVERS[solver][0]()
    if pattern in NO_GRID and solver in ("exact_obs", "swap_search", "then", "best_of", "branch_and_bound"):
        with pytest.raises(TypeError, match=r"takes patterns whose cells are single weights, or some rows times some"):
            solve(problem, made)
        return
    solution = solve(problem, made)
    assert solution.status in (Status.CONVERGED, Status.MAX_ITER)
    assert solution.certificate.violation == 0
    slack = 1e-9 * problem.layer.energy
    assert solution.certificate.bound <= least + slack
    assert solution.certificate.value >= least - slack
    if solver == "branch_and_bound":
        assert solution.status is Status.CONVERGED
        assert solution.certificate.value <= least + slack
    if solver == "best" and layer != "rank_deficient" and pattern not in NO_GRID:
        assert solution.certificate.value <= least + 0.05 * problem.layer.energy


@pytest.mark.parametrize("pattern", NO_GRID)
def test_a_refusal_names_solvers_that_do_take_it(pattern):
    problem = optimum("bias", pattern)[0]
    for solver in (ExactOBS(), SwapSearch(), BranchAndBound(), Refit(ExactOBS()), Then(Magnitude(), SwapSearch())):
        with pytest.raises(TypeError) as caught:
            solve(problem, solver)
        said = re.search(r"are not\. (.*) take it$", str(caught.value)).group(1)
        for name in re.findall(r"\w+", said.replace(" and ", " ")):
            other = Refit(Magnitude()) if name == "Refit" else getattr(solvers, name)()
            assert solve(problem, other).certificate.violation == 0
    # what swaps would have done is done without, under the name of what runs; what is asked of swaps is refused
    for preset in (Balanced, Best):
        assert solve(problem, preset()).solver.startswith("RisingPenalty(")
        with pytest.raises(ValueError, match=rf"{preset.__name__}\(rounds=3\): rounds does not apply to"):
            solve(problem, preset(rounds=3))
        with pytest.raises(ValueError, match=r"grow does not apply"):
            solve(problem, Refit(preset(grow=1.3)))


def test_nobody_works_before_it_is_refused():
    @dataclass(frozen=True)
    class Works:
        def solve(self, problem, start=None):
            raise AssertionError("the work has begun")

    small, large = optimum("bias", "corners")[0], Reconstruction(random_layer(0, inputs=31), Unstructured(0.5))
    for problem, solver, error in (
        (small, BestOf(Works(), SwapSearch()), TypeError),
        (small, Then(Works(), SwapSearch()), TypeError),
        (small, BestOf(Works(), ExactOBS()), TypeError),
        (small, BestOf(Works(), Balanced(rounds=2)), ValueError),
        (large, BestOf(Works(), BranchAndBound()), ValueError),
        (optimum("bias", "per_input")[0], BestOf(Works(), ExactOBS(memory=1.0)), MemoryError),
        (optimum("bias", "per_input")[0], BestOf(Works(), BranchAndBound(max_inputs=23)), ValueError),
        (cp.OptimalBrainSurgeon(random_layer(), torch.eye(4, 6) > 0), BestOf(Works(), KKT(max_inputs=3)), ValueError),
        (cp.NeuronMerging(torch.eye(3), torch.eye(3), keep=2), Then(Works(), Exchange(memory=1.0)), MemoryError),
    ):
        with pytest.raises(error):
            solve(problem, solver)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("make", [Channels, lambda keep: Blocks((2, 3), keep), lambda keep: NM(int(3 * keep), 3)])
def test_all_and_nothing(make, solver):
    layer, made = LAYERS["bias"](), SOLVERS[solver][0]()
    whole, none = (solve(Reconstruction(layer, make(keep)), made) for keep in (1.0, 0.0))
    assert whole.certificate.value <= 1e-5 * layer.energy
    assert not none.x[:, :6].any()
    torch.testing.assert_close(none.x[:, 6], layer.target_mean)
    assert whole.certificate.violation == none.certificate.violation == 0


def test_the_default_prunes_a_network_by_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(50, 6, generator=torch.Generator().manual_seed(1))]
    for pattern in (PerInput(2), Neurons(3), Pairs(4), Corners(3)):
        pruned, report = cp.prune(model, batches, lambda layer, p=pattern: Reconstruction(layer, p))
        assert [row.certificate.violation for row in report.rows] == [0, 0]
        assert [row.kept for row in report.rows] == [row.wanted for row in report.rows]
        assert report.network.measured <= report.network.guaranteed * (1 + 1e-6)
        if isinstance(pattern, PerInput):
            assert ((pruned[0].weight != 0).sum(0) == 2).all()


# what a layout says


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("make", [*PATTERNS.values(), *(lambda p=p: p for p in OWN.values())], ids=[*PATTERNS, *OWN])
def test_a_layout_says_what_the_pattern_does(make, kernel, monkeypatch):
    pattern, shape = make(), (5, 8) if make in PATTERNS.values() else SHAPE
    if kernel == 3:
        shape = (shape[0], 3 * shape[1])
        if isinstance(pattern, Support):
            pattern = Support(torch.ones(shape, dtype=torch.bool))
        if isinstance(pattern, Uneven):
            return
    monkeypatch.setattr("convexprune.layout.KNOWN", ())  # the package's own are checked here, once
    check_pattern(pattern, shape, kernel)
    layout = Layout.of(pattern, shape, kernel)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = torch.rand(shape, generator=generator, dtype=torch.float64)
        mask = select(pattern, scores, kernel)
        kept = torch.zeros(layout.never.numel(), dtype=torch.bool)
        kept[layout.cell[mask]] = True
        assert torch.equal(kept[layout.cell], mask)  # whole cells
        assert not kept[layout.never.flatten()].any()
        allowed = (~layout.never).sum(1).clamp(max=layout.quota)
        assert torch.equal(kept.reshape(layout.never.shape).sum(1), allowed)
        loose = torch.rand(shape, generator=generator) < 0.5
        held = torch.zeros(layout.never.numel(), dtype=torch.bool)
        held[layout.cell[loose]] = True
        held = held.reshape(layout.never.shape)
        over = ((held & ~layout.never).sum(1) - layout.quota).clamp(min=0).sum() + (held & layout.never).sum()
        assert excess(pattern, loose, kernel) == over
        assert excess(pattern, mask, kernel) == 0
    if (grid := layout.grid) is None:
        assert isinstance(pattern, Corners | Bent)
        return
    assert torch.equal(grid.spread(grid.group), layout.group)
    assert torch.equal(grid.spread(grid.allowed), ~layout.never.flatten()[layout.cell])
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    assert torch.equal(grid.unbundled(grid.bundled(values)), values)
    sums = torch.zeros(layout.never.numel(), dtype=torch.float64).index_add_(0, layout.cell.flatten(), values.flatten())
    torch.testing.assert_close(grid.spread(grid.summed(grid.bundled(values))), sums[layout.cell])
    alone = [len(torch.unique((grid.group == g).nonzero()[:, 0])) == 1 for g in range(layout.groups)]
    assert (grid.apart is not None) == all(alone)
    if grid.apart is not None:
        for own, numbers in zip(grid.group, grid.apart, strict=True):
            assert torch.equal(own[:, None] == own, numbers[:, None] == numbers)
            assert int(numbers.max()) + 1 == len(torch.unique(own))


def test_ranks_count_within_the_group():
    scores = torch.tensor([3.0, 1.0, 3.0, 2.0, 5.0, 4.0])
    group = torch.tensor([1, 0, 1, 1, 0, 3])
    assert ranks(scores, group).tolist() == [0, 1, 1, 2, 0, 0]


@pytest.mark.parametrize("block", [1, 2, 3, 4, 128])
@pytest.mark.parametrize(
    "pattern", [Unstructured(13), PerRow(5), NM(2, 4), PerInput(2), Pairs(7), Squares(9), NM(1, 2)], ids=repr
)
def test_the_sweep_keeps_exact_counts_whatever_its_blocks(pattern, block):
    problem = Reconstruction(random_layer(70, inputs=12, out=4), pattern)
    kept = solve(problem, ColumnSweep(block=block)).x[:, :12] != 0
    layout = Layout.of(pattern, (4, 12))
    counts = torch.zeros(layout.groups, dtype=torch.long).index_add_(0, layout.group[kept], kept[kept].long())
    assert (counts == layout.quota).all()


def test_the_sweep_decides_a_group_when_it_reaches_it():
    """Of N:M along the channels of a convolution too, where the inputs of a group lie apart."""
    layer = random_layer(71, inputs=12, out=40, samples=2000, bias=False)
    mixed = layer.inputs @ torch.randn(12, 36, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixed += 0.3 * torch.randn(2000, 36, generator=torch.Generator().manual_seed(4))
    weight = torch.randn(40, 36, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layer = replace(Layer.from_samples(weight, mixed), kernel=3)
    # weights that must stay, none here, make it choose the whole mask at once
    at_once = Reconstruction(layer, NM(1, 4), always=torch.zeros(40, 36, dtype=torch.bool))
    values = [solve(each, ColumnSweep()).certificate.value for each in (Reconstruction(layer, NM(1, 4)), at_once)]
    assert values[0] < 0.9 * values[1]


# what is no pattern


class Torn(PerInput):
    """Its `unfolded` turns the layer around."""

    def unfolded(self, cells, shape, kernel=1):
        return super().unfolded(cells, shape, kernel).flip(1)


class Lost(Own):
    """A cell of no weight."""

    def cells(self, shape):
        row, column = grid(shape)
        return torch.zeros_like(row), row * (shape[1] + 1) + column


class Flat(PerInput):
    """No groups."""

    def folded(self, values, kernel=1):
        return super().folded(values).flatten()


class Small(PerInput):
    """A mask of another shape."""

    def unfolded(self, cells, shape, kernel=1):
        return cells


class Mean(Neurons):
    """Averages where sums are asked for."""

    def folded(self, values, kernel=1):
        return values.mean(1)[None]


@pytest.mark.parametrize(
    ("pattern", "error", "said"),
    [
        (0.5, TypeError, "0.5 is not a pattern: it lacks quota, folded, unfolded; give one such as PerRow"),
        (None, TypeError, "None is not a pattern"),
        ("2:4", TypeError, "'2:4' is not a pattern"),
        (torch.ones(4, 6, dtype=torch.bool), TypeError, "is not a pattern: it lacks quota"),
        (Unstructured, TypeError, "the pattern is the class Unstructured; give an object of it"),
        (Torn(2), ValueError, "unfolded does not give back to each weight the cell that folded adds it to"),
        (Lost(3), ValueError, "unfolded does not give back"),
        (Mean(2), ValueError, "unfolded does not give back"),
        (Flat(2), ValueError, r"folded gives \(24,\), which is not \(groups, cells\)"),
        (Small(2), ValueError, r"unfolded gives \(6, 4\) for a layer of shape \(4, 6\)"),
        (PerInput(2.5), ValueError, "quota is 2.5; it must be a count >= 0"),
        (PerInput(-1), ValueError, "quota is -1; it must be a count >= 0"),
        (Channels(7), ValueError, "keep is 7, but the layer's channels are only 6"),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_problem(pattern, error, said):
    with pytest.raises(error, match=said):
        Reconstruction(random_layer(inputs=6), pattern)


@pytest.mark.parametrize("pattern", [Band(5), Ends(2), Support(torch.eye(4, 6) == 1)])
def test_a_weight_that_can_never_be_kept_cannot_have_to_stay(pattern):
    """It used to be dropped without a word."""
    always = torch.zeros(SHAPE, dtype=torch.bool)
    always[0, 0] = always[2, 0] = True
    with pytest.raises(ValueError, match=r"(?s)`always` marks weights that .* can never keep"):
        Reconstruction(random_layer(inputs=6), pattern, always)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name not in ("magnitude", "activation_magnitude")])
@pytest.mark.parametrize("pattern", ["per_input", "pairs", "ends", "halves", "neurons"])
def test_weights_that_must_stay_do(pattern, solver):
    always = torch.zeros(SHAPE, dtype=torch.bool)
    always[0, 1] = always[3, 4] = True
    problem = Reconstruction(LAYERS["bias"](), OWN[pattern], always)
    x = solve(problem, SOLVERS[solver][0]()).x[:, :6]
    assert (x[always] != 0).all()
    assert problem.violation(x) == 0


def test_blocks_and_channels_reach_a_lower_error_than_admm_alone():
    layer = random_layer(80, inputs=48, out=32, samples=400)
    for pattern in (Blocks((4, 4), 0.4), Blocks((1, 4), 0.4), Blocks((8, 1), 0.4), Channels(0.5), PerInput(12)):
        problem = Reconstruction(layer, pattern)
        presets = (cp.ADMM(), Balanced(), Best(), Fast())
        admm, balanced, best, fast = (solve(problem, preset).certificate.value for preset in presets)
        assert best <= 1.005 * min(admm, balanced)
        assert balanced <= 1.005 * admm
        assert fast <= 1.005 * admm
