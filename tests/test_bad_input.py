"""Wrong calls: each is refused in one sentence that names the value, before the work begins, and nothing is touched."""

import copy
import functools
import json
import os
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune
from click.testing import CliRunner
from torch import nn, tensor

import convexprune as cp
from convexprune.bounds.difference import Exact, LinearRelaxation
from convexprune.bounds.input_sets import Ball, Box
from convexprune.network import memory

NAN = float("nan")


def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def normed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()


def x(samples=20, width=6, seed=1):
    return torch.randn(samples, width, generator=torch.Generator().manual_seed(seed))


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


@functools.cache
def pruned():
    return cp.prune(model(), [x()], half)[0]


def changed(change, make=model):
    """A model after a change."""
    network = make()
    change(network)
    return network


def weight(make):
    """A model whose first weight is what `make` makes of it."""

    def change(network):
        network[0].weight = nn.Parameter(make(network[0].weight.detach()), requires_grad=False)

    return changed(change)


class Calls(nn.Module):
    """Two layers, called as a function says."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.out, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function

    def forward(self, x):
        return self.function(self, x)


def branching(m, x):
    return m.out(torch.cond(x.sum() > 0, lambda x: m.fc(x), lambda x: m.fc(x) + 1, (x,)))


# ---- models: what takes one refuses all that are none ----

TAKERS = {
    "prune": lambda m: cp.prune(m, [x()], half),
    "prune_within": lambda m: cp.prune_within(m, [x()], 0.5),
    "capture": lambda m: cp.capture(m, [x()]),
    "sensitivities": lambda m: cp.sensitivities(m, [x()]),
    "rate_distortion": lambda m: cp.rate_distortion(m, [x()], levels=[0.5, 1.0]),
    "shares": lambda m: cp.Allocation(0.5, levels=[0.5, 1.0]).shares(m, [x()]),
    "macs_per_weight": lambda m: cp.macs_per_weight(m, x()),
    "additivity": lambda m: cp.additivity(m, model(), [x()]),
    "additivity of": lambda m: cp.additivity(model(), m, [x()]),
    "certify_unseen": lambda m: cp.certify_unseen(m, model(), [x()], [x(seed=2)], clip=1.0),
    "certify_unseen of": lambda m: cp.certify_unseen(model(), m, [x()], [x(seed=2)], clip=1.0),
    "worst_case": lambda m: cp.worst_case(m, model(), x(), 0.1),
    "worst_case of": lambda m: cp.worst_case(model(), m, x(), 0.1),
    "distill": lambda m: cp.distill(m, pruned(), [x()], epochs=1),
    "distill of": lambda m: cp.distill(model(), m, [x()], epochs=1),
    "merge": lambda m: cp.merge(m, 0.5),
    "compact": lambda m: cp.compact(m),
    "reestimate": lambda m: cp.reestimate_batch_norm(m, [x()]),
    "MaskKeeper": lambda m: cp.MaskKeeper(m, torch.optim.SGD(model().parameters(), 0.1)),
    "save": lambda m: cp.save(m, os.devnull),
    "load": lambda m: cp.load(m, os.devnull),
}
NO_MODELS = {
    "None": (lambda: None, TypeError, "is a NoneType; give an nn.Module"),
    "class": (lambda: nn.Linear, TypeError, "is the class Linear; give an nn.Module"),
    "state_dict": (lambda: model().state_dict(), TypeError, "is a OrderedDict; give an nn.Module"),
    "string": (lambda: "resnet18", TypeError, "is a str; give an nn.Module"),
    "function": (lambda: half, TypeError, "is a function; give an nn.Module"),
    "tensor": (lambda: x(), TypeError, "is a Tensor; give an nn.Module"),
    "meta": (lambda: model().to("meta"), ValueError, "its 0.weight is on the meta device"),
    "half meta": (lambda: changed(lambda m: m[2].to("meta")), ValueError, "its 2.weight is on the meta device"),
    "meta buffer": (lambda: changed(lambda m: m[1].to("meta"), normed), ValueError, "its 1.*on the meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), ValueError, "its 0.weight has no shape yet"),
    "lazy buffer": (lambda: nn.Sequential(nn.LazyBatchNorm1d()), ValueError, "has no shape yet"),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS.keys())
@pytest.mark.parametrize(("make", "error", "message"), NO_MODELS.values(), ids=NO_MODELS.keys())
def test_what_is_no_model_is_refused(take, make, error, message):
    with pytest.raises(error, match=message):
        take(make())


WATCHERS = (
    "prune",
    "prune_within",
    "capture",
    "sensitivities",
    "rate_distortion",
    "macs_per_weight",
    "merge",
    "compact",
)
NO_LAYERS = {
    "script": (lambda: torch.jit.script(model()), ValueError, "is a script, whose layers cannot be watched"),
    "compiled": (lambda: torch.compile(model()), ValueError, "the model is compiled, so its layers"),
    "in place": (lambda: changed(lambda m: m.compile()), ValueError, "the model was compiled in place"),
    "a part": (lambda: changed(lambda m: m[0].compile()), ValueError, "0 was compiled in place"),
    "sparse": (lambda: weight(lambda w: w.to_sparse()), TypeError, "layer '0': its weight is torch.sparse_coo"),
    "csr": (lambda: weight(lambda w: w.to_sparse_csr()), TypeError, "layer '0': its weight is torch.sparse_csr"),
    "complex": (lambda: nn.Sequential(nn.Linear(6, 3, dtype=torch.complex64)), TypeError, "weight is torch.complex64"),
    "fp8": (lambda: weight(lambda w: w.to(torch.float8_e4m3fn)), TypeError, "weight is torch.float8_e4m3fn; dequant"),
    "int8": (lambda: weight(lambda w: w.to(torch.int8)), TypeError, "weight is torch.int8; dequantise"),
    "quantised": (
        lambda: weight(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), TypeError, "weight is torch.qint8"
    ),
    "weight norm": (
        lambda: changed(lambda m: nn.utils.parametrizations.weight_norm(m[0])), ValueError, "computed from other"
    ),
    "spectral norm": (
        lambda: changed(lambda m: nn.utils.parametrizations.spectral_norm(m[2])), ValueError, "layer '2': its weight"
    ),
    "mask": (
        lambda: changed(lambda m: nn.utils.prune.random_unstructured(m[0], "weight", 1)), ValueError, "computed from"
    ),
}  # fmt: skip


@pytest.mark.parametrize("take", WATCHERS)
@pytest.mark.parametrize(("make", "error", "message"), NO_LAYERS.values(), ids=NO_LAYERS.keys())
def test_layers_that_cannot_be_read_or_watched_are_refused(take, make, error, message):
    with pytest.raises(error, match=message):
        TAKERS[take](make())


@pytest.mark.parametrize("take", ["prune", "capture", "rate_distortion", "distill"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Calls(branching), "batch 0: the model uses torch's cond"),
        (lambda: Calls(lambda m, x: m.out(torch.vmap(m.fc)(x))), "layer 'fc' is called inside torch.vmap"),
        (lambda: Calls(lambda m, x: torch.vmap(lambda r: m.out(m.fc(r)))(x)), "layer 'fc' is called inside torch.vmap"),
    ],
)
def test_layers_inside_transforms_are_refused_by_name(take, make, message):
    with pytest.raises(ValueError, match=message):
        TAKERS[take](make())


def test_a_default_device_or_dtype_that_cannot_compute_is_refused():
    network, batch = model(), x()
    with torch.device("meta"), pytest.raises(ValueError, match="torch's default device is meta"):
        cp.prune(network, [batch], half)
    try:
        torch.set_default_dtype(torch.float16)
        with pytest.raises(ValueError, match="torch's default dtype is torch"):
            cp.prune(network, [batch], half)
        torch.set_default_dtype(torch.float64)
        other, _ = cp.prune(network, [batch], half)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(other[0].weight, pruned()[0].weight)


# ---- batches ----


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return x()[index]


def reestimated(batches):
    network = normed()
    before = copy.deepcopy(network.state_dict())
    try:
        cp.reestimate_batch_norm(network, batches)
    finally:
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


BATCH_TAKERS = {
    "prune": lambda b: cp.prune(model(), b, half),
    "Calibration": lambda b: cp.prune(model(), cp.Calibration(b), half),
    "prune_within": lambda b: cp.prune_within(model(), b, 0.5),
    "capture": lambda b: cp.capture(model(), b),
    "sensitivities": lambda b: cp.sensitivities(model(), b),
    "rate_distortion": lambda b: cp.rate_distortion(model(), b, levels=[0.5, 1.0]),
    "OutputChange": lambda b: cp.rate_distortion(model(), b, levels=[0.5], measure=cp.OutputChange()),
    "Allocation": lambda b: cp.prune(model(), [x()], allocation=cp.Allocation(0.5, levels=[0.5, 1.0], batches=b)),
    "merge": lambda b: cp.merge(model(), 0.5, batches=b),
    "compact": lambda b: cp.compact(model(), batches=b),
    "reestimate": reestimated,
    "additivity": lambda b: cp.additivity(model(), pruned(), b),
    "certify_unseen": lambda b: cp.certify_unseen(model(), pruned(), b, [x(seed=9)], clip=1.0),
    "distill": lambda b: cp.distill(model(), pruned(), b, epochs=1),
}
NO_BATCHES = {
    "tensor": (lambda: x(), TypeError, "batches is a Tensor"),
    "number": (lambda: 3, TypeError, "batches is a int"),
    "string": (lambda: "ab", TypeError, "batches is a str"),
    "array": (lambda: x().numpy(), TypeError, "batches is a ndarray"),
    "dict": (lambda: {"x": x()}, TypeError, "batches is a dict"),
    "dataset": (Samples, TypeError, "a Samples holds samples"),
    "class": (lambda: torch.utils.data.DataLoader, TypeError, "batches is the class DataLoader"),
    "of arrays": (lambda: [x().numpy()], TypeError, "batch 0 is a ndarray; .* torch.from_numpy"),
    "of numbers": (lambda: [1.0, 2.0], TypeError, "batch 0 is a float"),
    "of lists": (lambda: [[1.0, 2.0]], TypeError, "batch 0 holds no tensor: its input is a float"),
    "of lists of lists": (lambda: [[[1.0, 2.0]]], TypeError, "batch 0 holds no tensor: its input is a list"),
    "of None": (lambda: [None], TypeError, "batch 0 is a NoneType"),
    "of strings": (lambda: ["a"], TypeError, "batch 0 is a str"),
    "of dicts of arrays": (lambda: [{"input": x().numpy()}], TypeError, "batch 0 holds no tensor: its input is a dict"),
    "of empty dicts": (lambda: [{}], TypeError, "batch 0 holds no tensor"),
    "of empty lists": (lambda: [[]], ValueError, "batch 0 is an empty sequence"),
    "of none": (lambda: [x()[:0]], ValueError, r"batch 0 is empty: its input has shape \(0, 6\)"),
    "single number": (lambda: [tensor(1.0)], ValueError, "batch 0 is a single number"),
    "complex": (lambda: [x().to(torch.complex64)], TypeError, "batch 0 is torch.complex64; only real"),
    "sparse": (lambda: [x().to_sparse()], TypeError, "batch 0 is a tensor of layout sparse_coo"),
    "csr": (lambda: [x().to_sparse_csr()], TypeError, "batch 0 is a tensor of layout sparse_csr"),
    "nested": (lambda: [torch.nested.nested_tensor([x(2), x(3)])], TypeError, "batch 0 is a tensor of layout nested"),
    "quantised": (lambda: [torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8)], TypeError, "batch 0 is torch.qint8"),
    "meta": (lambda: [x().to("meta")], ValueError, "batch 0 is on the meta device"),
}  # fmt: skip


@pytest.mark.parametrize("take", BATCH_TAKERS.values(), ids=BATCH_TAKERS.keys())
@pytest.mark.parametrize(("make", "error", "message"), NO_BATCHES.values(), ids=NO_BATCHES.keys())
def test_what_are_no_batches_is_refused(take, make, error, message):
    with pytest.raises(error, match=message.replace("batch 0", "batch 0")):
        take(make())


UNFIT = {
    "wide": (lambda: [x(20, 7)], r"forward failed: mat1 and mat2 shapes .*\(the batch is \(20, 7\) float32\)"),
    "the second": (lambda: [x(), x(5, 7, 2)], r"forward failed: mat1 .*\(the batch is \(5, 7\) float32\)"),
    "double": (lambda: [x().double()], r"the batch is \(20, 6\) float64, the weights are float32"),
    "half": (lambda: [x().half()], r"the batch is \(20, 6\) float16, the weights are float32"),
    "integers": (lambda: [(1000 * x()).long()], r"the batch is \(20, 6\) int64, the weights are float32"),
    "boolean": (lambda: [x(2) > 0], r"the batch is \(2, 6\) bool, the weights are float32"),
    "fp8": (lambda: [x().to(torch.float8_e4m3fn)], "float8_e4m3fn, the weights are float32"),
    "keywords": (lambda: [{"nothing": x()}], "forward failed|unexpected|missing"),
}


@pytest.mark.parametrize("take", BATCH_TAKERS.values(), ids=BATCH_TAKERS.keys())
@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT.keys())
def test_a_batch_that_the_model_cannot_take_is_named(take, make, message):
    with pytest.raises(ValueError, match=message) as raised:
        take(make())
    assert "\n" not in str(raised.value)


def test_a_failing_forward_says_which_batch_and_keeps_the_cause():
    with pytest.raises(ValueError, match="batch 1: the model's forward failed") as raised:
        cp.prune(model(), [x(), x(5, 7)], half)
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match=r"the batch is .* float32, the weights are float16"):
        cp.prune(model().half(), [x()], half)


@pytest.mark.parametrize(
    "take",
    ["prune", "capture", "sensitivities", "OutputChange", "additivity", "compact", "reestimate", "certify_unseen"],
)
def test_nan_and_inf_are_refused_and_nothing_is_written(take):
    for value in (NAN, float("inf")):
        bad = x()
        bad[3, 2] = value
        with pytest.raises(ValueError, match=r"NaN|inf"):
            BATCH_TAKERS[take]([bad])


# ---- names ----

NAME_TAKERS = {
    "prune": lambda n: cp.prune(model(), [x()], half, names=n),
    "Calibration": lambda n: cp.Calibration([x()], n),
    "prune_within": lambda n: cp.prune_within(model(), [x()], 0.5, names=n),
    "capture": lambda n: cp.capture(model(), [x()], n),
    "sensitivities": lambda n: cp.sensitivities(model(), [x()], n),
    "rate_distortion": lambda n: cp.rate_distortion(model(), [x()], n, levels=[0.5, 1.0]),
    "distill": lambda n: cp.distill(model(), pruned(), [x()], n, epochs=1),
    "merge": lambda n: cp.merge(model(), 0.5, names=n),
    "macs_per_weight": lambda n: cp.macs_per_weight(model(), x(), n),
}


@pytest.mark.parametrize("take", NAME_TAKERS.values(), ids=NAME_TAKERS.keys())
@pytest.mark.parametrize(
    "names", [0, 1.5, True, b"fc", [None], [b"0"], [["0"]], {"0": 1}, object(), nn.Linear(2, 2), tensor([1])], ids=repr
)
def test_what_are_no_names_is_refused(take, names):
    with pytest.raises(TypeError, match="names is "):
        take(names)


# ---- options: call, error, message ----


def curve(**fields):
    return cp.Curve(**{"name": "a", "kept": tensor([1, 2]), "distortion": tensor([1.0, 0.0]), **fields})


def distill(**options):
    return cp.distill(model(), pruned(), [x()], **{"epochs": 1, **options})


def unseen(**options):
    return cp.certify_unseen(model(), pruned(), [x(seed=5)], [x()], **{"clip": 1.0, **options})


def worst(around=None, radius=0.1, **options):
    return cp.worst_case(model(), pruned(), x(4) if around is None else around, radius, **options)


def rates(**options):
    return cp.rate_distortion(model(), [x()], **{"levels": [0.5, 1.0], **options})


def within(goal=0.5, **options):
    return cp.prune_within(model(), [x()], goal, **options)


def keeper(masks=None, optimizer=None, **options):
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), 0.1) if optimizer is None else optimizer
    return cp.MaskKeeper(network, optimizer, masks, **options)


CENTER = torch.zeros(2, 3, dtype=torch.float64)
MASK = torch.ones(8, 6) > 0
V, T = ValueError, TypeError
OPTIONS = [
    (lambda: cp.Calibration([x()], mask=3), T, "mask is 3"),
    (lambda: cp.Calibration([x()], positions=0), V, "positions is 0"),
    (lambda: cp.Calibration([x()], positions=1.5), T, "positions is 1.5"),
    (lambda: cp.Calibration([x()], positions="a"), T, "positions is 'a'"),
    (lambda: cp.Calibration([x()], seed="a"), T, "seed is 'a'"),
    (lambda: cp.Calibration([x()], seed=None), T, "seed is None"),
    (lambda: cp.Calibration([x()], seed=2**70), V, "seed is 11805"),
    (lambda: cp.Calibration([x()], seed=-(2**70)), V, "seed is -11805"),
    (lambda: cp.Calibration([x()], activations=["a"]), T, "activations is"),
    (lambda: cp.Calibration([x()], activations={0: "relu"}), T, "a name of `activations` is 0"),
    (lambda: cp.Calibration([x()], keep_inputs=2), T, "keep_inputs is 2"),
    (lambda: cp.capture(model(), [x()], dense="a"), T, "the dense network is a str"),
    (lambda: cp.capture(model(), [x()], dense=nn.Linear), T, "the dense network is the class Linear"),
    (lambda: cp.capture(model(), [x()], keep_inputs="all"), T, "keep_inputs is 'all'"),
    (lambda: cp.prune(model(), [x()], half, progress=3), T, "progress is 3; give True for a bar, or a function"),
    (lambda: cp.prune(model(), [x()], half, progress="a"), T, "progress is 'a'"),
    (lambda: cp.prune(model(), [x()], half, mode="sideways"), V, "mode is 'sideways'"),
    (lambda: within(None), T, "error is None"),
    (lambda: within("a"), T, "error is 'a'"),
    (lambda: within(True), T, "error is True"),
    (lambda: within(tensor(0.5)), T, "error is tensor"),
    (lambda: within(cp.Goal), T, "error is <class"),
    (lambda: within(NAN), V, "error is nan"),
    (lambda: within(-1), V, "error is -1"),
    (lambda: within(build=3), T, "build is 3"),
    (lambda: within(build=0.5), T, "build is 0.5"),
    (lambda: within(solver="admm"), T, "'admm' is not a solver"),
    (lambda: within(progress=3), T, "progress is 3"),
    (lambda: cp.Goal(0.5, near="a"), T, "near is 'a'"),
    (lambda: cp.Goal(0.5, near=NAN), V, "near is nan"),
    (lambda: cp.Goal(0.5, rounds=1.5), T, "rounds is 1.5"),
    (lambda: cp.Goal(0.5, rounds=True), T, "rounds is True"),
    (lambda: cp.Goal(0.5, rounds=0), V, "rounds is 0"),
    (lambda: distill(epochs=0), V, "epochs is 0"),
    (lambda: distill(epochs=1.5), T, "epochs is 1.5"),
    (lambda: distill(hints=True), T, "hints is True"),
    (lambda: distill(hints=NAN), V, "hints is nan"),
    (lambda: distill(rate=None), T, "rate is None"),
    (lambda: distill(rate=0), V, "rate is 0"),
    (lambda: distill(seed="a"), T, "seed is 'a'"),
    (lambda: distill(seed=1.5), T, "seed is 1.5"),
    (lambda: distill(seed=2**70), V, "seed is"),
    (lambda: cp.distill(model(), nn.Linear(6, 3), [x()]), V, "has no such layer"),
    (lambda: cp.distill(model(), model().double(), [x()]), V, "is torch.float32 in the dense .*torch.float64"),
    (lambda: cp.distill(model().half(), model().half(), [x().half()]), V, "distill in float32: convert"),
    (lambda: cp.sensitivities(model(), [x()], probes=0), V, "probes is 0"),
    (lambda: cp.sensitivities(model(), [x()], probes="a"), T, "probes is 'a'"),
    (lambda: cp.sensitivities(model(), [x()], probes=1.5), T, "probes is 1.5"),
    (lambda: cp.sensitivities(model(), [x()], probes=True), T, "probes is True"),
    (lambda: cp.sensitivities(model(), [x()], seed=None), T, "seed is None"),
    (lambda: rates(levels="abc"), T, "levels is 'abc'"),
    (lambda: rates(levels=3), T, "levels is 3"),
    (lambda: rates(levels=None), T, "levels is None"),
    (lambda: rates(levels=["a"]), T, r"levels is \['a'\]"),
    (lambda: rates(levels=[True]), T, r"levels is \[True\]"),
    (lambda: rates(levels=[]), V, "fractions in .* got none"),
    (lambda: rates(levels=[NAN]), V, "fractions in .* got nan"),
    (lambda: rates(measure="second"), T, "measure is 'second'"),
    (lambda: rates(measure=cp.SecondOrder), T, "measure is <class"),
    (lambda: rates(solver=cp.ADMM), T, "the solver is the class ADMM"),
    (lambda: rates(damping="a"), T, "damping is 'a'"),
    (lambda: rates(damping=NAN), V, "damping is nan"),
    (lambda: rates(cache=3), T, "cache is 3"),
    (lambda: rates(cache=b"x"), T, "cache is b'x'"),
    (lambda: rates(cache="a\0b"), V, "cache is .* names no file"),
    (lambda: rates(cache="/dev/null/x"), OSError, "no folder for the cache"),
    (lambda: rates(progress=3), T, "progress is 3"),
    (lambda: cp.SecondOrder(directions=0), V, "directions is 0"),
    (lambda: cp.SecondOrder(directions=-1), V, "directions is -1"),
    (lambda: cp.SecondOrder(directions="a"), T, "directions is 'a'"),
    (lambda: cp.SecondOrder(seed=None), T, "seed is None"),
    (lambda: cp.OutputChange(worst="a"), T, "worst is 'a'"),
    (lambda: cp.OutputChange(worst=None), T, "worst is None"),
    (lambda: cp.random_inputs(3), T, "shape is 3"),
    (lambda: cp.random_inputs("ab"), T, "shape is 'ab'"),
    (lambda: cp.random_inputs(None), T, "shape is None"),
    (lambda: cp.random_inputs(tensor([3])), T, "shape is tensor"),
    (lambda: cp.random_inputs((-1,)), V, "a size of `shape` is -1"),
    (lambda: cp.random_inputs((1.5,)), T, "a size of `shape` is 1.5"),
    (lambda: cp.random_inputs((3,), 0), V, "samples is 0"),
    (lambda: cp.random_inputs((3,), "a"), T, "samples is 'a'"),
    (lambda: cp.random_inputs((3,), 4, 0), V, "batch is 0"),
    (lambda: cp.random_inputs((3,), 4, -2), V, "batch is -2"),
    (lambda: cp.random_inputs((3,), 4, 2, "a"), T, "seed is 'a'"),
    (lambda: cp.Allocation(0.5, price=3.0), T, "price is 3.0; give a mapping"),
    (lambda: cp.Allocation(0.5, price=[1.0]), T, r"price is \[1.0\]"),
    (lambda: cp.Allocation(0.5, price={"0": "a"}), T, r"price\['0'\] is 'a'"),
    (lambda: cp.Allocation(0.5, price={"0": -1.0}), V, r"price\['0'\] is -1.0"),
    (lambda: cp.Allocation(0.5, least="a"), T, "least is 'a'"),
    (lambda: cp.Allocation(0.5, least=NAN), V, "least is nan"),
    (lambda: cp.Allocation(0.5, least=-1.0), V, "least is -1.0"),
    (lambda: cp.Allocation(0.5, least={"0": "a"}), T, r"least\['0'\] is 'a'"),
    (lambda: cp.Allocation(0.5, most=None), T, "most is None"),
    (lambda: cp.Allocation(0.5, tie="a"), T, "tie is 'a'"),
    (lambda: cp.Allocation(0.5, tie={"0": 3}), T, r"tie\['0'\] is 3"),
    (lambda: cp.Allocation(0.5, levels="a"), T, "levels is 'a'"),
    (lambda: cp.Allocation(0.5, levels=3), T, "levels is 3"),
    (lambda: cp.Allocation(0.5, measure="a"), T, "measure is 'a'"),
    (lambda: cp.Allocation(0.5, measure=cp.LayerError), T, "measure is <class"),
    (lambda: cp.Allocation(0.5, inner="a"), T, "'a' is not a solver"),
    (lambda: cp.Allocation(0.5, solver=cp.MinimalCore), T, "the solver is the class"),
    (lambda: cp.Allocation(0.5, damping="a"), T, "damping is 'a'"),
    (lambda: cp.Allocation(0.5, cache=3), T, "cache is 3"),
    (lambda: cp.Allocation(0.5, batches=x()), T, "batches is a Tensor"),
    (lambda: cp.Allocation(0.5, curves=[1]), T, r"curves is \[1\]"),
    (lambda: cp.Allocation(0.5, curves="a"), T, "curves is 'a'"),
    (lambda: cp.Allocation(0.5, curves=[]), V, "curves is empty"),
    (lambda: cp.Allocation(0.5).problem(None), T, "curves is None"),
    (lambda: cp.macs_per_weight(model(), {}), T, "a batch holds no tensor"),
    (lambda: cp.macs_per_weight(model(), []), V, "a batch is an empty sequence"),
    (lambda: cp.macs_per_weight(model(), x().numpy()), T, "a batch is a ndarray"),
    (lambda: cp.macs_per_weight(model(), tensor(1.0)), V, "a batch is a single number"),
    (lambda: curve(name=None), T, "name is None"),
    (lambda: curve(kept="abc"), T, "kept is 'abc'"),
    (lambda: curve(kept=None), T, "kept is None"),
    (lambda: curve(kept=tensor([1j, 2])), T, "kept is torch.complex64"),
    (lambda: curve(kept=tensor([1.5, 2])), V, "whole numbers of weights"),
    (lambda: curve(kept=tensor([-1, 2])), V, "kept has -1"),
    (lambda: curve(distortion="ab"), T, "distortion is 'ab'"),
    (lambda: curve(distortion=tensor([NAN, 0])), V, "distortion holds NaN"),
    (lambda: curve(total="a"), T, "total is 'a'"),
    (lambda: curve(total=-1), V, "total is -1"),
    (lambda: curve(total=1.5), T, "total is 1.5"),
    (lambda: curve(total=1), V, "total is 1, and a level keeps 2"),
    (lambda: curve(kernel=0), V, "kernel is 0"),
    (lambda: curve(kernel="a"), T, "kernel is 'a'"),
    (lambda: curve(tie=3), T, "tie is 3"),
    (lambda: curve(weight=[[1.0]]), T, "weight is a list"),
    (lambda: curve(weight=torch.ones(2)), T, r"weight is torch.float32 \(2,\)"),
    (lambda: curve(weight=torch.ones(1, 2).long()), T, "weight is torch.int64"),
    (lambda: curve(weight=torch.full((1, 2), NAN)), V, "weight is sparse, .* NaN"),
    (lambda: curve().between("a"), T, "least is 'a'"),
    (lambda: curve().between(0.0, None), T, "most is None"),
    (lambda: curve().between(NAN), V, "least is nan"),
    (lambda: curve().priced("a"), T, "the price is 'a'"),
    (lambda: curve().priced(-1.0), V, "the price is -1.0"),
    (lambda: cp.compact(model(), round_to=1.5), T, "round_to is 1.5"),
    (lambda: cp.compact(model(), round_to="a"), T, "round_to is 'a'"),
    (lambda: cp.compact(model(), round_to=True), T, "round_to is True"),
    (lambda: cp.compact(model(), round_to=-1), V, "round_to is -1"),
    (lambda: cp.merge(model(), "a"), V, "keep is 'a'"),
    (lambda: cp.merge(model(), True), V, "keep is True"),
    (lambda: cp.merge(model(), {"0": None}), V, "keep is None"),
    (lambda: cp.merge(model(), {}), V, "no layer is named"),
    (lambda: cp.merge(model(), 0.5, names=[]), V, "no layer is named"),
    (lambda: cp.merge(model(), 0.5, names=""), V, "the neurons of '' cannot merge"),
    (lambda: cp.merge(model(), max_saliency="a"), T, "max_saliency is 'a'"),
    (lambda: cp.merge(model(), max_saliency=-1), V, "max_saliency is -1"),
    (lambda: cp.merge(model(), 0.5, refit="yes", batches=[x()]), T, "refit is 'yes'"),
    (lambda: cp.merge(model(), 0.5, solver="greedy"), T, "'greedy' is not a solver"),
    (lambda: unseen(clip="a"), T, "clip is 'a'"),
    (lambda: unseen(clip=None), T, "clip is None"),
    (lambda: unseen(clip=NAN), V, "clip is nan"),
    (lambda: unseen(confidence="a"), T, "confidence is 'a'"),
    (lambda: unseen(confidence=1), V, "confidence is 1"),
    (lambda: unseen(predict=3), T, "predict is 3"),
    (lambda: worst(radius="a"), T, "the radius is 'a'"),
    (lambda: worst(radius=tensor([0.1, 0.2])), T, "the radius is tensor"),
    (lambda: worst(radius=True), T, "the radius is True"),
    (lambda: worst(radius=-1), V, "the radius is -1"),
    (lambda: worst(norm="inf"), V, "norm is 'inf'"),
    (lambda: worst(norm=tensor([2.0, 2.0])), V, "norm is tensor"),
    (lambda: worst(norm=1), V, "norm is 1"),
    (lambda: worst(within=0.5), V, "within is 0.5"),
    (lambda: worst(within=(0,)), V, r"within is \(0,\)"),
    (lambda: worst(within=(0, 1, 2)), V, "within is"),
    (lambda: worst(within=("a", "b")), T, "an end of `within` is 'a'"),
    (lambda: worst(within=(None, None)), T, "an end of `within` is None"),
    (lambda: worst(within=(NAN, 1.0)), V, "an end of `within` is nan"),
    (lambda: worst(method="exact"), T, "method is 'exact'"),
    (lambda: worst(method=LinearRelaxation), T, "method is <class"),
    (lambda: worst(method=3), T, "method is 3"),
    (lambda: worst(method=Exact("ZZZ")), V, "solver 'ZZZ' is not installed"),
    (lambda: Exact(3), T, "solver is 3"),
    (lambda: worst([[1.0]]), V, "around must be a floating-point tensor"),
    (lambda: worst(x().to("meta")), V, "around is on the meta device"),
    (lambda: worst(x().to_sparse()), T, "around is a tensor of layout sparse_coo"),
    (lambda: worst(x(4, 7)), V, "forward failed: mat1"),
    (lambda: worst(x().double()), V, "float64, the weights are float32"),
    (lambda: Ball("a", 0.1), T, "the center is 'a'"),
    (lambda: Ball([[1.0]], 0.1), T, "the center is"),
    (lambda: Ball(CENTER * 1j, 0.1), T, "the center is a tensor torch.complex128"),
    (lambda: Ball(CENTER, None), T, "the radius is None"),
    (lambda: Box(CENTER, "a"), T, "the radius is 'a'"),
    (lambda: Box(CENTER, 0.1, "a"), T, "least is 'a'"),
    (lambda: Box(CENTER, 0.1, None, [1.0]), T, "most is"),
    (lambda: Box(CENTER, 0.1, torch.zeros(7)), V, r"least has shape \(7,\)"),
    (lambda: Box(CENTER, 0.1, NAN), V, "least is nan"),
    (lambda: cp.additivity(model(), model(), [x()]), V, "no layer has changed"),
    (lambda: cp.additivity(model(), normed(), [x()]), V, "is not the same in both"),
    (lambda: keeper(optimizer="adam"), T, "optimizer is 'adam'"),
    (lambda: keeper(optimizer=torch.optim.SGD), T, "optimizer is <class"),
    (lambda: keeper([1]), T, "masks is a list"),
    (lambda: keeper("a"), T, "masks is a str"),
    (lambda: keeper({"0.weight": 3}), T, "mask of '0.weight' is a int"),
    (lambda: keeper({"0.weight": np.ones((8, 6), bool)}), T, "mask of '0.weight' is a ndarray"),
    (lambda: keeper({"0.weight": MASK.to("meta")}), V, "meta device"),
    (lambda: keeper({"0.weight": MASK.to_sparse()}), V, "is sparse"),
    (lambda: keeper({"0.weight": MASK}, dense=model()), V, "masks or dense, not both"),
    (lambda: keeper(dense="a"), T, "the dense network is a str"),
    (lambda: keeper(dense=nn.Sequential(nn.Linear(5, 8))), V, r"'0.weight' has shape \(8, 6\) in the model, \(8, 5\)"),
    (lambda: cp.reestimate_batch_norm(model(), [x()]), V, "no batch norm with running statistics"),
    (lambda: reestimated([x(1)]), V, "batch 0: the model's forward failed: Expected more than 1 value"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), OPTIONS, ids=[message for _, _, message in OPTIONS])
def test_wrong_options_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- what problems are made of ----


def a_layer():
    return cp.Layer.from_samples(torch.ones(3, 4), torch.eye(4), torch.ones(3))


def merging(**figures):
    return cp.NeuronMerging(**{"incoming": torch.ones(3, 2), "outgoing": torch.ones(1, 3), "keep": 1, **figures})


ONE, ROWS = torch.ones(1), torch.ones(3, 4) > 0
STATED = [
    (lambda: cp.Reconstruction(ROWS, cp.PerRow(1)), T, "the layer is a Tensor; give a Layer"),
    (lambda: cp.Reconstruction(None, cp.PerRow(1)), T, "the layer is a NoneType; give a Layer"),
    (lambda: cp.Reconstruction(nn.Linear(4, 3), cp.PerRow(1)), T, "the layer is a Linear; give a Layer"),
    (lambda: cp.Reconstruction(a_layer(), ROWS), T, r"a tensor is not a pattern: .* Support\(mask\)"),
    (lambda: cp.Reconstruction(a_layer(), cp.PerRow(1), always=[1]), T, "always is a list; give a torch tensor"),
    (lambda: cp.Reconstruction(a_layer(), cp.PerRow(1), importance=[1.0] * 3), T, "importance is a list"),
    (lambda: cp.Reconstruction(a_layer(), cp.PerRow(1), importance=1j * torch.ones(3)), T, "importance is strided"),
    (lambda: cp.OptimalBrainSurgeon(None, ROWS), T, "the layer is a NoneType; give a Layer"),
    (lambda: cp.OptimalBrainSurgeon(a_layer(), [1]), T, "removed is a list; give a torch tensor"),
    (lambda: cp.ErrorBudget([1.0], ONE, ONE, 1.0), T, "gains is a list; give a torch tensor"),
    (lambda: cp.ErrorBudget(ONE, None, ONE, 1.0), T, "sizes is a NoneType; give a torch tensor"),
    (lambda: cp.ErrorBudget(ONE, ONE, ONE, True), T, "goal is True"),
    (lambda: cp.SparsityAllocation(3, 1), T, "curves is 3; give a Curve for each layer"),
    (lambda: cp.SparsityAllocation(["a"], 1), T, r"curves\[0\] is a str; give a Curve"),
    (lambda: cp.SparsityAllocation([curve()], "a"), T, "budget is 'a'"),
    (lambda: merging(incoming=[[1.0]]), T, "incoming is a list; give a torch tensor"),
    (lambda: merging(incoming=np.ones((3, 2))), T, "incoming is a ndarray; give a torch tensor"),
    (lambda: merging(incoming=1j * torch.ones(3, 2)), T, "incoming is strided torch.complex64"),
    (lambda: merging(keep=2.5), T, "keep is 2.5; it must be a whole number from 1 to 3"),
    (lambda: merging(keep=True), T, "keep is True"),
    (lambda: merging(gram=[[1.0]]), T, "gram is a list; give a torch tensor"),
    (lambda: merging(gram=torch.full((2, 2), NAN)), V, "gram holds NaN or inf"),
    (lambda: merging(gram=tensor([[1.0, 0.5], [0.0, 1.0]])), V, "gram is not symmetric"),
    (lambda: cp.Layer.from_moments(torch.ones(3, 2), [[1.0]]), T, "gram is a list; give a torch tensor"),
    (lambda: cp.Layer.from_moments(ONE[None], ONE[None], ONE[None], "a"), T, "energy is 'a'"),
    (lambda: cp.Layer.from_moments(ONE[None], ONE[None], samples=1.5), T, "samples is 1.5"),
    (lambda: cp.Layer.from_samples([[1.0]], ONE[None]), T, "weight is a list; give a torch tensor"),
    (lambda: cp.Layer.from_samples(ONE[None], np.ones((1, 1))), T, "inputs is a ndarray; give a torch tensor"),
    (lambda: cp.Layer.from_samples(ONE[None], ONE[None].to("meta")), T, "inputs is strided torch.float32 on meta"),
    (lambda: cp.Layer.from_samples(ONE[None].to_sparse(), ONE[None]), T, "weight is sparse_coo torch.float32"),
    (lambda: cp.Layer.from_samples(ONE[None], ONE[None], targets=1j * ONE[None]), T, "targets is strided"),
    (lambda: cp.Layer.from_samples(ONE[None], ONE[None], bias=1.0), T, "bias is a float; give a torch tensor"),
    (lambda: cp.Layer.from_samples(ONE[None], ONE[None], name=None), T, "name is None; it must be a string"),
    (lambda: a_layer().damped(torch.ones(2)), T, "damping fraction is tensor"),
    (lambda: a_layer().damped("a"), T, "damping fraction is 'a'"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), STATED, ids=[message for _, _, message in STATED])
def test_wrong_parts_of_a_problem_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- files ----


def content():
    return safetensors.torch.save(dict(model().state_dict()), {"format": "pt", "aliases": "{}"})


def with_metadata(**entries):
    return safetensors.torch.save(dict(model().state_dict()), entries)


def other(network):
    return safetensors.torch.save(dict(network.state_dict()))


FILES = {
    "empty": (lambda: b"", "is no safetensors file"),
    "ten bytes": (lambda: content()[:10], "is no safetensors file"),
    "half": (lambda: content()[: len(content()) // 2], "is no safetensors file"),
    "all but one byte": (lambda: content()[:-1], "is no safetensors file"),
    "one byte more": (lambda: content() + b"a", "is no safetensors file"),
    "zeros": (lambda: bytes(100), "is no safetensors file"),
    "garbage": (lambda: bytes(range(256)), "is no safetensors file"),
    "huge header": (lambda: b"\xff" * 8 + b"abc", "is no safetensors file"),
    "pickle": (lambda: b"\x80\x04K\x03.", "is no safetensors file"),
    "zip": (lambda: b"PK\x03\x04" + bytes(60), "is no safetensors file"),
    "metadata": (lambda: with_metadata(a="{not json"), "metadata entry 'a' is not JSON"),
    "deep metadata": (lambda: with_metadata(a="[" * 100000), "metadata entry 'a' is not JSON"),
    "alias of nothing": (lambda: with_metadata(aliases=json.dumps({"q": "z"})), "name the tensor 'z', which is not in"),
    "alias of itself": (lambda: with_metadata(aliases=json.dumps({"q": "q"})), "name the tensor 'q'"),
    "aliases of lists": (lambda: with_metadata(aliases=json.dumps({"q": ["a"]})), "are no mapping"),
    "aliases as a list": (lambda: with_metadata(aliases="[1]"), "are no mapping"),
    "aliases as a number": (lambda: with_metadata(aliases="3"), "are no mapping"),
    "another model": (lambda: other(normed()), "is not in the model"),
    "another shape": (lambda: other(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))), "in the file and"),
    "another dtype": (lambda: other(model().half()), "torch.float16 in the file and"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), FILES.values(), ids=FILES.keys())
def test_a_wrong_file_is_named_and_the_model_untouched(tmp_path, make, message):
    path, network = tmp_path / "weights", model()
    path.write_bytes(make())
    with pytest.raises(ValueError, match=message) as raised:
        cp.load(network, path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), model().state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("act", [cp.load, cp.save])
@pytest.mark.parametrize(
    ("path", "error"),
    [(None, TypeError), (3, TypeError), (True, TypeError), (b"weights", TypeError), (["a"], TypeError),
     ("", ValueError), ("a\0b", ValueError), (os.devnull, OSError), (".", OSError)],
)  # fmt: skip
def test_a_wrong_path_is_named(act, path, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=r"path is|regular file"):
        act(model(), path)


def test_a_path_that_would_block_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is not a regular file"):
        cp.load(model(), tmp_path / "pipe")


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({1: 2}, TypeError, "metadata is"),
        ([1], TypeError, "metadata is"),
        ("ab", TypeError, "metadata is"),
        ({"a": {1}}, TypeError, r"'a' is \{1\}, which JSON cannot hold"),
        ({"a": torch.ones(2)}, TypeError, "JSON cannot hold"),
        ({"a": NAN}, ValueError, "JSON cannot hold"),
        ({"aliases": 1}, ValueError, "is a key of the file format"),
        ({"format": "x"}, ValueError, "is a key of the file format"),
    ],
)
def test_metadata_that_cannot_be_stored_is_named(tmp_path, metadata, error, message):
    with pytest.raises(error, match=message):
        cp.save(model(), tmp_path / "weights", metadata)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("buffer", [torch.zeros(2, dtype=torch.complex128), torch.eye(3).to_sparse()])
def test_tensors_that_a_file_cannot_hold_are_named(tmp_path, buffer):
    with pytest.raises(TypeError, match="'extra' is torch"):
        cp.save(changed(lambda m: m.register_buffer("extra", buffer)), tmp_path / "weights")


# ---- parts that are not installed, memory, the command line ----


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [
        ("matplotlib", lambda path: cp.prune(model(), [x()], half)[1].save_html(path), "report"),
        ("cvxpy", lambda path: cp.CVXPY("CLARABEL"), "cvxpy"),
        ("cvxpy", lambda path: worst(x(1), method=Exact()), "cvxpy"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, call, extra):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed.*pip install 'convexprune\[{extra}\]'"):
        call(tmp_path / "file")


def test_what_cannot_fit_is_said_before_the_first_pass(monkeypatch):
    calls = []
    network = changed(lambda m: m.register_forward_hook(lambda *_: calls.append(1)))
    monkeypatch.setattr(memory, "available", lambda: 1000)
    for act in (cp.capture, lambda m, b: cp.prune(m, b, half)):
        with pytest.raises(MemoryError, match="layer '2': the Gram matrices of its 8 inputs takes"):
            act(network, [x()])
    assert not calls


def test_rows_that_cannot_be_kept_are_said_before_they_are(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 4000)
    cp.prune(model(), [x(2000)], half)
    with pytest.raises(MemoryError, match="layer '0': keeping the 2000 rows"):
        cp.prune(model(), [x(2000)], lambda layer: cp.NetTrim(layer, 0.1))


def command(*arguments):
    from convexprune.cli import main

    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


def test_the_command_line_refuses_before_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr("convexprune.datasets.train", lambda *_: pytest.fail("it trains"))
    for option in ("--epsilon", "--gamma"):
        for value in ("nan", "inf"):
            done = command(option, value, "--out", tmp_path / "out")
            assert done.exit_code == 2
            assert "is not a finite number" in done.output
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    assert "not a regular file" in command("--out", tmp_path / "out").output


@pytest.mark.parametrize("inside", ["out", "new/folder/out"])
def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch, inside):
    def read_only(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmp")  # root may write anywhere

    monkeypatch.setattr("convexprune.datasets.train", lambda *_: pytest.fail("it trains"))
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    done = command("--out", tmp_path / inside)
    assert done.exit_code == 2
    assert f"{tmp_path / inside}: Permission denied" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "labels", [np.array([-1, 3]), np.array([0, 12]), np.array([0.0, 1.0]), np.array([True, False])]
)
def test_labels_that_are_no_classes_are_named(tmp_path, labels):
    images = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "data.npz", x_train=images, y_train=np.array(labels), x_test=images, y_test=np.array([0, 1]))
    done = command("--data", tmp_path / "data.npz", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "y_train is" in done.output
    assert "expected whole numbers from 0 to 9" in done.output


# ---- what is ordinary works ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
@pytest.mark.parametrize("made", ["before", "inside"])
def test_gradients_that_the_caller_has_switched_off_are_there_where_they_are_needed(mode, made):
    before = model(), pruned(), [x()]

    def results(network, other, batches):
        yield cp.sensitivities(network, batches)["0"]
        yield cp.rate_distortion(network, batches, levels=[0.5, 1.0])[0].distortion
        yield cp.worst_case(network, other, batches[0][:2], 0.1).upper
        yield cp.distill(network, other, batches, epochs=2)[0][0].weight
        yield cp.prune(network, batches, allocation=cp.Allocation(0.5, levels=[0.1, 0.5, 1.0]))[0][2].weight

    wanted = list(results(*before))
    with mode():
        found = list(results(*(before if made == "before" else (model(), pruned(), [x()]))))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert all(each.requires_grad for each in found[-2:])


def half_zero(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.fc.weight[:, :3] = 0
    return other


@pytest.mark.parametrize("inner", [lambda m, z: m.fc(z).relu(), lambda m, z: m.fc(z), lambda m, z: m.fc(z).relu_()])
def test_distill_goes_through_activation_checkpoints(inner):
    from torch.utils.checkpoint import checkpoint

    def through(m, x):
        return m.out(checkpoint(lambda z: inner(m, z), x, use_reentrant=False))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Calls(through).eval()
    plain = Calls(lambda m, x: m.out(inner(m, x))).eval()
    plain.load_state_dict(network.state_dict())
    mine, its = (cp.distill(each, half_zero(each), [x()], epochs=3)[0] for each in (network, plain))
    assert torch.equal(mine.fc.weight, its.fc.weight)
    reentrant = Calls(lambda m, x: m.out(checkpoint(lambda z: m.fc(z).relu(), x, use_reentrant=True))).eval()
    with pytest.raises(ValueError, match="layer 'fc' runs without gradients"):
        cp.distill(reentrant, half_zero(reentrant), [x()], epochs=1)


@pytest.mark.parametrize("again", [lambda m: float(m.fc.weight[0, 0]) == 0, lambda m: float(m.fc.weight[0, 0]) != 0])
def test_distill_names_a_layer_that_is_called_more_often_in_one_network(again):
    network = Calls(lambda m, x: m.out(m.fc(x) + (m.fc(x) if again(m) else 0))).eval()
    with pytest.raises(ValueError, match=r"layer 'fc' is called \d times in the pruned network"):
        cp.distill(network, half_zero(network), [x()], epochs=1)


class Adapted(nn.Module):
    """A layer, and an adapter of rank 2 whose second factor begins at zero."""

    def __init__(self, fc):
        super().__init__()
        self.fc, self.down, self.up = fc, nn.Linear(6, 2, bias=False), nn.Linear(2, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.fc(x) + self.up(self.down(x))


def test_an_adapters_zero_factor_trains_and_pruned_weights_stay_zero():
    dense, network = Adapted(model()[0]), Adapted(copy.deepcopy(pruned()[0]))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"'up.weight' is all zero, and would never train"):
        cp.MaskKeeper(network, optimizer)
    gone = network.fc.weight == 0
    with cp.MaskKeeper(network, optimizer, dense=nn.ModuleDict({"fc": dense.fc})):
        for _ in range(2):
            network(x()).square().sum().backward()
            optimizer.step()
    assert bool((network.fc.weight[gone] == 0).all())
    assert bool((network.up.weight != 0).any())


# ---- compact computes the same function, or leaves the channels ----


def silent(network, *names):
    """The first two neurons of these layers make a constant."""
    with torch.no_grad():
        for name in names:
            network.get_submodule(name).weight[:2] = 0
            network.get_submodule(name).bias[:2] = 0.7
    return network.eval()


class Pooled(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.a, self.pool, self.b = nn.Conv2d(3, 4, 1), pool, nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(self.pool(self.a(x)))


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2, divisor_override=3), nn.AvgPool2d(2), nn.MaxPool2d(2)])
def test_compact_knows_what_a_pool_makes_of_a_constant(pool):
    network, images = silent(Pooled(pool), "a"), torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    small, _ = cp.compact(network)
    torch.testing.assert_close(small(images), network(images))


READS = {
    "weight": lambda m, x: m.out(m.fc(x)) + m.fc.weight.sum(),
    "function": lambda m, x: m.out(m.fc(x)) + nn.functional.linear(x, m.fc.weight)[:, :3],
    "bias": lambda m, x: m.out(m.fc(x)) + m.fc.bias.square().mean(),
    "reader": lambda m, x: m.out(m.fc(x)) * (1 + m.out.weight.square().mean()),
    "reader's bias": lambda m, x: m.out(m.fc(x)) + m.out.bias,
    "norm": lambda m, x: m.out(m.fc(x)) / m.fc.weight.norm(),
}


@pytest.mark.parametrize("forward", READS.values(), ids=READS.keys())
def test_compact_leaves_weights_that_forward_reads_itself(forward):
    network = silent(Calls(forward), "fc")
    small, compaction = cp.compact(network)
    torch.testing.assert_close(small(x()), network(x()))
    assert not compaction.removed


def test_compact_takes_keyword_batches():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.relu, self.out = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)

        def forward(self, first, scale=1.0):
            return self.out(self.relu(self.fc(first * scale)))

    network = Named().eval()
    with torch.no_grad():
        network.fc.bias[:2] = -1e3  # never fires
    for batches in ([{"first": x()}], [{"scale": 2.0, "first": x()}], [x()], [(x(), None)]):
        small, compaction = cp.compact(network, batches=batches)
        assert compaction.removed == {"fc": 2}
        torch.testing.assert_close(small(x()), network(x()))
