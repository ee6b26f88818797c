"""Capture: conv = unfold, moments = those of the rows, and the model is left as it was."""

import numpy as np
import pytest
import torch
from benchmark_utils import resnet
from torch import nn
from torch.nn import functional as F

import convexprune.network.moment_accumulator as accumulate
from convexprune.layer import Layer
from convexprune.network import Calibration, capture, read, write
from convexprune.network.blocks import Blocks
from convexprune.network.capture import Gathering, layers_of
from convexprune.network.names import choose
from convexprune.network.survey import survey


def relative(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-300))


class Attention(nn.Module):
    """Reads one tensor three times, and once more through a layer with another input."""

    def __init__(self, width=6):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        return self.o(scores.softmax(-1) @ self.v(x))


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same", groups=4, bias=False, padding_mode="circular")
        self.conv3 = nn.Conv1d(8, 4, 3, dilation=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.conv1(x)))
        x = F.relu(self.conv2(x), inplace=True)
        return self.head(self.conv3(x.flatten(2)).mean(-1))


def convolutional(seed=0):
    torch.manual_seed(seed)
    return Convolutional(), torch.randn(10, 3, 8, 6)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 5, 6), (2, 3, 4, 6)])
def test_linear_rows_of_any_leading_shape(shape):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(*shape)
    (layer,) = capture(model, [x], keep_inputs=True)
    assert torch.equal(layer.inputs, x.reshape(-1, 6))
    assert layer.samples == x.numel() // 6


def test_captured_convolutions_reproduce_their_outputs():
    model, x = convolutional()
    model.double().eval()
    outputs = {}
    for name in ("conv1", "conv2", "conv3", "head"):
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: outputs.update({name: y.clone()}))
    layers = capture(model, [x.double()], keep_inputs=True)
    assert [layer.name for layer in layers] == ["conv1", *(f"conv2[{g}]" for g in range(4)), "conv3", "head"]
    for layer in layers:
        name, _, group = layer.name.partition("[")
        y = outputs[name] if name == "head" else outputs[name].flatten(2).transpose(1, 2).reshape(layer.samples, -1)
        y = y[:, 2 * int(group[0]) : 2 * int(group[0]) + 2] if group else y
        assert relative(layer.affine_inputs @ layer.affine_weight.T, y) < 1e-12


@pytest.mark.parametrize("chunk", [1, 200, 2**22])
def test_moments_are_those_of_the_kept_rows(monkeypatch, chunk):
    monkeypatch.setattr(accumulate, "_CHUNK", chunk)
    model, x = convolutional()
    for layer in capture(model, [x[:7], (x[7:], "a label")], keep_inputs=True):
        assert layer.inputs.dtype == torch.float32
        same = Layer.from_samples(layer.weight, layer.inputs, layer.bias, layer.activation)
        for key in ("gram", "cross", "energies", "mean", "target_mean"):
            assert relative(getattr(layer, key), getattr(same, key)) < 1e-12


def test_moments_do_not_depend_on_the_batch_size():
    model, x = convolutional()
    whole = capture(model.double(), Calibration([x.double()], positions=5))
    split = capture(model, Calibration(x.double().split(3), positions=5))
    for a, b in zip(whole, split, strict=True):
        assert a.samples == b.samples
        assert relative(a.affine_gram, b.affine_gram) < 1e-12
        assert relative(a.affine_cross, b.affine_cross) < 1e-12


def test_layers_that_read_one_tensor_share_its_gram():
    torch.manual_seed(0)
    q, k, v, o = sorted(capture(Attention(), [torch.randn(3, 5, 6) for _ in range(3)], keep_inputs=True),
                        key=lambda layer: "qkvo".index(layer.name))  # fmt: skip
    assert q.gram is k.gram is v.gram
    assert q.inputs is v.inputs
    assert o.gram is not q.gram
    assert q.samples == o.samples == 45


