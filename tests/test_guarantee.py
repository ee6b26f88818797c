"""The network's guaranteed error along its graph: never below the measured one, and silent where it cannot be known."""

from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import convexprune as cp
from convexprune.bounds.gains import ConvolutionOperator, LinearOperator
from convexprune.bounds.pooling import Windows, average_pool_gain, max_pool_gain
from convexprune.bounds.propagation import ByChannel, Frobenius, Spectral, Spread
from convexprune.certify.side_by_side import _Sums
from convexprune.solution import Attempt


@dataclass(frozen=True)
class Noise:
    """Moves every weight a little, and drops some."""

    size: float = 0.1

    def solve(self, problem, start=None):
        generator = torch.Generator().manual_seed(int(problem.dense.abs().sum() * 1e6) % 2**31)
        shake = torch.randn(problem.shape, generator=generator, dtype=torch.float64)
        return Attempt(problem.dense + self.size * problem.dense.std() * shake, None, cp.Status.CONVERGED, 1)


class Net(nn.Module):
    """Convolutions of several kinds, norms, pools, a residual sum and a head."""

    def __init__(self, stride, dilation, groups, pool):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, stride=stride), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same", dilation=dilation, groups=groups, bias=False)
        self.bn2, self.pool, self.head = nn.BatchNorm2d(8), pool, nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)), inplace=True)
        return torch.sigmoid(self.head(self.pool(x).mean((2, 3))))


def random_net(seed, stride, dilation, groups, pool):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(stride, dilation, groups, pool).eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.running_var, 0.2, 2)
        return net, list(torch.randn(2, 4, 3, 9, 8))


@settings(max_examples=25)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 4]),
    st.sampled_from([nn.Identity(), nn.MaxPool2d(3, 2), nn.AvgPool2d(2), nn.AvgPool2d(3, 1)]),
    st.sampled_from(["parallel", "cascade", "residual"]), st.sampled_from([None, ["conv2", "head"], ["conv1"]]),
)  # fmt: skip
def test_measured_is_never_above_guaranteed(seed, stride, dilation, groups, pool, mode, names):
    net, batches = random_net(seed, stride, dilation, groups, pool)
    build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(1.0))  # noqa: E731
    _, report = cp.prune(net, batches, build, Noise(), mode, names=names)
    assert report.network.guaranteed is not None, report.network.reason
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-5)


@settings(max_examples=40)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2),
    st.integers(1, 2),
)  # fmt: skip
def test_the_gain_of_a_convolution_is_above_its_norm_and_near_it(seed, out, kernel, dilation, padding, stride):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, 3, kernel, kernel, generator=generator, dtype=torch.float64)
    size = 9
    columns = []
    for index in range(3 * size * size):
        x = torch.zeros(3 * size * size, dtype=torch.float64)
        x[index] = 1
        x = x.reshape(1, 3, size, size)
        columns.append(F.conv2d(x, weight, padding=padding, dilation=dilation, stride=stride).flatten())
    norm = float(torch.linalg.matrix_norm(torch.stack(columns), 2))
    gain = ConvolutionOperator(weight, (size + 2 * padding,) * 2, (dilation,) * 2).spectral
    assert norm <= gain
    if stride == 1:
        assert gain <= 2 * norm


def test_gains_of_groups_and_pools():
    torch.manual_seed(0)
    weight = torch.randn(4, 1, 3)
    each = max(ConvolutionOperator(weight[i : i + 1], (10,), (1,)).spectral for i in range(4))
    assert ConvolutionOperator(weight, (10,), (1,), 4).spectral == pytest.approx(each)
    assert max_pool_gain([Windows.sliding(8, 4, 2, 2, 0)] * 2) == 1
    assert max_pool_gain([Windows.sliding(9, 4, 3, 2, 0)] * 2) == 2
    assert max_pool_gain([Windows.sliding(9, 3, 3, 2, 0, 2)]) == pytest.approx(3**0.5)
    assert average_pool_gain([Windows.sliding(8, 4, 2, 2, 0)] * 2) == pytest.approx(0.5)
    matrix = torch.randn(5, 7)
    assert LinearOperator(matrix).spectral == pytest.approx(float(torch.linalg.matrix_norm(matrix.double(), 2)))
    with pytest.raises(ValueError, match="must hold the dilated kernel"):
        ConvolutionOperator(weight, (2,), (1,))


