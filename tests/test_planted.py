"""The benchmark's planted instances have the optimum that they claim."""

import pytest
import torch
from benchmark_utils.planted import planted

from convexprune.layer import Layer
from convexprune.problem import judge
from convexprune.problems import NetTrim


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_point_and_witness_close_the_gap(seed):
    instance = planted(120, 12, 5, seed=seed)
    x, inputs, outputs = (torch.from_numpy(a) for a in (instance.x, instance.inputs, instance.outputs))
    problem = NetTrim(Layer.from_samples(x + 0.1, inputs, targets=outputs), instance.epsilon)
    certificate = judge(problem, x, torch.from_numpy(instance.witness))
    assert certificate.value == pytest.approx(instance.value)
    assert certificate.violation < 1e-12
    assert certificate.relative_gap == pytest.approx(0, abs=1e-9)
    assert 0.01 < instance.epsilon < 0.2
    assert (torch.from_numpy(instance.witness)[~problem.active] < 0).any()
