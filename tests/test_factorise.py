"""Networks of one sparse matrix or two for each layer: what is written, counted, judged, and multiplied out again."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import convexprune as cp
from convexprune.network.two_factors import TwoFactors

QUICK = cp.Alternation(shares=(0.2,), falling=10, rounds=2, steps=15)
SEEDS = st.integers(0, 2**32 - 1)


def mlp(seed=0, bias=True):
    """Of low rank, so that two factors win."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(12, 16, bias), nn.ReLU(), nn.Linear(16, 12, bias), nn.ReLU(), nn.Linear(12, 3, bias)
    )
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.randn(layer.out_features, 2) @ torch.randn(2, layer.in_features))
    return model


def convolutional(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, padding_mode="reflect"), nn.ReLU(),
        nn.Conv2d(8, 12, (3, 1), padding=(1, 0), dilation=(1, 2), bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(192, 4),
    )  # fmt: skip
    with torch.no_grad():
        weight = torch.randn(12, 2) @ torch.randn(2, 24)
        model[2].weight.copy_(weight.reshape(12, 8, 3, 1))
    return model


def images(seed=1, count=24):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows(seed=1, count=60):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def pairs(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, TwoFactors)}


def nonzeros(model, name):
    module = model.get_submodule(name)
    layers = list(module) if isinstance(module, TwoFactors) else [module]
    return sum(int(layer.weight.count_nonzero()) for layer in layers)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize(("make", "draw"), [(mlp, rows), (convolutional, images)])
def test_what_is_written_is_counted_and_judged_as_it_is_stored(make, draw, mode):
    model, batch = make(), draw()
    before = copy.deepcopy(model.state_dict())
    made, report = cp.factorise(model, [batch], 0.5, QUICK, mode)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert pairs(made)
    for row in report.rows:
        assert row.kept == nonzeros(made, row.name) <= row.wanted
        assert row.certificate.violation == 0
        assert row.certificate.bound <= row.certificate.value
    assert report.network.guaranteed is None
    assert "two modules" in report.network.reason
    change = float((made(batch).double() - model(batch).double()).norm())
    assert report.network.measured == pytest.approx(change, rel=1e-4)


@pytest.mark.parametrize(("make", "draw"), [(mlp, rows), (convolutional, images)])
def test_each_error_is_that_of_the_layer_in_the_network_so_far(make, draw):
    """In a cascade the pair reads what the network before it makes, and aims at the dense network's outputs."""
    model, batch = make(), draw()
    made, report = cp.factorise(model, [batch], 0.5, QUICK)
    for row in report.rows:
        index = int(row.name)
        dense, now = model[: index + 1](batch).double(), made[: index + 1](batch).double()
        if row.name in pairs(made):
            assert row.problem.startswith("SparseFactors")
        # the float32 passes differ from the moments by their rounding
        assert float((dense - now).norm()) == pytest.approx(row.error, rel=1e-3, abs=1e-4 * float(dense.norm()))


@pytest.mark.parametrize(("make", "draw"), [(mlp, rows), (convolutional, images)])
def test_factors_are_chosen_where_they_err_less(make, draw):
    model, batch = make(), draw()
    made, report = cp.factorise(model, [batch], 0.5, QUICK, "parallel")
    recipe = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5))  # noqa: E731
    one = {row.name: row.certificate.value for row in cp.prune(model, [batch], recipe)[1].rows}
    for row in report.rows:
        assert row.certificate.value <= one[row.name] * (1 + 1e-6)
        assert (row.name in pairs(made)) == row.problem.startswith("SparseFactors")


