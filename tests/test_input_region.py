"""Bounds over sets of inputs: above everything found in the set, tighter by the better method, exact at a point."""

import copy
import math
from fractions import Fraction

import exact
import pytest
import torch
from constructs import SHARED, Body, Construct, constructs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from convexprune.bounds.difference import (
    Exact,
    IntervalPropagation,
    LinearRelaxation,
    cannot_change,
    difference_bounds,
    sampled_difference,
)
from convexprune.bounds.input_sets import Ball, Box, Interval
from convexprune.bounds.relaxation import ChainPair, Hidden
from convexprune.certify.input_region import worst_case

METHODS = [IntervalPropagation(), LinearRelaxation()]
WIDTHS = [(3, 2), (1, 1, 1), (4, 6, 3), (3, 5, 5, 2), (2, 4, 4, 4, 3)]


def prune_at_random(weight, kind, generator):
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    if kind == "same":
        return weight
    if kind == "moved":
        return weight + 0.05 * noise
    if kind == "rows":
        return weight * (noise[:, :1] > 0)
    return weight * (noise > 0)


def random_pair(seed, widths, kind, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    biases = [torch.randn(out, generator=generator, dtype=torch.float64) + shift for out, _ in shapes]
    pruned = [prune_at_random(weight, kind, generator) for weight in weights]
    # fewer biases than weights change
    moved = [bias + 0.1 * (place % 2) * (kind != "same") for place, bias in enumerate(biases)]
    return ChainPair(weights, biases, pruned, moved), torch.randn(2, widths[0], generator=generator)


def random_set(center, radius, shape):
    if shape == "ball":
        return Ball(center, radius)
    # numbers and tensors, and a center that is a corner
    return Box(center, radius, *([center.double().amin(0) - 0.1, float(center.max())] if shape == "clipped" else []))


def differences(pair, around, points=3000):
    """zhat - z at many points of the set, (samples, points, outputs)."""
    x = around.points(points, torch.Generator().manual_seed(1))
    z, zhat = pair.run(x)
    return zhat - z


cases = given(
    st.integers(0, 10**6), st.sampled_from(WIDTHS), st.sampled_from(["moved", "rows", "entries"]),
    st.sampled_from([-2.0, 0.0, 2.0]), st.sampled_from([0.01, 0.3, 2.0]), st.sampled_from(["box", "clipped", "ball"]),
)  # fmt: skip


@settings(max_examples=80)
@cases
def test_no_point_of_the_set_is_outside_the_bounds(seed, widths, kind, shift, radius, shape):
    pair, center = random_pair(seed, widths, kind, shift)
    around = random_set(center, radius, shape)
    seen, found = differences(pair, around), sampled_difference(pair, around)
    for method in METHODS:
        bounds = difference_bounds(pair, around, method)
        assert (bounds.lower[:, None] <= seen + 1e-9).all()
        assert (seen <= bounds.upper[:, None] + 1e-9).all()
        assert (found <= bounds.largest + 1e-9).all()
    z, zhat = pair.run(center.double())
    assert (found >= (zhat - z).abs().amax(1) - 1e-12).all()
    loose, tight = (difference_bounds(pair, around, method) for method in METHODS)
    assert (tight.lower >= loose.lower - 1e-9).all()
    assert (tight.upper <= loose.upper + 1e-9).all()


@pytest.mark.parametrize("shape", ["box", "ball"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-200, -160, -100, 100])
def test_functions_whose_squares_leave_float64(power, method, shape):
    """An input in another unit, its weights in the inverse: the same bounds, and sound."""
    (plain, center), unit = random_pair(4, (3, 5, 2), "entries"), 10.0**power
    first, others = [[unit * each[0], each[1]] for each in (plain.weights, plain.pruned_weights)]
    pair, center = ChainPair(first, plain.biases, others, plain.pruned_biases), center[:1].double()
    around, same = random_set(center / unit, 0.5 / unit, shape), random_set(center, 0.5, shape)
    bounds = difference_bounds(pair, around, method)
    torch.testing.assert_close(bounds.upper, difference_bounds(plain, same, method).upper, rtol=1e-9, atol=0)
    x = torch.lerp(around.center, around.points(200, torch.Generator().manual_seed(1))[0], 0.99)
    z, zhat = pair.run(x)
    for at in torch.cat([(zhat - z).argmax(0), (zhat - z).argmin(0)]).tolist():
        ends = zip(bounds.lower[0].tolist(), exact.chain_difference(pair, x[at]), bounds.upper[0].tolist(), strict=True)
        assert all(Fraction(low) <= change <= Fraction(high) for low, change, high in ends)


@pytest.mark.parametrize("method", METHODS)
def test_what_leaves_float64_is_bounded_by_nothing(method):
    pair, center = random_pair(4, (3, 5, 5, 2), "entries")
    weights = [1e150 * weight for weight in pair.weights]
    pair = ChainPair(weights, pair.biases, [-weight for weight in weights], pair.pruned_biases)
    center = 1e100 * center.double()
    for around in (Box(center, 1.0), Ball(center, 1e100)):
        bounds = difference_bounds(pair, around, method)
        assert (bounds.upper == math.inf).all()
        assert (bounds.lower == -math.inf).all()
        assert not cannot_change(pair, around, method).any()


@settings(max_examples=60)
@cases
def test_what_cannot_change_does_not(seed, widths, kind, shift, radius, shape):
    pair, center = random_pair(seed, widths, "moved" if kind == "rows" else kind, shift)
    around = random_set(center, radius / 5, shape)
    z, zhat = pair.run(around.points(500, torch.Generator().manual_seed(1)))
    same = (z.argmax(2) == zhat.argmax(2)).all(1)
    loose, tight = (cannot_change(pair, around, method) for method in METHODS)
    assert not (tight & ~same).any()
    assert not (loose & ~same).any()


def test_predictions_at_a_point_are_decided():
    pair, center = random_pair(3, (4, 6, 3), "entries")
    center = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    z, zhat = pair.run(center.double())
    same = z.argmax(1) == zhat.argmax(1)
    assert 0 < same.sum() < 50
    for method in METHODS:
        assert torch.equal(cannot_change(pair, Box(center, 0.0), method), same)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_point_and_the_same_network(method, widths):
    pair, center = random_pair(0, widths, "entries")
    z, zhat = pair.run(center.double())
    for around in (Box(center, 0.0), Ball(center, 0.0)):
        bounds = difference_bounds(pair, around, method)
        torch.testing.assert_close(bounds.lower, zhat - z, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(bounds.upper, zhat - z, rtol=1e-10, atol=1e-12)
    same, center = random_pair(1, widths, "same")
    for around in (Box(center, 0.0), Box(center, 1.0), Ball(center, 1.0)):
        bounds = difference_bounds(same, around, method)
        assert not bounds.lower.any()
        assert not bounds.upper.any()


def test_one_layer_is_exact():
    pair, center = random_pair(5, (3, 2), "entries")
    change, shift = pair.changes[0]
    middle = center.double() @ change.T + shift
    for around, reach in ((Box(center, 0.3), change.abs().sum(1)), (Ball(center, 0.3), change.norm(dim=1))):
        for method in METHODS:
            bounds = difference_bounds(pair, around, method)
            torch.testing.assert_close(bounds.upper, middle + 0.3 * reach)
            torch.testing.assert_close(bounds.lower, middle - 0.3 * reach)
        torch.testing.assert_close(sampled_difference(pair, around), bounds.largest)


@settings(max_examples=300)
@given(st.lists(st.integers(-6, 6), min_size=2, max_size=2), st.lists(st.integers(-6, 6), min_size=2, max_size=2))
def test_the_relaxed_difference_of_one_neuron(z_ends, delta_ends):
    (zl, zu), (dl, du) = sorted(z_ends), sorted(delta_ends)
    z, delta = torch.meshgrid(torch.linspace(zl, zu, 49).double(), torch.linspace(dl, du, 49).double(), indexing="ij")
    z, delta = z.flatten(), delta.flatten()
    gamma = (z + delta).relu() - z.relu()
    ends = [torch.tensor([[float(end)]]).double() for end in (zl, zu, zl + dl, zu + du, dl, du)]
    layer = Hidden(Interval(*ends[:2]), Interval(*ends[2:4]), Interval(*ends[4:]))
    assert float(layer.gamma.lower) == pytest.approx(float(gamma.min()), abs=1e-12)  # attained: nothing is given away
    assert float(layer.gamma.upper) == pytest.approx(float(gamma.max()), abs=1e-12)
    lines = layer.gamma_lines
    assert (lines.above * delta + lines.above_at >= gamma - 1e-12).all()
    assert (lines.below * delta + lines.below_at <= gamma + 1e-12).all()
    for end in (dl, du):  # the chords begin and end at the largest and the least for that delta: they are tight
        over_z, over_zhat = torch.linspace(zl, zu, 49).double(), torch.linspace(zl + dl, zu + du, 49).double()
        most = float(((over_z + end).relu() - over_z.relu()).max())
        least = float((over_zhat.relu() - (over_zhat - end).relu()).min())
        assert float(lines.above * end + lines.above_at) == pytest.approx(most, abs=1e-12)
        assert float(lines.below * end + lines.below_at) == pytest.approx(least, abs=1e-12)
    for each, at in ((layer.y_lines, z), (layer.yhat_lines, z + delta)):
        assert (each.above * at + each.above_at >= at.relu() - 1e-12).all()
        assert (each.below * at + each.below_at <= at.relu() + 1e-12).all()


@pytest.mark.parametrize(("seed", "widths", "kind"), [(0, (2, 4, 2), "entries"), (1, (3, 4, 3, 1), "moved"),
                                                      (2, (2, 3, 1), "rows")])  # fmt: skip
def test_exact_is_between_what_is_found_and_the_bounds(seed, widths, kind):
    pytest.importorskip("cvxpy")
    pair, center = random_pair(seed, widths, kind)
    around = Box(center[:1], 0.8, least=-1.5)
    exact = difference_bounds(pair, around, Exact())
    seen = differences(pair, around)
    assert (exact.lower <= seen.amin(1) + 1e-7).all()
    assert (exact.upper >= seen.amax(1) - 1e-7).all()
    assert (sampled_difference(pair, around) <= exact.largest + 1e-7).all()
    assert exact.largest[0] <= 1.02 * sampled_difference(pair, around, points=3000, starts=50)[0]
    for method in METHODS:
        bounds = difference_bounds(pair, around, method)
        assert (bounds.lower <= exact.lower + 1e-7).all()
        assert (bounds.upper >= exact.upper - 1e-7).all()
    with pytest.raises(ValueError, match="takes a Box"):
        difference_bounds(pair, Ball(center, 0.1), Exact())


@pytest.mark.parametrize(
    ("weight", "radius"), [(1e4, 1e3), (1e-5, 1.0), (1e-5, 1e-2), (1e4, 1e-3), (1e-5, 1e3), (1e9, 1e-6)]
)
@pytest.mark.parametrize("seed", range(2))
def test_exact_is_sound_at_any_scale(seed, weight, radius):
    """The program's value and its tolerances are in units of the network: 17 of 100 such bounds were once below."""
    pytest.importorskip("cvxpy")
    pair, center = random_pair(seed, (2, 4, 2), ["entries", "moved"][seed])
    parts = [[weight * part for part in each] for each in (pair.weights, pair.biases, pair.pruned_weights)]
    pair = ChainPair(*parts, [weight * part for part in pair.pruned_biases])
    around = Box(radius * center[:1], radius)
    bounds, x = difference_bounds(pair, around, Exact()), around.points(4000, torch.Generator().manual_seed(seed))[0]
    z, zhat = pair.run(x)
    for at in torch.cat([(zhat - z).argmax(0), (zhat - z).argmin(0)]).tolist():
        for low, change, high in zip(
            bounds.lower[0].tolist(), exact.chain_difference(pair, x[at]), bounds.upper[0].tolist(), strict=True
        ):
            assert Fraction(low) <= change <= Fraction(high)


def test_exact_at_dead_and_stable_neurons_and_without_a_solver():
    pytest.importorskip("cvxpy")
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    pair = ChainPair([one, one], [zero, zero], [0 * one, one], [zero, zero])
    around = Box(torch.zeros(1, 1), 0.5)  # relu(x), and a neuron that is always exactly 0
    for method in (*METHODS, Exact()):
        bounds = difference_bounds(pair, around, method)
        assert float(bounds.lower) == pytest.approx(-0.5)
        assert float(bounds.upper) == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="NOSUCH"):
        difference_bounds(pair, around, Exact("NOSUCH"))


class Net(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), middle, nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.relu(self.middle(self.first(x.flatten(1)))))


