"""By how much an operation enlarges a change: pools, activations, tensors that are joined, rows over their norms."""

import inspect
import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from convexprune.bounds import lipschitz
from convexprune.bounds.pooling import Windows, average_pool_gain, max_pool_gain
from convexprune.bounds.propagation import Spread
from convexprune.certify.normalisations import Normalisation

# ---- pools ----


@st.composite
def sliding(draw):
    """The arguments of F.avg_pool1d or F.max_pool1d, and a size that they fit."""
    kernel, stride, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    padding = draw(st.integers(0, kernel // 2))
    size = draw(st.integers(max(dilation * (kernel - 1) + 1, 2), 16))
    return size, kernel, stride, padding, dilation, draw(st.booleans()), draw(st.booleans())


@settings(max_examples=150)
@given(sliding(), sliding())
def test_the_gain_of_an_average_is_above_its_norm(rows, columns):
    (height, *down), (width, *right) = rows, columns
    kernel, stride, padding = zip(down[:3], right[:3], strict=True)
    ceil, counted = down[4], down[5]
    unit = torch.eye(height * width, dtype=torch.float64).reshape(-1, 1, height, width)
    for divisor in (None, 3, -2):
        made = F.avg_pool2d(unit, kernel, stride, padding, ceil, counted, divisor)
        axes = [
            Windows.sliding(size, windows, *each, pad=counted)
            for size, windows, *each in zip((height, width), made.shape[2:], kernel, stride, padding, strict=True)
        ]
        norm = float(torch.linalg.matrix_norm(made.flatten(1), 2))
        assert norm <= average_pool_gain(axes, divisor) * (1 + 1e-13)
        assert average_pool_gain(axes, divisor) <= 2.5 * norm


@settings(max_examples=100)
@given(sliding())
def test_the_gain_of_a_maximum_is_that_of_a_spike_at_the_entry_read_most(arguments):
    size, kernel, stride, padding, dilation, ceil, _ = arguments
    spikes = torch.eye(size, dtype=torch.float64)[:, None]
    made = F.max_pool1d(spikes, kernel, stride, padding, dilation, ceil)
    gain = max_pool_gain([Windows.sliding(size, made.shape[2], kernel, stride, padding, dilation)])
    most = int(made.sum((1, 2)).max())
    assert Fraction(gain) ** 2 >= most
    assert gain <= math.sqrt(max(most, 1)) * (1 + 1e-15)


@settings(max_examples=100)
@given(st.integers(1, 20), st.integers(1, 30))
def test_windows_of_adaptive_pools(size, windows):
    unit = torch.eye(size, dtype=torch.float64)[:, None]
    axes = [Windows.adaptive(size, windows)]
    mean, most = F.adaptive_avg_pool1d(unit, windows), F.adaptive_max_pool1d(unit, windows)
    norm = float(torch.linalg.matrix_norm(mean.flatten(1), 2))
    assert norm <= average_pool_gain(axes) * (1 + 1e-13)
    assert average_pool_gain(axes) <= 1.5 * norm
    assert max_pool_gain(axes) == pytest.approx(math.sqrt(int(most.sum((1, 2)).max())))


# ---- activations ----


def derivative(function, x):
    return mpmath.diff(function, x)


CURVES = {
    "gelu": (lambda x: x * mpmath.ncdf(x), mpmath.sqrt(2), F.gelu, {}),
    "gelu by tanh": (
        lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3))),
        1.4185, lambda x: F.gelu(x, approximate="tanh"), {"approximate": "tanh"},
    ),
    "silu": (lambda x: x / (1 + mpmath.exp(-x)), 2.3994, F.silu, {}),
    "mish": (lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x))), 1.4906, F.mish, {}),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), 0.0, torch.sigmoid, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CURVES)
