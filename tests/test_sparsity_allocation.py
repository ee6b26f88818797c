"""The knapsack over layers: bounds for any witness, the optimum of brute force and of HiGHS, and bad input."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import convexprune as cp
from convexprune import knapsack
from convexprune.curve import Curve

EXACT = [cp.MinimalCore(), cp.DynamicProgramming(buckets=None)]
RULES = [cp.Uniform(), cp.UniformPlus(), cp.ErdosRenyiKernel(), cp.GlobalMagnitude(), cp.LAMP()]


def names(solver):
    return type(solver).__name__


def curves(layers=4, levels=5, seed=0, whole=True, weights=False):
    """Random curves, some of their levels dominated."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(layers):
        kept = np.sort(rng.integers(0, 40, levels))
        loss = rng.random(levels) * (40 - kept)
        cost = kept if whole else kept * rng.uniform(0.5, 2)
        weight = torch.from_numpy(rng.standard_normal((5, 8))) if weights else None
        found.append(Curve(f"l{index}", torch.from_numpy(kept), torch.from_numpy(loss), cost, 40, weight=weight))
    return found


def optimum(problem):
    """The least value within the budget, by trying every choice; inf where none fits."""
    sizes = [range(len(problem.curves[group[0]].kept)) for group in problem.groups]
    best = math.inf
    for choice in itertools.product(*sizes):
        x = torch.zeros(problem.shape)
        for group, level in zip(problem.groups, choice, strict=True):
            x[list(group), 0] = float(level)
        if problem.violation(x) == 0:
            best = min(best, problem.value(x))
    return best


@settings(max_examples=80)
@given(
    st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), st.floats(0, 1), st.booleans(),
    st.one_of(st.none(), st.floats(-1, 100), st.tuples(st.floats(0, 50), st.floats(-10, 500))),
)  # fmt: skip
@example(10, 3, 3, 1.0, True, None)
def test_exact_solvers_find_the_optimum_and_no_witness_passes_it(seed, layers, levels, share, whole, witness):
    found = curves(layers, levels, seed, whole)
    budget = share * sum(float(curve.costs.max()) for curve in found)
    problem = cp.SparsityAllocation(found, round(budget) if whole else budget)
    best = optimum(problem)
    assert problem.lower_bound(witness) <= best
    for solver in EXACT[: 1 + whole]:
        solution = cp.solve(problem, solver)
        if best == math.inf:
            assert solution.status is cp.Status.INFEASIBLE
            assert solution.certificate.bound == math.inf
        else:
            assert solution.certificate.violation == 0
            assert solution.certificate.value == pytest.approx(best, abs=1e-9)
    if best < math.inf:
        solution = cp.solve(problem)
        assert solution.certificate.bound == pytest.approx(best, rel=1e-9, abs=1e-9)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.2, 0.9), st.integers(5, 200))
def test_buckets_waste_at_most_one_a_layer(seed, share, buckets):
    found = curves(4, 5, seed, whole=False)
    budget = share * sum(float(curve.costs.max()) for curve in found)
    solution = cp.solve(cp.SparsityAllocation(found, budget), cp.DynamicProgramming(buckets=buckets))
    tighter = cp.SparsityAllocation(found, budget * max(0, 1 - 4 / buckets))
    if solution.status is cp.Status.CONVERGED:
        assert solution.certificate.violation == 0
        assert solution.certificate.value <= optimum(tighter) + 1e-9
    else:
        assert optimum(tighter) == math.inf


@pytest.mark.parametrize("seed", range(6))
def test_highs_agrees(seed):
    found = curves(15, 12, seed)
    budget = round(0.3 * sum(float(curve.costs.max()) for curve in found))
    problem = cp.SparsityAllocation(found, budget)
    ours = cp.solve(problem)
    highs = cp.solve(problem, cp.CVXPY("HIGHS", mip_rel_gap=0, mip_abs_gap=0))
    assert highs.status is cp.Status.CONVERGED
    assert highs.certificate.violation == ours.certificate.violation == 0
    assert ours.certificate.value == pytest.approx(highs.certificate.value, rel=1e-9)
    assert ours.certificate.relative_gap < 1e-9