@pytest.fixture
def networks():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 6, bias=False),
        nn.Identity(), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    x = torch.rand(70, 2, 2)
    with torch.no_grad():  # predictions of every class
        model[7].weight *= 5
        model[7].bias -= model(x).mean(0)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (pruned[1], pruned[4]):
            layer.weight *= torch.rand_like(layer.weight) < 0.4
    return model, pruned, x


@pytest.mark.parametrize(("norm", "within"), [(math.inf, None), (math.inf, (0, 1)), (2, None)])
def test_modules(networks, norm, within):
    model, pruned, x = networks
    before, state = x.clone(), copy.deepcopy(model.state_dict())
    result = worst_case(model, pruned, x, 0.05, norm=norm, within=within)
    assert model.training
    assert pruned[3].training
    assert torch.equal(x, before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    model.eval(), pruned.eval()
    step = torch.randn(200, *x.shape)
    step = 0.05 * (step.sign() if norm == math.inf else step / step.flatten(2).norm(dim=2)[..., None, None])
    near = x + step if within is None else (x + step).clamp(*within)
    with torch.no_grad():
        dense, sparse = (net(near.flatten(0, 1)).unflatten(0, (200, -1)) for net in (model, pruned))
    assert (sparse - dense <= result.upper + 1e-5).all()
    assert (sparse - dense >= result.lower - 1e-5).all()
    assert (result.found <= result.largest + 1e-9).all()
    assert (dense.argmax(2) == sparse.argmax(2))[:, result.unchanged].all()
    assert result.unchanged.any()
    assert not result.unchanged.all()
    assert f"{int(result.unchanged.sum())} of them" in str(result)


def test_within_can_differ_by_entry(networks):
    model, pruned, x = networks
    whole = worst_case(model, pruned, x, 0.1, within=(0, 1))
    least, most = torch.zeros(2, 2), torch.ones(2, 2)
    assert torch.equal(worst_case(model, pruned, x, 0.1, within=(least, most)).upper, whole.upper)
    with pytest.raises(ValueError, match=r"within has shape \(4,\); one sample's is \(2, 2\)"):
        worst_case(model, pruned, x, 0.1, within=(torch.zeros(4), 1))


def test_linears_in_a_row_and_relus_at_the_ends():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Linear(3, 20), nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 2), nn.ReLU()
    )
    nn.init.constant_(model[4].bias, 1.0)
    pruned = copy.deepcopy(model)
    nn.init.zeros_(pruned[2].weight[:5].detach())
    x = torch.randn(5, 3)
    before = x.clone()
    result = worst_case(model, pruned, x, 0.0)
    assert torch.equal(x, before)
    assert result.largest.min() > 0
    torch.testing.assert_close(result.upper.float(), (pruned(x) - model(x)).detach(), atol=1e-6, rtol=1e-5)