@settings(max_examples=60)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 2]), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_every_rule_is_above_what_an_operator_does(seed, groups, kernel, stride, padding, with_channels, with_gram):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 4 // groups, kernel, kernel, generator=generator, dtype=torch.float64)
    weight *= torch.rand(weight.shape, generator=generator) < 0.4
    # few samples, correlated channels, some of them silent
    change = torch.randn(3, 2, 7, 7, generator=generator, dtype=torch.float64)
    change = torch.einsum("cd,ndhw->nchw", torch.randn(4, 2, generator=generator, dtype=torch.float64), change)
    change[:, seed % 4] = 0
    made = F.conv2d(change, weight, stride=stride, padding=padding, groups=groups)
    columns, result = (each.movedim(1, -1).reshape(-1, each.shape[1]) for each in (change, made))
    full = Spread.of(columns.T @ columns)
    before = Spread(full.total, full.channels if with_channels else None, full.gram if with_gram else None)
    operator = ConvolutionOperator(weight, (7 + 2 * padding,) * 2, (1, 1), groups)
    scale = torch.randn(6, generator=generator, dtype=torch.float64)
    totals = []
    for rule in (ByChannel(), Spectral(), Frobenius()):
        for spread, truth in (
            (rule.through(operator, before), result),
            (rule.scaled(scale, rule.through(operator, before)), result * scale),
            (rule.through(operator.scaled(scale), before), result * scale),
        ):
            assert float(truth.norm()) <= spread.total * (1 + 1e-9)
            if spread.channels is not None:
                assert bool((truth.norm(dim=0) <= spread.channels * (1 + 1e-9)).all())
            if spread.gram is not None:
                rest = torch.linalg.eigvalsh(spread.gram - truth.T @ truth)
                assert float(rest[0]) >= -1e-9 * float(rest[-1].clamp(min=1e-300)) - 1e-9
        totals.append(rule.through(operator, before).total)
    assert totals == sorted(totals)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.05, 20))
def test_sums_of_changes(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    two = two * factor
    found = Spread.of(one.T @ one).plus(Spread.of(two.T @ two))
    total = one + two
    assert float(total.norm()) <= found.total * (1 + 1e-12)
    assert bool((total.norm(dim=0) <= found.channels * (1 + 1e-12)).all())
    assert float(torch.linalg.eigvalsh(found.gram - total.T @ total)[0]) >= -1e-9 * float(found.gram.trace())


def changes(seed, width):
    """Bounds of random norms over many scales, and those of a tensor that was seen."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(2, width, generator=generator) * 4).exp2().double()
    return (Spread.of_squares(each.square(), 3) for each in (one, two))


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.integers(1, 9))
def test_norms_and_what_is_above_them_are_rounded_up(seed, runs, each):
    known, seen = changes(seed, runs * each)
    exact = [Fraction(value) ** 2 for value in known.channels.tolist()]
    parts = [sum(exact[run * each : (run + 1) * each]) for run in range(runs)]
    found = known.grouped(runs, gram=True)
    assert Fraction(known.total) ** 2 >= sum(exact)
    norms = [Fraction(value) for value in found.channels.tolist()]
    assert all(norm**2 >= part for norm, part in zip(norms, parts, strict=True))
    diagonal = found.gram.diagonal().tolist()
    assert all(Fraction(value) >= norm * sum(norms) for value, norm in zip(diagonal, norms, strict=True))
    over = seen.excess(known)
    assert Fraction(known.total) + Fraction(over.total) >= Fraction(seen.total)
    for extra, bound, norm in zip(*(part.channels.tolist() for part in (over, known, seen)), strict=True):
        assert Fraction(bound) + Fraction(extra) >= Fraction(norm)
    wide = known.widened(over)
    for channel, bound, extra in zip(*(part.channels.tolist() for part in (wide, known, over)), strict=True):
        assert Fraction(channel) >= Fraction(bound) + Fraction(extra)
    assert Fraction(wide.total) ** 2 >= sum(Fraction(value) ** 2 for value in seen.channels.tolist())


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 4))
def test_sums_over_batches_are_rounded_up(seed, samples, batches):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(samples, 2, generator=generator, dtype=torch.float64) for _ in range(batches)]
    sums, whole = _Sums(), _Sums()
    for part in parts:
        sums.add(part.square().sum(0), len(part))
        whole.add(part.T @ part, len(part))
    rows = [[Fraction(value) for value in row] for part in parts for row in part.tolist()]
    (a, b), (_, d) = [[sum(row[i] * row[j] for row in rows) for j in range(2)] for i in range(2)]
    for found in (sums.spread(), whole.spread()):
        assert Fraction(found.total) ** 2 >= a + d
        assert all(Fraction(norm) ** 2 >= true for norm, true in zip(found.channels.tolist(), (a, d), strict=True))
        assert found.total <= (1 + 1e-11) * float(torch.cat(parts).norm())
    (e, f), (_, h) = [[Fraction(value) for value in row] for row in whole.spread().gram.tolist()]
    assert e >= a
    assert (e - a) * (h - d) >= (f - b) ** 2


class Shortcut(nn.Module):
    """A shortcut by slices and zero channels, and a flatten of maps into the head."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6 * 16, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.norm(self.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        return self.head(F.relu(y).flatten(1) + 1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", ["parallel", "cascade", "residual"])
