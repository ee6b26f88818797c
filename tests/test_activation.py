"""What follows a layer, from one recorded forward pass."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from convexprune.network import Calibration, capture
from convexprune.network.recording import record


class Functional(nn.Module):
    """A model whose forward is the given function of itself and x; it has layers a, b, c, a norm, a conv."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
        self.bn, self.conv = nn.BatchNorm1d(6), nn.Conv1d(1, 2, 3, padding=1)
        self.drop, self.relu = nn.Dropout(), nn.ReLU()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def first_activation(function):
    return capture(Functional(function), [torch.randn(4, 6)] * 2)[0].activation


def overwritten(m, x):
    h = m.a(x)
    h[0] = 0
    return m.b(h.relu())


def changing_shape(m, x):
    h = m.a(x)
    assert h.shape == x.shape
    assert h.dim() == 2
    return m.b(h.relu().reshape(h.size(0), -1))


RECTIFIED = {
    "module": lambda m, x: m.b(m.relu(m.a(x))),
    "in place": lambda m, x: m.b(F.relu(m.a(x), inplace=True)),
    "in place, then reused": lambda m, x: (lambda h: h + m.b(h))(m.a(x).relu_()),
    "F.relu": lambda m, x: m.b(F.relu(m.a(x))),
    "torch.relu": lambda m, x: m.b(torch.relu(m.a(x))),
    "method": lambda m, x: m.b(m.a(x).relu()),
    "dropout first": lambda m, x: m.b(F.relu(m.drop(m.a(x)))),
    "active dropout": lambda m, x: m.b(F.relu(F.dropout(m.a(x)))),
    "flattened": lambda m, x: m.b(m.a(x).view(2, 2, 6).flatten(0, 1).relu()),
    "identity": lambda m, x: m.b(nn.Identity()(m.a(x)).relu()),
    "two readers": lambda m, x: (lambda h: m.b(h.relu()) + m.c(F.relu(h)))(m.a(x)),
    "residual after": lambda m, x: m.b(m.a(x).relu()) + x,
    "max pooling": lambda m, x: F.relu(F.max_pool1d(m.conv(x[:, None]), 2)).flatten(1),
    "data-dependent": lambda m, x: m.b(m.a(x).relu()) if float(x.sum()) > -1e9 else x,
    "looked at": changing_shape,
    "called twice": lambda m, x: m.b(m.a(m.a(x).relu()).relu()),
}
NOT_RECTIFIED = {
    "linear": lambda m, x: m.b(m.a(x)),
    "returned": lambda m, x: m.a(x),
    "returned as well": lambda m, x: (lambda h: {"h": h, "y": h.relu()})(m.a(x)),
    "residual": lambda m, x: (m.a(x) + x).relu(),
    "residual around the relu": lambda m, x: (lambda h: h + h.relu())(m.a(x)),
    "changed in place": lambda m, x: (lambda h: h.add_(x).relu())(m.a(x)),
    "overwritten": overwritten,
    "carried away": lambda m, x: (lambda h: h.relu() + h.sum().item())(m.a(x)),
    "batch norm": lambda m, x: m.bn(m.a(x)).relu(),
    "gelu": lambda m, x: F.gelu(m.a(x)),
    "relu6": lambda m, x: F.relu6(m.a(x)),
    "joined": lambda m, x: torch.cat([m.a(x), x]).relu(),
    "average pooling": lambda m, x: F.relu(F.avg_pool1d(m.conv(x[:, None]), 2)).flatten(1),
    "called twice, once bare": lambda m, x: m.b(m.a(m.a(x).relu())),
    "unused": lambda m, x: (m.a(x), m.b(x).relu())[1],
}


@pytest.mark.parametrize("case", RECTIFIED)
def test_rectified(case):
    assert first_activation(RECTIFIED[case]) == "relu"


@pytest.mark.parametrize("case", NOT_RECTIFIED)
def test_not_rectified(case):
    assert first_activation(NOT_RECTIFIED[case]) is None


def test_sequential_and_what_the_user_says():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x = [torch.randn(3, 6)]
    assert [layer.activation for layer in capture(model, x)] == ["relu", None, None]
    told = capture(model, Calibration(x, activations={"0": None, "5": "relu"}))
    assert [layer.activation for layer in told] == [None, None, "relu"]
    with pytest.raises(ValueError, match=r"activations: '7' is no layer; did you mean '0', '3', '5'"):
        capture(model, Calibration(x, activations={"7": "relu"}))
    with pytest.raises(ValueError, match="'gelu', not one of"):
        capture(model, Calibration(x, activations={"0": "gelu"}))
    grouped = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.ReLU())
    told = capture(grouped, Calibration([torch.randn(2, 4, 3)], activations={"0": "relu", "0[1]": None}))
    assert [layer.activation for layer in told] == ["relu", None]


def test_tracing_changes_no_output():
    model = Functional(RECTIFIED["max pooling"]).eval()
    x, seen = torch.randn(4, 6), []
    model.register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    with torch.no_grad():
        model(x)
    capture(model, [x, x])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_recording_leaves_the_model_as_it_was():
    def halfway(m, x):
        m.a(x)
        raise RuntimeError("halfway")

    model = Functional(halfway)
    with pytest.raises(RuntimeError, match="halfway"):
        record(model, torch.randn(4, 6))
    assert all(m.training and not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()
