"""The projections of attention and the experts of a mixture are layers like any other."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

import convexprune as cp
from convexprune.network import Calibration, capture, read, write
from convexprune.network.expansion import expanded
from convexprune.network.names import stacks
from convexprune.network.projections import named_layers
from convexprune.network.traversal import Traversal

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
    if mode == "cascade":  # the head has been judged
        assert report.network.measured <= report.network.guaranteed <= report.network.measured * (1 + 1e-4)


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


def test_attention_can_be_the_whole_model():
    class Alone(nn.MultiheadAttention):
        pass

    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    model, batch = Alone(8, 2, batch_first=True), {"query": x, "key": x, "value": x}
    pruned, report = cp.prune(model, [batch], half, cp.Magnitude(), "cascade")
    assert [row.name for row in report.rows] == ["q_proj", "k_proj", "v_proj", "out_proj"]
    assert report.network.measured == pytest.approx(float((pruned(**batch)[0] - model(**batch)[0]).norm()), rel=1e-4)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_expanded_too(dtype):
    model, data = Attending(batch_first=True).to(dtype), [torch.randn(4, 5, 8, dtype=dtype)]
    _, report = cp.prune(model, data, half, cp.Magnitude(), "cascade")
    assert len(report.rows) == 5
    assert report.coverage.covered == report.coverage.total


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_single_sequence_without_a_batch_axis(batch_first):
    model, x = Single(batch_first).double(), torch.randn(9, 8).double()
    layers = capture(model, [x], "attention.*", keep_inputs=True)
    assert [tuple(layer.inputs.shape) for layer in layers] == [(9, 8)] * 4
    assert torch.equal(layers[0].inputs, x)


class Single(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        return self.attention(x, x, x)


@pytest.mark.parametrize("mode", MODES)
def test_attention_that_is_called_twice_counts_both(mode):
    class Again(Single):
        def forward(self, x):
            return super().forward(super().forward(x)[0])

    model, x = Again(True), torch.randn(4, 5, 8)
    pruned, report = cp.prune(model, [x], half, cp.Magnitude(), mode)
    assert len(report.rows) == 4
    assert report.network.measured > 0
    assert all(layer.samples == 40 for layer in capture(pruned, [x]))


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model, x = Attending(batch_first=True), torch.randn(4, 5, 8)
        _, report = cp.prune(model, [x], half, cp.Magnitude(), "cascade")
    assert len(report.rows) == 5


def test_a_forward_that_was_put_on_the_instance_is_left_and_said():
    model = Attending(batch_first=True)
    plain = model.attention.forward
    model.attention.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    _, report = cp.prune(model, [torch.randn(4, 5, 8)], half, cp.Magnitude())
    assert [row.name for row in report.rows] == ["head"]
    why = {held.name: held.why for held in report.coverage.tensors}
    assert why["attention.q_proj"] == why["attention.out_proj.weight"] == "read by the model without calling its module"


def test_a_computed_weight_is_left_and_said():
    model = Attending(batch_first=True)
    weight_norm(model.attention, "in_proj_weight")
    _, report = cp.prune(model, [torch.randn(4, 5, 8)], half, cp.Magnitude())
    assert [row.name for row in report.rows] == ["head"]
    why = {held.name: held.why for held in report.coverage.tensors}
    assert why["attention.parametrizations.in_proj_weight.original1"] == "computed by a parametrization"


@pytest.mark.parametrize("make", [lambda: Attending(batch_first=True), lambda: Mixed()])
def test_a_failure_leaves_the_model_as_it_was(make):
    model = make()
    data = [torch.randn(4, 5, model.before.in_features if hasattr(model, "before") else 8)]
    before = {name: set(vars(module)) for name, module in model.named_modules()}

    class Broken(Exception):
        pass

    def seen(index):
        raise Broken

    with pytest.raises(Broken):
        capture(model, data, progress=seen)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for _, module in named_layers(model))


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


# ---- experts ----


def as_transformers_marks_it(experts):
    """What its `use_experts_implementation` does to a class, with a batched product as the implementation."""
    plain = experts.forward

    @functools.wraps(plain)
    def forward(self, hidden, index, weights):
        made = torch.einsum("th,eoh->teo", hidden, self.gate_up_proj)
        gate, up = made.chunk(2, -1)
        made = torch.einsum("tei,ehi->teh", gate.relu() * up, self.down_proj)
        return (made.gather(1, index[..., None].expand(-1, -1, hidden.shape[1])) * weights[..., None]).sum(1)

    experts.forward = forward
    return experts


@as_transformers_marks_it
class Experts(nn.Module):
    def __init__(self, count, width, inner):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(count, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.randn(count, width, inner))
        self.is_transposed = False

    def forward(self, hidden, index, weights):
        made = torch.zeros_like(hidden)
        for expert in index.unique():
            place, token = torch.where(expert == index.T)
            gate, up = F.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, -1)
            part = F.linear(gate.relu() * up, self.down_proj[expert]) * weights[token, place, None]
            made.index_add_(0, token, part)
        return made


class Turned(Experts):
    """The same with (experts, in, out), and with products for Linears."""

    def __init__(self, experts):
        nn.Module.__init__(self)
        self.gate_up_proj = nn.Parameter(experts.gate_up_proj.detach().mT.contiguous())
        self.down_proj = nn.Parameter(experts.down_proj.detach().mT.contiguous())
        self.is_transposed = True

    def forward(self, hidden, index, weights):
        raise NotImplementedError  # replaced below


def _turned(self, hidden, index, weights):
    made = torch.zeros_like(hidden)
    for expert in index.unique():
        place, token = torch.where(expert == index.T)
        gate, up = (hidden[token] @ self.gate_up_proj[expert]).chunk(2, -1)
        part = (gate.relu() * up) @ self.down_proj[expert] * weights[token, place, None]
        made.index_add_(0, token, part)
    return made


@functools.wraps(_turned)
def _called(self, hidden, index, weights):
    return _turned(self, hidden, index, weights)


Turned.forward = _called


class Mixed(nn.Module):
    """The first of five experts gets every token with a negative second entry or so, the last one none."""

    def __init__(self, width=6, inner=4):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.router, self.experts = nn.Linear(width, width), nn.Linear(width, 5), Experts(5, width, inner)
        nn.init.constant_(self.router.bias, 0)
        with torch.no_grad():
            self.router.bias[4] = -1e3

    def forward(self, x):
        hidden = x.flatten(0, -2)
        hidden = hidden + self.before(hidden)
        weights, index = self.router(hidden).softmax(-1).topk(2, -1)
        return (hidden + self.experts(hidden, index, weights)).view(x.shape)

    def routed(self, x):
        """The experts' input, and where it goes."""
        hidden = x.flatten(0, -2)
        hidden = hidden + self.before(hidden)
        return hidden, self.router(hidden).softmax(-1).topk(2, -1).indices


