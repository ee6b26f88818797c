"""Every kind of layer keeps the same laws, those registered here and those of a user; what is no kind is refused."""

import copy
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import convexprune as cp
from convexprune.bounds.propagation import ByChannel, Frobenius, Spectral, Spread
from convexprune.layer import Layer
from convexprune.network import LinearStack, Stack, load, matrices, read, register_kind, save, write
from convexprune.network.matrices import KINDS, stack_of

MODES = ["parallel", "cascade", "residual"]


class Conv1D(nn.Module):
    """Stands for that of transformers, which is not installed here: same path, same parameters, same formula."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view((*x.size()[:-1], len(self.bias)))


Conv1D.__module__, Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class Windows(nn.Module):
    """A user's kind with groups: y of each window of `span` tokens, channels last, a weight of its own layout."""

    def __init__(self, width, out, span, groups):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(span, groups, width // groups, out // groups))
        self.span, self.groups = span, groups

    def forward(self, x):
        windows = x.unflatten(1, (-1, self.span)).unflatten(-1, (self.groups, -1))  # (n, windows, span, groups, width)
        return torch.einsum("npsgi,sgio->npgo", windows, self.kernel).flatten(2)


class WindowsStack(Stack):
    weight_name, bias_name = "kernel", None

    def __init__(self, module):
        super().__init__(module, module.groups)

    def pack(self, weight):
        return weight.permute(1, 3, 0, 2).flatten(2)

    def unpack(self, matrices):
        span, groups, width, out = self.weight.shape
        return matrices.reshape(groups, out, span, width).permute(2, 0, 3, 1)

    @property
    def unfolding(self):
        return Windows, self.module.span, self.groups

    def items(self, x):
        return x

    def input_rows(self, items):
        windows = items.unflatten(1, (-1, self.module.span)).unflatten(-1, (self.groups, -1))
        return windows.transpose(2, 3).flatten(3)

    def output_rows(self, y):
        return y.unflatten(-1, (self.groups, -1))

    def channel_axis(self, dimensions):
        return dimensions - 1


@pytest.fixture(autouse=True)
def _kinds_as_they_were():
    before = dict(KINDS)
    KINDS[Windows] = WindowsStack
    yield
    KINDS.clear()
    KINDS.update(before)


@dataclass(frozen=True, eq=False)
class Case:
    """A module, an input, and a layer of another kind whose output it can read."""

    module: nn.Module
    x: torch.Tensor
    before: nn.Module


def linear(draw):
    shape = (*draw(st.sampled_from([(5,), (3, 4), (2, 3, 2)])), 4)
    return nn.Linear(4, 6, draw(st.booleans())), torch.randn(shape), nn.Linear(4, 4)


def conv1d_of_transformers(draw):
    return Conv1D(6, 4), torch.randn(*draw(st.sampled_from([(5,), (3, 4)])), 4), nn.Linear(4, 4)


def windows(draw):
    return Windows(4, 6, 2, draw(st.sampled_from([1, 2]))), torch.randn(3, 6, 4), nn.Linear(4, 4)


def convolution(draw, kind, planes):
    groups = draw(st.sampled_from([1, 2, 3]))
    numbers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(planes))  # noqa: E731
    kernel, dilation, padding = numbers(1, 3), numbers(1, 2), draw(st.sampled_from(["some", "same", "valid"]))
    stride = (1,) * planes if padding == "same" else numbers(1, 3)
    padding = numbers(0, 2) if padding == "some" else padding
    mode, bias = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])), draw(st.booleans())
    module = kind(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups, bias, mode)
    x = torch.randn(draw(st.integers(1, 3)), 2 * groups, *numbers(5, 7))
    return module, x, getattr(nn, f"Conv{planes}d")(2 * groups, 2 * groups, 1)


def transposed(draw, kind, planes):
    groups = draw(st.sampled_from([1, 2, 3]))
    numbers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(planes))  # noqa: E731
    kernel, dilation, stride, padding = numbers(1, 3), numbers(1, 2), numbers(1, 3), numbers(0, 2)
    more = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    module = kind(2 * groups, 3 * groups, kernel, stride, padding, more, groups, draw(st.booleans()), dilation)
    size = numbers(4, 6) if planes < 3 else numbers(2, 4)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    made = zip(size, stride, padding, reach, more, strict=True)
    assume(all((n - 1) * s - 2 * p + r + m > 0 for n, s, p, r, m in made))  # torch refuses an output of no pixels
    x = torch.randn(draw(st.integers(1, 3)), 2 * groups, *size)
    return module, x, getattr(nn, f"Conv{planes}d")(2 * groups, 2 * groups, 1)