def test_a_tensor_changed_in_place_is_another_input():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            x = x + 0
            return self.a(x), self.b(x.relu_())

    torch.manual_seed(0)
    x = torch.randn(20, 4)
    for mode in (False, True):
        with torch.inference_mode(mode):
            a, b = capture(Changing(), [x.clone(), x.clone()], keep_inputs=True)
        assert torch.equal(a.inputs[:20], x)
        assert torch.equal(b.inputs[:20], x.relu())


def test_layers_with_one_input_that_part_are_refused():
    class Parting(Attention):
        def forward(self, x):
            return self.q(x) + self.k(x if len(x) == 2 else 2 * x)

    batches = [torch.randn(2, 6), torch.randn(3, 6)]
    with pytest.raises(ValueError, match=r"'q', 'k' read the same tensor in one batch and not in another"):
        capture(Parting(), batches)
    assert capture(Parting(), batches, "k")[0].samples == 5

    class Skipping(Attention):
        def forward(self, x):
            return self.q(x) + self.k(x) if len(x) == 2 else self.k(x)

    with pytest.raises(ValueError, match="read the same tensor"):
        capture(Skipping(), batches)


def test_a_module_called_twice_counts_all_rows_and_tied_weights_are_two_layers():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x).relu()) + x)

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(6, 4, dtype=torch.float64)
    a, b = capture(model, [x[:2], x[2:]], keep_inputs=True)
    rows = torch.cat([x, model.a(x).relu()])
    assert (a.samples, b.samples) == (12, 6)
    assert relative(a.inputs, rows) < 1e-12
    assert relative(a.gram, rows.T @ rows / 12) < 1e-12
    assert torch.equal(a.weight, b.weight)
    same = capture(model, [x[:2], x[2:]], keep_inputs=True, dense=model)[0]
    assert relative(same.targets, model.a(rows)) < 1e-12
    assert relative(same.affine_cross, a.affine_cross) < 1e-12


def test_cascade_targets_are_the_dense_pre_activations():
    model, x = convolutional()
    dense = Convolutional()
    dense.load_state_dict(model.state_dict())
    write(model, "conv1", read(model, "conv1") * 0.5)
    own = capture(dense, x.split(4), keep_inputs=True)
    layers = capture(model, Calibration(x.split(4), positions=1000), dense=dense, keep_inputs=True)
    for layer, other in zip(layers, own, strict=True):
        assert relative(layer.targets, other.targets_or_dense) < 1e-5
        assert layer.targets.dtype == layer.inputs.dtype == torch.float32
        assert layer.name == "conv1" or not torch.equal(layer.inputs, other.inputs)
        again = Layer.from_samples(layer.weight, layer.inputs, layer.bias, None, targets=layer.targets)
        for key in ("gram", "cross", "energies", "mean", "target_mean"):
            assert relative(getattr(layer, key), getattr(again, key)) < 1e-12


def test_cascade_shares_inputs_and_positions():
    model, x = convolutional()
    layers = capture(model, Calibration(x.split(4), positions=3), dense=model, keep_inputs=True)
    for layer in layers:
        assert relative(layer.targets, layer.affine_inputs.double() @ layer.affine_weight.T) < 1e-5
    torch.manual_seed(0)
    q, k = capture(Attention(), [torch.randn(2, 5, 6)], ["q", "k"], dense=Attention())
    assert q.gram is k.gram
    assert not torch.equal(q.cross, k.cross)


