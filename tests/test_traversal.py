"""The way through a network: in which order, on which batches, and in how many passes."""

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network.calibration import Calibration
from convexprune.network.traversal import Traversal

MODES = ["parallel", "cascade", "residual"]


class Total(list):
    """One for a model and all its copies."""

    def __deepcopy__(self, memo):
        return self


class Counting(nn.Module):
    """Seven layers, and how often a batch reaches each: of this copy, and of all copies together."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(7)])
        self.counts, self.total = [0] * 7, Total([0] * 7)

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            self.counts[index] += 1
            self.total[index] += 1
            x = layer(x).relu()
        return x


class Branched(nn.Module):
    """Samples that begin with a negative number go through `late`, which the first batch does not reach."""

    def __init__(self):
        super().__init__()
        self.first, self.late, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x)
        if float(x[0, 0]) < 0:
            y = self.late(y)
        return self.last(y)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


def trim(layer):
    return cp.NetTrim(layer, 0.2)


@pytest.mark.parametrize("build", [half, trim])
@pytest.mark.parametrize("mode", MODES)
def test_the_passes_are_those_that_are_stated(mode, build):
    model, batches = Counting(), list(torch.randn(5, 8, 6))
    calibration = Calibration(batches)
    walk = Traversal(model, calibration, mode)
    stated = walk.passes
    model.total[:] = [0] * 7
    pruned, _ = cp.prune(model, calibration, build, cp.ADMM(max_iter=20), mode, execution=cp.Execution(by_block=False))
    dense = [every - own for every, own in zip(model.total, pruned.counts, strict=True)]
    # and two passes of each network to measure, one of them recorded
    assert dense[0] == 5 * (stated.dense + 2)
    assert pruned.counts[0] == 5 * (stated.pruned + 2)
    if mode == "parallel":
        assert stated.dense == 2  # the survey and the capture
        assert dense == [20] * 7
    else:
        assert stated.dense == 8
        assert dense == [5 * (1 + 7 - index + 2) for index in range(7)]  # each only as far as its layer
        assert pruned.counts == [5 * (7 - index + 2) for index in range(7)]


def test_a_search_surveys_and_captures_once():
    model = Counting()
    counted = Calibration(list(torch.randn(5, 8, 6)))
    cp.prune_within(model, counted, cp.Goal(0.5, rounds=3, near=0.999))
    # survey, capture, norms, and in each round two passes of each network
    assert model.total[0] in (5 * (3 + 4 * rounds) for rounds in (1, 2, 3))


@pytest.mark.parametrize("mode", MODES)
def test_layers_are_those_of_all_batches(mode):
    positive, negative = torch.rand(9, 4), -torch.rand(9, 4)
    for batches in ([positive, negative], [negative, positive]):
        walk = Traversal(Branched(), Calibration(batches), mode)
        assert walk.modules == ["first", "late", "last"]
        _, report = cp.prune(Branched(), batches, half, mode=mode)
        assert [row.name for row in report.rows] == ["first", "late", "last"]
        assert all(row.kept == row.total // 2 for row in report.rows)
        assert report.network.guaranteed is None
        assert "the batches do not all take the same way" in report.network.reason


def test_rows_are_kept_only_where_a_problem_needs_them():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    seen = {}

    def build(layer):
        seen[layer.name] = layer  # the outline first, then the layer
        return trim(layer) if layer.name == "2" else half(layer)

    for mode in MODES:
        cp.prune(model, [torch.randn(20, 6)], build, mode=mode)
        assert {name: layer.inputs is not None for name, layer in seen.items()} == {"0": False, "2": True, "4": False}
        cp.prune(model, Calibration([torch.randn(20, 6)], keep_inputs=True), build, mode=mode)
        assert all(layer.inputs is not None for layer in seen.values())


def test_a_recipe_that_minds_the_moments_is_asked_again():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))

    def build(layer):
        if layer.energy == 0:
            raise ZeroDivisionError("an outline has no energy")
        return trim(layer)

    _, report = cp.prune(model, [torch.randn(20, 6)], build)
    assert len(report.rows) == 2


def test_tied_layers_are_refused_before_anything_is_solved():
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    solver = cp.ADMM(max_iter=1)
    with pytest.raises(ValueError, match="'0' and '2' are tied"):
        cp.prune(nn.Sequential(first, nn.ReLU(), second), [torch.randn(9, 6)], trim, solver)


def test_layers_that_read_one_tensor_share_their_moments_and_go_together():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.o(self.q(x) * self.k(x))

    model = Attention()
    walk = Traversal(model, Calibration([torch.randn(20, 6)]), "cascade")
    assert walk.survey.groups == [["q", "k"], ["o"]]
    found = {name: layers[0] for group in walk.groups(keep=()) for name, layers in group}
    assert found["q"].gram is found["k"].gram
    assert walk.passes.pruned == 2


def test_what_is_read_differently_in_a_later_batch_goes_apart():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.a(x) + self.b(x if float(x[0, 0]) > 0 else x.clone())

    batches = [torch.rand(9, 6), -torch.rand(9, 6)]
    walk = Traversal(Odd(), Calibration(batches), "cascade")
    assert walk.survey.groups == [["a"], ["b"]]
