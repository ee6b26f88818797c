"""Masks that survive training, and batch-norm statistics measured anew."""

import copy

import pytest
import torch
from torch import nn

import convexprune as cp

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
}


def pruned_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[torch.rand(8, 10) < 0.7] = 0
        model[2].weight[torch.rand(3, 8) < 0.5] = 0
    return model


def train(model, optimizer, steps=5):
    x, y = torch.randn(32, 10), torch.randint(3, (32,))

    def loss():
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y)
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_zeros_stay_zero_and_the_rest_learns(kind):
    model = pruned_network()
    before, names = copy.deepcopy(model.state_dict()), list(model.state_dict())
    optimizer = OPTIMIZERS[kind](model.parameters())
    with cp.MaskKeeper(model, optimizer):
        train(model, optimizer)
        for name, value in model.state_dict().items():
            if name.endswith("weight"):
                assert (value[before[name] == 0] == 0).all()
                assert not torch.equal(value, before[name])
    assert list(model.state_dict()) == names
    assert not model[0]._forward_pre_hooks
    train(model, optimizer)  # nobody watches any more
    assert (model[0].weight[before["0.weight"] == 0] != 0).any()


def test_given_masks_are_applied_at_once():
    model = pruned_network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    mask = torch.zeros(3, 8, dtype=torch.bool)
    with cp.MaskKeeper(model, optimizer, {"2.weight": mask}):
        assert (model[2].weight == 0).all()


def test_bad_masks_and_strange_optimizers_are_refused():
    model = pruned_network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(ValueError, match="no parameter of the model"):
        cp.MaskKeeper(model, optimizer, {"nothing": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="the mask of"):
        cp.MaskKeeper(model, optimizer, {"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="trains none"):
        cp.MaskKeeper(model, OPTIMIZERS["sgd"](pruned_network().parameters()))


def test_batch_norm_statistics_are_those_of_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    x = 3 + 2 * torch.randn(16, 3, 8, 8)
    weights = copy.deepcopy(list(model.parameters()))
    cp.reestimate_batch_norm(model, [x[:8], x[8:]])
    made = [model[0](part).detach() for part in (x[:8], x[8:])]
    torch.testing.assert_close(model[1].running_mean, sum(y.mean((0, 2, 3)) for y in made) / 2)
    torch.testing.assert_close(model[1].running_var, sum(y.var((0, 2, 3)) for y in made) / 2)
    assert model.training
    assert model[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_a_failing_batch_leaves_the_statistics_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        cp.reestimate_batch_norm(model, [torch.randn(8, 3), torch.randn(8, 5)])
    with pytest.raises(ValueError, match="no batches"):
        cp.reestimate_batch_norm(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="no batch norm"):
        cp.reestimate_batch_norm(nn.Linear(2, 2), [torch.randn(1, 2)])


def test_two_of_four_runs_along_the_channels_of_a_captured_convolution():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 5, 3)), torch.randn(4, 8, 9, 9)
    pruned, report = cp.prune(model, [x], lambda layer: cp.Reconstruction(layer, cp.NM(2, 4)))
    kept = (pruned[0].weight != 0).reshape(5, 2, 4, 3, 3).sum(2)
    assert (kept == 2).all()
    assert report.rows[0].certificate.violation == 0


def test_a_model_that_is_one_layer_keeps_its_zeros():
    torch.manual_seed(0)
    model = nn.Linear(10, 3)
    with torch.no_grad():
        model.weight[torch.rand(3, 10) < 0.5] = 0
    gone = model.weight == 0
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    with cp.MaskKeeper(model, optimizer):
        train(model, optimizer)
    assert bool((model.weight[gone] == 0).all())
    assert bool((model.weight[~gone] != 0).all())