def test_tied_curves_take_one_level_in_every_formulation():
    base = curves(5, 6, 3)
    found = [Curve(c.name, c.kept, c.distortion, c.cost, c.total, "pair" if i in (1, 3) else None)
             for i, c in enumerate(base)]  # fmt: skip
    problem = cp.SparsityAllocation(found, 90)
    best = optimum(problem)
    for solver in (*EXACT, cp.LagrangianPrice(), cp.Uniform(), cp.CVXPY("HIGHS", mip_rel_gap=0, mip_abs_gap=0)):
        solution = cp.solve(problem, solver)
        assert solution.x[1] == pytest.approx(solution.x[3], abs=1e-6)
        assert solution.certificate.violation == 0
        assert solution.certificate.value >= best - 1e-9
        if solver in EXACT:
            assert solution.certificate.value == pytest.approx(best)
    parted = solution.x.clone()
    parted[1] += 1
    assert problem.violation(parted) == math.inf


@pytest.mark.parametrize("solver", [*EXACT, cp.LagrangianPrice(), *RULES], ids=names)
def test_too_small_a_budget_names_the_smallest(solver):
    found = curves(4, 5, 1, weights=True)
    problem = cp.SparsityAllocation(found, 0)
    solution = cp.solve(problem, solver)
    assert solution.status is cp.Status.INFEASIBLE
    assert f"{problem.cheapest:g}" in solution.note
    assert solution.certificate.bound == math.inf
    least = cp.solve(cp.SparsityAllocation(found, problem.cheapest), cp.MinimalCore())
    assert least.certificate.violation == 0


@pytest.mark.parametrize("solver", [*EXACT, cp.LagrangianPrice(), *RULES], ids=names)
def test_a_large_budget_keeps_what_loses_least(solver):
    found = curves(4, 5, 2, weights=True)
    problem = cp.SparsityAllocation(found, 10**6)
    solution = cp.solve(problem, solver)
    least = sum(float(curve.distortion.min()) for curve in found)
    assert solution.certificate.violation == 0
    if not isinstance(solver, tuple(type(rule) for rule in RULES)):
        assert solution.certificate.value == pytest.approx(least)
        assert solution.certificate.bound == pytest.approx(least)


@pytest.mark.parametrize("rule", RULES, ids=names)
def test_rules_spend_the_budget_and_not_more(rule):
    rng = np.random.default_rng(0)
    kept = torch.arange(0, 401)
    found = [
        Curve(f"l{i}", kept, 1.0 - kept / 400, weight=torch.from_numpy(rng.standard_normal((20, 20))) * (i + 1))
        for i in range(4)
    ]
    problem = cp.SparsityAllocation(found, 700)
    solution = cp.solve(problem, rule)
    assert solution.certificate.violation == 0
    assert problem.cost(solution.x) >= 690
    counts = [float(c.kept[int(k)]) for c, k in zip(found, solution.x[:, 0], strict=True)]
    if isinstance(rule, cp.GlobalMagnitude):
        everything = torch.cat([c.weight.abs().flatten() for c in found]).sort(descending=True).values
        assert counts == [float((c.weight.abs() >= everything[699]).sum()) for c in found]
    if isinstance(rule, cp.Uniform):
        assert len(set(counts)) == 1


def test_erdos_renyi_kernel_keeps_more_of_small_layers():
    found = [
        Curve("small", torch.arange(101), torch.zeros(101), weight=torch.ones(10, 10)),
        Curve("large", torch.arange(2501), torch.zeros(2501), weight=torch.ones(50, 50)),
    ]
    x = cp.solve(cp.SparsityAllocation(found, 300), cp.ErdosRenyiKernel()).x[:, 0]
    # (10 + 10 + 2) / 100 against (50 + 50 + 2) / 2500
    assert x[0] / 100 / (x[1] / 2500) == pytest.approx(0.22 / 0.0408, rel=0.05)