def test_channels_go_through_slices_zero_channels_and_flattening(seed, mode):
    torch.manual_seed(seed)
    net, batches = Shortcut().eval().double(), [torch.randn(6, 2, 8, 8).double() for _ in range(2)]
    build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.3))  # noqa: E731
    _, report = cp.prune(net, batches, build, mode=mode)
    rules = report.network.rules
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-5) + 1e-12
    assert report.network.guaranteed <= 0.999 * rules["spectral"] or mode != "parallel"


class Blocks(nn.Module):
    """Residual blocks, the first with a layer on its shortcut, which runs before or after the other branch."""

    def __init__(self, late, faint):
        super().__init__()
        self.late = late
        self.stem, self.a, self.b = (nn.Conv2d(w, 6, 3, padding=1, bias=False) for w in (3, 6, 6))
        self.c, self.d = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.side, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.norm, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.weight, -2, 2)
            norm.weight.data[:2] *= 1e-5 if faint else 1.0

    def forward(self, x):
        x = F.relu(self.stem(x))
        short = x if self.late else self.side(x)
        y = self.norm(self.b(F.relu(self.a(x))))
        short = self.side(x) if self.late else short
        short = F.relu(short) if self.late == "rectified" else short
        x = F.relu(y + short)
        return self.head(F.relu(x + self.norm2(self.d(F.relu(self.c(x))))).mean((2, 3)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("late", ["", "late"])
@pytest.mark.parametrize("faint", [False, True])
@pytest.mark.parametrize("names", [None, ["a", "b", "c", "d"], ["side", "b", "d"], ["stem", "c"]])
def test_a_repaired_sum_is_charged_the_repairing_layer_alone(seed, late, faint, names):
    torch.manual_seed(seed)
    net, batches = Blocks(late, faint).eval().double(), [torch.randn(5, 3, 6, 6).double() for _ in range(2)]
    build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5))  # noqa: E731
    _, residual = cp.prune(net, batches, build, cp.Magnitude(), mode="residual", names=names)
    if faint and residual.network.guaranteed is None:
        assert "leaves out channels that its norm switches off" in residual.network.reason
        assert names is None or "side" in names
        return
    assert residual.network.guaranteed is not None, residual.network.reason
    for total in residual.network.rules.values():
        assert residual.network.measured <= total * (1 + 1e-9) + 1e-9
    for link in residual.network.layers:
        assert link.measured <= link.guaranteed * (1 + 1e-9) + 1e-9
    repairing = {row.name for row in residual.rows if row.repairs}
    assert repairing <= {"b", "d", "side"}
    assert {link.name for link in residual.network.layers}.isdisjoint(repairing)
    if names == ["a", "b", "c", "d"] and not faint:
        _, cascade = cp.prune(net, batches, build, cp.Magnitude(), mode="cascade", names=names)
        assert residual.network.guaranteed < cascade.network.guaranteed


def test_a_branch_that_is_pruned_after_its_repair_has_no_bound():
    torch.manual_seed(0)
    net, batches = Blocks("rectified", False).eval(), [torch.randn(5, 3, 6, 6)]
    build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5))  # noqa: E731
    names = ["stem", "a", "b", "side", "c", "d"]
    _, report = cp.prune(net, batches, build, cp.Magnitude(), mode="residual", names=names)
    assert report.network.guaranteed is None
    assert "a branch was pruned after b, which was to repair it" in report.network.reason
    _, report = cp.prune(net, batches, build, cp.Magnitude(), mode="residual")  # the head is judged behind it
    assert report.network.measured <= report.network.guaranteed


class Shifted:
    """The dense layer and 0.5 on every weight."""

    def solve(self, problem, start=None):
        return Attempt(problem.dense + 0.5, None, cp.Status.CONVERGED, 1)