DRAWN = {
    nn.Linear: linear,
    nn.Conv1d: lambda draw: convolution(draw, nn.Conv1d, 1),
    nn.Conv2d: lambda draw: convolution(draw, nn.Conv2d, 2),
    nn.Conv3d: lambda draw: convolution(draw, nn.Conv3d, 3),
    nn.ConvTranspose1d: lambda draw: transposed(draw, nn.ConvTranspose1d, 1),
    nn.ConvTranspose2d: lambda draw: transposed(draw, nn.ConvTranspose2d, 2),
    nn.ConvTranspose3d: lambda draw: transposed(draw, nn.ConvTranspose3d, 3),
    "transformers.pytorch_utils.Conv1D": conv1d_of_transformers,
    Windows: windows,
}
BOUNDED = [kind for kind in DRAWN if kind is not Windows]
for_every_kind = pytest.mark.parametrize("kind", DRAWN, ids=str)


@st.composite
def cases(draw, kind):
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 10**6)))
        module, x, before = DRAWN[kind](draw)
        return Case(module.double(), x.double(), before.double())


def test_no_kind_is_without_its_laws():
    assert list(DRAWN) == list(KINDS)
    assert matrices.kind_names().startswith("Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.detach().abs().max().clamp(min=1)))


@for_every_kind
@settings(max_examples=25)
@given(st.data())
def test_the_rows_times_the_matrices_are_the_output(kind, data):
    case = data.draw(cases(kind))
    stack, y = stack_of(case.module), case.module(case.x).detach()
    rows, made = stack.input_rows(stack.items(case.x)), stack.output_rows(y)
    found = torch.einsum("npgi,goi->npgo", rows, stack.weights())
    close(found if stack.biases() is None else found + stack.biases(), made)
    assert (stack.width, stack.outputs) == (rows.shape[-1], made.shape[2] * made.shape[3])
    axis = stack.channel_axis(y.ndim)
    assert y.shape[axis] == stack.outputs
    assert torch.equal(y.movedim(axis, -1).reshape(-1, stack.outputs), made.flatten(2).flatten(0, 1))
    assert math.prod(stack.sample_shape(y)) == len(made) * made.shape[1]
    weight = stack.weight.detach()
    assert torch.equal(stack.unpack(stack.pack(weight)), weight)
    assert torch.equal(stack.pack(stack.unpack(stack.weights())), stack.weights())


@pytest.mark.parametrize("kind", [kind for kind in DRAWN if isinstance(kind, type) and kind is not Windows], ids=str)
@settings(max_examples=10)
@given(st.data())
def test_a_single_sample_is_a_batch_of_one(kind, data):
    case = data.draw(cases(kind))
    stack, one = stack_of(case.module), case.x[0]
    y = case.module(one).detach()
    if y.ndim < 2 or kind is nn.Linear:
        return
    assert stack.channel_axis(y.ndim) == 0
    rows = torch.einsum("npgi,goi->npgo", stack.input_rows(stack.items(one)), stack.weights())
    close(rows if stack.biases() is None else rows + stack.biases(), stack.output_rows(y))


@for_every_kind
@settings(max_examples=10)
@given(st.data())
def test_capture_takes_the_moments_of_the_rows_and_says_where_a_layer_is(kind, data):
    case = data.draw(cases(kind))
    model, stack = nn.Sequential(case.module), stack_of(case.module)
    rows = stack.input_rows(stack.items(case.x)).flatten(0, 1)
    layers = cp.capture(model, [case.x], keep_inputs=True)
    assert [layer.name for layer in layers] == stack.names("0")
    for layer in layers:
        write(model, layer.name, torch.zeros_like(layer.affine_weight))
        assert int((layer.weight != 0).sum()) == layer.weight.numel()  # a copy of what was there
    for group, layer in enumerate(layers):
        assert (layer.module, layer.group, layer.groups, layer.kernel) == ("0", group, stack.groups, stack.kernel)
        assert torch.equal(layer.inputs, rows[:, group])
        same = Layer.from_samples(layer.weight, layer.inputs, layer.bias, layer.activation)
        for key in ("gram", "cross", "energies", "mean", "target_mean"):
            if getattr(same, key) is not None:
                close(getattr(layer, key), getattr(same, key))


@for_every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=5)
@given(st.data())
def test_what_was_read_is_written_back_bit_for_bit(kind, dtype, data):
    module = data.draw(cases(kind)).module.to(dtype)
    model = nn.Sequential(module, nn.ReLU())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in stack_of(module).names("0"):
        own = read(model, name)
        write(model, name, own)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        write(model, name, own.flip(0) / 3)
        assert torch.equal(read(model, name), (own.flip(0) / 3).to(dtype).double())
        write(model, name, own)