def test_dominated_levels_are_dropped_and_counted():
    curve = Curve("a", [1, 2, 3, 4], [5.0, 6.0, 1.0, 1.0])
    problem = cp.SparsityAllocation([curve], 4)
    assert problem.dominated == 2
    assert cp.solve(problem).x.item() == 2


def test_a_lying_solver_is_caught():
    class Liar:
        def solve(self, problem, start=None):
            return cp.solution.Attempt(problem.dense, (0.0, 1e9), cp.Status.CONVERGED, 1)

    problem = cp.SparsityAllocation(curves(4, 5, 4), 60)
    solution = cp.solve(problem, Liar())
    assert solution.certificate.violation > 0
    assert solution.certificate.bound <= optimum(problem)


def test_points_that_name_no_levels_are_infeasible():
    problem = cp.SparsityAllocation(curves(2, 3), 60)
    for x in ([[0.0], [3.0]], [[-1.0], [0.0]], [[0.5], [0.0]], [[math.nan], [0.0]]):
        assert problem.violation(torch.tensor(x)) == math.inf
        assert problem.value(torch.tensor(x)) == math.inf


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curve("conv1", [], []), "'conv1' has no levels"),
        (lambda: Curve("conv1", [1, 2], [1.0]), "1 values of distortion for 2 levels"),
        (lambda: Curve("conv1", [1, 2], [math.nan, 1.0]), "'conv1': distortion holds NaN"),
        (lambda: Curve("conv1", [1, 2], [1.0, 0.0], cost=[1, 2.0**54]), "beyond 2\\^53"),
        (lambda: Curve("conv1", [1, 2], [1.0, 0.0], cost=[-1, 2]), "cost has -1"),
        (lambda: cp.SparsityAllocation([], 3), "no curves"),
        (lambda: cp.SparsityAllocation(curves(2), math.nan), "budget is nan"),
        (lambda: cp.SparsityAllocation([*curves(1), *curves(1)], 3), "two curves have the name 'l0'"),
        (lambda: Curve("a", [1, 2], [1.0, 0.0]).between(0.9, 0.95), "no level keeps between"),
        (lambda: cp.solve(cp.SparsityAllocation(curves(2), 60), cp.LAMP()), "has no `weight`"),
        (lambda: cp.solve(cp.SparsityAllocation(curves(2, whole=False), 60), EXACT[1]), "no integers"),
        (lambda: cp.DynamicProgramming(buckets=0), "buckets is 0"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ties_need_the_same_levels():
    pair = [Curve("a", [1, 2], [1.0, 0.0], tie="t"), Curve("b", [1], [1.0], tie="t")]
    with pytest.raises(ValueError, match="different numbers of levels"):
        cp.SparsityAllocation(pair, 3)


def test_a_search_that_is_too_large_says_so(monkeypatch):
    monkeypatch.setattr(knapsack, "MOST", 0)
    solution = cp.solve(cp.SparsityAllocation(curves(6, 8, 5), 70), cp.MinimalCore())
    assert solution.status is cp.Status.MAX_ITER
    assert solution.certificate.violation == 0
    assert 0 < solution.certificate.bound <= solution.certificate.value


def test_sums_beyond_float64_bound_nothing():
    kept, distortion = torch.tensor([1, 2]), torch.tensor([1.7e308, 1e308], dtype=torch.float64)
    problem = cp.SparsityAllocation([Curve(name, kept=kept, distortion=distortion) for name in "abc"], 3)
    x = torch.zeros(3, 1, dtype=torch.float64)
    assert problem.value(x) == float("inf")
    assert problem.lower_bound(0.0) == -float("inf")