def test_cascade_networks_must_match():
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="'0' is not in the dense network"):
        capture(model, [x], dense=nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"shape \(3, 4\) in the model, \(2, 4\)"):
        capture(model, [x], dense=nn.Sequential(nn.Linear(4, 2)))

    broken = nn.Sequential(nn.Linear(4, 3))
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(ValueError, match="'0' makes NaN or inf in the dense network"):
        capture(model, [x], dense=broken)

    class Again(nn.Sequential):
        def forward(self, x):
            super().forward(x)
            return super().forward(x)

    with pytest.raises(ValueError, match="called 1 times in the model and 2 times"):
        capture(model, [x], dense=Again(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="more often in the model"):
        capture(Again(nn.Linear(4, 3)), [x], dense=model)


def test_mask_drops_padding_exactly():
    torch.manual_seed(0)
    x, mask = torch.randn(4, 5, 6), torch.rand(4, 5) < 0.6
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    batches = [{"input": poisoned[:2], "keep": mask[:2]}, {"input": poisoned[2:], "keep": mask[2:]}]

    class Tokens(nn.Sequential):
        def forward(self, input, keep):
            return super().forward(input)

    model = Tokens(nn.Linear(6, 3), nn.ReLU())
    (layer,) = capture(model, Calibration(batches, mask=lambda batch: batch["keep"]), keep_inputs=True)
    assert torch.equal(layer.inputs, x[mask])
    (conv,) = capture(nn.Sequential(nn.Conv1d(5, 2, 1)), Calibration([x], mask=lambda batch: torch.ones(4, 6) > 0))
    assert conv.samples == 24


def test_mask_errors():
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(4, 5, 6)
    with pytest.raises(ValueError, match=r"layer '0': the mask has shape \(4,\)"):
        capture(model, Calibration([x], mask=lambda batch: torch.ones(4) > 0))
    with pytest.raises(TypeError, match=r"torch.int64; return a bool"):
        capture(model, Calibration([x], mask=lambda batch: torch.ones(4, 5, dtype=torch.int64)))
    with pytest.raises(ValueError, match="no samples reached it"):
        capture(model, Calibration([x], mask=lambda batch: torch.zeros(4, 5) > 0))


def test_positions_are_seeded_and_bounded():
    model, x = convolutional()
    draw = lambda seed: capture(model, Calibration(x.split(3), positions=2, seed=seed), keep_inputs=True)  # noqa: E731
    one, same, other = draw(1), draw(1), draw(2)
    for a, b, c in zip(one, same, other, strict=True):
        assert a.samples == (10 if a.name == "head" else 20)
        assert torch.equal(a.inputs, b.inputs)
        assert a.name == "head" or not torch.equal(a.inputs, c.inputs)
    everything = capture(model, [x], "conv1", keep_inputs=True)[0].inputs
    drawn = capture(model, Calibration([x], "conv1", positions=2), keep_inputs=True)[0].inputs
    matches = (drawn[:, None] == everything[None]).all(-1)
    assert bool(matches.any(1).all())
    assert torch.equal(matches.float().argmax(1) // 12, torch.arange(10).repeat_interleave(2))


def snapshot(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {k: (id(t), t._version, t.detach().clone(), t.requires_grad, t.grad) for k, t in tensors.items()},
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    for key, old in before[0].items():
        new = after[0][key]
        assert (old[0], old[3], old[4]) == (new[0], new[3], new[4]), key
        assert torch.equal(old[2], new[2]), key
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2])


class Restless(nn.Module):
    """Counts its calls in a buffer, draws random numbers, and raises on the n-th call."""

    def __init__(self, fatal=None):
        super().__init__()
        self.first, self.bn, self.second = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.fatal = fatal
        self.bn.eval()
        self.first.weight.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        self.last = self.last + 1
        x = self.first(x) + torch.randn(4)
        if self.calls == self.fatal:
            raise RuntimeError("halfway")
        return self.second(self.bn(x))


@pytest.mark.parametrize("fatal", [None, 1, 2])
def test_the_model_is_left_as_it_was(fatal):
    torch.manual_seed(0)
    model, dense = Restless(fatal).train(), Restless().train()
    before = snapshot(model), snapshot(dense)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    if fatal is None:
        assert [layer.samples for layer in capture(model, [x, x], dense=dense)] == [12, 12]
    else:
        with pytest.raises(RuntimeError, match="halfway"):
            capture(model, [x, x], dense=dense)
    assert_same(before[0], snapshot(model))
    assert_same(before[1], snapshot(dense))
    assert torch.is_grad_enabled()


def test_batches_that_do_not_fit_raise_the_models_error():
    model, batches = nn.Sequential(nn.Linear(4, 3)), [torch.randn(2, 4), torch.randn(2, 5)]
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        capture(model, batches)
    with pytest.raises(ValueError, match=r"batch 0: the model's forward failed: .*unexpected keyword"):
        capture(model, [{"x": batches[0]}])
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batches"),
        (iter([]), ValueError, "no batches"),
        (torch.ones(2, 4), TypeError, r"such as \[x\]"),
        ({"x": torch.ones(2, 4)}, TypeError, "batches is a dict"),
        ([np.ones((2, 4))], TypeError, "batch 0 is a ndarray"),
        ([()], ValueError, "empty sequence"),
        ([torch.tensor([[1.0, 2.0, float("nan"), 4.0]])], ValueError, "layer '0' reads NaN or inf in batch 0; check"),
        ([torch.ones(2, 4), torch.full((2, 4), float("inf"))], ValueError, "in batch 1"),
        ([torch.ones(2, 4), torch.ones(0, 4)], ValueError, r"batch 1 is empty: its input has shape \(0, 4\)"),
    ],
)
def test_bad_batches(batches, error, message):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    before = snapshot(model)
    with pytest.raises(error, match=message):
        capture(model, batches)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_weights_that_are_not_finite_are_named(key):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    getattr(model[0], key).data[0] = float("nan")
    with pytest.raises(ValueError, match=f"layer '0': its {key} holds NaN or inf"):
        capture(model, [torch.ones(2, 4)])
    with pytest.raises(ValueError, match=r"layer '2' reads NaN or inf in batch 0; check .* the layers before it"):
        capture(model, [torch.ones(2, 4)], "2")