SPIKE = F.one_hot(torch.tensor([[10]]), 21).float()  # (1, 1, 21)


@pytest.mark.parametrize(
    ("pool", "batches"),
    [
        (nn.MaxPool1d(3, 2, dilation=2), [SPIKE]),
        (nn.AvgPool1d(4, 4, ceil_mode=True), [SPIKE[:, :, 6:11]]),
        (nn.AvgPool1d(4, 4, padding=2, count_include_pad=False), [SPIKE[:, :, 10:14] + 1]),
        (nn.AvgPool1d(3, 2), [SPIKE]),
        (nn.AdaptiveAvgPool1d(1), [SPIKE, SPIKE.repeat(3, 1, 1)]),
        (nn.AdaptiveAvgPool1d(7), [SPIKE, torch.ones(1, 1, 21)]),
        (nn.AdaptiveAvgPool1d(21), [SPIKE]),
    ],
)
def test_pools_that_count_entries_twice_or_divide_by_fewer(pool, batches):
    net = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False), pool).eval()
    net[0].weight.data.fill_(1.0)
    _, report = cp.prune(net, batches, lambda layer: cp.L1Reconstruction(layer, 1e-3), Shifted())
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-6)


def test_batches_of_several_shapes_have_no_bound():
    net = nn.Sequential(nn.Conv1d(1, 1, 1), nn.AdaptiveAvgPool1d(1)).eval()
    batches = [torch.randn(1, 1, 50), torch.randn(9, 1, 2)]
    _, report = cp.prune(net, batches, lambda layer: cp.L1Reconstruction(layer, 1e-3), Shifted())
    assert report.network.guaranteed is None
    assert "samples of several shapes" in report.network.reason
    override = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2, divisor_override=1)).eval()
    _, report = cp.prune(override, [torch.randn(2, 1, 4, 4)], lambda layer: cp.L1Reconstruction(layer, 1e-3), Shifted())
    assert report.network.measured <= report.network.guaranteed


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm, self.ln = nn.BatchNorm1d(6), nn.LayerNorm(6)
        self.pool, self.function = nn.MaxPool1d(2, return_indices=True), function

    def forward(self, x):
        return self.function(self, x)


@torch.jit.script
def tripled(x):
    return x * 3.0


def written_to_a_view(x, change):
    made = x.clone()
    made[:, :6].add_(change)
    return made


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: m.b(F.dropout(m.a(x))), "dropout in training in the model (Functional) is not covered"),
        (lambda m, x: F.normalize(m.a(x)), "normalize in the model (Functional) is not covered"),
        (lambda m, x: torch.add(*m.pool(m.a(x))), "pool (MaxPool1d) is not covered"),
        (lambda m, x: m.a(x) * m.b(x), "mul in the model (Functional) reads two tensors that have changed"),
        (lambda m, x: m.a(m.a(x)), "a (Linear) is called more than once"),
        (lambda m, x: m.a(x).tolist(), "tolist in the model"),
        (lambda m, x: m.b(F.pad(m.a(x)[None], (2, 2), "reflect")[0, :, 2:8]), "pad by reflect in the model"),
        (lambda m, x: m.b(torch.add(x, m.a(x), alpha=3)), "add with alpha in the model"),
        (lambda m, x: m.b(m.a(x)).mean(0), "averages over the samples"),
        (lambda m, x: m.b(m.a(x)).mean(), "averages over the samples"),
        (lambda m, x: m.b(m.a(x)[:, [0, 1, 2, 3, 3, 3]]), "takes entries by a list or a tensor"),
        (lambda m, x: x[None] + m.a(x)[:, None], "stretches a tensor over another"),
        (lambda m, x: x[None].repeat(9, 1, 1) + m.a(x)[:, None], "stretches a tensor over another"),
        (lambda m, x: torch.add(x, 5, m.a(x)), "add with alpha"),
        (lambda m, x: F.softplus(m.a(x), 0.01, 0), "softplus with a threshold of 0"),
        (lambda m, x: m.a(x).view(torch.int32), "view as another dtype"),
        (lambda m, x: x if bool(m.a(x)[0, 0]) else 2 * x, "bool in the model"),
        (lambda m, x: torch.from_dlpack(m.a(x)), "dlpack_device in the model"),
        (lambda m, x: tripled(m.a(x)), "aten.mul in the model"),
        (lambda m, x: torch.func.vmap(lambda each: 3 * each)(m.a(x)), "uses torch.func"),
        (lambda m, x: written_to_a_view(x, m.a(x)), "a change in place in the model"),
        (lambda m, x: m.b(written_to_a_view(x, m.a(x))), "a change in place in b (Linear)"),
        (lambda m, x: torch.add(x, m.a(x), out=torch.zeros(9, 12)[:, :6])._base, "get in the model"),
        (lambda m, x: m.a(x) + F.linear(x, m.a.weight), "the weight of a (Linear) is read elsewhere"),
        (lambda m, x: m.a(x) + torch.randn(9, 6), "the model draws random numbers"),
        (lambda m, x: m.b(m.a(x + torch.randn_like(x))), "the model draws random numbers"),
    ],
)
def test_what_is_not_covered_is_named(function, message):
    build = lambda layer: cp.L1Reconstruction(layer, 0.1)  # noqa: E731
    model = Functional(function).eval()
    _, report = cp.prune(model, [torch.randn(9, 6)], build, Noise())
    assert report.network.guaranteed is None
    assert message in report.network.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [({"positions": 3}, "`positions` was given")],
)
def test_what_was_not_judged_on_all_the_data_is_not_guaranteed(options, message):
    net, batches = random_net(0, 1, 1, 1, nn.Identity())
    build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(1.0))  # noqa: E731
    _, report = cp.prune(net, cp.Calibration(batches, **options), build, Noise())
    assert report.network.guaranteed is None
    assert message in report.network.reason


