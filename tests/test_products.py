"""Sums of products where the samples are: within their stated doubt of exact sums, and no sample goes to the host."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convexprune as cp
from convexprune.moments import InputMoments, TargetMoments
from convexprune.network import moment_accumulator
from convexprune.products import OnDevice, OnHost, products_on

CPU = torch.device("cpu")
SINGLE = OnDevice(CPU)


def samples(seed, rows, width, spread):
    """Columns of scales up to 10^spread apart, about means that may be much larger."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** (spread * (2 * torch.rand(width, generator=generator, dtype=torch.float64) - 1))
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64) * scales
    x[:, -1] = 3.0 * scales[-1]
    return x + 100 * scales * (torch.rand(width, generator=generator, dtype=torch.float64) < 0.3)


def covariance(x, y):
    """Exact central moments of columns."""
    xs, ys = ([[Fraction(value) for value in column] for column in each.T.tolist()] for each in (x, y))
    n = len(x)
    return [
        [sum(a * b for a, b in zip(one, two, strict=True)) / n - sum(one) * sum(two) / n**2 for two in ys] for one in xs
    ]


def within(found, exact, left, right, relative=0.0):
    for i, row in enumerate(exact):
        for j, value in enumerate(row):
            limit = Fraction(float(left[i])) * Fraction(float(right[j])) + Fraction(relative) * abs(value)
            if abs(Fraction(float(found[i, j])) - value) > limit:
                return False
    return True


@settings(max_examples=12)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 3, 20, 60]), st.sampled_from([1, 5, 140]))
def test_the_sums_are_within_their_doubt(seed, spread, rows):
    x, y = samples(seed, rows, 5, spread), samples(seed + 1, rows, 3, spread)
    read, aimed = InputMoments(5, SINGLE), TargetMoments(3, 5, SINGLE)
    for part in (slice(0, 70), slice(70, None)):
        read.add(x[part])
        aimed.add(x[part], y[part])
    one, two = read.finished(), aimed.finished()
    assert within(one.covariance, covariance(x, x), one.doubt, one.doubt)
    assert within(two.covariance, covariance(y, x), two.doubt, two.input_doubt, two.relative)


def test_the_doubt_says_something():
    x = torch.randn(2000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [InputMoments(6, made) for made in (OnHost(), SINGLE)]
    for sums in found:
        sums.add(x)
    (exact, single) = (sums.finished() for sums in found)
    assert not torch.equal(exact.covariance, single.covariance)
    assert float((exact.covariance - single.covariance).abs().max()) < 1e-6
    assert float(single.doubt.square().max()) < 1e-3


@pytest.mark.parametrize("precision", ["medium", "high"])
def test_neither_autocast_nor_a_lower_precision_reaches_the_products(precision):
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))

    def products():
        sums = InputMoments(40, SINGLE)
        sums.add(x)
        return sums.products

    expected, before = products(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(products(), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_device_has_its_own():
    assert products_on(CPU) == OnHost()
    assert products_on(torch.device("mps")) == OnHost()  # which has no float64
    assert products_on(torch.device("cuda", 1)) == OnDevice(torch.device("cuda", 1))


def test_no_sample_goes_to_the_host():
    meta = torch.device("meta")  # a tensor there cannot be copied to the host: whoever tries gets an error
    x, y = torch.empty(300, 8, device=meta), torch.empty(300, 4, device=meta, dtype=torch.bfloat16)
    read, aimed = InputMoments(8, OnDevice(meta)), TargetMoments(4, 8, OnDevice(meta))
    read.add(x)
    aimed.add(x, y)
    assert read.count == aimed.count == 300
    for host in (read.finished, aimed.finished, lambda: InputMoments(8, OnHost()).add(x)):
        with pytest.raises(NotImplementedError):
            host()


def test_a_capture_by_float32_is_a_layer_with_wider_doubts(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    batches = [torch.randn(40, 6) for _ in range(3)]
    exact = cp.capture(model, batches)
    monkeypatch.setattr(moment_accumulator, "products_on", OnDevice)
    single = cp.capture(model, batches)
    for one, other in zip(exact, single, strict=True):
        assert float(other.read.doubt.max()) > float(one.read.doubt.max())
        x = 0.5 * one.affine_weight
        assert (other.error_norms(x) >= one.squared_errors(x).mul(one.samples).sqrt() * (1 - 1e-9)).all()
    _, report = cp.prune(model, batches, lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)), mode="cascade")
    assert all(row.certificate.bound <= row.certificate.value for row in report.rows)
