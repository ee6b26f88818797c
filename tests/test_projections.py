"""The projections of attention and the experts of a mixture are layers like any other."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network import Calibration, capture, read, write
from convexprune.network.expansion import expanded
from convexprune.network.names import stacks
from convexprune.network.projections import named_layers

MODES = ["parallel", "cascade", "residual"]


def half(layer):
    return cp.Reconstruction(layer, cp.PerRow(0.5))


class Attending(nn.Module):
    """Attention over itself, over a memory or over three tensors."""

    def __init__(self, kind="self", padded=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.padded = kind, padded
        self.attention = nn.MultiheadAttention(8, 2, **options)
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        a = self.attention
        key = torch.linspace(-1, 1, a.kdim).to(x) * x.sum(-1, keepdim=True).sin()
        value = torch.linspace(1, 2, a.vdim).to(x) * x.sum(-1, keepdim=True).cos()
        given = {"self": (x, x, x), "memory": (x, key, key), "three": (x, key, value)}[self.kind]
        batch, tokens = x.shape[:2] if a.batch_first else reversed(x.shape[:2])
        padding = torch.arange(tokens).expand(batch, -1) >= tokens - 1 if self.padded else None
        return self.head(a(*given, key_padding_mask=padding, need_weights=self.kind == "three")[0])


CASES = {
    "self": {"batch_first": True},
    "tokens first": {},
    "memory": {"kind": "memory", "batch_first": True},
    "three": {"kind": "three"},
    "other widths": {"kind": "three", "kdim": 5, "vdim": 6, "batch_first": True},
    "no bias": {"bias": False, "kdim": 5, "kind": "memory", "vdim": 5},
    "padded": {"padded": True, "batch_first": True},
    "further keys": {"add_bias_kv": True, "add_zero_attn": True},
}
by_case = pytest.mark.parametrize("case", CASES)


def truth(attention, x):
    """What each projection reads and makes, by the definition of attention; x is (batch, tokens, in)."""
    a = attention
    weights = (
        a.in_proj_weight.chunk(3)
        if a.in_proj_weight is not None
        else (a.q_proj_weight, a.k_proj_weight, a.v_proj_weight)
    )
    biases = a.in_proj_bias.chunk(3) if a.in_proj_bias is not None else (0, 0, 0)
    made = [x @ w.T + b for w, b in zip(weights, biases, strict=True)]
    q, k, v = (each.unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for each in made)
    mixed = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    return made, mixed.transpose(1, 2).flatten(2)


@by_case
def test_the_expanded_model_makes_what_it_makes(case):
    model, x = Attending(**CASES[case]).double().eval(), torch.randn(4, 5, 8).double()
    before, state = model(x), copy.deepcopy(model.state_dict())
    with expanded(model):
        with expanded(model):  # one within another is no other
            torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
        assert "forward" in vars(model.attention)
    assert "forward" not in vars(model.attention)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), before)


@by_case
@pytest.mark.parametrize("mode", MODES)
def test_every_projection_is_pruned(case, mode):
    model, data = Attending(**CASES[case]), [torch.randn(4, 5, 8), torch.randn(4, 5, 8)]
    pruned, report = cp.prune(model, data, half, cp.Magnitude(), mode)
    assert [row.name for row in report.rows] == [
        f"attention.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")
    ] + ["head"]
    assert report.coverage.covered == report.coverage.total - (16 if "further" in case else 0)  # bias_k, bias_v
    for row in report.rows:
        kept = read(pruned, row.name)[:, : row.shape[1]] != 0
        assert (int(kept.sum()), kept.shape) == (row.kept, row.shape)
        assert row.kept_fraction == pytest.approx(0.5, abs=0.11)
    change = [(pruned(x) - model(x)).double().square().sum() for x in data]
    assert report.network.measured == pytest.approx(float(sum(change).detach()) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_projection_reads_what_attention_says(batch_first):
    model, x = Attending(batch_first=batch_first).double(), torch.randn(4, 5, 8).double()
    layers = {layer.name: layer for layer in capture(model, [x], "attention.*", keep_inputs=True)}
    made, mixed = truth(model.attention, x if batch_first else x.transpose(0, 1))
    rows = x.reshape(-1, 8)
    for name, y in zip("qkv", made, strict=True):
        layer = layers[f"attention.{name}_proj"]
        assert torch.equal(layer.inputs, rows)
        y = y if batch_first else y.transpose(0, 1)
        torch.testing.assert_close(layer.targets_or_dense, y.reshape(-1, 8).detach())
    mixed = mixed if batch_first else mixed.transpose(0, 1)
    torch.testing.assert_close(layers["attention.out_proj"].inputs, mixed.reshape(-1, 8).detach())
    q, k, v = (layers[f"attention.{name}_proj"] for name in "qkv")
    assert q.gram is k.gram is v.gram  # one Gram for what reads one tensor


def test_a_cascade_judges_a_projection_on_the_pruned_inputs():
    model, x = Attending(batch_first=True).double(), torch.randn(4, 5, 8).double()
    pruned, report = cp.prune(model, [x], half, cp.Magnitude(), "cascade", names="attention.*")
    _, mixed = truth(pruned.attention, x)
    y, yhat = model.attention(x, x, x)[0], pruned.attention.out_proj(mixed)
    error = {row.name: row.error for row in report.rows}["attention.out_proj"]
    assert error == pytest.approx(float((yhat - y).norm()), rel=1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_mask_of_tokens_holds_for_projections(batch_first):
    model, x = Attending(batch_first=batch_first), torch.randn(4, 5, 8)
    real = torch.rand(x.shape[:2]) < 0.7
    for layer in capture(model, Calibration([x], mask=lambda batch: real)):
        assert layer.samples == int(real.sum())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_transformers_of_torch_are_pruned_whole(mode, batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=batch_first)
    data = [{"src": torch.randn(3, 6, 8), "tgt": torch.randn(3, 6, 8)}]
    pruned, report = cp.prune(model, data, half, cp.Magnitude(), mode)
    assert report.coverage.covered == report.coverage.total
    assert len(report.rows) == 2 * (4 + 2) + 2 * (8 + 2)
    assert report.network.measured > 0
    assert report.total == sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert report.kept == sum(int((p != 0).sum()) for p in pruned.parameters() if p.ndim > 1)


def test_a_projection_has_gradients_curves_and_training():
    model, data = Attending(batch_first=True), [torch.randn(8, 5, 8)]
    found = cp.sensitivities(model, data)
    assert all(float(found[f"attention.{name}_proj"].sum()) > 0 for name in ("q", "k", "v", "out"))
    exact = cp.rate_distortion(model, data, levels=(0.5,), measure=cp.OutputChange(), solver=cp.Magnitude())
    near = cp.rate_distortion(model, data, levels=(0.5,), measure=cp.SecondOrder(), solver=cp.Magnitude())
    assert [curve.name for curve in near] == [*(f"attention.{p}_proj" for p in ("q", "k", "v", "out")), "head"]
    assert all(float(a.distortion) > 0 and float(b.distortion) > 0 for a, b in zip(exact, near, strict=True))
    pruned, report = cp.prune(model, data, half, cp.Magnitude())
    better, distilled = cp.distill(model, pruned, data, epochs=15)
    assert set(distilled.layers) == {row.name for row in report.rows}
    assert distilled.objective[1] < distilled.objective[0]
    assert torch.equal(better.attention.in_proj_weight == 0, pruned.attention.in_proj_weight == 0)


def test_a_mask_keeper_and_an_allocation_know_them():
    model, data = Attending(batch_first=True), [torch.randn(8, 5, 8)]
    pruned, report = cp.prune(model, data, allocation=cp.Allocation(0.4, measure=cp.LayerError()))
    assert report.kept <= 0.4 * report.total
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
    with cp.MaskKeeper(pruned, optimizer, dense=model):
        pruned(data[0]).square().sum().backward()
        optimizer.step()
    assert int((pruned.attention.in_proj_weight == 0).sum()) > 0.3 * 192


def test_names_mean_single_projections():
    model = Attending()
    write(model, "attention.k_proj", torch.zeros(8, 9))
    assert not model.attention.in_proj_weight[8:16].any()
    assert model.attention.in_proj_weight[:8].all()
    assert model.attention.in_proj_weight[16:].all()
    _, report = cp.prune(model, [torch.randn(4, 5, 8)], half, cp.Magnitude(), names=["*.q_proj", "*.v_proj"])
    assert [row.name for row in report.rows] == ["attention.q_proj", "attention.v_proj"]
    why = {held.name: held.why for held in report.coverage.tensors}
    assert why["attention.k_proj"] == "not among the names"
    with pytest.raises(ValueError, match=r"'attention' is a MultiheadAttention.*inside it use 'attention"):
        cp.prune(model, [torch.randn(4, 5, 8)], half, names="attention")


class Louder(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        made, weights = super().forward(*args, **kwargs)
        return 2 * made, weights


def test_attention_with_a_forward_of_its_own_is_left_and_said():
    model = Attending(batch_first=True)
    model.attention = Louder(8, 2, batch_first=True)
    _, report = cp.prune(model, [torch.randn(4, 5, 8)], half, cp.Magnitude())
    assert [row.name for row in report.rows] == ["head"]
    why = {held.name: held.why for held in report.coverage.tensors}
    assert "in_proj_weight of a Louder" in why["attention.in_proj_weight"]


def test_nothing_stays_on_the_model():
    model, data = Attending(batch_first=True), [torch.randn(4, 5, 8)]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    cp.prune(model, data, half, cp.Magnitude(), "cascade")
    assert {name: set(vars(module)) for name, module in model.named_modules()} == {n: set(v) for n, v in before.items()}
    found = dict(named_layers(model))["attention.q_proj"]
    assert dict(named_layers(model))["attention.q_proj"] is found  # as long as someone holds it
    assert stacks(model)["attention.q_proj"].module is found
    gone = weakref.ref(model)
    del model, found, before
    gc.collect()
    assert gone() is None


def test_tied_attention_is_refused():
    one = nn.MultiheadAttention(8, 2)
    other = nn.MultiheadAttention(8, 2)
    other.in_proj_weight = one.in_proj_weight

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = one, other

        def forward(self, x):
            x = self.one(x, x, x)[0]
            return self.other(x, x, x)[0]

    with pytest.raises(ValueError, match=r"'one.q_proj' and 'other.q_proj' are tied"):
        cp.prune(Pair(), [torch.randn(4, 5, 8)], half, cp.Magnitude())
