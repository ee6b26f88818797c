"""Residual sums: a layer that aims at the repaired target reproduces the dense sum exactly where it can."""

import copy

import pytest
import torch
from benchmark_utils import resnet
from torch import nn
from torch.nn import functional as F

import convexprune as cp
from convexprune.network.recording import record
from convexprune.network.residual import repaired, summed


class Block(nn.Module):
    """A residual block whose sum is written in one of several ways."""

    def __init__(self, way, norm):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 5, 1, bias=False), nn.Conv2d(5, 3, 3, padding=1, bias=False)
        self.norm, self.way = nn.BatchNorm2d(3) if norm else nn.Dropout(), way
        if norm:
            nn.init.uniform_(self.norm.weight, 0.5, 2)
            nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x):
        y = self.norm(self.outer(F.relu(self.inner(x))))
        if self.way == "operator":
            return F.relu(x + y)
        if self.way == "function":
            return torch.add(y, x).relu()
        y += x
        return y.relu()


@pytest.mark.parametrize("way", ["operator", "function", "in place"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_repaired_target_restores_the_sum(way, norm):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(2, 3, 1), Block(way, norm)).eval()
    model = copy.deepcopy(dense)
    model[0].weight.data.mul_(0.7)
    x = torch.randn(4, 2, 5, 5)
    outputs = []
    dense[1].outer.register_forward_hook(lambda _m, _a, y: outputs.append(y.detach().clone()))
    with torch.no_grad():
        wanted = dense(x)
        (target,) = repaired(dense, model, x, {"1.outer": outputs[:1]})["1.outer"]
        got = F.relu(model[1].norm(target) + model[0](x))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    steps = record(dense, x)
    assert summed(steps, "1.outer")
    assert not summed(steps, "1.inner")


def test_no_sum_no_repair():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batches = [torch.randn(8, 4)]
    assert not summed(record(model, batches[0]), "0")
    with pytest.raises(ValueError, match="0 residual sums"):
        repaired(model, model, batches[0], {"0": [torch.zeros(8, 4)]})

    def build(layer):
        return cp.Reconstruction(layer, cp.Unstructured(0.5))

    residual, _ = cp.prune(model, batches, build, cp.Magnitude(), mode="residual")
    cascade, _ = cp.prune(model, batches, build, cp.Magnitude(), mode="cascade")
    assert all(torch.equal(a, b) for a, b in zip(residual.parameters(), cascade.parameters(), strict=True))


class Sum(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 4), nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.first(x), self.second)


@pytest.mark.parametrize("function", [lambda y, f: y + y, lambda y, f: f(y) + y[None].repeat(2, 1, 1)])
def test_doubled_and_stretched_tensors_are_no_residual_sums(function):
    build = lambda layer: cp.L1Reconstruction(layer, 0.1)  # noqa: E731
    _, report = cp.prune(Sum(function).eval(), [torch.randn(9, 4)], build, mode="residual")
    assert report.network.measured > 0


def test_residual_mode_repairs_a_network():
    torch.manual_seed(0)
    model = resnet.ResNet(1).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    batches = [torch.randn(8, 3, 16, 16)]

    def build(layer):
        return cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(0.3))

    errors = {}
    for mode in ("cascade", "residual"):
        _, report = cp.prune(model, batches, build, mode=mode, names="*conv*")
        errors[mode] = report.network.measured
    assert errors["residual"] < errors["cascade"]
