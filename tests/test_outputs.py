"""One rule says which tensor of what a model returns is its output, and the caller may name another."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network import Calibration
from convexprune.network.outputs import output_of


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


class Forked(nn.Module):
    """Returns what `made` makes of a whole number, a hidden state and two heads."""

    def __init__(self, made):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.made = made

    def forward(self, x):
        hidden = self.trunk(x).relu()
        return self.made(torch.arange(len(x)), hidden, self.one(hidden), self.two(hidden))


class Attributes:
    """Neither a mapping nor a sequence."""

    def __init__(self, logits):
        self.logits = logits


FORMS = {
    "logits among a dict": lambda n, h, a, b: {"count": n, "hidden": h, "logits": b, "last": a},
    "the first of floating point": lambda n, h, a, b: (n, [b, h], a),
    "a tensor": lambda n, h, a, b: b,
    "an attribute": lambda n, h, a, b: Attributes(b),
    "an ordered dict": lambda n, h, a, b: OrderedDict(count=n, last=b),
}


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("form", FORMS)
def test_the_error_of_the_output_is_measured_and_guaranteed(form, mode):
    model, x = Forked(FORMS[form]).eval(), torch.randn(20, 6)
    pruned, report = cp.prune(model, [x[:10], x[10:]], half, cp.Magnitude(), mode)
    two = lambda network: network.two(network.trunk(x).relu()).detach().double()  # noqa: E731
    truth = float((two(pruned) - two(model)).norm())
    assert report.network.measured == pytest.approx(truth, rel=1e-5)
    assert truth <= report.network.guaranteed * (1 + 1e-9)
    assert report.network.guaranteed < 20 * truth


def test_what_is_computed_after_the_pass_has_no_guarantee():
    model, x = Forked(FORMS["logits among a dict"]).eval(), torch.randn(20, 6)
    data = Calibration([x], output=lambda returned: returned["last"][:, :1])
    _, report = cp.prune(model, data, half, cp.Magnitude())
    assert report.network.measured > 0
    assert report.network.guaranteed is None
    assert "the model's output is no tensor that it was seen to make" in report.network.reason


@pytest.mark.parametrize(
    ("which", "head"),
    [("last", "one"), (lambda returned: returned["last"], "one"), ("logits", "two"), (None, "two")],
)
def test_the_caller_may_name_another(which, head):
    model, x = Forked(FORMS["logits among a dict"]).eval(), torch.randn(20, 6)
    data = Calibration([x], output=which)
    pruned, report = cp.prune(model, data, half, cp.Magnitude())
    made = lambda network: getattr(network, head)(network.trunk(x).relu()).detach().double()  # noqa: E731
    truth = float((made(pruned) - made(model)).norm())
    assert report.network.measured == pytest.approx(truth, rel=1e-5)
    assert truth <= report.network.guaranteed * (1 + 1e-9)
    unseen = cp.certify_unseen(model, pruned, Calibration([torch.rand(30, 6)], output=which), [x], clip=1e9)
    assert unseen.samples == 30
    for measure in (cp.OutputChange(), cp.SecondOrder()):
        *_, last = cp.rate_distortion(model, data, levels=(0.2,), measure=measure)  # the layer `two`
        assert (float(last.distortion) > 1e-12) == (head == "two")
    found = cp.sensitivities(model, data, probes=2)
    assert head in found
    assert {"one", "two"} - {head} - set(found)


def test_an_index_counts_what_was_returned():
    returned = (torch.arange(3), torch.ones(2), torch.zeros(1))
    assert output_of(returned) is returned[1]
    assert output_of(returned, 2) is returned[2]
    assert output_of(returned, 0) is returned[0]
    assert output_of(torch.arange(3)) is not None  # a lone tensor, whatever its dtype
    assert output_of((torch.arange(3), torch.arange(2))) is None


@pytest.mark.parametrize(
    ("which", "error", "message"),
    [
        ("logit", ValueError, "output is 'logit', which the dict that the model returns does not have"),
        (7, ValueError, "output is 7"),
        (lambda returned: 3.0, TypeError, "it is a float, not a tensor"),
        (True, TypeError, "output is True; give a key"),
        (1.5, TypeError, "output is 1.5; give a key"),
    ],
)
def test_what_names_no_output_is_refused(which, error, message):
    model = Forked(FORMS["logits among a dict"])
    with pytest.raises(error, match=message):
        cp.prune(model, Calibration([torch.randn(20, 6)], output=which), half, cp.Magnitude())


def test_a_goal_is_for_the_output():
    model, x = Forked(FORMS["logits among a dict"]).eval(), torch.randn(50, 6)
    pruned, report = cp.prune_within(model, [x], 0.3)
    change, size = (pruned(x)["logits"] - model(x)["logits"]).norm(), model(x)["logits"].norm()
    assert 0 < float(change / size) <= 0.3
    assert report.network.guaranteed <= report.network.wanted
