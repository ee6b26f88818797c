"""Pruning a pruned network again: a zero stays zero unless it pays, and five rounds go from 50% to 95%."""

import pytest
import torch
from torch import nn

import convexprune as cp


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5))
        return model, [torch.randn(100, 24), torch.randn(100, 24)]


def keeping(share):
    return lambda layer: cp.Reconstruction(layer, cp.Unstructured(share))


def masks(model):
    return {name: value != 0 for name, value in model.named_parameters() if value.ndim > 1}


SOLVERS = [cp.Fast(), cp.Balanced(), cp.Best(), cp.ADMM(), cp.ExactOBS(), cp.SwapSearch(), cp.ColumnSweep()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_looser_second_pruning_revives_nothing(solver):
    model, batches = network()
    once, _ = cp.prune(model, batches, keeping(0.3), solver)
    twice, report = cp.prune(once, batches, keeping(0.5), solver)
    before, after = masks(once), masks(twice)
    assert all(not bool((after[name] & ~before[name]).any()) for name in before)
    for row in report.rows:
        assert row.certificate.value <= 1e-9
    for x in batches:
        torch.testing.assert_close(twice(x), once(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_five_rounds_revive_no_weight_that_does_not_pay(mode):
    dense, batches = network(1)
    model, errors = dense, []
    for share in (0.5, 0.35, 0.2, 0.1, 0.05):
        before = masks(model)
        model, report = cp.prune(model, batches, keeping(share), cp.Balanced(), mode)
        assert all(row.kept <= round(share * row.total) for row in report.rows)
        for layer in cp.capture(model, batches):
            name = f"{layer.name}.weight"
            revived = (layer.weight != 0) & ~before[name]
            # what a revived weight does to its output is more than rounding
            moves = layer.weight.square() * layer.gram.diagonal()
            assert bool((moves[revived] > 2.0**-44 * layer.energies.clamp(min=1e-30).min()).all())
        with torch.no_grad():
            errors.append(sum(float((model(x) - dense(x)).square().sum()) for x in batches))
    assert errors == sorted(errors)
    assert report.kept_fraction <= 0.055


def test_a_zero_that_pays_comes_back():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.zeros(2, 6, dtype=torch.float64)
    weight[:, 0] = 1.0
    targets = x[:, :2] + x[:, 3:4]  # the third input is worth a weight now
    layer = cp.Layer.from_samples(weight, x, activation=None, targets=targets)
    solution = cp.solve(cp.Reconstruction(layer, cp.PerRow(2)))
    assert bool((solution.x[:, 3] != 0).all())


def test_the_zeros_of_a_grouped_layer_stay_as_well():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        batches = [torch.randn(6, 8, 7, 7)]
    once, _ = cp.prune(model, batches, keeping(0.4))
    twice, _ = cp.prune(once, batches, keeping(0.6))
    before, after = masks(once), masks(twice)
    assert all(not bool((after[name] & ~before[name]).any()) for name in before)
