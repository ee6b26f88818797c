"""Transposed convolutions as matrices: capture = torch, write-then-read, groups, pruning."""

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network import read, write

CASES = [
    lambda: nn.ConvTranspose2d(4, 6, 3),
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), padding=(0, 2), dilation=(2, 1), bias=False),
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
    lambda: nn.ConvTranspose1d(4, 6, 5, stride=2, padding=3),
    lambda: nn.ConvTranspose1d(4, 4, 3, stride=4, groups=4, dilation=3),
]


def network(case):
    torch.manual_seed(0)
    layer = CASES[case]()
    shape = (3, 4, 7, 6) if isinstance(layer, nn.ConvTranspose2d) else (3, 4, 9)
    return nn.Sequential(layer).double().eval(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_rows_times_matrix_is_torchs_output(case):
    model, x = network(case)
    layers = cp.capture(model, [x], keep_inputs=True)
    y = model(x).detach().flatten(2).transpose(1, 2).reshape(-1, model[0].out_channels)
    made = torch.cat([layer.affine_inputs.double() @ layer.affine_weight.T for layer in layers], 1)
    torch.testing.assert_close(made, y)
    assert all(layer.kernel == model[0].weight[0, 0].numel() for layer in layers)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_what_is_written_is_read_and_what_was_read_changes_nothing(case):
    model, x = network(case)
    before = model(x)
    for layer in cp.capture(model, [x]):
        own = read(model, layer.name)
        torch.testing.assert_close(own, layer.affine_weight)
        write(model, layer.name, own)
        torch.testing.assert_close(model(x), before)
        write(model, layer.name, 2 * own)
        torch.testing.assert_close(read(model, layer.name), 2 * own)
        write(model, layer.name, own)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_pruned_by_reconstruction(case, mode):
    model, x = network(case)
    pruned, report = cp.prune(model, [x], lambda layer: cp.Reconstruction(layer, cp.PerRow(0.5)), mode=mode)
    assert all(row.certificate.violation == 0 for row in report.rows)
    samples = len(x) * model(x)[0, 0].numel()
    certified = samples * sum(row.certificate.value for row in report.rows)
    change = (pruned(x) - model(x)).detach().square().sum()
    assert float(change) == pytest.approx(certified, rel=1e-6)
