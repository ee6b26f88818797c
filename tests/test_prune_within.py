"""A network within a wanted error: the budget problem's laws, and what `prune_within` promises."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convexprune as cp
from convexprune.solution import Attempt

LAW = settings(max_examples=40)


def budget(seed, count=6, goal=None):
    generator = torch.Generator().manual_seed(seed)
    gains, sizes, caps = (10 ** (4 * torch.rand(count, generator=generator, dtype=torch.float64) - 2) for _ in range(3))
    whole = float(gains @ caps)
    share = 10 ** float(-3 * torch.rand(1, generator=generator))
    return cp.ErrorBudget(gains, sizes, caps, goal or share * whole)


@LAW
@given(st.integers(0, 10**6), st.floats(0, 1e6), st.integers(0, 10**6))
def test_weak_duality_at_any_price(seed, price, other):
    problem = budget(seed)
    x = problem.caps[:, None] * torch.rand(problem.shape, generator=torch.Generator().manual_seed(other)).double()
    x = x * min(1.0, problem.goal / float(problem.gains @ x[:, 0]))
    assert problem.violation(x) <= 1e-12
    assert problem.lower_bound(price) <= problem.value(x) * (1 + 1e-9) + 1e-9
    assert problem.lower_bound(float("nan")) == problem.lower_bound(-1.0) == problem.lower_bound(None) == 0


@LAW
@given(st.integers(0, 10**6))
def test_the_solution_is_certified(seed):
    problem = budget(seed)
    found = cp.solve(problem)
    assert found.status is cp.Status.CONVERGED
    assert found.certificate.violation <= 1e-12
    # the objective may be near 0; its unit is the sum of the sizes
    assert abs(found.certificate.value - found.certificate.bound) <= 1e-12 * float(problem.sizes.sum())


@pytest.mark.parametrize("seed", range(5))
def test_the_solution_is_clarabels(seed):
    problem = budget(seed)
    ours, oracle = cp.solve(problem), cp.solve(problem, cp.CVXPY("CLARABEL"))
    assert oracle.status is cp.Status.CONVERGED
    assert ours.certificate.value == pytest.approx(oracle.certificate.value, abs=1e-4 * float(problem.sizes.sum()))
    assert ours.witness == pytest.approx(oracle.witness, rel=1e-3)


def test_without_caps_every_layer_spends_in_proportion_to_its_size():
    problem = cp.ErrorBudget(torch.tensor([2.0, 5.0]), torch.tensor([30.0, 10.0]), torch.tensor([1e3, 1e3]), 8.0)
    x = cp.solve(problem).x[:, 0]
    best = torch.tensor([3.0, 0.4], dtype=torch.float64)
    assert problem.value(x[:, None]) == pytest.approx(problem.value(best[:, None]), rel=1e-8)
    torch.testing.assert_close(x, best, rtol=1e-4, atol=0)  # the root of it, where the objective is flat
    loose = cp.ErrorBudget(torch.tensor([2.0, 0.0]), torch.tensor([30.0, 10.0]), torch.tensor([1.0, 2.0]), 8.0)
    torch.testing.assert_close(cp.solve(loose).x[:, 0], loose.caps, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gains": torch.tensor([-1.0])}, r"gains\[0\] is -1.0"),
        ({"sizes": torch.tensor([0.0])}, r"sizes\[0\] is 0.0"),
        ({"caps": torch.tensor([float("nan")])}, r"caps\[0\] is nan"),
        ({"caps": torch.ones(2)}, r"caps has shape \(2,\)"),
        ({"goal": 0.0}, "goal is 0.0"),
    ],
)
def test_bad_figures_are_named(fields, message):
    good = {"gains": torch.ones(1), "sizes": torch.ones(1), "caps": torch.ones(1), "goal": 1.0}
    with pytest.raises(ValueError, match=message):
        cp.ErrorBudget(**{**good, **fields})


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 15), nn.ReLU(), nn.Linear(15, 4))
    return model, [torch.randn(60, 12), torch.randn(60, 12)]


@pytest.mark.parametrize("error", [0.5, 0.1, 0.01])
def test_the_guaranteed_error_is_within_the_goal_and_near_it(error):
    model, batches = network()
    before = copy.deepcopy(model.state_dict())
    pruned, report = cp.prune_within(model, batches, error)
    found = report.network
    assert found.wanted == pytest.approx(error * found.scale)
    assert found.measured <= found.guaranteed <= found.wanted
    assert found.guaranteed >= 0.5 * found.wanted
    assert report.kept < report.total
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "network error, wanted" in str(report)
    assert cp.prune_within(model, batches, cp.Goal(error, rounds=1))[1].network.guaranteed <= found.wanted
    assert not torch.equal(pruned[0].weight, model[0].weight)


def test_a_larger_goal_keeps_fewer_weights():
    model, batches = network(1)
    kept = [cp.prune_within(model, batches, error)[1].kept for error in (0.02, 0.1, 0.5)]
    assert kept == sorted(kept, reverse=True)


def test_a_network_without_a_bound_says_why():
    model = nn.Sequential(nn.Linear(6, 6), nn.GLU(), nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"1 \(GLU\) is not covered"):
        cp.prune_within(model, [torch.randn(20, 6)], 0.1)


def test_a_norm_without_an_eps_has_no_bound_before_it_is_pruned():
    model = nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="give the norm an eps"):
        cp.prune_within(model, [torch.randn(20, 6)], 0.1)
    gelu = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6, eps=0.1), nn.Linear(6, 3))
    found = cp.prune_within(gelu, [torch.randn(20, 6)], cp.Goal(0.5, rounds=4))[1].network
    assert found.measured <= found.guaranteed <= found.wanted


def test_a_goal_that_is_not_met_says_so():
    model, batches = network(2)
    stubborn = lambda layer, epsilon: cp.NetTrim(layer, 0.9)  # noqa: E731   deaf to what it may lose
    with pytest.raises(ValueError, match=r"none of 2 networks was within an error of 0.01: the last bound was"):
        cp.prune_within(model, batches, cp.Goal(0.01, rounds=2), stubborn)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cp.Goal(0.0), ValueError, "error is 0.0"),
        (lambda: cp.prune_within(*network(), "10%"), TypeError, "error is '10%'"),
        (lambda: cp.Goal(0.1, near=1.0), ValueError, "near is 1.0"),
        (lambda: cp.Goal(0.1, rounds=0), ValueError, "rounds is 0"),
        (lambda: cp.prune_within(*network(), 0.1, mode="cascade"), TypeError, "unexpected keyword argument .mode"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


class Careless:
    """Never within any radius."""

    def solve(self, problem, start=None):
        return Attempt(problem.dense + 0.1, None, cp.Status.CONVERGED, 1)


def test_a_goal_that_no_network_meets_is_named():
    torch.manual_seed(15)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    free = lambda layer, epsilon: cp.L1Reconstruction(layer, 0.1)  # noqa: E731
    with pytest.raises(ValueError, match="networks was within an error of 1e-08"):
        cp.prune_within(net, [torch.randn(12, 4)], cp.Goal(1e-8, rounds=12), free, Careless())


def test_no_scales_make_the_budget_spend_more_than_the_goal():
    """Sums that cancelled spent 51% too much, and said CONVERGED, where figures were 1e20 times as large as others."""
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)

        def draw(count, spread=(1, 4, 10)[seed % 3], generator=generator):
            return 10 ** (spread * torch.randn(count, generator=generator, dtype=torch.float64))

        count = 1 + seed % 7
        problem = cp.ErrorBudget(draw(count), draw(count), draw(count), float(draw(1)))
        found = cp.solve(problem)
        assert found.status is cp.Status.CONVERGED
        assert found.certificate.violation == 0
        value, bound = found.certificate.value, found.certificate.bound
        assert bound <= value + problem.rounding(found.x)
        assert value - bound <= 1e-9 * value + 1e-11 * float(problem.sizes.sum())
