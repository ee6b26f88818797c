"""A copy that has the model's parameters until they are written."""

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network.sharing import owned, sharing


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


def network():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    return model


def test_parameters_are_the_models_until_they_are_owned():
    model = network()
    model.register_buffer("seen", torch.zeros(2))
    copy = sharing(model)
    assert all(one is other for one, other in zip(model.parameters(), copy.parameters(), strict=True))
    assert copy.seen is not model.seen
    owned(copy, model, [copy[0].weight])
    assert copy[0].weight is copy[1].weight is not model[0].weight
    assert copy[2].weight is model[2].weight
    with torch.no_grad():
        copy[1].weight.zero_()
    assert bool((model[0].weight != 0).any())
    owned(copy, model)
    assert not {id(each) for each in copy.parameters()} & {id(each) for each in model.parameters()}
    assert copy[0].weight is copy[1].weight


def test_what_prune_returns_shares_nothing_with_the_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    model[2].weight.requires_grad_(False)
    for mode in ("parallel", "cascade"):
        pruned, _ = cp.prune(model, [torch.randn(9, 4)], half, mode=mode, names="0")
        storages = [{each.untyped_storage().data_ptr() for each in net.parameters()} for net in (model, pruned)]
        assert not storages[0] & storages[1]
        assert [each.requires_grad for each in pruned.parameters()] == [True, True, False, True]


def test_a_failure_leaves_the_model_as_it_was():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def build(layer):
        if layer.name == "2" and layer.samples > 1:
            raise KeyboardInterrupt
        return half(layer) if layer.name != "1" else None

    with pytest.raises(KeyboardInterrupt):
        cp.prune(model, [torch.randn(9, 4)], build, mode="cascade")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