def test_cascade_through_a_residual_sum_adds_errors_and_multiplies_none():
    net, batches = random_net(3, 1, 1, 1, nn.Identity())
    build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.3))  # noqa: E731
    _, cascade = cp.prune(net, batches, build, mode="cascade")
    _, parallel = cp.prune(net, batches, build, mode="parallel")
    assert cascade.network.measured <= cascade.network.guaranteed <= parallel.network.guaranteed


class Strange(nn.AvgPool1d):
    def forward(self, x):
        return super().forward(7 * x)


class Louder(nn.BatchNorm1d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, 5 * self.weight, self.bias)


def hooked(module):
    module.register_forward_hook(lambda module, args, output: 3 * output)
    return module


def tied(first, second):
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


class Middle(nn.Module):
    """Nothing of what `max_pool1d`, the module, says holds for the function of that name."""

    def __init__(self):
        super().__init__()
        self.conv, self.max_pool1d = nn.Conv1d(2, 2, 1), nn.MaxPool1d(1)

    def forward(self, x):
        return F.max_pool1d(self.conv(x), 5, 1)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Sequential(nn.Conv1d(2, 2, 1), Louder(2)), (3, 2, 8), "1 (Louder) is not covered"),
        (nn.Sequential(nn.Linear(6, 6), hooked(nn.Linear(6, 6))), (9, 6), "1 (Linear) has forward hooks"),
        (nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 6))), (9, 6), "aten."),
        (tied(nn.Linear(6, 6), nn.Linear(6, 6)), (9, 6), "the weight of 0 (Linear) is read elsewhere"),
    ],
)
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_modules_that_do_not_do_what_their_kind_does_are_named(model, x, message, mode):
    build = lambda layer: cp.L1Reconstruction(layer, 0.1)  # noqa: E731
    _, report = cp.prune(
        model.eval(), [torch.randn(x)], build, Noise(), mode, names=[next(iter(dict(model.named_children())))]
    )
    assert report.network.guaranteed is None
    assert message in report.network.reason


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Conv1d(2, 2, 1), Strange(2)), (3, 2, 8)),
        (nn.Sequential(nn.Conv1d(2, 2, 1), hooked(nn.MaxPool1d(2))), (3, 2, 8)),
        (Middle(), (3, 2, 8)),
        (nn.Sequential(nn.Conv1d(2, 4, 1), nn.AdaptiveAvgPool2d((3, 1))), (5, 2, 7)),
    ],
)
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_module_is_what_it_was_seen_to_call(model, x, mode):
    _, report = cp.prune(model.eval(), [torch.randn(x)], lambda layer: cp.L1Reconstruction(layer, 0.1), Noise(), mode)
    assert report.network.guaranteed is not None, report.network.reason
    assert report.network.measured <= report.network.guaranteed


class ByBatch(nn.Module):
    """What it does depends on the batch: on its size, or on what is in it."""

    def __init__(self, which):
        super().__init__()
        self.layer, self.which = nn.Linear(4, 4), which

    def forward(self, x):
        y = self.layer(x)
        if self.which == "values":
            return y + y + y if x[0, 0] > 0 else y
        return y.view(1, -1, 4).mean(1) if self.which == "mean" else y