def exactly(model, x):
    """A chain's outputs in rational arithmetic."""
    y = exact.rational(x)
    for layer in model:
        if isinstance(layer, nn.ReLU):
            y = [max(value, 0) for value in y]
        else:
            rows, shifts = (exact.rational(part.detach()) for part in (layer.weight, layer.bias))
            y = [exact.dot(row, y) + shift for row, shift in zip(rows, shifts, strict=True)]
    return y


@pytest.mark.parametrize("method", [*METHODS, Exact()])
@pytest.mark.parametrize("seed", range(4))
def test_linears_in_a_row_that_cancel(seed, method):
    """Multiplied out, two layers of 1 are one of 2^-48, and rounding is a part of it that shows."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        model[0].weight[1] = model[0].weight[0] * (1 + 2.0 ** -(20 + 14 * (seed % 3)))
        model[1].weight[:, 1] = -model[1].weight[:, 0]
        nn.init.zeros_(model[0].bias)
        nn.init.zeros_(model[1].bias)
        pruned = copy.deepcopy(model)
        pruned[0].weight[:, 0] = 0
    x = torch.randn(2, 3, dtype=torch.float64)
    found = worst_case(model, pruned, x, 0.0, method=method)
    for row, lower, upper in zip(x, found.lower.tolist(), found.upper.tolist(), strict=True):
        both = zip(exactly(model, row), exactly(pruned, row), lower, upper, strict=True)
        assert all(Fraction(low) <= after - before <= Fraction(high) for before, after, low, high in both)


@pytest.mark.parametrize(
    ("middle", "message"),
    [
        (nn.BatchNorm1d(5), r"middle \(BatchNorm1d\)"),
        (
            nn.Sigmoid(),
            r"the model: sigmoid in middle \(Sigmoid\) is not covered; worst_case covers chains of Linear and ReLU",
        ),
        (nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 1, 1), nn.Flatten()), r"middle.1 \(Conv1d\) is not"),
    ],
)
def test_what_is_not_covered_is_named(middle, message):
    net = Net(middle)
    with pytest.raises(ValueError, match=message):
        worst_case(net, net, torch.rand(3, 4), 0.1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.relu(self.fc(x))


def test_residual_sums_hooks_and_other_shapes_are_refused(networks):
    model, pruned, x = networks
    with pytest.raises(ValueError, match=r"Residual.*joins or splits"):
        worst_case(Residual(), Residual(), torch.rand(3, 4), 0.1)
    hooked = copy.deepcopy(model)
    far = lambda module, args, output: output.clamp(max=1e6)  # noqa: E731  (nothing of it is seen at x)
    hooked[4].register_forward_hook(far)
    with pytest.raises(ValueError, match=r"the pruned model: clamp in 4 \(Linear\) is not covered"):
        worst_case(model, hooked, x, 0.1)
    smaller = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"layer 0: .*\(6, 4\) and, pruned, \(5, 4\)"):
        worst_case(model, smaller, x, 0.1)
    with pytest.raises(ValueError, match="2, 2, 3, 3 weights"):
        worst_case(nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), pruned, x, 0.1)


def moved(model):
    """Another network of the same structure."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return other.eval()


