"""Laws of a module's groups as one problem: sums, bounds, one count for all groups, and solvers that share it out."""

import copy
import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import cascade_layer, random_layer
from table import PATTERNS, RECONSTRUCTIONS, RECONSTRUCTORS, some
from torch import nn

import convexprune as cp
from convexprune.forms import GroupedLeastSquares, SharedPattern, StackedProblem, declared
from convexprune.layer import Layer
from convexprune.network import read, write
from convexprune.patterns import NM, Blocks, PerRow, Support, Unstructured, counted, joined, spans
from convexprune.problem import LayerProblem, judge
from convexprune.problems import (
    L1Reconstruction,
    NetTrim,
    OptimalBrainSurgeon,
    Reconstruction,
    Stacked,
    StackedReconstruction,
    stacked,
)
from convexprune.report import described
from convexprune.report.row import Moments
from convexprune.report.shares import Share, Shares
from convexprune.solution import Attempt, Certificate, Status
from convexprune.solve import UNPROVEN, default_solver, solve
from convexprune.solvers import (
    ADMM,
    CVXPY,
    ActivationMagnitude,
    Balanced,
    Bounded,
    BranchAndBound,
    ClosedForm,
    ColumnSweep,
    ExactOBS,
    Fast,
    Groupwise,
    Magnitude,
    RisingPenalty,
)
from convexprune.solvers.least_squares.grams import Grams

SEEDS = st.integers(0, 2**32 - 1)
LAW = settings(max_examples=15)
WIDE = {"inputs": 8, "out": 2}


