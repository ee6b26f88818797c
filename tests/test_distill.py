"""Distillation without labels: what it may touch, that it goes down, and where it must end up."""

import copy

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network import Calibration


def networks(seed=0, keep=0.3):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)
    )
    batches = list((torch.randn(96, 6)).split(16))
    with torch.no_grad():
        model(batches[0])  # batch norm has seen something
    return (
        model,
        cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Unstructured(keep)), mode="cascade")[0],
        batches,
    )


def states(*models):
    return [
        (copy.deepcopy(model.state_dict()), [m.training for m in model.modules()],
         [(p.requires_grad, p.grad) for p in model.parameters()])
        for model in models
    ]  # fmt: skip


def by_hand(model, student, batches, layers):
    """The objective from its formula, the networks taken apart."""
    total = [[0.0, 0.0] for _ in range(len(layers) + 1)]
    with torch.no_grad():
        for batch in batches:
            for index, (place, relu) in enumerate([*layers, (len(model), False)]):
                theirs, ours = model[:place].eval()(batch).double(), student[:place].eval()(batch).double()
                theirs, ours = (theirs.relu(), ours.relu()) if relu else (theirs, ours)
                total[index][0] += float((ours - theirs).square().sum())
                total[index][1] += float(theirs.square().sum())
    shares = [a / b for a, b in total]
    return shares[-1] + sum(shares[:-1]) / len(layers)


@pytest.mark.parametrize("seed", range(5))
def test_it_goes_down_and_touches_nothing_else(seed):
    model, pruned, batches = networks(seed)
    model.train()
    before, random = states(model, pruned), torch.random.get_rng_state()
    student, found = cp.distill(model, pruned, batches)
    assert torch.equal(torch.random.get_rng_state(), random)
    for (old, modes, flags), (new, modes_now, flags_now) in zip(before, states(model, pruned), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
        assert modes == modes_now
        assert flags == flags_now
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in pruned.parameters()]
    for (name, old), new in zip(pruned.state_dict().items(), student.state_dict().values(), strict=True):
        assert (new[old == 0] == 0).all()
        if name.startswith("1."):  # batch norm is not of the layers
            assert torch.equal(old, new)
        elif name.endswith("weight"):
            assert not torch.equal(old, new)
    assert found.objective[1] < found.objective[0]
    assert found.outputs[1] < found.outputs[0]
    layers = [(1, False), (5, True), (7, False)]
    for network, value in zip((pruned, student), found.objective, strict=True):
        assert value == pytest.approx(by_hand(model, copy.deepcopy(network), batches, layers), rel=1e-5)
    again, _ = cp.distill(model, pruned, batches)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_a_single_layer_ends_at_the_least_squares_of_its_support():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 5))
    batches = list(torch.randn(64, 8).split(32))
    rough, _ = cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.4)), cp.Magnitude())
    best, _ = cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Support(rough[0].weight != 0)))
    ours, found = cp.distill(model, rough, batches, epochs=300, rate=0.03)
    torch.testing.assert_close(ours[0].weight, best[0].weight, rtol=0, atol=1e-3)
    assert found.outputs[1] == pytest.approx(found.layers["0"][1])


def test_only_the_named_layers_move():
    model, pruned, batches = networks()
    student, found = cp.distill(model, pruned, batches, "4", epochs=2)
    moved = [name for name, p in pruned.named_parameters() if not torch.equal(p, student.get_parameter(name))]
    assert moved == ["4.weight", "4.bias"]
    assert list(found.layers) == ["4"]


def test_without_hints_the_outputs_alone_count():
    model, pruned, batches = networks()
    alone, both = (cp.distill(model, pruned, batches, epochs=100, hints=hints)[1] for hints in (0, 1))
    assert alone.outputs[1] < both.outputs[1]
    assert sum(after for _, after in alone.layers.values()) > sum(after for _, after in both.layers.values())
    assert alone.objective[1] == pytest.approx(alone.outputs[1] ** 2)


def test_steps_that_lead_up_are_taken_back():
    model, _, batches = networks()
    near = copy.deepcopy(model)
    with torch.no_grad():
        near[0].weight.mul_(1.001)
    student, found = cp.distill(model, near, batches, epochs=1, rate=0.9)
    assert all(torch.equal(a, b) for a, b in zip(near.parameters(), student.parameters(), strict=True))
    assert found.objective[0] == found.objective[1] < 1e-5
    assert "the network is as it was; try a smaller rate" in str(found)


class Twice(nn.Module):
    """One layer called twice, and two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        y = self.layer(x).relu_()
        return y, self.layer(y)


class Silent(nn.Sequential):
    """Returns nothing."""

    def forward(self, x):
        super().forward(x)


def test_a_layer_called_twice_in_a_network_of_two_outputs():
    torch.manual_seed(2)
    model, batches = Twice(), [torch.randn(40, 5)]
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.layer.weight[torch.rand(5, 5) < 0.5] = 0
    _, found = cp.distill(model, pruned, batches)
    assert found.outputs[1] < found.outputs[0]  # the first of the two
    assert found.layers["layer"][1] < found.layers["layer"][0]
    _, second = cp.distill(model, pruned, Calibration(batches, output=1))
    assert second.outputs[0] != found.outputs[0]


def test_a_network_without_an_output_has_its_layers_compared():
    model, batches = Silent(nn.Linear(5, 5)), [torch.randn(40, 5)]
    pruned, _ = cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)), cp.Magnitude())
    _, found = cp.distill(model, pruned, batches)
    assert found.outputs is None
    assert "outputs" not in str(found)
    with pytest.raises(ValueError, match="hints is 0, and the output is no tensor, or is zero: nothing"):
        cp.distill(model, pruned, batches, hints=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs is 0; it must be a whole number >= 1"),
        ({"rate": 1.5}, ValueError, r"rate is 1.5; it must be a finite number in \(0, 1\)"),
        ({"hints": -1}, ValueError, "hints is -1; it must be a finite number >= 0"),
        ({"rate": "fast"}, TypeError, "rate is 'fast'"),
        ({"batches": torch.randn(3, 6)}, TypeError, "batches is a Tensor"),
        ({"batches": []}, ValueError, "no batches"),
        ({"names": "nope"}, ValueError, "'nope'"),
        ({"pruned": nn.Sequential(nn.Linear(6, 9))}, ValueError, r"\(12, 6\), the pruned one has weights \(9, 6\)"),
        ({"pruned": nn.Sequential()}, ValueError, "the pruned one has no such layer"),
    ],
)  # fmt: skip
def test_wrong_calls(change, error, message):
    model, pruned, batches = networks()
    with pytest.raises(error, match=message):
        cp.distill(**{"model": model, "pruned": pruned, "batches": batches, **change})


class Graphless(nn.Sequential):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


def test_a_network_without_gradients_is_refused():
    torch.manual_seed(3)
    model = Graphless(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="layer '0' runs without gradients"):
        cp.distill(model, model, [torch.randn(9, 6)])


def test_under_inference_mode():
    model, pruned, batches = networks()
    with torch.inference_mode():
        student, found = cp.distill(model, pruned, [batch + 0 for batch in batches])
    assert found.objective[1] < found.objective[0]
    assert not student[0].weight.is_inference()


def test_nothing_left_to_move():
    model, _, batches = networks()
    empty = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match="nothing can move: every weight of 0, 4, 6 is zero"):
        cp.distill(model, empty, batches)
    with pytest.raises(ValueError, match="all that is watched is zero: nothing is left to compare"):
        cp.distill(empty, model, batches)