def attacked(model, other, x, radius):
    """The extremes of other - model at many inputs within the radius, in passes of the shape of x."""
    found = []
    for _ in range(20):
        near = x + radius * (2 * torch.rand_like(x) - 1).mul(3).clamp(-1, 1)
        with torch.no_grad():
            found.append((other(near.clone()) - model(near.clone())).double())
    return torch.stack(found)


CHAINS = {
    "called_with_other_weights", "called_with_the_neighbours_weights", "weights_exchanged_for_the_call",
    "a_layer_is_called_twice", "dropout_that_is_off_by_position", "checkpointed",
    "a_decoder_that_is_tied_through_a_parametrization", "a_decoder_that_is_tied_in_secret", "two_layers_of_one_weight",
    "a_layer_kept_in_a_list", "a_spectral_norm", "a_weight_norm",
}  # fmt: skip
ROWS = [each for each in constructs() if len(each.shape) == 3]


@pytest.mark.parametrize("construct", ROWS, ids=lambda each: each.name)
@pytest.mark.filterwarnings("ignore")
def test_an_unusual_network_has_bounds_that_hold_or_is_refused(construct: Construct):
    torch.manual_seed(0)
    SHARED.clear()
    with construct.around():
        model, x = construct.build().eval(), torch.randn(construct.shape)[0]
        other = moved(model)
        try:
            found = worst_case(model, other, x, 0.3)
        except ValueError as error:
            assert "worst_case covers" in str(error)  # noqa: PT017
            assert construct.name not in CHAINS
            return
        assert construct.name in CHAINS
        seen = attacked(model, other, x, 0.3)
    assert (seen <= found.upper + 1e-5).all()
    assert (seen >= found.lower - 1e-5).all()


