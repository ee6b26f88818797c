"""Neuron merging: Lemma 1, the greedy's bookkeeping, the p-median bound, HiGHS, and whole networks."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convexprune as cp
from convexprune.solvers import GreedyMerging, Merges

ACTIVATIONS = {
    "relu": torch.relu,
    "leaky": torch.nn.functional.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def problem(seed=0, neurons=9, width=4, outputs=3, data=False, **limits):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(50, width)
    gram = x.T @ x / len(x) if data else None
    return cp.NeuronMerging(draw(neurons, width), draw(outputs, neurons), gram=gram, **limits), x


def optimum(instance):
    """The least summed saliency for `keep` survivors, by trying all sets."""
    n = instance.shape[0]
    best = math.inf
    for chosen in itertools.combinations(range(n), instance.keep):
        kept = torch.tensor(chosen)
        apart = (instance.features[:, None] - instance.features[kept]).square().sum(2)
        best = min(best, float((instance.importance * apart.min(1).values).sum()))
    return best


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([*ACTIVATIONS]), st.booleans(), st.integers(1, 8))
def test_no_merge_changes_more_than_lemma_1_allows(seed, name, data, keep):
    instance, x = problem(seed, data=data, keep=keep)
    act = ACTIVATIONS[name]
    hidden = act(x @ instance.incoming.T)
    dense = hidden @ instance.outgoing.T
    unit = 1.0 if data else float(x.square().sum(1).mean())
    for i, j in ((0, 1), (3, 7)):  # one merge: i joins j
        joined = torch.arange(9, dtype=torch.float64)[:, None]
        joined[i] = j
        change = (hidden @ instance.merged(joined).T - dense).square().mean()
        assert float(change) <= unit * float(instance.saliencies(joined).sum()) * (1 + 1e-9)
    x_all = cp.solve(instance).x
    change = (hidden @ instance.merged(x_all).T - dense).square().mean()
    assert float(change) <= unit * instance.change(x_all) * (1 + 1e-9)


def plain_greedy(instance, survivors):
    """The published algorithm with the whole matrix, updated entry by entry."""
    a, w = instance.outgoing.clone(), instance.features
    alive, steps = list(range(len(w))), []
    while len(alive) > survivors:
        pairs = [(float(a[:, j].square().mean() * (w[i] - w[j]).square().sum()), j, i)
                 for i in alive for j in alive if i != j]  # fmt: skip
        cost, j, i = min(pairs)
        steps.append((j, i, cost))
        a[:, i] += a[:, j]
        alive.remove(j)
    return steps


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("neighbours", [1, 3, 16])
def test_the_greedy_is_the_published_one(seed, neighbours):
    instance, _ = problem(seed, neurons=14, keep=1)
    merges = cp.GreedyMerging(neighbours=neighbours).merges(instance)
    steps = plain_greedy(instance, 1)
    assert merges.left.tolist() == [left for left, _, _ in steps]
    assert merges.into.tolist() == [into for _, into, _ in steps]
    torch.testing.assert_close(merges.saliency, torch.tensor([cost for *_, cost in steps], dtype=torch.float64))


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9), st.booleans())
def test_no_multipliers_pass_the_optimum(seed, keep, data):
    instance, _ = problem(seed, data=data, keep=keep)
    best = optimum(instance)
    generator = torch.Generator().manual_seed(seed)
    for scale in (0.0, 1.0, 100.0):
        witness = scale * torch.randn(9, generator=generator)
        assert instance.lower_bound(witness) <= best * (1 + 1e-12) + 1e-12
    solution = cp.solve(instance, cp.Exchange())
    greedy = cp.solve(instance)
    assert best * (1 - 1e-9) - 1e-9 <= solution.certificate.value <= greedy.certificate.value + 1e-12
    assert solution.certificate.bound <= best * (1 + 1e-12) + 1e-12
    assert solution.certificate.violation == greedy.certificate.violation == 0


@pytest.mark.parametrize("seed", range(4))
def test_highs_agrees_with_trying_everything(seed):
    instance, _ = problem(seed, keep=4)
    solution = cp.solve(instance, cp.CVXPY("HIGHS", mip_rel_gap=0))
    assert solution.certificate.violation == 0
    assert solution.certificate.value == pytest.approx(optimum(instance), rel=1e-6)


@pytest.mark.parametrize("solver", [cp.GreedyMerging(), cp.Exchange(), cp.CVXPY("HIGHS", mip_rel_gap=0)], ids=str)
def test_a_limit_on_the_saliency_is_kept(solver):
    for seed in range(3):
        instance, _ = problem(seed, max_saliency=4.0)
        fewest = min(k for k in range(1, 10) if optimum(problem(seed, keep=k)[0]) <= 4.0)
        solution = cp.solve(instance, solver)
        assert solution.certificate.violation <= 1e-9
        assert solution.certificate.value >= fewest
        assert solution.certificate.bound <= fewest
        if isinstance(solver, cp.CVXPY):
            assert solution.certificate.value == fewest


def test_equal_neurons_merge_for_nothing():
    instance, x = problem(neurons=6, keep=3)
    twice = cp.NeuronMerging(
        torch.cat([instance.incoming, instance.incoming]), torch.cat([instance.outgoing, instance.outgoing], 1), keep=6
    )
    solution = cp.solve(twice)
    assert solution.certificate.value == 0
    hidden = torch.relu(x @ twice.incoming.T)
    torch.testing.assert_close(hidden @ twice.merged(solution.x).T, hidden @ twice.outgoing.T)


def test_the_published_cutoff_is_the_mode():
    values = torch.cat([torch.linspace(0, 1, 20), torch.full((60,), 2.0), torch.linspace(3, 9, 20)]).double()
    merges = Merges(101, torch.zeros(100), torch.zeros(100), values)
    assert 20 <= merges.published_cutoff() <= 81


def network(activation=nn.ReLU):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 20), activation(), nn.Linear(20, 15), activation(), nn.Dropout(), nn.Linear(15, 3)
        ).eval()


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU])
def test_a_merged_network_is_smaller_and_within_its_bound(activation):
    model, x = network(activation), torch.randn(200, 6)
    before = copy.deepcopy(model.state_dict())
    small, report = cp.merge(model, {"2": 0.5}, batches=[x])
    assert small[2].out_features == small[5].in_features == 8
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert float((small(x) - model(x)).detach().square().mean()) == pytest.approx(report.measured, rel=1e-4)
    assert report.measured <= report.layers[0].change
    assert report.compaction.parameters[1] == sum(p.numel() for p in small.parameters())
    whole, _ = cp.merge(model, 1.0)
    torch.testing.assert_close(whole(x), model(x))


def test_least_squares_move_the_outputs_less():
    model, x = network(), torch.randn(500, 6)
    _, added = cp.merge(model, 0.4, batches=[x])
    _, fitted = cp.merge(model, 0.4, batches=[x], refit=True)
    assert fitted.measured < added.measured


def test_no_data_is_needed_and_the_report_is_drawn(tmp_path):
    small, report = cp.merge(network())
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert small[0].out_features == report.layers[0].survivors
    assert report.measured is None
    report.save_html(tmp_path / "merging.html")
    assert "Merging report" in (tmp_path / "merging.html").read_text()
    assert "published cut-off" in str(report)
    assert '"survivors"' in report.to_json()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: problem()[0], "either keep"),
        (lambda: problem(keep=3, max_saliency=1.0)[0], "either keep"),
        (lambda: problem(keep=0)[0], "keep is 0"),
        (lambda: problem(max_saliency=-1.0)[0], "max_saliency is -1"),
        (lambda: cp.NeuronMerging(torch.ones(3, 2), torch.ones(2, 4), keep=1), "4 columns for 3 neurons"),
        (lambda: cp.NeuronMerging(torch.full((3, 2), math.nan), torch.ones(2, 3), keep=1), "finite"),
        (lambda: cp.GreedyMerging(neighbours=0), "neighbours is 0"),
        (lambda: cp.merge(network(), 0.0), "keep is 0.0"),
        (lambda: cp.merge(network(), {"5": 0.5}), "'5' cannot merge"),
        (lambda: cp.merge(network(), 0.5, refit=True), "refit needs batches"),
        (lambda: cp.merge(nn.Sequential(nn.Linear(3, 3)), 0.5), "no layer can merge"),
        (lambda: cp.merge(network(nn.GELU), 0.5), "no layer can merge"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_costs_that_do_not_fit_are_refused():
    with pytest.raises(MemoryError, match="GreedyMerging"):
        cp.solve(problem(keep=3)[0], cp.Exchange(memory=100))


def test_the_greedy_solver_leaves_a_problem_of_one_output_as_it_is():
    torch.manual_seed(0)
    outgoing = torch.randn(1, 8)
    problem = cp.NeuronMerging(torch.randn(8, 5), outgoing, keep=3)
    solution = cp.solve(problem, GreedyMerging())
    assert torch.equal(problem.outgoing, outgoing.double())
    assert float(problem.merged(solution.x).sum()) == pytest.approx(float(outgoing.sum()), rel=1e-5)


@pytest.mark.parametrize("steep", [nn.Softplus(0.01, 0), nn.Softplus(1, 5)])
def test_an_activation_that_jumps_is_not_merged_through(steep):
    with pytest.raises(ValueError, match="no layer can merge"):
        cp.merge(nn.Sequential(nn.Linear(3, 4), steep, nn.Linear(4, 2)), keep=2)


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", ["before", "behind", "instead"])
def test_neurons_beside_hooks_and_other_forwards_are_not_merged(place, kind):
    """The lemma knows none of them: the change was above what the report said was the most."""
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 4))
    if kind == "before":
        net[place].register_forward_pre_hook(lambda m, args: (5 * args[0],))
    elif kind == "behind":
        net[place].register_forward_hook(lambda m, args, y: 5 * y)
    else:
        inner = net[place].forward
        net[place].forward = lambda x: 5 * inner(x)
    with pytest.raises(ValueError, match="no layer can merge"):
        cp.merge(net, 0.5, batches=[torch.randn(50, 5)])