@settings(max_examples=5)
@given(seed=SEEDS)
def test_multiplying_out_gives_the_same_function_and_the_old_names(seed):
    model, batch = convolutional(seed), images(seed)
    made, _ = cp.factorise(model, [batch], 0.4, QUICK)
    whole = cp.multiply_out(made)
    assert {key: value.shape for key, value in whole.state_dict().items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    assert not pairs(whole)
    assert torch.allclose(whole(batch), made(batch), rtol=1e-4, atol=1e-4)
    assert pairs(made) or torch.equal(whole(batch), made(batch))


def test_a_pair_is_loaded_into_itself_and_into_the_model_that_it_was(tmp_path):
    model, batch = convolutional(), images()
    made, _ = cp.factorise(model, [batch], 0.5, QUICK)
    cp.save(made, tmp_path / "two.safetensors")
    zeros = copy.deepcopy(made)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    for other in (zeros, convolutional(7)):
        cp.load(other, tmp_path / "two.safetensors")
        assert torch.equal(other(batch), made(batch))
        assert pairs(other).keys() == pairs(made).keys()


def test_a_file_that_does_not_fit_leaves_the_model_as_it_was(tmp_path):
    made, _ = cp.factorise(mlp(), [rows()], 0.5, QUICK)
    cp.save(made, tmp_path / "two.safetensors")
    other = mlp()
    other[4] = nn.Linear(12, 5)
    before, kinds = copy.deepcopy(other.state_dict()), [type(module) for module in other]
    with pytest.raises(ValueError, match=r"'4\.bias' is \(3,\)|'4\.weight' is \(3, 12\)"):
        cp.load(other, tmp_path / "two.safetensors")
    assert [type(module) for module in other] == kinds
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in before.items())


def test_the_copy_has_the_dtype_and_mode_of_the_model_and_no_random_numbers_are_drawn():
    model, batch = mlp().double().train(), rows().double()
    state = torch.get_rng_state()
    made, report = cp.factorise(model, [batch], 0.5, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float64}
    assert all(module.training for module in made.modules())
    assert report.settings.dtype == "float64"


def test_channels_that_are_not_used_are_left_out():
    module = nn.Linear(4, 3)
    left, right = torch.zeros(3, 3), torch.zeros(3, 4)
    left[:, 0], right[0], right[1] = 1.0, 2.0, 3.0  # the second is made and not read
    pair = TwoFactors.of(module, left, right, torch.ones(3))
    assert pair[0].weight.shape == (1, 4)
    assert torch.equal(pair(torch.ones(1, 4)), torch.full((1, 3), 9.0))
    nothing = TwoFactors.of(module, torch.zeros(3, 3), right, torch.ones(3))
    assert torch.equal(nothing(torch.ones(2, 4)), torch.ones(2, 3))


def test_a_function_says_how_much_a_layer_keeps():
    model, batch = mlp(), rows()
    made, report = cp.factorise(model, [batch], lambda layer: 90 if layer.name == "0" else None, QUICK)
    assert [row.wanted for row in report.rows] == [90, None, None]
    assert torch.equal(made[2].weight, model[2].weight)
    assert report.rows[1].error > 0  # it reads what the first has changed


def test_wrong_calls_are_refused_before_the_work():
    model, batch = mlp(), rows()
    before = copy.deepcopy(model.state_dict())
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    hooked, embedded = mlp(), nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 9, bias=False))
    hooked[2].register_forward_hook(lambda module, args, output: None)
    embedded[1].weight = embedded[0].weight
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    tokens = torch.randn(2, 5, 8)
    calls = [
        (lambda: cp.factorise(grouped, [torch.randn(2, 4, 8, 8)], 0.5), ValueError, "a Conv2d with groups"),
        (lambda: cp.factorise(hooked, [batch], 0.5), ValueError, "'2' is hooked"),
        (lambda: cp.factorise(embedded, [torch.arange(9)[None]], 0.5, names="1"), ValueError, "'1' is tied"),
        (lambda: cp.factorise(nn.Linear(12, 3), [batch], 0.5), ValueError, "wrap it in an nn.Sequential"),
        (lambda: cp.factorise(encoder, [tokens], 0.5, names="*linear*"), ValueError, "no attribute 'weight'"),
        (lambda: cp.factorise(model, [batch], lambda layer: None), ValueError, "every layer"),
        (lambda: cp.factorise(model, [batch], 1.5), ValueError, "keep is 1.5"),
        (lambda: cp.factorise(model, [batch], 500), ValueError, "layer '0': keep is 500"),
        (lambda: cp.factorise(model, [batch], "half"), TypeError, "keep is 'half'"),
        (lambda: cp.factorise(model, [batch], 0.5, cp.Balanced), TypeError, "the solver is the class"),
        (lambda: cp.factorise(model, [batch], 0.5, cp.Balanced()), TypeError, "Balanced takes"),
        (lambda: cp.factorise(nn.Linear, [batch], 0.5), TypeError, "the model is the class"),
        (lambda: cp.multiply_out("model"), TypeError, "the model is a str"),
    ]
    for call, error, message in calls:
        with pytest.raises(error, match=message):
            call()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