@for_every_kind
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=3)
@given(st.data())
def test_the_certified_error_of_one_layer_is_what_its_output_changes_by(kind, mode, data):
    case = data.draw(cases(kind))
    model, outputs = nn.Sequential(case.module), case.module(case.x).numel() // stack_of(case.module).outputs
    build = lambda layer: cp.Reconstruction(layer, cp.PerRow(0.5))  # noqa: E731
    pruned, report = cp.prune(model, [case.x], build, cp.Magnitude(), mode)
    assert all(row.certificate.violation == 0 and row.module == "0" for row in report.rows)
    certified = outputs * sum(row.certificate.value for row in report.rows)
    assert float((pruned(case.x) - model(case.x)).detach().square().sum()) == pytest.approx(
        certified, rel=1e-6, abs=1e-12
    )


@for_every_kind
@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=4)
@given(st.data())
def test_a_network_with_it_is_pruned_and_its_bound_holds_or_is_refused_by_name(kind, mode, data):
    case = data.draw(cases(kind))
    y = case.module(case.before(case.x))
    planes = getattr(stack_of(case.module), "planes", 0)
    pool = getattr(nn, f"AdaptiveAvgPool{planes}d")(1) if planes else nn.Identity()
    head = nn.Linear(y.shape[1] if planes else y.flatten(1).shape[1], 3).double()
    model = nn.Sequential(case.before, nn.ReLU(), case.module, nn.ReLU(), pool, nn.Flatten(), head)
    names = [name for name, module in model.named_modules() if stack_of(module) is not None and name != "2"]
    for chosen in (None, names):  # judged, and passed through
        build = lambda layer: cp.Reconstruction(layer, cp.PerRow(0.5))  # noqa: E731
        _, report = cp.prune(model, [case.x], build, cp.Magnitude(), mode, names=chosen)
        network = report.network
        repeats = getattr(case.module, "padding_mode", "zeros") != "zeros"
        if kind is not Windows and not repeats:
            assert network.guaranteed is not None, network.reason
        if network.guaranteed is None:
            assert network.reason == f"2 ({type(case.module).__name__}): no gain is known of this layer"
        else:
            assert network.measured <= network.guaranteed * (1 + 1e-9)


@pytest.mark.parametrize("kind", BOUNDED, ids=str)
@settings(max_examples=15)
@given(st.data())
def test_the_operator_bounds_what_the_module_does_to_a_change(kind, data):
    case = data.draw(cases(kind))
    stack = stack_of(case.module)
    operator = stack.operator(case.x.shape)
    if operator is None:
        assert case.module.padding_mode != "zeros"
        return
    change = torch.randn(case.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = (case.module(case.x + change) - case.module(case.x)).detach()
    channels = stack.channel_axis(change.ndim)
    columns, truth = (each.movedim(channels, -1).flatten(0, -2) for each in (change, result))
    before = Spread.of(columns.T @ columns)
    for rule in (ByChannel(), Spectral(), Frobenius()):
        spread = rule.through(operator, before)
        assert float(truth.norm()) <= spread.total * (1 + 1e-9)
        if spread.channels is not None:
            assert bool((truth.norm(dim=0) <= spread.channels * (1 + 1e-9)).all())
        if spread.gram is not None:
            least = torch.linalg.eigvalsh(spread.gram - truth.T @ truth)[0]
            assert float(least) >= -1e-9 * float(spread.gram.trace())


@pytest.mark.parametrize("kind", BOUNDED, ids=str)
@settings(max_examples=4)
@given(st.data())
def test_the_gain_is_above_the_norm_of_the_modules_jacobian(kind, data):
    case = data.draw(cases(kind))
    operator = stack_of(case.module).operator(case.x[:1].shape)
    if operator is not None:
        jacobian = torch.autograd.functional.jacobian(case.module, case.x[:1]).reshape(-1, case.x[:1].numel())
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= operator.spectral


# ---- a user's kind ----


def user_network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Windows(4, 6, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3))
    return model, [torch.randn(8, 6, 4) for _ in range(2)]