def slightly(m, x):
    m.a.weight.data.mul_(1 + 1e-4)
    y = m.a(x)
    m.a.weight.data.div_(1 + 1e-4)
    return m.b(y.relu())


def grown(m, x):
    m.a.weight.data.mul_(1.01)
    return m.b(m.a(x).relu())


UNSEEN = {
    "scaled a little": (slightly, "does something that its recorded operations do not do"),
    "scaled in every pass": (grown, "something else in another pass"),
    "random weights": (lambda m, x: F.linear(x, torch.rand(6, 6)), "something else in another pass"),
    "another relu": (lambda m, x: torch.ops.convexprune_test.relu(m.a(x)), r"convexprune_test.relu in .* is not"),
    "when watched": (lambda m, x: m.a(x) * (1 - torch._C._len_torch_function_stack()), "is not covered"),
    "if watched": (lambda m, x: m.a(x) if torch._C._len_torch_function_stack() else m.b(x), "do not do"),
    "if trained": (lambda m, x: m.a(x) if torch.is_grad_enabled() else m.b(x), "do not do"),
    "a factor of the bias": (lambda m, x: torch.addmm(m.a.bias, x, m.a.weight, beta=3), "addmm in .* is not"),
    "weights of the input": (lambda m, x: F.linear(x, x), "linear in .* is not covered"),
    "a bias of the input": (lambda m, x: F.linear(x, m.a.weight, x[0]), "is not covered"),
    "read by address": (lambda m, x: m.a(x) if x.data_ptr() else m.b(x), "data_ptr in .* joins or splits"),
    "entries of other samples": (lambda m, x: m.a(x).view(6, 9).view(9, 6), "view in .* is not covered"),
    "two branches": (lambda m, x: (m.a(x).relu(), m.b(x))[1], "linear in b .* joins or splits"),
    "a mapping": (lambda m, x: {"y": m.a(x)}, "does not return one tensor"),
    "torch.func": (lambda m, x: torch.vmap(m.a)(x), "uses torch.func"),
    "half": (lambda m, x: m.a(x).relu().half(), "half in .* is not covered"),
}


