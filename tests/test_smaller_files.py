"""Files of compacted and merged networks: loaded into the dense network, or refused with the model as it was."""

import copy
import json

import pytest
import torch
from test_compact import ConvNet, Residual, kill, settled
from torch import nn
from torch.nn.utils import parametrizations

import convexprune as cp
from convexprune.network.files import serialised


def mlp(width=6, inside=4, **options):
    return nn.Sequential(nn.Linear(inside, width, **options), nn.ReLU(), nn.Linear(width, 2, **options))


def compacted(make, constant=0.3):
    """A network with dead channels, and the smaller one."""
    torch.manual_seed(0)
    model = settled(make())
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer in layers[:-1]:
        kill(layer, [0, 2], constant)
    return model, cp.compact(model)[0]


def convolutions():
    """With depthwise ones, a batch norm, and a reader without bias."""
    model = ConvNet()
    model.fc2 = nn.Linear(12, 4, bias=False)  # what a dead neuron of fc1 gives it becomes a bias
    return model


NETWORKS = {
    "linear": (mlp, (5, 4), 0.3),
    "no bias": (lambda: mlp(bias=False), (5, 4), 0.3),
    "convolutions": (convolutions, (3, 3, 6, 6), 0.3),
    "residual": (Residual, (3, 3, 5, 5), -0.3),  # a positive constant meets a border of zeros
}


def state(model):
    """All that loading could change: the tensors by identity and bits, and what a module says of itself."""
    tensors = {key: (id(value), value.clone()) for key, value in model.state_dict(keep_vars=True).items()}
    return tensors, str(model), {name: sorted(vars(module)) for name, module in model.named_modules()}


def assert_untouched(before, model):
    after = state(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for key, (identity, value) in before[0].items():
        assert identity == after[0][key][0]
        assert torch.equal(value, after[0][key][1])


@pytest.mark.parametrize("case", NETWORKS)
def test_a_fresh_dense_network_becomes_the_smaller_one_bit_for_bit(case, tmp_path):
    make, shape, constant = NETWORKS[case]
    _, small = compacted(make, constant)
    cp.save(small, tmp_path / "small.safetensors", {"kept": 0.5})
    fresh = make().eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in fresh.parameters())
    assert cp.load(fresh, tmp_path / "small.safetensors") == {"kept": 0.5}
    assert str(fresh) == str(small)  # the sizes that the modules say
    x = torch.randn(shape)
    assert torch.equal(fresh(x), small(x))
    assert fresh.state_dict().keys() == small.state_dict().keys()
    fresh(x).sum().backward()  # what was made can be trained
    assert all(parameter.grad is not None for parameter in fresh.parameters())


def test_sizes_survive_copies_and_further_rounds(tmp_path):
    _, small = compacted(mlp)
    smaller = copy.deepcopy(small)
    with torch.no_grad():
        smaller[2].weight[:, 0] = 0
    smaller, _ = cp.compact(smaller)
    assert (small[0].out_features, smaller[0].out_features) == (4, 3)
    cp.save(smaller, tmp_path / "smaller")
    fresh, x = mlp(), torch.randn(3, 4)
    for model in (fresh, small, smaller):  # from the dense one, from half-way, and where nothing is to change
        cp.load(model, tmp_path / "smaller")
        assert torch.equal(model(x), smaller(x))
    cp.save(fresh, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "smaller").read_bytes()


