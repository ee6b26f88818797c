"""The ends of a spectrum, against LAPACK; and who shares them."""

import pickle

import pytest
import torch

import convexprune as cp
from convexprune import rounding, spectrum
from convexprune.moments import InputMoments, Moments


def gram(size, decay, seed=0):
    """A Gram matrix of eigenvalues k^-decay."""
    turn = torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ).Q
    found = (turn * torch.arange(1, size + 1, dtype=torch.float64) ** -decay) @ turn.T
    return (found + found.T) / 2


@pytest.fixture
def small(monkeypatch):
    """So that the matrices of a test are large."""
    monkeypatch.setattr(spectrum, "LARGE", 100)
    monkeypatch.setattr("convexprune.moments.LARGE", 100)


@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0, 4.0])
def test_the_ends_are_those_of_lapack(small, decay):
    matrix = gram(150, decay)
    values = torch.linalg.eigvalsh(matrix)
    low, top = spectrum.smallest(matrix, torch.linalg.cholesky(matrix)), spectrum.largest(matrix)
    assert low == pytest.approx(float(values[0]), rel=1e-6)
    assert top == pytest.approx(float(values[-1]), rel=1e-6)


def test_a_wrong_guess_proves_nothing_wrong():
    matrix = gram(20, 2.0)
    least = float(torch.linalg.eigvalsh(matrix)[0])
    for guess in (-1.0, 0.0, least, 2 * least, 1.0, 1e6):
        found = rounding.least_eigenvalue(matrix, guess)
        assert found <= least
        assert found > min(guess, least) - 1e-12 * (1 + abs(guess))


@pytest.mark.parametrize("constant", [False, True])
def test_a_large_matrix_has_the_figures_of_a_small_one(small, monkeypatch, constant):
    x = torch.randn(900, 120, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) @ gram(120, 1.0)
    if constant:
        x[:, 7] = 0.0
    sums = InputMoments(120)
    sums.add(x + 0.1)
    found = []
    for large in (100, 1000):
        monkeypatch.setattr(spectrum, "LARGE", large)
        monkeypatch.setattr("convexprune.moments.LARGE", large)
        moments = sums.finished()
        found.append((moments.curvature, moments.level, moments.conditioning))
    (one, level, (rank, condition)), (other, flat, (ranks, conditions)) = found
    assert one == pytest.approx(other, rel=1e-6)
    assert one > 0
    torch.testing.assert_close(level, flat, rtol=2e-6, atol=0)
    assert rank == ranks
    assert condition == pytest.approx(conditions, rel=1e-6)


@pytest.mark.parametrize("deficient", ["twin", "few samples"])
def test_a_singular_matrix_has_no_curvature_and_its_rank(small, deficient):
    x = torch.randn(60 if deficient == "few samples" else 400, 120, dtype=torch.float64)
    if deficient == "twin":
        x[:, 1] = x[:, 0]
    sums = InputMoments(120)
    sums.add(x)
    moments = sums.finished()
    assert moments.curvature <= 0
    assert not moments.level.any()
    assert moments.conditioning == (119 if deficient == "twin" else 60, torch.inf)


def test_layers_that_read_one_tensor_have_one_factorisation(monkeypatch):
    calls = []
    least = Moments._least.func
    counted = type(Moments.__dict__["_least"])(lambda moments: calls.append(moments) or least(moments))
    counted.__set_name__(Moments, "_least")
    monkeypatch.setattr(Moments, "_least", counted)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (torch.nn.Linear(12, 12) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x) + self.v(x)

    torch.manual_seed(0)
    for mode in ("parallel", "cascade"):
        calls.clear()
        _, report = cp.prune(
            Attention(), [torch.randn(64, 12)], lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)), mode=mode
        )
        assert len(report.rows) == 3
        assert len(calls) == 1
        assert len({row.moments for row in report.rows}) == 1


def test_only_numbers_are_kept():
    layer = cp.Layer.from_samples(torch.randn(4, 30), torch.randn(200, 30), torch.randn(4))
    before = len(pickle.dumps(layer.read))
    problem = cp.Reconstruction(layer, cp.Unstructured(0.5))
    assert problem.lower_bound(None) > 0
    assert layer.spectrum()[0] == 30
    assert len(pickle.dumps(layer.read)) < before + 8 * 30 * 10


def test_a_bound_without_a_witness_is_that_of_the_dense_weights():
    layer = cp.Layer.from_samples(torch.randn(4, 30), torch.randn(200, 30), torch.randn(4))
    problem = cp.Reconstruction(layer, cp.Unstructured(0.5))
    assert problem.lower_bound(None) == problem.lower_bound(None) == problem.lower_bound(layer.weight) > 0