@pytest.mark.parametrize(("model", "what"), [(nn.Linear, "the class Linear"), ({}, "a dict")])
def test_what_is_no_network_is_refused(model, what):
    with pytest.raises(TypeError, match=f"the model is {what}; give an nn.Module"):
        capture(model, [torch.ones(2, 4)])


def test_names_and_patterns():
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    model.add_module("head", nn.Linear(4, 2))
    model.body.again = model.head
    model.body.pop(-1)
    x = [torch.randn(5, 4)]
    names = lambda request: [layer.name for layer in capture(model, x, request)]  # noqa: E731
    assert names(None) == ["body.0", "body.2", "head"]
    assert names("body.*") == ["body.0", "body.2"]
    assert names(["head", "body.[01]"]) == ["body.0", "head"]
    conv, image = Convolutional(), [torch.randn(2, 3, 8, 6)]
    assert [layer.name for layer in capture(conv, image, "conv2[2]")] == ["conv2[2]"]
    assert len(capture(conv, image, "conv2")) == 4
    assert len(capture(conv, image, "conv?[[]*")) == 4
    for request, message in [
        ("heda", "did you mean 'head'"),
        ("tail.*", "this pattern matches no Linear"),
        ("body", r"'body' is a Sequential.*use 'body\.\*'"),
        ("body.1", "'body.1' is a ReLU, not one of Linear, Conv1d, Conv2d"),
        ([], "names is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            capture(model, x, request)


def test_a_module_under_two_names_is_captured_under_its_first():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(4, 4)

        def forward(self, x):
            return self.second(x)

    model = Two()
    for request in (None, "first", "second"):
        assert [layer.name for layer in capture(model, [torch.randn(2, 4)], request)] == ["first"]
    assert torch.equal(read(model, "second"), read(model, "first"))


def test_layers_that_are_never_called():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
            self.direct = nn.ModuleDict({"one": nn.Linear(4, 4)})

        def forward(self, x):
            return self.used(x) @ self.direct["one"].weight

    x = [torch.randn(3, 4)]
    assert [layer.name for layer in capture(Idle(), x)] == ["used"]
    for request in ("idle", "direct.*"):
        with pytest.raises(ValueError, match="no such layer was called"):
            capture(Idle(), x, request)
    with pytest.raises(ValueError, match="this pattern matches no"):
        capture(nn.ReLU(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4)).to(dtype)
    x = torch.randn(7, 2, 6).to(dtype)
    for layer in capture(model, [x], keep_inputs=True):
        assert layer.inputs.dtype == dtype
        assert layer.gram.dtype == torch.float64
        assert relative(layer.gram, layer.inputs.double().T @ layer.inputs.double() / layer.samples) < 1e-13


def test_weights_that_cannot_be_captured():
    x = [torch.randn(2, 4)]
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    model[0].weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer '0': its weight is torch.int8; dequantise"):
        capture(model, x)
    with pytest.raises(ValueError, match="parametrization"):
        capture(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), x)
    with pytest.raises(ValueError, match="run the model once first"):
        capture(nn.Sequential(nn.LazyLinear(3)), x)
    broken = nn.Sequential(nn.Linear(4, 3))
    nn.init.constant_(broken[0].bias, float("inf"))
    with pytest.raises(ValueError, match="bias holds NaN or inf"):
        capture(broken, x)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="'0' is a Doubled"):
        capture(nn.Sequential(Doubled(4, 3)), x, "0")