@pytest.mark.parametrize("which", ["values", "mean"])
def test_batches_that_go_different_ways_have_no_bound(which):
    batches = [-torch.ones(8, 4), torch.ones(1, 4)]
    _, report = cp.prune(ByBatch(which).eval(), batches, lambda layer: cp.L1Reconstruction(layer, 0.1), Shifted())
    assert report.network.guaranteed is None
    assert "do not all take the same way" in report.network.reason
    _, report = cp.prune(ByBatch("").eval(), batches, lambda layer: cp.L1Reconstruction(layer, 0.1), Shifted())
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-5)


def picking(inputs, column, outputs=1, row=0):
    """A Linear that reads one of its inputs, and writes it to one of its outputs."""
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight.data.zero_()[row, column] = 1
    return layer


def first_only(size):
    norm = nn.BatchNorm1d(size)
    norm.weight.data[1:] = 0
    return norm


class Spiked:
    """The dense layer, with another bias of its first output."""

    def solve(self, problem, start=None):
        x = problem.dense.clone()
        x[0, -1] += 1
        return Attempt(x, None, cp.Status.CONVERGED, 1)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ((nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(4)), (5, 4, 6)),
        ((nn.Linear(6, 6), nn.Identity(), picking(6, 0, 4, 1), first_only(4)), (5, 4, 6)),
        ((nn.Conv1d(2, 4, 3, padding=1), picking(8, 7)), (5, 2, 8)),
        ((nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3)), (2, 8)),
        ((nn.Linear(6, 6), nn.AvgPool1d(3, 1, 1), picking(6, 1)), (9, 6)),
        ((nn.Conv1d(2, 4, 1), nn.Flatten(), nn.ZeroPad1d((4, 0)), picking(16, 4)), (5, 2, 3)),
    ],
)
def test_the_second_axis_is_not_always_that_of_the_channels(model, shape, mode):
    net = nn.Sequential(*model).eval()
    build = lambda layer: cp.L1Reconstruction(layer, 0.1) if layer.name.startswith("0") else None  # noqa: E731
    _, report = cp.prune(net, [torch.randn(shape)], build, Spiked(), mode)
    assert 0 < report.network.measured <= report.network.guaranteed * (1 + 1e-5)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("group", [0, 1])
def test_groups_that_were_left_out_keep_their_places(mode, group):
    model = nn.Sequential(nn.Conv1d(2, 8, 1, groups=2), nn.Conv1d(8, 1, 1, bias=False)).eval()
    nn.init.zeros_(model[1].weight)
    model[1].weight.data[:, 4 * group : 4 * group + 2] = 1.0
    build = lambda layer: cp.L1Reconstruction(layer, 0.1) if layer.name == f"0[{group}]" else None  # noqa: E731
    _, report = cp.prune(model, [torch.randn(4, 2, 5)], build, Spiked(), mode)
    assert 0 < report.network.measured <= report.network.guaranteed * (1 + 1e-5)


class InPlace(nn.Module):
    """Normalises its input where it stands."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        x -= 0.5
        x *= 2
        return self.layer(x)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_model_that_writes_to_its_input_does_not_change_the_data(mode):
    x = torch.randn(8, 4)
    kept = x.clone()
    _, report = cp.prune(InPlace().eval(), [x], lambda layer: cp.L1Reconstruction(layer, 0.1), Shifted(), mode)
    assert torch.equal(x, kept)
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-5)


def test_a_transposed_convolution_in_a_cascade_is_judged_whole():
    model = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.ConvTranspose1d(8, 2, 3)).eval()
    build = lambda layer: cp.L1Reconstruction(layer, 0.1)  # noqa: E731
    _, report = cp.prune(model, [torch.randn(4, 2, 9)], build, Noise(), "cascade")
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-5)


@pytest.mark.parametrize("mode", ["cascade", "residual"])
def test_a_dense_head_that_is_judged_carries_the_guarantee_of_a_transformer(mode):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=30,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        batches = [{"input_ids": torch.randint(0, 30, (4, 12)), "use_cache": False} for _ in range(2)]

    def build(layer):
        return None if layer.name == "lm_head" else cp.Reconstruction(layer, cp.Unstructured(0.5))

    _, report = cp.prune(model, batches, build, cp.Magnitude(), mode)
    head = report.rows[-1]
    assert (head.name, head.status, head.kept) == ("lm_head", None, head.total)
    network = report.network
    assert network.measured <= network.guaranteed <= 1.001 * network.measured