def test_a_smooth_activation_is_steepest_where_its_second_derivative_is_zero(name):
    curve, near, function, options = CURVES[name]
    constant = lipschitz.LIPSCHITZ[name.partition(" ")[0]](None, **options)
    with mpmath.workdps(30):
        steepest = mpmath.findroot(lambda x: mpmath.diff(curve, x, 2), near) if near else mpmath.mpf(0)
        exact = derivative(curve, steepest)
        assert exact <= mpmath.mpf(constant) <= exact * mpmath.mpf("1.0015")
    x = torch.linspace(-30, 30, 600_001, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(function(x).sum(), x)
    assert float(slopes.abs().max()) <= float(exact) * (1 + 1e-12)


def test_the_slope_of_mish_is_below_its_constant_between_the_points_of_a_grid_too():
    x = torch.arange(-20, 20, 5e-4, dtype=torch.float64)
    s = x.sigmoid()
    t = F.softplus(x, threshold=40).tanh()
    slope = t + x * (1 - t * t) * s
    # |f''| <= 3.4, by docs/theory
    assert float(slope.abs().max()) + 3.4 * 2.5e-4 + 1e-10 < lipschitz.mish(None)
    bend = (1 - t * t) * (2 * s + x * (s * (1 - s) - 2 * t * s * s))
    assert float(bend.abs().max()) < 3.4


BROKEN_LINES = [
    (F.hardswish, {}, 1.5), (F.hardsigmoid, {}, 1 / 6), (F.selu, {}, 1.7580994), (F.softmax, {}, 0.5),
    (F.elu, {"alpha": 2.5}, 2.5), (F.elu, {"alpha": -0.5}, 1.0), (F.elu, {"alpha": -3}, 3.0),
    (F.celu, {"alpha": 0.1}, 1.0), (F.leaky_relu, {"negative_slope": -4.0}, 4.0), (F.leaky_relu, {}, 1.0),
    (F.rrelu, {"lower": 1.0, "upper": 4.0}, 2.5),
]  # fmt: skip


@pytest.mark.parametrize(("function", "options", "wanted"), BROKEN_LINES, ids=str)
@pytest.mark.filterwarnings("ignore:Implicit dimension:UserWarning")
def test_the_steepest_chord_is_just_below_the_constant(function, options, wanted):
    constant = lipschitz.LIPSCHITZ[function.__name__](None, **options)
    assert constant >= wanted
    assert constant == pytest.approx(wanted, rel=1e-7)
    if function is not F.softmax:
        x = torch.linspace(-8, 8, 1_600_001, dtype=torch.float64)
        chords = function(x, **options).diff() / x.diff()
        assert 0.999 * wanted < float(chords.abs().max()) <= constant * (1 + 1e-6)


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.integers(2, 7), st.floats(0.01, 30))
def test_softmax_and_its_logarithm_of_a_row(seed, width, size):
    generator = torch.Generator().manual_seed(seed)
    x, y = size * torch.randn(2, width, generator=generator, dtype=torch.float64)
    for other in (y, x + 1e-4 * y):
        apart = float((x - other).norm()) * (1 + 1e-9)
        assert float((x.softmax(0) - other.softmax(0)).norm()) <= 0.5 * apart
        assert float((x.log_softmax(0) - other.log_softmax(0)).norm()) <= math.sqrt(width) * apart
    jacobian = torch.func.jacrev(lambda z: z.softmax(0))(torch.tensor([0.0, 0.0, -60, -60], dtype=torch.float64))
    assert float(torch.linalg.matrix_norm(jacobian, 2)) == pytest.approx(0.5)  # attained
    bent = torch.func.jacrev(lambda z: z.log_softmax(0))(torch.tensor([60.0, 0, 0, 0], dtype=torch.float64))
    assert float(torch.linalg.matrix_norm(bent, 2)) == pytest.approx(2.0)


def test_the_arguments_are_those_of_torch():
    for name, function in lipschitz.LIPSCHITZ.items():
        theirs = getattr(F, name)
        try:
            wanted = inspect.signature(theirs)
        except ValueError:  # a builtin
            continue
        if name not in ("softmax", "prelu", "sigmoid"):
            assert list(inspect.signature(function).parameters) == list(wanted.parameters)


