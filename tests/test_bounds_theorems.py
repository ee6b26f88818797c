"""Each theorem holds on random networks, and says so where its hypotheses fail."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convexprune as cp
from convexprune.bounds import (
    Additivity,
    LinkNormalised,
    lemma_1,
    lemma_3_1,
    proposition_1,
    proposition_2,
    removal,
    sample_count,
    theorem_1,
    theorem_2,
    theorem_3_2,
)
from convexprune.datasets import mnist, trained_lenet300


def chain(seed, widths=(5, 8, 7, 4), samples=40, bias=True):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weights = [draw(b, a) for a, b in itertools.pairwise(widths)]
    biases = [draw(b) if bias else None for b in widths[1:]]
    return draw(samples, widths[0]), weights, biases


def ones(x):
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def solved(x, y, weight, bias, epsilon, cascade=None, linear=False):
    """A layer of a chain by Net-Trim: weights, bias, radius of its problem."""
    activation = None if linear else "relu"
    targets = None if cascade is None else y
    layer = cp.Layer.from_samples(weight, x, bias, activation, "layer", targets=targets)
    problem = cp.NetTrim(layer, epsilon) if cascade is None else cp.NetTrim.cascade(layer, epsilon, cascade)
    solution = cp.solve(problem)
    found = solution.x
    return (found, None, problem) if bias is None else (found[:, :-1], found[:, -1], problem)


@settings(max_examples=10)
@given(st.integers(0, 10**6), st.sampled_from([0.05, 0.2]))
def test_proposition_1_on_what_the_solver_returns(seed, epsilon):
    x, (weight, *_), (bias, *_) = chain(seed)
    layer = cp.Layer.from_samples(weight, x, bias)
    problem = cp.NetTrim(layer, epsilon)
    u = cp.solve(problem, cp.ADMM(eps_abs=1e-12)).x  # feasible, not nearly so
    y = torch.relu(x @ weight.T + bias)
    statement = proposition_1(ones(x), y, u, problem.radius)
    assert statement.applies
    assert statement.true
    assert statement.margin >= 0
    broken = proposition_1(ones(x), y, u + 0.5, problem.radius)
    assert not broken.applies
    assert "fails" in str(broken)


@pytest.mark.parametrize("linear_last", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_1_on_parallel_net_trim(seed, linear_last):
    x, weights, biases = chain(seed)
    dense = LinkNormalised.of(weights, biases)
    assert [float(w.abs().sum()) for w in dense.weights] == pytest.approx([1, 1, 1])
    ours = dense.outputs(x, linear_last)
    read, thin, shifts, errors = [x, *ours[:-1]], [], [], []
    for index, (inputs, y, weight, bias) in enumerate(zip(read, ours, dense.weights, dense.biases, strict=True)):
        found, shift, problem = solved(inputs, y, weight, bias, 0.1, linear=linear_last and index == 2)
        thin.append(found)
        shifts.append(shift)
        errors.append(problem.radius)
    statement = theorem_1(dense, thin, shifts, x, errors, linear_last)
    assert statement.applies, str(statement)
    assert statement.true
    large = theorem_1(dense, [thin[0], 3 * thin[1], thin[2]], shifts, x, errors, linear_last)
    assert not large.applies


@pytest.mark.parametrize("linear_last", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_2_on_cascade_net_trim(seed, linear_last):
    x, weights, biases = chain(seed)
    dense, gamma = LinkNormalised.of(weights, biases), 1.1
    ours = dense.outputs(x, linear_last)
    inputs, thin, shifts, first = x, [], [], 0.0
    for index, (weight, bias) in enumerate(zip(dense.weights, dense.biases, strict=True)):
        last = linear_last and index == 2
        read = x if index == 0 else ours[index - 1]
        target = read @ weight.T + bias
        found, shift, problem = solved(inputs, target, weight, bias, 0.1, None if index == 0 else gamma, last)
        thin.append(found)
        shifts.append(shift)
        first = problem.radius if index == 0 else first
        inputs = inputs @ found.T + shift
        inputs = inputs if last else inputs.relu()
    statement = theorem_2(dense, thin, shifts, x, first, [gamma, gamma], linear_last)
    assert statement.applies, str(statement)
    assert statement.true


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.booleans())
def test_normalising_carries_the_scale(seed, bias):
    x, weights, biases = chain(seed, bias=bias)
    normal, y = LinkNormalised.of(weights, biases), x
    for weight, shift in zip(weights, biases, strict=True):
        y = (y @ weight.T if shift is None else y @ weight.T + shift).relu()
    torch.testing.assert_close(normal.outputs(x)[-1] * normal.factor, y)


def test_an_unnormalised_network_is_refused():
    x, weights, biases = chain(0)
    raw = LinkNormalised(tuple(weights), tuple(biases), (1.0, 1.0, 1.0))
    statement = theorem_1(raw, weights, biases, x, [0.0, 0.0, 0.0])
    assert not statement.applies
    with pytest.raises(ValueError, match="all zero"):
        LinkNormalised.of([torch.zeros(2, 2)], [None])


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_layerwise_obs_lemma_and_theorem(seed, noise):
    x, weights, _ = chain(seed, bias=False)
    generator = torch.Generator().manual_seed(seed + 1)
    thin = [w + noise * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    y, found, errors = x, x, []
    for weight, pruned in zip(weights, thin, strict=True):
        statement = lemma_3_1(y @ weight.T, y @ pruned.T)
        assert statement.true
        errors.append(statement.guaranteed**2)
        y, found = (y @ weight.T).relu(), (found @ pruned.T).relu()
    measured = float((found - y).norm()) / math.sqrt(len(x))
    published, spectral = (theorem_3_2(errors, thin, measured, norm) for norm in ("frobenius", "spectral"))
    assert published.true
    assert spectral.true
    assert spectral.guaranteed <= published.guaranteed * (1 + 1e-12)


def test_the_published_constant_is_too_small():
    x, (weight, *_), _ = chain(3, bias=False)
    layer = cp.Layer.from_samples(weight, x, activation=None)
    removed = torch.zeros(weight.shape, dtype=torch.bool)
    removed[0, 2] = True
    increase = cp.solve(cp.OptimalBrainSurgeon(layer, removed)).certificate.value
    inverse = torch.linalg.inv(layer.gram)
    exact = removal(weight[0], inverse, 2, increase, doubt=1e-12 * increase)  # the inverse's own rounding
    assert exact.true
    assert exact.guaranteed == pytest.approx(increase)
    assert not removal(weight[0], inverse, 2, increase, published=True).true


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([torch.relu, torch.tanh, torch.sigmoid, torch.nn.functional.leaky_relu]))
def test_lemma_1_for_one_merge_and_for_many(seed, activation):
    generator = torch.Generator().manual_seed(seed)
    x, w, a = (torch.randn(shape, generator=generator) for shape in ((30, 4), (7, 4), (3, 7)))
    for joined in ([1, 1, 2, 3, 4, 5, 6], [0, 0, 0, 3, 3, 5, 5]):
        statement = lemma_1(x, w, a, torch.tensor(joined), activation)
        assert statement.applies
        assert statement.true
    assert not lemma_1(x, w, a, torch.zeros(7), torch.exp).applies
    assert not lemma_1(x, w, a, torch.zeros(7), lambda p: (p * (1 + 1e-12)).relu()).applies
    steep = lemma_1(x, w, a, torch.zeros(7), lambda p: torch.floor(1e3 * p) / 1e3)  # no grid has to see its steps
    assert not steep.applies


def test_what_holds_only_within_a_tolerance_does_not_hold():
    x, (weight, *_), _ = chain(7, bias=False)
    y = (x @ weight.T).relu()
    u = weight * (1 + 1e-3)
    far = float((x @ u.T - y)[y > 0].norm())
    verdicts = [proposition_1(x, y, u, far * (1 + step)).hypotheses[0].holds for step in (-1e-10, 0.0, 1e-10)]
    assert verdicts == [False, None, True]
    assert "hidden by rounding: ||(X U^T - Y)_active||_F" in str(proposition_1(x, y, u, far))
    inputs, ones = torch.tensor([[1.0, 1.0, 1e-17]], dtype=torch.float64), torch.ones(1, 1)
    for last, holds in ((1.0, False), (-1.0, True)):  # 1 - 1 + 1e-17 is not 0
        point = torch.tensor([[1.0, -1.0, last]], dtype=torch.float64)
        assert proposition_1(inputs, 0 * ones, point, 1.0).hypotheses[1].holds is holds


@pytest.mark.parametrize(("step", "holds"), [(1e-10, False), (0.0, None), (-1e-10, True)])
def test_a_norm_of_one_is_checked_to_rounding(step, holds):
    x, weights, biases = chain(8)
    dense = LinkNormalised.of(weights, biases)
    assert all(hypothesis.holds for hypothesis in theorem_1(dense, dense, None, x, [1e-9] * 3).hypotheses)
    large = [weight / weight.abs().sum() * (1 + step) for weight in dense.weights]
    assert theorem_1(dense, large, dense.biases, x, [1.0] * 3).hypotheses[1].holds is holds


@pytest.mark.parametrize("linear_last", [False, True])
def test_errors_at_their_limits_are_not_known_to_be_within(linear_last):
    x, weights, biases = chain(9)
    dense = LinkNormalised.of(weights, biases)
    thin = [weight * 0.99 for weight in dense.weights]
    ours, read = dense.outputs(x, linear_last), [x, *dense.outputs(x)[:-1]]
    errors = []
    for index, (inputs, weight, bias) in enumerate(zip(read, thin, dense.biases, strict=True)):
        z = inputs @ weight.T + bias
        errors.append(float(((z if linear_last and index == 2 else z.relu()) - ours[index]).norm()))
    for step, holds in ((-1e-10, False), (0.0, None), (1e-10, True)):
        found = theorem_1(dense, thin, dense.biases, x, [error * (1 + step) for error in errors], linear_last)
        assert [hypothesis.holds for hypothesis in found.hypotheses[2:]] == [holds] * 3
        first = theorem_2(dense, thin, dense.biases, x, errors[0] * (1 + step), [1.0, 1.0], linear_last)
        assert first.hypotheses[2].holds is holds


@pytest.mark.parametrize("step", [1e-6, 1e-8, 1e-10, 1e-14, 0.0])
def test_a_neuron_with_a_shorter_twin_is_not_unique(step):
    """The second input is the first, times a little more than 1: the weight is smaller there."""
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 1] = x[:, 0] * (1 + step)
    w = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    assert not proposition_2(x, (x @ w).relu(), w).unique
    outside = x.clone()
    outside[0] = torch.tensor([1e-9, 0.0, 0.0])  # X w > 0 where the target is 0
    target = (outside @ w).relu()
    target[0] = 0
    assert not proposition_2(outside, target, w).unique


def test_statements_of_parts_of_a_network_are_refused():
    x, weights, biases = chain(10)
    dense = LinkNormalised.of(weights, biases)
    far = [dense.weights[0], *(-weight for weight in dense.weights[1:])]
    for gammas in ([], [1.0], [1.0] * 3):  # of a network whose last layers nobody would look at
        with pytest.raises(ValueError, match=f"{len(gammas)} gammas for 3 layers"):
            theorem_2(dense, far, dense.biases, x, 1.0, gammas)
    with pytest.raises(ValueError, match=r"shapes \[\(8, 5\), \(7, 8\)\]; the dense ones'"):
        theorem_1(dense, far[:2], dense.biases[:2], x, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"\(1, 7\)\]; the dense"):  # not stretched over the outputs
        theorem_1(dense, [*far[:2], far[2][:1]], [*dense.biases[:2], None], x, [1.0] * 3)
    y = x @ weights[0].T
    for outputs in (y, y.relu()[:1], torch.full_like(y, math.nan)):
        with pytest.raises(ValueError, match="give Y >= 0"):
            proposition_1(x, outputs, weights[0], 1.0)


def test_the_sample_count():
    assert sample_count(4, 100, 2) == math.ceil(51 * 2 * math.log(100))
    with pytest.raises(ValueError, match="mu is 1"):
        sample_count(4, 100, 1)
    with pytest.raises(ValueError, match="sparsity is 0"):
        sample_count(0, 100)


@pytest.mark.parametrize("seed", range(3))
def test_proposition_2_tells_recovery(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, sparsity = 20, 2
    w = torch.zeros(inputs, dtype=torch.float64)
    w[:sparsity] = torch.randn(sparsity, generator=generator, dtype=torch.float64)
    plenty = torch.randn(sample_count(sparsity, inputs), inputs, generator=generator, dtype=torch.float64)
    assert proposition_2(plenty, (plenty @ w).relu(), w).unique
    few = plenty[:3]
    assert not proposition_2(few, (few @ w).relu(), w).unique


def test_inputs_tiny_beside_the_bias_are_no_trouble():
    x, weights, biases = chain(5)
    layer = cp.Layer.from_samples(weights[0], 1e-3 * x, biases[0])
    solution = cp.solve(cp.NetTrim(layer, 0.1))
    assert solution.status is cp.Status.CONVERGED
    assert solution.certificate.violation == 0


def _additive(alone, together, tolerance):
    """Whether the changes add, and are uncorrelated, in rational arithmetic."""
    rows = [[Fraction(value) for value in each.flatten().tolist()] for each in (*alone, together)]
    total = [sum(values) for values in zip(*rows[:-1], strict=True)]
    size = lambda row: sum(value**2 for value in row)  # noqa: E731
    rest = [whole - part for whole, part in zip(rows[-1], total, strict=True)]
    return size(rest) <= tolerance**2 * size(rows[-1]), size(total) <= (1 + tolerance) * sum(map(size, rows[:-1]))


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-4, 1.0))
def test_additivity_holds_wherever_its_assumptions_do(seed, size):
    generator = torch.Generator().manual_seed(seed)
    alone = list(size * torch.randn(4, 30, 5, generator=generator, dtype=torch.float64))
    together = sum(alone) + size**2 * torch.randn(30, 5, generator=generator, dtype=torch.float64)
    found = Additivity.of(alone, together)
    assert found.predicted == pytest.approx(sum(float(each.square().sum(1).mean()) for each in alone))
    for tolerance in (0.1, 0.25, 0.6):
        statement = found.statement(tolerance)
        assert statement.true or not statement.applies
        for hypothesis, exact in zip(
            statement.hypotheses, _additive(alone, together, Fraction(tolerance)), strict=True
        ):
            assert hypothesis.holds in (exact, None)
    edge = Additivity.of([alone[0]], alone[0] * (1 / (1 - 0.1)))  # what is left over is 10%, to rounding
    assert [edge.statement(t).hypotheses[0].holds for t in (0.1 - 1e-12, 0.1, 0.1 + 1e-12)] == [False, None, True]
    assert Additivity.of(alone[:1], alone[0]).ratio == 1
    assert Additivity.of(alone[:1], alone[0]).statement().applies
    twice = Additivity.of([alone[0], alone[0]], 2 * alone[0])
    assert (twice.ratio, twice.crossing) == (pytest.approx(2), pytest.approx(1))
    assert "uncorrelated" in str(twice.statement())


def test_additivity_of_a_network():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)), torch.randn(50, 6)
    build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.8))  # noqa: E731
    pruned, _ = cp.prune(model, [x], build)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = cp.additivity(model, pruned, [x[:20], x[20:]])
    assert len(found.alone) == 2
    assert "the sum over 2 layers, each pruned alone" in str(found)
    assert found.measured == pytest.approx(float((pruned(x) - model(x)).detach().square().sum(1).mean()), rel=1e-5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    last, _ = cp.prune(model, [x], build, names="2")
    assert cp.additivity(model, last, [x]).ratio == pytest.approx(1)
    with pytest.raises(ValueError, match="no layer has changed"):
        cp.additivity(model, model, [x])
    with pytest.raises(ValueError, match=r"'0.bias' is not the same in both networks"):
        cp.additivity(model, torch.nn.Linear(6, 3), [x])
    with pytest.raises(TypeError, match="batches is a Tensor"):
        cp.additivity(model, pruned, x)
    with pytest.raises(ValueError, match="tolerance is 1"):
        found.statement(1)


def test_theorems_on_a_published_network(data):
    """LeNet-300-100, pruned for real: each statement applies and is true; broken inputs say so."""
    model, x = trained_lenet300(data / "lenet300.npz"), mnist(data / "mnist.npz").x_train[:300].flatten(1)
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    dense, built = LinkNormalised.of(weights, biases), {}

    def build(layer):
        built[layer.name] = cp.NetTrim(layer, 0.2)
        return built[layer.name]

    thin, report = cp.prune(model, [x], build)
    others = [module for module in thin.modules() if isinstance(module, torch.nn.Linear)]
    for row, layer in zip(report.rows[:2], others, strict=False):
        problem = built[row.name]
        u = torch.cat([layer.weight, layer.bias[:, None]], 1)
        statement = proposition_1(problem.inputs, problem.outputs, u, problem.radius * (1 + 1e-6))
        assert statement.applies, str(statement)
        assert statement.true
    errors = [
        problem.radius * (1 + 1e-6) / math.prod(dense.scales[: index + 1])
        for index, problem in enumerate(built.values())
    ]
    normal = dense.like([layer.weight for layer in others], [layer.bias for layer in others])
    whole = theorem_1(dense, normal, None, x, errors, linear_last=True)
    assert whole.applies, str(whole)
    assert whole.true
    raw = LinkNormalised(
        tuple(w.detach().double() for w in weights), tuple(b.detach().double() for b in biases), (1.0,) * 3
    )
    assert not theorem_1(raw, normal, None, x, errors, linear_last=True).applies
    rules = report.network.rules
    assert report.network.measured <= rules["by channel"] <= rules["spectral"] <= rules["Frobenius"]
    starved, _ = cp.prune(model, [x], lambda layer: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(0.02)))
    weak = next(module for module in starved.modules() if isinstance(module, torch.nn.Linear))
    lost = torch.cat([weak.weight, weak.bias[:, None]], 1)
    first = built[report.rows[0].name]
    assert not proposition_1(first.inputs, first.outputs, lost, first.radius).applies