@pytest.mark.parametrize("mode", MODES)
def test_a_users_kind_goes_through_prune_save_and_load(tmp_path, mode):
    model, batches = user_network()
    state = copy.deepcopy(model.state_dict())
    pruned, report = cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)), mode=mode)
    assert [row.name for row in report.rows] == ["0", "2", "5"]
    assert int((pruned[2].kernel != 0).sum()) == pruned[2].kernel.numel() // 2
    assert report.network.reason == ("" if mode != "parallel" else "2 (Windows): no gain is known of this layer")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    again = cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)), names="2")[1]
    assert [row.module for row in cp.report.Report.from_json(again.to_json()).rows] == ["2"]
    save(pruned, tmp_path / "pruned.safetensors")
    other, _ = user_network(1)
    load(other, tmp_path / "pruned.safetensors")
    assert all(torch.equal(value, pruned.state_dict()[key]) for key, value in other.state_dict().items())


def test_a_users_kind_elsewhere_in_the_house():
    model, batches = user_network()
    found = cp.sensitivities(model, batches)
    assert {name: len(each) for name, each in found.items()} == {"0": 4, "2[0]": 3, "2[1]": 3, "5": 3}
    pruned, report = cp.prune(model, batches, allocation=cp.Allocation(0.5))
    assert report.kept <= 0.5 * report.total
    student, _ = cp.distill(model, pruned, batches, epochs=1)
    assert torch.equal(student[2].kernel == 0, pruned[2].kernel == 0)
    keeper = cp.MaskKeeper(pruned, torch.optim.SGD(pruned.parameters(), 0.1))
    keeper.close()
    _, done = cp.compact(model)
    assert done.left == ("2 is a Windows, a kind whose channels are not followed",)
    with pytest.raises(ValueError, match=r"no layer can merge: .*; 2 is a Windows"):
        cp.merge(model)
    with pytest.raises(ValueError, match=r"no bound: 2 \(Windows\): no gain is known"):
        cp.prune_within(model, batches, 0.1)
    alone = nn.Sequential(Windows(4, 6, 2, 2), nn.Flatten())
    with pytest.raises(ValueError, match=r"0 \(Windows\) is not covered"):
        cp.worst_case(alone, alone, batches[0], 0.1)


def test_a_kind_that_is_a_matrix_has_every_bound():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(5, 4), nn.ReLU(), Conv1D(3, 5))
    x = torch.randn(6, 4)
    _, report = cp.prune_within(model, [x], 0.5)
    assert report.network.measured <= report.network.guaranteed <= report.network.wanted
    twin = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    for mine, its in ((model[0], twin[0]), (model[2], twin[2])):
        its.weight, its.bias = nn.Parameter(mine.weight.T.clone()), mine.bias
    theirs = cp.worst_case(twin, twin, x, 0.1)
    close(cp.worst_case(model, model, x, 0.1).upper.double(), theirs.upper.double())


def test_layers_of_two_kinds_that_read_a_tensor_alike_share_its_gram():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), Conv1D(3, 4)

        def forward(self, x):
            return self.a(x) + self.b(x)

    a, b = cp.capture(Both(), [torch.randn(5, 4)])
    assert a.gram is b.gram


# ---- what is a kind, and what is none ----