# ---- joins ----


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 7))
def test_tensors_side_by_side_and_one_under_the_other(seed, widths, how):
    generator = torch.Generator().manual_seed(seed)
    changes = [torch.randn(6, width, generator=generator, dtype=torch.float64) for width in widths]
    changes[-1] *= how != 1

    def known(change, place):
        return Spread.of(change.T @ change, 8) if (place + how) % 3 else Spread.of_squares(change.square().sum(0), 8)

    spreads = [known(change, place) for place, change in enumerate(changes)]
    spreads = [each.plain() for each in spreads] if how == 2 else spreads
    holds(Spread.beside(spreads, widths), torch.cat(changes, 1))
    narrow = [change[:, :1] for change in changes]
    holds(Spread.below([known(each, place) for place, each in enumerate(narrow)]), torch.cat(narrow))
    assert Spread.beside(spreads, [width + 1 for width in widths]).channels is None


def holds(found, change):
    assert float(change.norm()) <= found.total <= float(change.norm()) * (1 + 1e-9) + 1e-300
    if found.channels is not None:
        assert bool((change.norm(dim=0) <= found.channels).all())
    if found.gram is not None:
        rest = torch.linalg.eigvalsh(found.gram - change.T @ change)
        assert float(rest[0]) >= -1e-12 * float(found.gram.trace())


# ---- norms ----


def seeds_of_rows(seed, width, size):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(40, width, generator=generator, dtype=torch.float64) * 10 ** torch.linspace(-4, 2, 40)[:, None]
    return u, u + size * u.norm(dim=1, keepdim=True) * torch.randn(u.shape, generator=generator, dtype=torch.float64)


@settings(max_examples=100)
@given(
    st.integers(0, 10**6), st.integers(1, 9), st.sampled_from([0.0, 1e-12, 1e-5, 1.0, 100.0]),
    st.sampled_from([1e-6, 0.1, 1.0, 10.0]), st.booleans(), st.floats(0, 1e4),
)  # fmt: skip
def test_rows_over_their_norms_change_by_no_more_than_the_gain(seed, width, eps, size, centred, shift):
    u, v = seeds_of_rows(seed, width, size)
    norm = Normalisation(0, width, eps, 1.0, centred)
    if centred:
        u, v = u + shift, v + shift
    make = (lambda x: F.layer_norm(x, (width,), eps=eps)) if centred else (lambda x: F.rms_norm(x, (width,), eps=eps))
    for one, two in zip(u.split(1), v.split(1), strict=True):
        gain = norm.gain(norm.sizes(one, two))
        change = float((make(one) - make(two)).norm())
        lost = 1e-13 * (1 + shift) * math.sqrt(width) * gain
        assert math.isinf(gain) or change <= gain * float((one - two).norm()) + lost + 1e-12
    whole = norm.gain(norm.sizes(u, v))
    assert whole <= norm.gain(0.0)
    assert all(norm.gain(norm.sizes(a, b)) <= whole for a, b in zip(u.split(1), v.split(1), strict=True))


def test_the_gain_of_opposite_rows_is_attained():
    norm, u = Normalisation(0, 4, 0.0, 1.0, False), torch.tensor([[3.0, 0, 0, 4]]).double()
    made = float((F.rms_norm(u, (4,), eps=0.0) - F.rms_norm(-u, (4,), eps=0.0)).norm())
    assert norm.gain(norm.sizes(u, -u)) * float((2 * u).norm()) == pytest.approx(made, rel=1e-12)
    assert norm.gain(norm.sizes(u, u)) == pytest.approx(0.0, abs=1e-300)  # rows that are the same do not count
    assert norm.gain(norm.sizes(torch.zeros(1, 4), torch.zeros(1, 4) - 0.0)) <= math.inf
    assert norm.sizes(u.to(torch.int64), u) == 0.0
    assert norm.gain(0.0) == math.inf