NAMES = "experts.*"


def test_an_expert_reads_the_tokens_that_go_to_it():
    model, x = Mixed().double(), torch.randn(30, 7, 6).double()
    layers = {layer.name: layer for layer in capture(model, [x[:10], x[10:]], NAMES, keep_inputs=True)}
    parts = [model.routed(each) for each in (x[:10], x[10:])]
    for expert in range(4):
        rows = torch.cat([hidden[torch.where(expert == index.T)[1]] for hidden, index in parts]).detach()
        gate, up = (rows @ model.experts.gate_up_proj[expert].T).chunk(2, -1)
        assert torch.equal(layers[f"experts.gate_up_proj[{expert}]"].inputs, rows)
        torch.testing.assert_close(layers[f"experts.down_proj[{expert}]"].inputs, (gate.relu() * up).detach())
    assert "experts.down_proj[4]" not in layers
    with pytest.raises(ValueError, match="no such layer was called"):
        capture(model, [x], "experts.down_proj[[]4]")


@pytest.mark.parametrize("mode", MODES)
def test_every_expert_that_is_reached_is_pruned(mode):
    model, data = Mixed(), [torch.randn(30, 7, 6), torch.randn(20, 7, 6)]
    pruned, report = cp.prune(model, data, half, cp.Magnitude(), mode)
    assert len(report.rows) == 2 + 4 * 2
    for row in report.rows:
        assert (int((read(pruned, row.name)[:, : row.shape[1]] != 0).sum()), row.kept_fraction) == (row.kept, 0.5)
    assert torch.equal(pruned.experts.down_proj[4], model.experts.down_proj[4])
    assert "never called on the calibration data: experts.gate_up_proj[4] (48), experts.down_proj[4] (24)" in str(
        report
    )
    assert report.network.measured > 0


def test_a_cascade_sends_the_tokens_where_the_dense_network_does():
    model, x = Mixed().double(), torch.randn(40, 7, 6).double()
    pruned, report = cp.prune(model, [x], half, cp.Magnitude(), "cascade")
    (theirs, index), (ours, other) = model.routed(x), pruned.routed(x)
    assert not torch.equal(index, other)  # pruning the layers before has changed who goes where
    for row in report.rows[2:]:
        part, expert = row.name.removesuffix("]").removeprefix("experts.").split("[")
        tokens = torch.where(int(expert) == index.T)[1]
        change = _made(pruned, ours, part, int(expert), tokens) - _made(model, theirs, part, int(expert), tokens)
        assert row.error == pytest.approx(float(change.norm()), rel=1e-8)


def _made(model, hidden, part, expert, tokens):
    made = hidden[tokens] @ model.experts.gate_up_proj[expert].T
    if part == "gate_up_proj":
        return made
    gate, up = made.chunk(2, -1)
    return (gate.relu() * up) @ model.experts.down_proj[expert].T