class Mine(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class MineStack(LinearStack):
    def pack(self, weight):
        return 2 * weight[None]

    def unpack(self, matrices):
        return matrices[0] / 2

    def biases(self):
        return None if self.bias is None else 2 * self.bias.detach()[None]


def test_a_subclass_with_a_forward_of_its_own_is_another_kind():
    class Renamed(Mine):
        pass

    class Other(Conv1D):
        def forward(self, x):
            return super().forward(x) + 1

    assert stack_of(Mine(4, 3)) is None
    assert stack_of(Other(3, 4)) is None
    assert type(stack_of(type("Same", (nn.Linear,), {})(4, 3))) is LinearStack
    register_kind(Mine, MineStack)
    assert type(stack_of(Mine(4, 3))) is type(stack_of(Renamed(4, 3))) is MineStack
    assert type(stack_of(nn.Linear(4, 3))) is LinearStack
    module, x = Mine(4, 3).double(), torch.randn(6, 4).double()
    (layer,) = cp.capture(nn.Sequential(module), [x], keep_inputs=True)
    close(layer.affine_inputs @ layer.affine_weight.T, module(x).detach())


def test_a_kind_by_its_path_needs_no_import():
    code = "import sys, convexprune, torch; convexprune.capture(torch.nn.Sequential(torch.nn.Linear(2, 2)), "
    code += "[torch.ones(2, 2)]); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
    register_kind("another.package.Mine", MineStack)
    assert stack_of(Mine(4, 3)) is None
    Mine.__module__, known = "another.package", Mine.__module__
    try:
        assert type(stack_of(Mine(4, 3))) is MineStack
    finally:
        Mine.__module__ = known


class Abstract(Stack):
    def pack(self, weight):
        return weight


@pytest.mark.parametrize(
    ("module_class", "stack_class", "error", "message"),
    [
        (nn.Linear(2, 2), LinearStack, TypeError, r"module_class is Linear\(.*give a subclass of nn.Module"),
        (int, LinearStack, TypeError, "module_class is <class 'int'>"),
        (None, LinearStack, TypeError, "module_class is None"),
        ("Mine", LinearStack, ValueError, "'Mine'; give a class, or its path as 'package.module.Class'"),
        ("", LinearStack, ValueError, "''; give a class"),
        ("a..b", LinearStack, ValueError, r"'a\.\.b'; give a class"),
        (Mine, nn.Linear, TypeError, "stack_class is <class 'torch.nn.*give a subclass of convexprune.network.Stack"),
        (Mine, LinearStack(nn.Linear(2, 2)), TypeError, "give a subclass of convexprune.network.Stack"),
        (Mine, Abstract, TypeError, "Abstract, which lacks channel_axis, input_rows, items, output_rows, unfolding"),
        (nn.Linear, MineStack, ValueError, "Linear is a kind of layer already, by LinearStack"),
        ("torch.nn.modules.conv.Conv2d", LinearStack, ValueError, "already, by ConvolutionStack"),
        ("transformers.pytorch_utils.Conv1D", LinearStack, ValueError, "already, by Conv1DStack"),
        (Conv1D, LinearStack, ValueError, r"transformers\.pytorch_utils\.Conv1D is a kind of layer already"),
    ],
)
def test_what_cannot_be_a_kind_is_refused(module_class, stack_class, error, message):
    before = dict(KINDS)
    with pytest.raises(error, match=message):
        register_kind(module_class, stack_class)
    assert before == KINDS


def test_errors_list_the_kinds_of_now():
    register_kind(Mine, MineStack)
    with pytest.raises(
        ValueError, match=r"'0' is a ReLU, not one of Linear, .*transformers\.pytorch_utils\.Conv1D, .*Mine"
    ):
        cp.capture(nn.Sequential(nn.ReLU()), [torch.ones(2)], "0")


def test_a_stack_that_names_no_parameter_is_refused():
    class Misnamed(LinearStack):
        bias_name = "shift"

    register_kind(Mine, Misnamed)
    with pytest.raises(ValueError, match="layer '0': a Mine has no 'shift'; set weight_name or bias_name of Misnamed"):
        cp.capture(nn.Sequential(Mine(4, 3)), [torch.ones(2, 4)])


# ---- names with brackets ----


class Bracketed(nn.Module):
    """Modules whose names look like those of groups."""

    def __init__(self, twice=False):
        super().__init__()
        self.add_module("conv", nn.Conv1d(4, 4, 1, groups=2))
        self.add_module("conv[1]" if twice else "conv[7]", nn.Conv1d(4, 4, 1))
        self.add_module("fc[0]", nn.Linear(4, 4))
        self.add_module("fc[1]", nn.Linear(4, 4))
        self.add_module("[", nn.Conv1d(4, 4, 1, groups=4))
        self.add_module("conv[0]x", nn.ReLU())

    def forward(self, x):
        for name in list(self._modules)[:2]:
            x = F.relu(self.get_submodule(name)(x))
        x = self.get_submodule("conv[0]x")(self.get_submodule("[")(x)).mean(-1)
        return self.get_submodule("fc[1]")(F.relu(self.get_submodule("fc[0]")(x)))


@pytest.mark.parametrize("mode", MODES)
def test_modules_may_have_brackets_in_their_names(mode):
    torch.manual_seed(0)
    model, x = Bracketed().double(), torch.randn(9, 4, 5).double()
    build = lambda layer: cp.Reconstruction(layer, cp.PerRow(0.5))  # noqa: E731
    pruned, report = cp.prune(model, [x], build, mode=mode)
    groups = ["conv[0]", "conv[1]", "conv[7]", *(f"[[{group}]" for group in range(4)), "fc[0]", "fc[1]"]
    assert [row.name for row in report.rows] == ["conv", "conv[7]", "[", "fc[0]", "fc[1]"]
    assert report.network.measured <= report.network.guaranteed
    assert all(int((weight != 0).sum()) < weight.numel() for key, weight in pruned.named_parameters() if "weight" in key
               and not key.startswith("[."))  # fmt: skip
    for name in groups:
        assert [layer.name for layer in cp.capture(model, [x], name)] == [name]
        write(model, name, read(pruned, name))
    torch.testing.assert_close(model(x), pruned(x))


def test_a_name_of_two_layers_is_refused():
    model, x = Bracketed(twice=True), torch.randn(9, 4, 5)
    message = r"'conv\[1\]' is the name of a layer of 'conv' and of 'conv\[1\]'; rename one of these modules"
    for call in (
        lambda: cp.capture(model, [x]),
        lambda: cp.capture(model, [x], "conv[1]"),
        lambda: read(model, "conv[1]"),
        lambda: cp.prune(model, [x], lambda layer: None),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert [layer.name for layer in cp.capture(model, [x], ["conv[0]", "fc[0]"])] == ["conv[0]", "fc[0]"]


def test_a_layer_that_was_not_captured_is_its_own_module():
    layer = Layer.from_samples(torch.ones(2, 3), torch.ones(4, 3), name="conv[1]")
    assert (layer.module, layer.group, layer.groups) == ("conv[1]", 0, 1)
    assert layer.damped(0.1).module == "conv[1]"
    with pytest.raises(ValueError, match=r"layer 'conv\[1\]': group is 2, of 2 groups"):
        Layer.from_moments(torch.ones(2, 3), torch.eye(3), name="conv[1]").__class__(
            **{**vars(layer), "group": 2, "groups": 2}
        )


# ---- what the rows do not say ----


def test_an_output_size_of_its_own_is_refused():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.ConvTranspose1d(2, 3, 3, stride=2) for _ in range(2))

        def forward(self, x):
            return self.a(x).sum() + self.b(x, output_size=[2 * x.shape[-1] + 2]).sum()

    x = torch.randn(4, 2, 5)
    assert [layer.name for layer in cp.capture(Sized(), [x], "a")] == ["a"]
    for names in (None, "b"):
        with pytest.raises(ValueError, match=r"layer 'b', a ConvTranspose1d, makes \d+ samples of outputs"):
            cp.capture(Sized(), [x], names)


class Forgetful(MineStack):
    def biases(self):
        return None if self.bias is None else 0 * self.bias.detach()[None]


class Turned(LinearStack):
    def pack(self, weight):
        return weight.T[None]

    def unpack(self, matrices):
        return matrices[0].T


def hooked(module):
    module.register_forward_hook(lambda module, args, y: y + 1)
    return module


def own_forward(module):
    module.forward = lambda x: F.linear(x, module.weight)
    return module


@pytest.mark.parametrize(
    ("make", "stack_class"),
    [
        (lambda: Mine(4, 4), LinearStack),
        (lambda: Mine(4, 4), Forgetful),
        (lambda: Mine(4, 4, bias=False), Turned),
        (lambda: hooked(nn.Linear(4, 4)), None),
        (lambda: hooked(nn.Conv2d(1, 2, 2)), None),
        (lambda: own_forward(nn.Linear(4, 4)), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_module_that_does_not_compute_what_its_stack_says_is_refused(make, stack_class, dtype):
    if stack_class is not None:
        register_kind(Mine, stack_class)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), make(), nn.ReLU()).to(dtype)
    kind = type(model[1]).__name__
    x = torch.randn(5, 4, 4) if kind == "Conv2d" else torch.randn(5, 4)
    with pytest.raises(ValueError, match=rf"layer '1', a {kind}, does not compute W x \+ b; leave it out of `names`"):
        cp.capture(model, [x.to(dtype)])


def test_a_kind_may_be_called_by_any_keyword_and_returns_a_tensor():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Conv1D(3, 4)

        def forward(self, x):
            return self.fc(x=x)

    class Pair(Mine):
        def forward(self, x):
            return super().forward(x), None

    assert [layer.name for layer in cp.capture(Named(), [torch.ones(2, 4)])] == ["fc"]
    register_kind(Pair, MineStack)
    with pytest.raises(TypeError, match="layer '0': a Pair that returns a tuple is no layer; leave it out of `names`"):
        cp.capture(nn.Sequential(Pair(4, 3)), [torch.ones(2, 4)])