def test_progress_and_options():
    model, seen = nn.Sequential(nn.Linear(4, 3)), []
    capture(model, [torch.randn(2, 4)] * 3, progress=seen.append)
    assert seen == [0, 1, 2]
    with pytest.raises(ValueError, match="positions is 0"):
        Calibration([torch.randn(2, 4)], positions=0)


def test_resnet20_is_captured_and_written_back_exactly(data):
    model, (x, labels) = resnet.resnet20(data), resnet.cifar10(data, "test", 64)
    with torch.no_grad():
        before = model(x)
    assert float((before.argmax(1) == labels).float().mean()) > 0.85
    layers = capture(model, [x[:4]], keep_inputs=True)
    assert len(layers) == 20
    outputs = {}
    handles = [
        model.get_submodule(layer.name).register_forward_hook(lambda m, a, y, n=layer.name: outputs.update({n: y}))
        for layer in layers
    ]
    with torch.no_grad():
        model(x[:4])
    for handle in handles:
        handle.remove()
    for layer in layers:
        y = outputs[layer.name]
        y = y.flatten(2).transpose(1, 2).flatten(0, 1) if y.ndim == 4 else y
        assert relative(layer.affine_inputs.double() @ layer.affine_weight.T, y) < 1e-5
        write(model, layer.name, layer.affine_weight)
    with torch.no_grad():
        assert torch.equal(model(x), before)


class Twice(nn.Module):
    """Calls a layer twice, and swallows every Exception on the way."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        try:
            return self.c(self.b(self.a(self.b(x)).relu()))
        except Exception:
            return x


def test_a_pass_ends_after_the_last_wanted_call():
    torch.manual_seed(0)
    model, batches, late = Twice(), [torch.randn(5, 4), torch.randn(3, 4)], []
    model.c.register_forward_hook(lambda *_: late.append(1))
    stacks = choose(model, ["b"]).stacks
    found = survey(model, Calibration(batches), choose(model, ["a", "b"]).stacks, Blocks(model), lambda index: None)
    assert found.calls == {"a": 1, "b": 2}
    late.clear()
    (whole,) = capture(model, batches, ["b"], dense=model)
    assert len(late) == 4
    late.clear()
    account = Gathering(model, stacks, Calibration(batches), dense=model, calls=found.calls).run()
    (short,) = layers_of("b", stacks["b"], account, ["b"], {})
    assert not late
    assert torch.equal(short.gram, whole.gram)
    assert torch.equal(short.cross, whole.cross)
    assert short.samples == whole.samples == 16
