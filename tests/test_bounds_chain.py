"""The network's bound holds on random networks, whatever was done to their layers."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convexprune.bounds import ChainBound, cascade_bound, parallel_bound, slack_product_bound
from convexprune.network import capture, read
from convexprune.problems import L1Reconstruction, NetTrim
from convexprune.prune import prune
from convexprune.solution import Attempt, Status
from convexprune.solvers import ADMM

GUARANTEED = settings(max_examples=25)
WIDTHS = st.lists(st.integers(1, 12), min_size=2, max_size=5)


@dataclass(frozen=True)
class Crude:
    """Drops the small weights and shakes the rest: a point that is rarely feasible and comes without a witness."""

    seed: int
    dropped: float
    noise: float

    def solve(self, problem, start=None):
        dense = problem.dense
        keep = dense.abs() >= torch.quantile(dense.abs().flatten(), self.dropped)
        shake = torch.randn(dense.shape, generator=torch.Generator().manual_seed(self.seed), dtype=dense.dtype)
        return Attempt((dense + self.noise * shake) * keep, None, Status.MAX_ITER, 1)


def network(widths, seed, between=nn.ReLU):
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for inputs, outputs in itertools.pairwise(widths):
        linear = nn.Linear(inputs, outputs)
        for parameter in linear.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        parts += [linear, between()]
    return nn.Sequential(*parts[:-1]).double()


def samples(width, seed, count=20):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def holds(report):
    return report.network.measured <= report.network.guaranteed * (1 + 1e-9) + 1e-9


@GUARANTEED
@given(WIDTHS, st.integers(0, 1000), st.floats(0, 0.9), st.floats(0, 1), st.sampled_from(["parallel", "cascade"]))
def test_guaranteed_is_at_least_measured(widths, seed, dropped, noise, mode):
    model, x = network(widths, seed), samples(widths[0], seed)

    def build(layer):
        return NetTrim.cascade(layer, 0.05) if mode == "cascade" else NetTrim(layer, 0.05)

    pruned, report = prune(model, [x], build, Crude(seed, dropped, noise), mode)
    assert holds(report)
    assert report.network.measured == pytest.approx(float((pruned(x) - model(x)).detach().norm()), rel=1e-12)


@GUARANTEED
@given(WIDTHS, st.integers(0, 1000), st.sampled_from(["parallel", "cascade"]), st.sampled_from([nn.ReLU, nn.Tanh]))
def test_also_with_layers_left_out_and_without_relu(widths, seed, mode, between):
    model, x = network(widths, seed, between), samples(widths[0], seed)

    def build(layer):
        return L1Reconstruction(layer, 0.1) if layer.name == "0" or (seed + int(layer.name)) % 3 else None

    assert holds(prune(model, [x[:7], x[7:]], build, Crude(seed, 0.3, 0.2), mode)[1])


def test_feasible_layers_are_charged_at_most_their_radius():
    model, x = network([5, 8, 4], 0), samples(5, 0)
    pruned, report = prune(model, [x], lambda layer: NetTrim(layer, 0.25), ADMM())
    first, last = (NetTrim(layer, 0.25).radius for layer in capture(model, [x], keep_inputs=True))
    norm = float(torch.linalg.matrix_norm(pruned[2].weight.detach(), 2))
    assert report.network.rules["spectral"] <= (last + norm * first) * (1 + 1e-6)
    assert report.network.rules["spectral"] >= 0.9 * (last + norm * first)  # the balls are full


@GUARANTEED
@given(WIDTHS, st.integers(0, 1000), st.floats(0, 0.9), st.sampled_from(["parallel", "cascade"]))
def test_sharper_rules_guarantee_no_more(widths, seed, dropped, mode):
    model, x = network(widths, seed), samples(widths[0], seed)
    pruned, report = prune(model, [x], lambda layer: NetTrim(layer, 0.05), Crude(seed, dropped, 0.1), mode)
    rules = report.network.rules
    assert report.network.guaranteed == rules["by channel"] <= rules["spectral"] * (1 + 1e-9)
    assert rules["spectral"] <= rules["Frobenius"] * (1 + 1e-9)
    errors, weights = [row.error for row in report.rows], [read(pruned, row.name)[:, :-1] for row in report.rows]
    chain = parallel_bound(errors, weights) if mode == "parallel" else cascade_bound(errors, weights)
    assert rules["spectral"] == pytest.approx(chain.total, rel=1e-6, abs=1e-9)
    for link in report.network.layers:
        assert link.measured <= link.guaranteed * (1 + 1e-9) + 1e-9
    assert [link.name for link in report.network.layers] == [row.name for row in report.rows]


def test_a_priori_bound_of_the_cascade_covers_the_measured_error():
    gamma, widths = 1.1, [6, 10, 8, 3]
    model, x = network(widths, 3), samples(6, 3)

    class Shrink:  # towards the dense layer until the problem agrees: feasible, and at the edge of it
        def solve(self, problem, start=None):
            step = 1.0
            while problem.violation((1 - step) * problem.dense) > 0:
                step *= 0.7
            return Attempt((1 - step) * problem.dense, None, Status.CONVERGED, 1)

    # the output has no ReLU behind it, and shrinking keeps the signs where a ReLU is
    for module in model:
        if isinstance(module, nn.Linear):
            module.bias.data.zero_()
    _, report = prune(model, [x], lambda layer: NetTrim.cascade(layer, 0.05, gamma), Shrink(), "cascade")
    assert all(row.certificate.violation == 0 for row in report.rows)
    layers = capture(model, [x], keep_inputs=True)
    first = NetTrim(layers[0], 0.05).radius
    bound = slack_product_bound(first, [gamma] * 2, [layer.weight for layer in layers[1:]])
    assert 0 < report.network.measured <= bound.total


def test_formulas():
    two = 2 * torch.eye(3)
    assert parallel_bound([1.0, 0.5], [two, two]).per_layer == pytest.approx((1.0, 2.5))
    assert cascade_bound([1.0, 0.5], [two, two]).per_layer == pytest.approx((1.0, 0.5))
    assert cascade_bound([1.0, None], [two, two]).per_layer == pytest.approx((1.0, 2.0))
    assert cascade_bound([None, None], [two, two]).total == 0
    assert slack_product_bound(1.0, [4.0], [two]).total == pytest.approx(4.0)
    assert parallel_bound([math.inf], [two]).total == math.inf


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: parallel_bound([1.0], []), "1 figures for 0 weights"),
        (lambda: parallel_bound([-1.0], [torch.eye(2)]), "-1.0"),
        (lambda: cascade_bound([math.nan], [torch.eye(2)]), "nan"),
        (lambda: cascade_bound([None], [torch.zeros(2, 2, 2)]), "(2, 2, 2)"),
        (lambda: slack_product_bound(1.0, [0.9], [torch.eye(2)]), "gamma is 0.9"),
        (lambda: ChainBound(()), "at least one"),
    ],
)
def test_wrong_calls_name_the_value(call, word):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call()
    assert word in str(raised.value)


def test_biases_cancel():
    model, x = network([4, 6, 3], 1), samples(4, 1)
    for row in (0, 2):
        model[row].bias.data.mul_(1e6)
    _, report = prune(model, [x], lambda layer: NetTrim(layer, 0.0) if layer.name == "0" else None, Crude(0, 0.3, 0.0))
    weight = read(model, "2")[:, :-1]
    spectral = report.rows[0].error * float(torch.linalg.matrix_norm(weight, 2))
    assert report.network.rules["spectral"] == pytest.approx(spectral)
    assert report.network.measured <= report.network.guaranteed <= spectral
