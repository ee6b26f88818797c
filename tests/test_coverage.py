"""Every weight of a model is accounted for, before the work and in the report."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import convexprune as cp


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


class Volumes(nn.Module):
    """An LSTM has most of the weights, and it is no layer kind."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.recurrent(x)[0])


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.attention(x, x, x)[0])


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Motley(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.spare, self.odd = nn.Linear(8, 5), Odd(8, 8)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.own = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.second(self.first(self.embedding(tokens)).relu())
        return self.head(self.normed(self.odd(x)) @ self.own)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_both_shares_are_said():
    model, events = Volumes(), []
    total = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    _, report = cp.prune(model, [torch.randn(6, 5, 8)], allocation=cp.Allocation(0.2), progress=events.append)
    assert report.coverage.total == total == 4 * 32 * (8 + 32) + 32 * 4
    assert report.coverage.covered == report.total == 128
    assert 20 <= report.kept <= 26  # the levels are not that fine
    left = 128 - report.kept
    assert report.model_kept_fraction == pytest.approx((total - left) / total)
    text = str(report)
    assert f"kept {report.kept} of 128 weights ({report.kept / 128:.1%}), {1 - left / total:.1%} of the model's" in text
    assert f"the layers have 128 of the model's {total} weights (2.4%)" in text
    assert "no layer kind for the weight_ih_l0 of a LSTM: recurrent.weight_ih_l0 (1024)" in text
    stages = [event.stage for event in events]
    assert stages.index("plan") < stages.index("solve")
    assert "weight_hh_l0" in events[stages.index("plan")].note


def test_attention_projections_are_named():
    _, report = cp.prune(Attending(), [torch.randn(6, 5, 8)], half)
    why = {held.name: held.why for held in report.coverage.tensors}
    assert why["out.weight"] == ""
    parts = {f"attention.{part}": "" for part in ("q_proj", "k_proj", "v_proj", "out_proj.weight")}
    assert why == {**parts, "out.weight": ""}


def test_each_reason():
    _, report = cp.prune(Motley(), [torch.randint(10, (6, 5))], half, names=["[fs][ip]*"])
    why = {held.name: held.why for held in report.coverage.tensors}
    assert why == {
        "embedding.weight": "tied to an embedding (name 'head' to prune both)",
        "first.weight": "",
        "second.weight": "not among the names",
        "spare.weight": "never called on the calibration data",
        "odd.weight": "in a layer with a forward of its own",
        "normed.parametrizations.weight.original0": "computed by a parametrization",
        "normed.parametrizations.weight.original1": "computed by a parametrization",
        "own": "no layer kind for the own of a Motley",
    }
    assert report.coverage.covered == 64


@pytest.mark.parametrize(
    ("names", "pruned"),
    [(None, False), ("*", False), (["first", "*"], False), ("hea?", True), ("head", True), (["*", "head"], True)],
)
def test_a_tied_head_is_pruned_only_where_it_is_meant(names, pruned):
    model, batches = Motley(), [torch.randint(10, (6, 5))]
    remove_parametrizations(model.normed, "weight")
    copy, report = cp.prune(model, batches, half, cp.Magnitude(), names=names)
    assert ("head" in [row.name for row in report.rows]) == pruned
    assert bool((copy.embedding.weight == 0).any()) == pruned
    assert ("tied to an embedding (name 'head' to prune both): embedding.weight (80)" in str(report)) != pruned


def test_a_network_whose_only_layer_is_tied_says_so():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="'1', the only layer, is tied to an embedding; prune both by naming it"):
        cp.prune(model, [torch.randint(10, (6, 5))], half)
    _, report = cp.prune(model, [torch.randint(10, (6, 5))], half, names="1")
    assert report.kept == 40


class Direct(nn.Module):
    """Uses a Linear's weight as Mamba does, and another Linear not at all."""

    def __init__(self):
        super().__init__()
        self.inside, self.direct, self.idle = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return (self.direct.weight @ self.inside(x).mT).mT + self.direct.bias


def test_a_weight_that_is_read_without_its_module_is_said():
    _, report = cp.prune(Direct(), [torch.randn(9, 6)], half, cp.Magnitude())
    why = {held.name: held.why for held in report.coverage.tensors}
    assert why == {
        "inside.weight": "",
        "direct.weight": "read by the model without calling its module",
        "idle.weight": "never called on the calibration data",
    }


def test_everything_covered_is_one_line():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    _, report = cp.prune(model, [torch.randn(9, 6)], half)
    assert report.coverage.lines() == ("the layers have 50 of the model's 50 weights (100.0%)",)
    assert report.model_kept_fraction == report.kept_fraction
    assert cp.Report.from_json(report.to_json()).coverage == report.coverage


def test_long_lists_are_cut():
    model = nn.Sequential(*[nn.LSTM(2, 2) for _ in range(9)])
    coverage = cp.network.coverage.coverage(model, (), ())
    assert len(coverage.lines()) == 3
    assert "and 5 more, 144 in all" in coverage.lines()[1]


def test_a_layer_that_was_counted_has_to_be_pruned():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    skip = lambda layer, count: None if layer.name == "2" else half(layer)  # noqa: E731
    with pytest.raises(ValueError, match="gives layer '2' a share of the budget, and it is not pruned"):
        cp.prune(model, [torch.randn(9, 6)], skip, allocation=cp.Allocation(0.5))
    curves = cp.rate_distortion(model, [torch.randn(9, 6)])
    with pytest.raises(ValueError, match="gives layer '0' a share"):
        cp.prune(model, [torch.randn(9, 6)], allocation=cp.Allocation(0.5, curves=curves), names="2")


class Experts(nn.Module):
    """Three fused experts, whose weights are one tensor."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.einsum("bi,eij->bj", x, self.experts))


class Recurrent(nn.Module):
    """A recurrent network with a head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x)[0])


@pytest.mark.parametrize(
    ("make", "shape", "left"),
    [
        (Experts, (20, 8), {"experts": 192}),
        (Recurrent, (20, 3, 8), {"body.weight_ih_l0": 192, "body.weight_hh_l0": 192}),
        (lambda: nn.Sequential(nn.Conv3d(2, 3, 3), nn.Flatten(), nn.Linear(24, 5)), (20, 2, 4, 4, 4), {}),
    ],
    ids=["experts", "recurrent", "volumes"],
)
@pytest.mark.parametrize("budget", [None, 0.5])
def test_the_share_of_the_model_is_what_is_in_it(make, shape, left, budget):
    model = make()
    allocation = None if budget is None else cp.Allocation(budget)
    pruned, report = cp.prune(model, [torch.randn(shape)], None if budget else half, allocation=allocation)
    weights = [p for p in pruned.parameters() if p.ndim > 1]
    total = sum(p.numel() for p in weights)
    assert report.model_kept_fraction == pytest.approx(sum(int((p != 0).sum()) for p in weights) / total)
    assert {held.name: held.weights for held in report.coverage.tensors if held.name in left} == left
    assert all(bool(held.why) == (held.name in left) for held in report.coverage.tensors)
    for name in left:
        assert name in str(report)