@pytest.mark.parametrize(("forward", "message"), UNSEEN.values(), ids=UNSEEN)
def test_what_no_module_says_is_refused_by_name(forward, message):
    torch.manual_seed(0)
    model, x = Body(forward), torch.randn(9, 6)
    with pytest.raises(ValueError, match=f"the model.*{message}.*worst_case covers"):
        worst_case(model, moved(model), x, 0.1)
    plain = Body(lambda m, x: m.a(x))
    with pytest.raises(ValueError, match=f"the pruned model.*{message}"):
        worst_case(plain, model, x, 0.1)


def replaced(layer):
    layer.forward = lambda x: F.linear(x, layer.weight.clamp(-0.1, 0.1))


CALLED = {
    "by hand": lambda m, x: F.linear(F.linear(x, m.a.weight, bias=m.a.bias).relu(), m.b.weight),
    "scaled": lambda m, x: F.linear(m.a(x).relu(), 2 * m.b.weight, m.b.bias + 1),
    "addmm": lambda m, x: torch.addmm(m.a.bias, x, m.a.weight.t()),
    "other weights": lambda m, x: m.b(torch.func.functional_call(m.a, {"weight": 3 * m.a.weight}, x).relu()),
    "unflatten": lambda m, x: m.b(m.a(x).unflatten(1, (2, 3)).flatten(1).relu()),
    "another forward": lambda m, x: (replaced(m.b), m.b(m.a(x).relu()))[1],
}


@pytest.mark.parametrize("forward", CALLED.values(), ids=CALLED)
def test_the_bounds_are_of_what_is_called(forward):
    torch.manual_seed(0)
    model, x = Body(forward).eval(), torch.randn(9, 6)
    other = moved(model)
    found, at = worst_case(model, other, x, 0.1), worst_case(model, other, x, 0.0)
    seen = attacked(model, other, x, 0.1)
    assert (seen <= found.upper + 1e-5).all()
    assert (seen >= found.lower - 1e-5).all()
    torch.testing.assert_close(at.upper.float(), (other(x) - model(x)).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": -0.1}, "radius is -0.1"),
        ({"radius": math.nan}, "radius is nan"),
        ({"radius": math.inf}, "radius is inf"),
        ({"norm": 1}, "norm is 1; it must be 2 or math.inf"),
        ({"norm": 2, "within": (0, 1)}, "goes with the max norm"),
        ({"within": (2, 3)}, "sample 0 has no point"),
        ({"around": torch.full((2, 4), math.nan)}, "not finite"),
        ({"around": torch.zeros(0, 4)}, "at least one sample"),
        ({"around": torch.zeros(4)}, "at least one sample"),
        ({"around": torch.zeros(2, 4, dtype=torch.long)}, "floating-point"),
    ],
)
def test_bad_input_is_named(networks, change, message):
    model, pruned, x = networks
    with pytest.raises(ValueError, match=message):
        worst_case(model, pruned, **{"around": x, "radius": 0.1, **change})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w, b: ChainPair([], [], [], []), "0, 0, 0, 0 weights"),
        (lambda w, b: ChainPair([w], [b, b], [w], [b]), "1, 2, 1, 1 weights"),
        (lambda w, b: ChainPair([w, w], [b, b], [w, w], [b, b]), r"layer 1: .*expected one shape \(out, 2\)"),
        (lambda w, b: ChainPair([w], [w], [w], [b]), r"a bias has shape \(2, 3\); expected \(2,\)"),
        (lambda w, b: ChainPair([w / 0], [b], [w], [b]), "weights hold numbers that are not finite"),
        (lambda w, b: Box(b, 0.1), r"center has shape \(2,\)"),
        (
            lambda w, b: Box(torch.tensor([[0.5, -2.0]]), 0.1, 0.0, 1.0),
            "sample 0 has no point between least and most within 0.1: its entry 1 is -2; give",
        ),
        (
            lambda w, b: difference_bounds(ChainPair([w], [b], [w], [b]), Box(torch.zeros(1, 2), 0.1)),
            "the centers have 2 entries; the networks read 3",
        ),
    ],
)
def test_bad_chains_and_sets_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.ones(2, 3), torch.ones(2))