def test_a_merged_network_is_loaded(tmp_path):
    torch.manual_seed(0)
    model, x = mlp(12), torch.randn(9, 4)
    small, _ = cp.merge(model, keep=0.5, batches=[x])
    cp.save(small, tmp_path / "merged")
    fresh = mlp(12)
    cp.load(fresh, tmp_path / "merged")
    assert fresh[0].out_features == fresh[2].in_features == 6
    assert torch.equal(fresh(x), small(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_and_what_is_trained_are_the_models(dtype, tmp_path):
    _, small = compacted(lambda: mlp(bias=False).to(dtype))
    cp.save(small, tmp_path / "small")
    fresh = mlp(bias=False).to(dtype)
    fresh[2].weight.requires_grad = False
    with torch.inference_mode():
        cp.load(fresh, tmp_path / "small")
    assert {parameter.dtype for parameter in fresh.parameters()} == {dtype}
    assert not any(parameter.is_inference() for parameter in fresh.parameters())
    assert not fresh[2].weight.requires_grad
    assert fresh[0].weight.requires_grad


def test_a_module_with_two_names_is_made_smaller_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()
            self.first = self.body[0]

        def forward(self, x):
            return self.body(x)

    _, small = compacted(Twice)
    cp.save(small, tmp_path / "small")
    fresh, x = Twice(), torch.randn(3, 4)
    cp.load(fresh, tmp_path / "small")
    assert fresh.first is fresh.body[0]
    assert torch.equal(fresh(x), small(x))


def another_width():
    return mlp(7), r"'0' has in_features 4, out_features 6 in the file's dense network, and .* 7 in the model"


def another_input():
    return mlp(inside=5), "'0' has in_features 4"


def another_kind():
    return nn.Sequential(nn.Conv1d(4, 6, 1), nn.ReLU(), nn.Linear(6, 2)), "is a Conv1d in the model"


def other_names():
    return nn.Sequential(mlp()), "'0' has .* and is a Sequential in the model"


def fewer_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU()), "'2' has .* and is nothing in the model"


def more_layers():
    return nn.Sequential(*mlp(), nn.Linear(2, 2)), "'3.bias' is not in the file"


def no_bias():
    return mlp(bias=False), "'0' has in_features 4"


def another_dtype():
    return mlp().double(), "torch.float32 in the file and .* torch.float64 in the model"


def parametrized():
    model = mlp()
    parametrizations.weight_norm(model[0])
    return model, "parametriz"


@pytest.mark.parametrize(
    "case",
    [another_width, another_input, another_kind, other_names, fewer_layers, more_layers, no_bias, another_dtype,
     parametrized],
)  # fmt: skip
def test_a_file_of_another_network_is_refused_by_name(case, tmp_path):
    _, small = compacted(mlp)
    cp.save(small, tmp_path / "small.safetensors")
    model, words = case()
    before = state(model)
    with pytest.raises(ValueError, match=f"small.safetensors: .*{words}"):
        cp.load(model, tmp_path / "small.safetensors")
    assert_untouched(before, model)


LINEAR = {"in_features": 4, "out_features": 6, "bias": 1}
WRONG = {
    "no mapping": [1],
    "no pair": {"0": 3},
    "no sizes": {"0": {"dense": LINEAR, "now": [4, 4]}},
    "half a size": {"0": {"dense": LINEAR, "now": {**LINEAR, "out_features": 4.5}}},
    "none left": {"0": {"dense": LINEAR, "now": {**LINEAR, "out_features": 0}}},
    "negative": {"0": {"dense": LINEAR, "now": {**LINEAR, "out_features": -4}}},
    "larger": {"0": {"dense": LINEAR, "now": {**LINEAR, "out_features": 10**15}}},
    "other keys": {"0": {"dense": LINEAR, "now": {"groups": 1}}},
    "not the tensors": {"0": {"dense": LINEAR, "now": {**LINEAR, "out_features": 5}}},
    "only a part": {"0": {"dense": LINEAR, "now": {**LINEAR, "out_features": 4}}},
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_contradicts_itself_is_refused(case, tmp_path):
    _, small = compacted(mlp)
    entries = {"compacted": json.dumps(WRONG[case]), "aliases": "{}"}
    (tmp_path / "odd.safetensors").write_bytes(serialised(small.state_dict(), entries))
    model = mlp()
    before = state(model)
    with pytest.raises(ValueError, match=r"odd\.safetensors: "):
        cp.load(model, tmp_path / "odd.safetensors")
    assert_untouched(before, model)


def test_a_dense_file_does_not_make_a_smaller_network_larger(tmp_path):
    model, small = compacted(mlp)
    cp.save(model, tmp_path / "dense")
    before = state(small)
    with pytest.raises(ValueError, match=r"\(6,\) torch.float32 in the file and \(4,\)"):
        cp.load(small, tmp_path / "dense")
    assert_untouched(before, small)


def test_the_key_is_the_formats_own(tmp_path):
    with pytest.raises(ValueError, match="'compacted' is a key of the file format"):
        cp.save(mlp(), tmp_path / "m", {"compacted": 1})