def test_an_expert_with_few_samples_is_damped_and_it_is_said():
    model, data = Mixed(width=20), [torch.randn(6, 4, 20)]
    few = [layer for layer in capture(model, data, NAMES) if layer.samples < layer.weight.shape[1]]
    assert few
    assert all(layer.damping == 0.01 and layer.spectrum()[0] == layer.weight.shape[1] for layer in few)
    assert all(layer.damping == 0 for layer in capture(model, data, NAMES) if layer.samples >= layer.weight.shape[1])
    _, report = cp.prune(model, data, half, names=NAMES)
    (said,) = [line for line in report.summary() if line.startswith("damped Gram matrices: ")]
    assert {entry.split(": ")[0] for entry in said.removeprefix("damped Gram matrices: ").split("; ")} == {
        layer.name for layer in few
    }
    assert cp.prune(model, data, lambda layer: cp.NetTrim(layer, 0.1), names=NAMES)[1].kept > 0  # over samples


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_tokens_holds_for_experts(mode):
    model, x = Mixed(), torch.randn(30, 7, 6)
    real = torch.rand(30, 7) < 0.5
    _, index = model.routed(x)
    count = lambda expert: int(real.flatten()[torch.where(expert == index.T)[1]].sum())  # noqa: E731
    data = Calibration([x], mask=lambda batch: real, names=NAMES)
    layers = {
        layer.name: layer for layer in capture(model, data, dense=None if mode == "parallel" else copy.deepcopy(model))
    }
    for expert in range(4):
        assert layers[f"experts.gate_up_proj[{expert}]"].samples == count(expert)
        assert layers[f"experts.down_proj[{expert}]"].samples == count(expert)
    with pytest.raises(ValueError, match="the mask has shape"):
        capture(model, Calibration([x], mask=lambda batch: real[:, :-1], names=NAMES))


@pytest.mark.parametrize("mode", MODES)
def test_experts_that_are_stored_the_other_way_round_are_the_same(mode):
    model, other, data = Mixed(), Mixed(), [torch.randn(30, 7, 6), torch.randn(20, 7, 6)]
    other.experts = Turned(other.experts)
    pruned, report = cp.prune(model, data, half, cp.Magnitude(), mode)
    turned, its = cp.prune(other, data, half, cp.Magnitude(), mode)
    assert [row.name for row in its.rows] == [row.name for row in report.rows]
    for mine, row in zip(report.rows, its.rows, strict=True):
        assert (row.shape, row.kept) == (mine.shape, mine.kept)
        assert row.error == pytest.approx(mine.error, rel=1e-4)
    assert torch.equal(turned.experts.down_proj.mT, pruned.experts.down_proj)
    assert torch.equal(turned.experts.gate_up_proj.mT, pruned.experts.gate_up_proj)
    found, same = cp.sensitivities(other, data, NAMES), cp.sensitivities(model, data, NAMES)
    assert all(torch.allclose(found[name], same[name]) for name in same)


def test_a_cascade_gathers_all_first_matrices_of_the_experts_in_one_pass():
    model, data = Mixed(), [torch.randn(3, 2, 6), torch.randn(30, 7, 6)]
    walk = Traversal(model, Calibration(data), "cascade")
    first, second = ([f"experts.{part}[{expert}]" for expert in range(4)] for part in ("gate_up_proj", "down_proj"))
    assert [sorted(group) for group in walk.survey.groups] == [["before"], ["router"], first, second]


def test_a_mixture_that_does_something_else_by_itself_is_refused():
    model, x = Mixed(), torch.randn(30, 7, 6)
    once = type(model.experts).forward

    class Louder(Experts):
        @functools.wraps(once.__wrapped__)
        def forward(self, *args):
            return 2 * once(self, *args)

    model.experts.__class__ = Louder
    with pytest.raises(ValueError, match="'experts', a Louder, does not compute what its projections do; leave"):
        cp.prune(model, [x], half, cp.Magnitude())


def test_experts_have_gradients_curves_and_training():
    model, data = Mixed(), [torch.randn(30, 7, 6)]
    found = cp.sensitivities(model, data, NAMES)
    assert len(found) == 8
    assert all(float(each.sum()) > 0 for each in found.values())
    curves = cp.rate_distortion(model, data, levels=(0.5,), solver=cp.Magnitude())
    assert all(float(curve.distortion) > 0 for curve in curves)
    pruned, _ = cp.prune(model, data, half, cp.Magnitude(), names=NAMES)
    better, distilled = cp.distill(model, pruned, data, names=NAMES, epochs=5, hints=0)
    assert distilled.objective[1] <= distilled.objective[0]
    assert torch.equal(better.experts.down_proj == 0, pruned.experts.down_proj == 0)