def normal(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scaled_layers(seed, groups, scales=(1.0, 0.2, 3.0, 0.5), **sizes):
    """Layers whose inputs have other energies, so that an even division is a bad one."""
    layers = []
    for group in range(groups):
        layer = random_layer(seed + group, **sizes)
        x = layer.inputs * scales[group % len(scales)]
        layers.append(Layer.from_samples(layer.weight, x, layer.bias, layer.activation, f"conv[{group}]"))
    return layers


def reconstructions(pattern, seed=50, groups=3, **sizes):
    return stacked([Reconstruction(layer, pattern) for layer in scaled_layers(seed, groups, **sizes)])


CONVEX = {
    "net_trim": lambda: [NetTrim(random_layer(seed), epsilon=0.1) for seed in range(3)],
    "net_trim_linear": lambda: [NetTrim(random_layer(seed, activation=None), epsilon=0.2) for seed in range(3, 5)],
    "l1": lambda: [L1Reconstruction(random_layer(seed, bias=False), lam=0.1) for seed in range(2)],
    "obs": lambda: [OptimalBrainSurgeon(random_layer(seed), removed=some(0.4, seed)) for seed in range(3)],
}
APART = {  # reconstructions that have no pattern in common
    "fractions": lambda: [Reconstruction(random_layer(seed, **WIDE), Unstructured(0.2 + seed / 10)) for seed in (0, 1)],
    "kinds": lambda: [Reconstruction(random_layer(2, **WIDE), p) for p in (PerRow(3), Unstructured(5))],
}
JOINT = {
    "fraction": lambda: reconstructions(Unstructured(0.3), **WIDE),
    "counts": lambda: stacked(
        [
            Reconstruction(layer, Unstructured(count))
            for layer, count in zip(scaled_layers(60, 3, **WIDE), (1, 7, 4), strict=True)
        ]
    ),
    "one_neuron": lambda: reconstructions(Unstructured(0.4), 61, 4, inputs=5, out=1),
    "without_bias": lambda: reconstructions(Unstructured(0.5), 62, 2, bias=False, **WIDE),
    "cascade": lambda: stacked([Reconstruction(cascade_layer(s, **WIDE), Unstructured(0.3)) for s in (63, 64)]),
    "per_row": lambda: reconstructions(PerRow(3), 65, **WIDE),
    "two_of_four": lambda: reconstructions(NM(2, 4), 66, **WIDE),
    "blocks": lambda: reconstructions(Blocks((2, 2), 0.5), 67, **WIDE),
    "support": lambda: stacked(
        [Reconstruction(layer, Support(some(0.5, g, (2, 8)))) for g, layer in enumerate(scaled_layers(68, 3, **WIDE))]
    ),
    "always": lambda: stacked(
        [
            Reconstruction(layer, Unstructured(0.3), some(0.25, 4, (2, 8)) if g == 1 else None)
            for g, layer in enumerate(scaled_layers(69, 3, **WIDE))
        ]
    ),
    "importance": lambda: stacked(
        [
            Reconstruction(layer, Unstructured(0.3), importance=torch.tensor([0.1, 5.0]) if g else None)
            for g, layer in enumerate(scaled_layers(70, 3, **WIDE))
        ]
    ),
    "few_samples": lambda: reconstructions(Unstructured(0.3), 71, samples=5, **WIDE),
}
STACKS = {
    **{name: lambda parts=parts: stacked(parts()) for name, parts in (CONVEX | APART).items()},
    **JOINT,
}


def point(problem, seed, spread):
    return problem.dense + spread * normal(seed, problem.shape)


def witness_of(part, seed):
    shape = tuple(part.outputs.shape) if isinstance(part, NetTrim) else part.shape
    return normal(seed, shape)


# A stack is the sum of its parts


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_the_sum_of_its_parts(name):
    problem = STACKS[name]()
    assert isinstance(problem, LayerProblem)
    assert isinstance(problem, StackedReconstruction if name in JOINT else Stacked)
    assert problem.shape == tuple(problem.dense.shape)
    x = point(problem, 0, 0.3)
    rows = problem.rows(x)
    assert torch.equal(torch.cat(rows), x)
    assert torch.equal(torch.cat([part.dense for part in problem.parts]), problem.dense)
    assert problem.value(x) == pytest.approx(
        sum(part.value(own) for part, own in zip(problem.parts, rows, strict=True))
    )
    errors = torch.cat([part.output_errors(own) for part, own in zip(problem.parts, rows, strict=True)])
    assert torch.equal(problem.output_errors(x), errors)


@pytest.mark.parametrize("name", [*CONVEX, *APART])
@LAW
@given(seed=SEEDS, log_spread=st.floats(-4, 0), moved=st.integers(0, 2))
def test_a_stack_is_feasible_exactly_where_every_part_is(name, seed, log_spread, moved):
    problem = STACKS[name]()
    x = problem.dense.clone()
    if isinstance(problem.parts[0], (OptimalBrainSurgeon, Reconstruction)):
        x = torch.zeros_like(x)
    own = problem.rows(x)[moved % len(problem.parts)]
    own += 10**log_spread * normal(seed, own.shape)
    each = [part.violation(rows) for part, rows in zip(problem.parts, problem.rows(x), strict=True)]
    assert problem.violation(x) == max(each)
    x[0, 0] = math.nan
    assert problem.violation(x) == math.inf


@pytest.mark.parametrize("name", [name for name in CONVEX if name != "obs"])
@LAW
@given(seed=SEEDS, log_scale=st.floats(-6, 6))
def test_weak_duality_for_any_witness(name, seed, log_scale):
    problem = STACKS[name]()
    witness = tuple(
        None if (seed + g) % 4 == 0 else 10**log_scale * witness_of(part, seed + g)
        for g, part in enumerate(problem.parts)
    )
    points = [problem.dense * factor for factor in (1.0, 0.99, 0.9, 0.0)]
    values = [problem.value(x) for x in points if problem.violation(x) == 0]
    assert values
    assert problem.lower_bound(witness) <= min(values)
    assert problem.lower_bound(None) <= min(values)


@pytest.mark.parametrize("name", CONVEX)
def test_clarabel_agrees_on_a_stack_as_a_whole(name):
    problem = STACKS[name]()
    whole = solve(problem, CVXPY("CLARABEL"))
    parts = [solve(part, CVXPY("CLARABEL")) for part in problem.parts]
    assert whole.certificate.value == pytest.approx(sum(each.certificate.value for each in parts), rel=1e-6)
    assert whole.certificate.violation <= 1e-6
    assert whole.certificate.relative_gap <= 1e-5  # its witness is one for each part
    apart = solve(problem, Groupwise(ClosedForm() if name == "obs" else ADMM(eps_rel=1e-6)))
    assert apart.certificate.value == pytest.approx(whole.certificate.value, rel=1e-5)
    assert apart.certificate.relative_gap <= 1e-4
    assert apart.status is Status.CONVERGED


@pytest.mark.parametrize("witness", [(None,), (None,) * 4, torch.zeros(12, 7), [None] * 3])
def test_a_witness_is_one_for_each_part(witness):
    for problem in (STACKS["net_trim"](), STACKS["fraction"]()):
        with pytest.raises(ValueError, match="give a tuple of 3"):
            problem.lower_bound(witness)


def test_what_is_no_stack_is_refused():
    layer = random_layer()
    with pytest.raises(ValueError, match="no problems"):
        stacked([])
    with pytest.raises(ValueError, match=r"different problems: L1Reconstruction \(4, 7\), NetTrim \(4, 7\)"):
        stacked([NetTrim(layer, 0.1), L1Reconstruction(layer, 0.1)])
    with pytest.raises(ValueError, match=r"Reconstruction \(4, 7\), Reconstruction \(5, 7\)"):
        stacked([Reconstruction(random_layer(out=out), Unstructured(0.5)) for out in (4, 5)])
    with pytest.raises(ValueError, match="different patterns"):
        StackedReconstruction(tuple(APART["kinds"]()))
    alone = Reconstruction(layer, Unstructured(0.5))
    assert stacked([alone]) is alone


@dataclass(frozen=True, eq=False)
class Fined(Reconstruction):
    """A reconstruction that pays for its weights: no longer of the form."""

    def value(self, x):
        return super().value(x) + 0.1 * float(x.square().sum())

    def lower_bound(self, witness):
        return 0.0


def test_a_subclass_that_minimises_something_else_is_not_taken_for_a_reconstruction():
    """The bound of a StackedReconstruction is the parts' perspective bound, which does not know of the fine."""
    parts = [Fined(random_layer(seed), Unstructured(0.5)) for seed in range(2)]
    assert type(stacked(parts)) is Stacked
    with pytest.raises(TypeError, match=r"Fined declares no form\. Its parent Reconstruction is of the form Persp"):
        StackedReconstruction(tuple(parts))
    with pytest.raises(TypeError, match="Balanced takes GroupedLeastSquares problems; Fined declares no form"):
        solve(stacked(parts), Groupwise(Balanced()))


def test_the_forms_of_a_stack():
    assert declared(STACKS["net_trim"]()) == (StackedProblem,)
    assert declared(JOINT["fraction"]()) == (SharedPattern, GroupedLeastSquares, StackedProblem)


@dataclass(frozen=True, eq=False)
class Liar:
    """Claims to have converged, whatever it returns."""

    x: torch.Tensor
    witness: object = None

    def solve(self, problem, start=None):
        return Attempt(self.x, self.witness, Status.CONVERGED, 1)


@pytest.mark.parametrize("name", ["fraction", "counts", "per_row", "blocks", "support"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9, math.nan])
def test_a_lying_solver_is_caught(name, scale):
    problem = JOINT[name]()
    certificate = solve(problem, Liar(problem.dense)).certificate
    assert certificate.value < 1e-9
    assert certificate.violation > 0
    witness = tuple(scale * normal(g, part.target.shape) for g, part in enumerate(problem.parts))
    best = solve(problem, Groupwise(Fast())).certificate
    assert best.violation == 0
    for garbage in (witness, tuple((v, v.abs().mean(0)) for v in witness), (witness[0], None, None)):
        assert solve(problem, Liar(problem.dense, garbage)).certificate.bound <= best.value


# One pattern over all groups


def test_a_count_is_the_modules():
    problem = JOINT["fraction"]()
    weights = problem.target.numel()
    assert problem.pattern == Unstructured(0.3)
    assert int(problem.select(problem.target.square()).sum()) == round(0.3 * weights) == 14
    assert JOINT["counts"]().pattern == Unstructured(12)
    even = torch.zeros(problem.shape)
    even[:, :2] = 1.0  # 2 of 8 in every neuron: 12 in all
    assert problem.violation(even) == 0
    even[0, :5] = 1.0
    assert problem.violation(even) == pytest.approx(1 / weights)  # 15, and it is 14 that may stay


@pytest.mark.parametrize(
    ("patterns", "whole"),
    [
        ([Unstructured(0.3)] * 3, Unstructured(0.3)),
        ([Unstructured(1), Unstructured(5)], Unstructured(6)),
        ([Unstructured(0.3), Unstructured(0.4)], None),
        ([Unstructured(1), Unstructured(1.0)], None),
        ([PerRow(2), PerRow(2)], PerRow(2)),
        ([PerRow(1), PerRow(1.0)], None),
        ([PerRow(2), PerRow(3)], None),
        ([NM(2, 4)] * 2, NM(2, 4)),
        ([Blocks((1, 2), 3), Blocks((1, 2), 4)], Blocks((1, 2), 7)),
        ([Blocks((1, 2), 3), Blocks((2, 2), 4)], None),
        ([Blocks((1, 2), 0.5)] * 2, Blocks((1, 2), 0.5)),
        ([PerRow(2), Unstructured(2)], None),
    ],
)
def test_how_patterns_widen(patterns, whole):
    assert repr(joined(patterns)) == repr(whole)


def test_supports_widen_to_one_below_the_other():
    masks = [some(0.5, seed, (2, 3)) for seed in range(3)]
    assert torch.equal(joined([Support(mask) for mask in masks]).mask, torch.cat(masks))


@LAW
@given(seed=SEEDS, keep=st.floats(0, 1))
def test_shares_of_a_count_add_up(seed, keep):
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for pattern in (Unstructured(keep), Blocks((2, 2), keep)):
        assert spans(pattern)
        mask = cp.patterns.select(pattern, scores)
        shares = [counted(pattern, own) for own in torch.split(mask, 2)]
        again = torch.cat([cp.patterns.select(p, own) for p, own in zip(shares, torch.split(scores, 2), strict=True)])
        assert torch.equal(again, mask)
    assert not any(spans(pattern) for pattern in (PerRow(2), NM(2, 4), Support(some(0.5))))


@pytest.mark.parametrize("name", JOINT)
@LAW
@given(seed=SEEDS, log_scale=st.floats(-6, 3), with_d=st.booleans())
def test_the_joint_bound_holds_for_any_witness(name, seed, log_scale, with_d):
    problem = JOINT[name]()
    optimum = best_value(name)
    witness = []
    for g, part in enumerate(problem.parts):
        v = part.target + 10**log_scale * normal(seed + g, part.target.shape)
        d = (
            part.gram.diagonal()
            * torch.rand(8, generator=torch.Generator().manual_seed(seed + g)).double()[: v.shape[1]]
        )
        witness.append((v, d) if with_d else v)
    assert 0 <= problem.lower_bound(tuple(witness)) <= optimum * (1 + 1e-9)
    assert problem.lower_bound(None) <= optimum * (1 + 1e-9)


KNOWN = {}


def best_value(name):
    """The optimum of a small problem."""
    if name not in KNOWN:
        KNOWN[name] = solve(JOINT[name](), BranchAndBound()).certificate.value
    return KNOWN[name]


def test_the_optimum_over_blocks_is_the_best_of_all_choices_of_them():
    problem = JOINT["blocks"]()
    cells = problem.pattern.folded(problem.target, problem.kernel).shape[1]
    keep = problem.pattern.quota(tuple(problem.target.shape), problem.kernel)
    least = min(
        value_on(problem, problem.pattern.unfolded(torch.tensor([[c in kept for c in range(cells)]]), (6, 8)))
        for kept in itertools.combinations(range(cells), keep)
    )
    assert best_value("blocks") == pytest.approx(least)


def value_on(problem, mask):
    """The least value on a support, by solving each neuron's normal equations."""
    total = 0.0
    for part, rows in zip(problem.parts, torch.split(mask, len(mask) // len(problem.parts)), strict=True):
        for m, kept in enumerate(rows):
            block, right = part.gram[kept][:, kept], part.cross[m, kept]
            total += float(part.energies[m] - right @ torch.linalg.lstsq(block, right[:, None]).solution[:, 0])
    return total


def least_values(part, neuron):
    """The least value of a neuron with each count of weights, over all its supports."""
    width = part.target.shape[1]
    values = [math.inf] * (width + 1)
    for kept in itertools.chain.from_iterable(itertools.combinations(range(width), k) for k in range(width + 1)):
        mask = torch.zeros_like(part.target, dtype=torch.bool)
        mask[neuron, list(kept)] = True
        others = float(part.energies.sum() - part.energies[neuron])
        values[len(kept)] = min(values[len(kept)], value_on(stacked([part]), mask) - others)
    return values


@pytest.mark.parametrize(("groups", "out", "inputs"), [(3, 1, 3), (2, 2, 3), (3, 1, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_division_is_found(groups, out, inputs, seed):
    """Brute force over every support of every neuron and every division of every count."""
    layers = scaled_layers(100 * seed, groups, out=out, inputs=inputs)
    parts = [Reconstruction(layer, Unstructured(1.0)) for layer in layers]
    curves = [least_values(part, neuron) for part in parts for neuron in range(out)]
    best = [math.inf] * (groups * out * inputs + 1)
    for counts in itertools.product(range(inputs + 1), repeat=groups * out):
        best[sum(counts)] = min(best[sum(counts)], sum(curve[k] for curve, k in zip(curves, counts, strict=True)))
    for count, wanted in enumerate(best):
        shares = [count // groups + (g < count % groups) for g in range(groups)]
        problem = stacked([Reconstruction(layer, Unstructured(k)) for layer, k in zip(layers, shares, strict=True)])
        even = sum(solve(part, BranchAndBound()).certificate.value for part in problem.parts)
        for solver in (Groupwise(BranchAndBound()), None):
            certificate = solve(problem, solver).certificate
            assert certificate.value == pytest.approx(wanted, rel=1e-8, abs=1e-9)
            assert certificate.value <= even + 1e-9
            assert certificate.violation == 0
            assert certificate.bound <= certificate.value


def pattern_of(name):
    return name if name in PATTERNS else "unstructured"


@pytest.mark.parametrize(
    ("solver", "name"),
    [(s, name) for s in RECONSTRUCTORS for name in JOINT if (s, pattern_of(name)) in RECONSTRUCTIONS],
)
def test_every_solver_solves_a_module(solver, name):
    problem = JOINT[name]()
    solution = solve(problem, Groupwise(RECONSTRUCTORS[solver][0]()))
    certificate = solution.certificate
    assert certificate.violation == 0
    assert certificate.bound <= certificate.value
    assert certificate.value >= best_value(name) - 1e-9 * sum(part.layer.energy for part in problem.parts)
    assert solution.status in (Status.CONVERGED, Status.MAX_ITER)
    if problem.always is not None:
        kept = solution.x[:, : problem.target.shape[1]] != 0
        assert bool(kept[problem.always].all())


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("solver", [Balanced(), cp.Best(), ExactOBS(), Groupwise(Bounded(Balanced()))])
def test_heuristics_are_near_the_optimum(solver, name):
    problem = JOINT[name]()
    energy = sum(float(part.energies.sum()) for part in problem.parts)
    assert solve(problem, solver).certificate.value <= best_value(name) + 0.03 * energy


WHOLE = {
    "unstructured": Unstructured(0.4),
    "per_row": PerRow(3),
    "two_of_four": NM(2, 4),
    "blocks": Blocks((1, 2), 0.5),
}
AT_ONCE = [
    (solver, pattern)
    for solver, pattern in RECONSTRUCTIONS
    if pattern in WHOLE and getattr(RECONSTRUCTORS[solver][0](), "takes", None) is GroupedLeastSquares
]


def split_layer(pattern):
    """A layer, and the same rows as three groups that have one Gram matrix."""
    layer = random_layer(80, out=6, inputs=8)
    groups = [
        replace(layer, weight=layer.weight[own], bias=layer.bias[own])
        for own in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    whole = Reconstruction(layer, WHOLE[pattern])
    return whole, stacked([Reconstruction(group, WHOLE[pattern]) for group in groups])


@pytest.mark.parametrize("pattern", WHOLE)
def test_groups_with_one_gram_matrix_are_an_ordinary_layer(pattern):
    whole, parts = split_layer(pattern)
    assert parts.pattern == whole.pattern
    x = point(whole, 1, 0.2)
    assert parts.value(x) == pytest.approx(whole.value(x))
    assert parts.violation(x) == whole.violation(x) > 0
    scores = whole.target.square()
    assert torch.equal(parts.select(scores), whole.select(scores))
    for witness in (None, normal(2, whole.target.shape)):
        own = None if witness is None else parts.rows(witness)
        assert parts.lower_bound(own) == pytest.approx(whole.lower_bound(witness), abs=1e-9 * whole.layer.energy)


@pytest.mark.parametrize(("solver", "pattern"), AT_ONCE)
def test_groups_with_one_gram_matrix_are_solved_as_an_ordinary_layer(solver, pattern):
    whole, parts = split_layer(pattern)
    found = solve(parts, Groupwise(RECONSTRUCTORS[solver][0]())).certificate
    wanted = solve(whole, RECONSTRUCTORS[solver][0]()).certificate
    assert found.violation == wanted.violation == 0
    assert found.value == pytest.approx(wanted.value, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in JOINT if name != "few_samples"])
def test_the_program_in_cvxpy_admits_the_optimum_and_has_its_value(name):
    problem = JOINT[name]()
    x = solve(problem, Groupwise(Fast())).x
    width = problem.target.shape[1]
    formulation = problem.to_cvxpy()
    formulation.x.value = x.numpy()
    kept = formulation.problem.var_dict["kept"]
    cells = problem.pattern.folded((x[:, :width] != 0).double(), problem.kernel)
    mask = problem.pattern.mask if name == "support" else cells.reshape(-1) > 0
    kept.value = mask.reshape(-1).double().numpy()
    if problem.always is not None:
        kept.value = (mask | problem.always.reshape(-1)).double().numpy()
    assert formulation.problem.objective.value == pytest.approx(problem.value(x))
    assert all(constraint.violation().max() < 1e-9 for constraint in formulation.problem.constraints)
    witness = formulation.witness()
    torch.testing.assert_close(problem.completed(torch.cat(witness))[:, :width], x[:, :width])


def test_witnesses_of_the_groups_make_one_of_the_module():
    problem = reconstructions(Unstructured(0.3), 90, 4, samples=400, **WIDE)
    optimum = solve(problem, BranchAndBound()).certificate.value
    bound = solve(problem, Groupwise(Bounded(Balanced()))).certificate.bound
    assert 0 < problem.lower_bound(None) < bound <= optimum
    assert bound > 0.8 * optimum


def test_a_group_that_says_nothing_takes_nothing_from_the_bound():
    """A singular group in a cascade has no perspective bound; what is known of the others stands."""
    first, second = (random_layer(seed, samples=200, bias=False, **WIDE) for seed in (1, 2))
    singular = Layer.from_moments(first.weight, torch.ones(8, 8), 0.1 * first.cross, first.energies)
    parts = [Reconstruction(layer, Unstructured(4)) for layer in (singular, second)]
    assert parts[0].lower_bound(None) == 0
    alone = replace(parts[1], pattern=Unstructured(8)).lower_bound(None)
    assert stacked(parts).lower_bound(None) == pytest.approx(alone, rel=1e-9)
    assert alone > 0


# Solvers over groups


@LAW
@given(seed=SEEDS)
def test_products_with_each_neurons_own_matrix(seed):
    matrices = normal(seed, (4, 5, 5))
    weights = normal(seed + 1, (12, 5))
    grams = Grams.of(matrices, 12)
    each = torch.stack([w @ matrices[i // 3] for i, w in enumerate(weights)])
    torch.testing.assert_close(grams.product(weights), each)
    which = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:7]
    torch.testing.assert_close(grams[which].product(weights[which]), each[which])
    left, right = (torch.randint(5, (7, k), generator=torch.Generator().manual_seed(seed + k)) for k in (2, 3))
    bundles = normal(seed + 2, (12, 3, 5))
    each = torch.stack([rows @ matrices[i // 3] for i, rows in enumerate(bundles)])
    torch.testing.assert_close(grams.product(bundles), each)
    blocks = grams[which].blocks(left, right)
    for row, i in enumerate(which.tolist()):
        assert torch.equal(blocks[row], matrices[i // 3][left[row]][:, right[row]])


def test_cells_that_join_groups_with_other_gram_matrices_cannot_be_swapped():
    """One inverse serves the rows of a cell: it would be that of the first group's Gram matrix."""
    problem = JOINT["fraction"]()
    object.__setattr__(problem, "pattern", cp.Channels(3))  # of the module; `stacked` leaves channels to the groups
    for solver in (ExactOBS(), cp.SwapSearch(), BranchAndBound()):
        with pytest.raises(TypeError, match="takes patterns whose cells are single weights, or some rows times some"):
            solve(problem, solver)
    for solver in (Balanced(), cp.Best()):
        solution = solve(problem, solver)
        assert solution.solver.startswith("RisingPenalty(")
        assert (solution.x[:, :8] != 0).any(0).sum() == 3


@dataclass(frozen=True)
class Stops:
    """Returns the dense layer with a status for each call."""

    statuses: tuple
    calls: list

    def solve(self, problem, start=None):
        self.calls.append(start)
        status = self.statuses[len(self.calls) - 1]
        return Attempt(problem.dense.float(), None, status, len(self.calls), note=status.name)


def test_groupwise_says_the_worst_and_adds_up():
    problem, calls = STACKS["net_trim"](), []
    start = normal(0, problem.shape)
    solution = solve(
        problem, Groupwise(Stops((Status.MAX_ITER, Status.INFEASIBLE, Status.CONVERGED), calls)), start=start
    )
    assert solution.status is Status.NUMERICAL  # a claim without a witness
    assert solution.iterations == 1 + 2 + 3
    assert solution.note == f"1 of 3 groups: INFEASIBLE; {UNPROVEN}"
    assert solution.witness is None
    assert all(torch.equal(own, rows) for own, rows in zip(calls, problem.rows(start), strict=True))
    fine = solve(problem, Groupwise(Stops((Status.CONVERGED,) * 3, [])))
    assert (fine.status, fine.note) == (Status.CONVERGED, "CONVERGED")


def test_groupwise_is_written_as_it_is_called_and_takes_a_lone_problem():
    problem = Reconstruction(random_layer(), Unstructured(0.5))
    assert repr(Groupwise(Magnitude())) == "Groupwise(inner=Magnitude(), exact=0)"
    assert solve(problem, Groupwise(Magnitude())).x.equal(solve(problem, Magnitude()).x)
    with pytest.raises(ValueError, match="exact is -1"):
        Groupwise(Magnitude(), exact=-1)
    with pytest.raises(TypeError, match="Groupwise takes StackedProblem problems; NetTrim is of the form BallProblem"):
        solve(NetTrim(random_layer(), 0.1), Groupwise(ADMM()))
    with pytest.raises(TypeError, match="takes SparseLeastSquares problems"):
        solve(JOINT["fraction"](), ColumnSweep())
    with pytest.raises(ValueError, match=r"inner solver returned a point of shape \(2, 2\)"):
        solve(STACKS["l1"](), Groupwise(Liar(torch.zeros(2, 2))))


def test_magnitude_ranks_the_weights_of_the_module():
    problem = JOINT["fraction"]()
    x = solve(problem, Groupwise(Magnitude())).x[:, :8]
    assert torch.equal(x != 0, problem.select(problem.target.square()))
    x = solve(problem, Groupwise(ActivationMagnitude())).x[:, :8]
    power = torch.cat([part.gram.diagonal().expand(2, -1) for part in problem.parts])
    assert torch.equal(x != 0, problem.select(problem.target.square() * power))


def test_small_groups_are_solved_to_the_optimum_and_others_are_not():
    problem = JOINT["fraction"]()
    assert default_solver(problem) == Groupwise(Balanced(), exact=10)
    assert solve(problem).certificate.value == pytest.approx(best_value("fraction"))
    assert solve(problem).solver == repr(BranchAndBound(max_inputs=10))
    larger = reconstructions(Unstructured(0.3), out=2, inputs=11)
    assert torch.equal(solve(larger).x, solve(larger, Balanced()).x)
    blocks = JOINT["blocks"]()
    assert torch.equal(solve(blocks, Groupwise(Fast(), exact=10)).x, solve(blocks, Fast()).x)


@pytest.mark.parametrize("solver", [Balanced(), cp.Best(), ExactOBS(), RisingPenalty(), BranchAndBound()])
def test_dead_inputs_differ_from_group_to_group(solver):
    layers = []
    for seed in range(4):
        x = normal(seed, (60, 9))
        x[:, seed : 2 * seed] = 0.0
        layers.append(Layer.from_samples(normal(seed + 10, (1, 9)), x))
    problem = stacked([Reconstruction(layer, Unstructured(0.4)) for layer in layers])
    solution = solve(problem, solver)
    assert solution.status in (Status.CONVERGED, Status.MAX_ITER)
    assert solution.certificate.violation == 0
    dead = torch.cat([layer.gram.diagonal()[None] == 0 for layer in layers])
    assert not solution.x[dead].any()
    best = solve(problem, BranchAndBound()).certificate.value
    assert solution.certificate.value <= best + 0.03 * sum(layer.energy for layer in layers)


@pytest.mark.parametrize("solver", [None, Groupwise(Balanced()), Groupwise(ColumnSweep()), Groupwise(Fast())])
def test_a_group_without_second_moments_is_said(solver):
    gram = torch.eye(8, dtype=torch.float64)
    gram[:3, :3] = 1.9 * gram[:3, :3] - 0.9  # every pair is possible, the three together are not
    bad = Layer.from_moments(normal(0, (2, 8)), gram, torch.ones(2, 8), torch.ones(2))
    good = replace(random_layer(bias=False, **WIDE), inputs=None)
    assert (
        solve(stacked([Reconstruction(layer, PerRow(6)) for layer in (good, bad)]), solver).status is Status.NUMERICAL
    )


def test_a_stack_in_a_reports_words():
    assert described(JOINT["fraction"]()) == (
        "StackedReconstruction(parts=3 x Reconstruction(pattern=Unstructured(keep=0.3)), "
        "pattern=Unstructured(keep=0.3))"
    )
    assert described(STACKS["net_trim"]()) == "Stacked(parts=3 x NetTrim(epsilon=0.1))"
    assert STACKS["net_trim"]().needs_samples
    assert not JOINT["fraction"]().needs_samples
    moments = Moments.of([random_layer(1), random_layer(2, samples=3)])
    assert (moments.rank, moments.inputs, moments.condition) == (9, 12, math.inf)


# Networks


@pytest.fixture
def mobile():
    """The first layers of a MobileNet, and data whose channels have very different energies."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(), nn.Conv2d(16, 24, 1), nn.ReLU6(),
            nn.Conv2d(24, 24, 3, stride=2, groups=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
        ).eval()  # fmt: skip
        with torch.no_grad():
            model[0].weight *= torch.logspace(-1, 0.5, 16)[:, None, None, None]
    images = torch.randn(2, 12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return model, list(nn.functional.avg_pool2d(images.flatten(0, 1), 3, 1, 1).reshape(images.shape))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("solver", [None, Balanced(), Magnitude(), ColumnSweep()])
def test_a_depthwise_convolution_keeps_its_share_as_a_module(mobile, solver, mode):
    model, batches = mobile
    build = lambda layer: Reconstruction(layer, Unstructured(0.3))  # noqa: E731
    pruned, report = cp.prune(model, batches, build, solver, mode=mode)
    assert [row.name for row in report.rows] == ["0", "2", "4", "6", "9"]
    for row in report.rows:
        weight = pruned.get_submodule(row.name).weight
        assert int((weight != 0).sum()) == row.kept == row.wanted == math.floor(0.3 * weight.numel() + 0.5)
        assert row.certificate.violation == 0
        assert row.certificate.bound <= row.certificate.value
    depthwise = (pruned[2].weight != 0).flatten(1).sum(1)
    assert int(depthwise.sum()) == 43
    assert len(depthwise.unique()) > 2  # and not 3 of 9 in every channel
    # what the certificate says is what the layer does on the inputs that it was judged on
    layers = cp.capture(model if mode == "parallel" else pruned, batches, "2", dense=model)
    errors = torch.cat([layer.squared_errors(read(pruned, layer.name)) for layer in layers])
    assert float(errors.sum()) == pytest.approx(report.rows[1].certificate.value, rel=1e-6)


@pytest.mark.parametrize("solver", [None, ADMM()])
def test_the_groups_of_a_convex_problem_are_one_row(mobile, solver):
    model, batches = mobile
    pruned, report = cp.prune(model, batches, lambda layer: NetTrim(layer, 0.1), solver, names="6")
    (row,) = report.rows
    layers = cp.capture(model, batches, "6", keep_inputs=True)
    problem = stacked([NetTrim(layer, 0.1) for layer in layers])
    certificate = judge(problem, torch.cat([read(pruned, layer.name) for layer in layers]))
    assert (row.name, row.status) == ("6", Status.CONVERGED)
    assert row.certificate.value == pytest.approx(certificate.value)
    assert row.certificate.violation == certificate.violation <= 1e-5
    assert 0 <= row.certificate.relative_gap < 1e-3


@pytest.mark.parametrize("solver", [None, cp.Best(), ExactOBS(), ColumnSweep(), Magnitude()])
def test_the_groups_of_a_convolution_lose_whole_channels_each(mobile, solver):
    model, batches = mobile
    pruned, report = cp.prune(model, batches, lambda layer: Reconstruction(layer, cp.Channels(4)), solver, names="6")
    (row,) = report.rows
    assert (row.name, row.certificate.violation) == ("6", 0)
    held = (pruned[6].weight != 0).reshape(4, 6, 6, 9).any(3)
    assert held.any(1).sum(1).tolist() == [4] * 4  # the same channels for all rows of a group
    assert torch.equal(held.any(1), held.all(1))


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        (BranchAndBound(max_inputs=8), "layer '2': BranchAndBound is for up to 8 inputs, this layer has 9"),
        (ClosedForm(), "layer '2': ClosedForm takes EqualityQuadratic problems; Reconstruction is of the form"),
        (Groupwise(ADMM(eps_rel=1e-9)), r"layer '2': ADMM\(eps_rel=1e-09\): eps_rel does not apply"),
        (cp.Bounded(Magnitude()), None),
    ],
)
def test_groups_that_cannot_be_solved_are_refused_before_the_work_begins(mobile, solver, said):
    model, batches = mobile
    events = []
    run = lambda: cp.prune(  # noqa: E731
        model, batches, lambda layer: Reconstruction(layer, Unstructured(0.3)), solver, names="2",
        progress=events.append,
    )  # fmt: skip
    if said is None:
        assert run()[1].rows[0].certificate.violation == 0
    else:
        with pytest.raises((TypeError, ValueError), match=said):
            run()
        assert "plan" not in [event.stage for event in events]


def test_a_module_loses_less_than_its_groups_each_under_its_own_count(mobile):
    model, batches = mobile
    layers = cp.capture(model, batches, "2")
    each = [Reconstruction(layer, Unstructured(3)) for layer in layers]
    apart = sum(solve(part, BranchAndBound()).certificate.value for part in each)
    for solver, least in ((None, 0.9), (Groupwise(Balanced()), 0.95)):
        certificate = solve(stacked(each), solver).certificate
        assert certificate.violation == 0
        assert certificate.value < least * apart


@pytest.mark.parametrize("measure", [cp.LayerError(), cp.OutputChange(), cp.SecondOrder()])
def test_a_grouped_module_has_one_curve(mobile, measure):
    model, batches = mobile
    before = copy.deepcopy(model.state_dict())
    curves = cp.rate_distortion(model, batches, ["2", "6"], levels=[0.1, 0.3, 1.0], measure=measure)
    assert [curve.name for curve in curves] == ["2", "6"]
    assert [curve.kept.tolist() for curve in curves] == [[14, 43, 144], [130, 389, 1296]]
    assert [tuple(curve.weight.shape) for curve in curves] == [(16, 9), (24, 54)]
    for curve in curves:
        assert curve.distortion[0] > curve.distortion[1] > curve.distortion[2]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_the_curve_of_a_grouped_module_is_that_of_its_pruning(mobile):
    model, batches = mobile
    trial = copy.deepcopy(model)
    layers = cp.capture(model, batches, "2")
    problem = stacked([Reconstruction(layer, Unstructured(0.2)) for layer in layers])
    solution = solve(problem)
    for layer, rows in zip(layers, problem.rows(solution.x), strict=True):
        write(trial, layer.name, rows)
    with torch.no_grad():
        change = torch.cat([trial(x) - model(x) for x in batches]).double().square().sum(1).mean()
    (curve,) = cp.rate_distortion(model, batches, "2", levels=[0.2], measure=cp.OutputChange())
    assert float(curve.distortion[0]) == pytest.approx(float(change), rel=1e-4)
    energy = sum(layer.energy for layer in layers)
    (curve,) = cp.rate_distortion(model, batches, "2", levels=[0.2], measure=cp.LayerError())
    assert float(curve.distortion[0]) == pytest.approx(solution.certificate.value / energy)
    (curve,) = cp.rate_distortion(model, batches, "2", levels=[0.2], measure=cp.LayerError(), solver=Magnitude())
    worse = solve(problem, Groupwise(Magnitude())).certificate.value
    assert float(curve.distortion[0]) == pytest.approx(worse / energy)


@LAW
@given(count=st.integers(0, 144), groups=st.integers(1, 16))
def test_shares_of_a_modules_count_add_up_to_it(count, groups):
    certificate = Certificate(0.0, 0.0, 0.0)
    shares = Shares((Share("conv", count, 144, 0.0),), 144.0, float(count), certificate, "")
    names = [f"conv[{g}]" for g in range(groups)]
    each = shares.by_layer({"conv": names, "other": ["other"]})
    assert list(each) == names
    assert sum(each.values()) == count
    assert max(each.values()) - min(each.values()) <= 1


def test_a_recipe_that_gets_a_share_for_each_group_states_the_modules_count(mobile):
    model, batches = mobile
    layers = cp.capture(model, batches, "6")
    shares = Shares((Share("6", 391, 1296, 0.0),), 1296.0, 391.0, Certificate(0.0, 0.0, 0.0), "")
    counts = shares.by_layer({"6": [layer.name for layer in layers]})
    problem = stacked([Reconstruction(layer, Unstructured(counts[layer.name])) for layer in layers])
    assert problem.pattern == Unstructured(391)
    x = solve(problem).x
    assert int((x[:, :54] != 0).sum()) == 391
