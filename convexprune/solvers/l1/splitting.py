"""The operator splittings that `ADMM` iterates: one step, the residuals, the point and the witness they hold."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from convexprune.forms import BallProblem, LassoProblem, declared

BALANCE = 3.0  # residuals further apart than this factor change rho
UNEQUAL = 30.0  # a column with more than this times the median energy gets a weight of its own


class Splitting(Protocol):
    """One ADMM for one kind of problem."""

    def step(self) -> None:
        """One iteration."""

    def balance(self) -> None:
        """Adapt rho to the ratio of the primal and the dual residual."""

    @property
    def point(self) -> Tensor:
        """(M, P): the exactly sparse iterate."""

    @property
    def witness(self) -> Tensor:
        """The dual witness the multipliers give."""


def splitting(problem: Any, start: Tensor | None, alpha: float, device: torch.device, dtype: torch.dtype) -> Splitting:
    """The splitting of the form that a problem declares, a ball or a lasso."""
    kind = BallSplitting if BallProblem in declared(problem) else LassoSplitting
    return kind(problem, start, alpha, device, dtype)


class BallSplitting:
    """T = X x^T on the ball and under the ceiling, S = x sparse (Aghasi, Abdi, Romberg 2020, section 4).

    T <- project(X U - A);  S <- soft(U - B, 1 / (rho w));  (X^T X + w I) U <- X^T (T + A) + w (S + B);
    A <- A + T - X U;  B <- B + S - U, with T and S over-relaxed. Everything is transposed: U, S are (P, M).
    X and Y are first divided by powers of two near their largest entries, so that float32 neither overflows nor rounds
    them anew. The weight w of the second block against the first acts as a scaling of X's columns; a column much larger
    or smaller than the others, such as the ones of a bias beside tiny inputs, has a weight of its own.
    """

    def __init__(self, problem: BallProblem, start: Tensor | None, alpha: float, device: torch.device,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.alpha, self.active = alpha, problem.active.to(device)
        self.unit = _unit(problem.inputs), _unit(problem.outputs)  # of X, of Y
        self.inputs = (problem.inputs.to(device) / self.unit[0]).to(dtype)
        outputs, ceiling = (each.to(device) / self.unit[1] for each in (problem.outputs, problem.ceiling))
        self.outputs, self.radius = outputs.to(dtype), problem.radius / self.unit[1]
        self.top = torch.where(self.active, torch.inf, ceiling.to(dtype))
        gram = self.inputs.T @ self.inputs
        self.weight = 0.05 * _energies(gram.diagonal())[:, None]
        kernel = gram.double() + torch.diag(self.weight[:, 0].double())
        self.kernel = torch.cholesky_inverse(torch.linalg.cholesky(kernel)).to(dtype)
        self.grown = self.unit[1] / self.unit[0]  # a weight is this times its scaled one
        size = float(problem.dense.abs().mean()) / self.grown or 1.0
        self.rho = 0.1 / (float(self.weight.min()) * size)
        shape = (self.inputs.shape[1], self.outputs.shape[1])
        blank = torch.zeros(shape, dtype=dtype, device=device)
        self.S = blank if start is None else (start.T.to(device, torch.float64) / self.grown).to(dtype)
        self.U, self.B = self.S.clone(), torch.zeros_like(self.S)
        self.XU = self.inputs @ self.U
        self.A = torch.zeros_like(self.outputs)
        self.T = self.outputs

    def step(self) -> None:
        """One iteration: two products with X, one with the kernel."""
        self.T = self._project(self.XU - self.A)
        before = self.S
        self.S = self._shrunk(self.U - self.B)
        self.moved = self.S - before
        relaxed = torch.lerp(self.XU, self.T, self.alpha)
        sparse = torch.lerp(self.U, self.S, self.alpha)
        self.A += relaxed
        self.B += sparse
        self.U = self.kernel @ torch.addmm(self.weight * self.B, self.inputs.T, self.A)
        self.XU = self.inputs @ self.U
        self.A -= self.XU
        self.B -= self.U

    def _shrunk(self, x: Tensor) -> Tensor:
        limit = 1 / (self.rho * self.weight)
        return x - torch.minimum(torch.maximum(x, -limit), limit)

    def _project(self, produced: Tensor) -> Tensor:
        residual = torch.where(self.active, produced - self.outputs, 0)
        norm = float(torch.linalg.vector_norm(residual))
        inside = self.outputs + residual * min(1.0, self.radius / max(norm, 1e-300))
        return torch.where(self.active, inside, torch.minimum(produced, self.top))

    def balance(self) -> None:
        """rho up when the primal residual dominates, down when the dual one does."""
        primal = (self.T - self.XU).norm() ** 2 + (self.weight * (self.S - self.U).square()).sum()
        dual = (self.inputs @ self.moved).norm() ** 2 + (self.weight * self.moved.square()).sum()
        factor = _balanced(float(primal), float(dual))
        self.rho *= factor
        self.A /= factor
        self.B /= factor

    @property
    def point(self) -> Tensor:
        """(M, P), float64."""
        return self.S.T.double() * self.grown

    @property
    def witness(self) -> Tensor:
        """(n, M), float64: rho A, the multiplier of T = X U."""
        return self.A.double() * (self.rho / self.unit[0])


class LassoSplitting:
    """S = U: (G + rho I) U <- C + rho (S + B);  S <- soft(U - B, lam / rho);  B <- B + S - U (Boyd et al., 2011)."""

    def __init__(self, problem: LassoProblem, start: Tensor | None, alpha: float, device: torch.device,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.lam, self.alpha = problem.lam, alpha
        values, vectors = torch.linalg.eigh(problem.gram.to(device))
        self.values, self.vectors = values.clamp(min=0).to(dtype), vectors.to(dtype)
        self.cross = problem.cross.T.to(device, dtype)
        self.rho = float(values.clamp(min=0).mean()) or 1.0
        self.S = torch.zeros_like(self.cross) if start is None else start.T.to(device, dtype).clone()
        self.B = torch.zeros_like(self.S)

    def step(self) -> None:
        """One iteration: two products with the eigenvectors, whatever rho is."""
        right = self.cross + self.rho * (self.S + self.B)
        self.U = self.vectors @ ((self.vectors.T @ right) / (self.values + self.rho)[:, None])
        relaxed = torch.lerp(self.S, self.U, self.alpha)
        before = self.S
        self.S = torch.nn.functional.softshrink(relaxed - self.B, self.lam / self.rho)
        self.moved = self.S - before
        self.B += self.S - relaxed

    def balance(self) -> None:
        """rho up when the primal residual dominates, down when the dual one does."""
        factor = _balanced(float((self.S - self.U).norm() ** 2), float(self.moved.norm() ** 2))
        self.rho *= factor
        self.B /= factor

    @property
    def point(self) -> Tensor:
        """(M, P)."""
        return self.S.T

    @property
    def witness(self) -> Tensor:
        """(M, P): the point, whose residual is the dual variable."""
        return self.S.T


def _energies(diagonal: Tensor) -> Tensor:
    """(P,): the mean energy of the typical columns; columns much larger or smaller than these keep their own."""
    alive = diagonal > 0
    if not bool(alive.any()):
        return torch.ones_like(diagonal)
    median = diagonal[alive].median()
    large, small = diagonal > UNEQUAL * median, alive & (diagonal < median / UNEQUAL**2)
    return torch.where(large | small, diagonal, diagonal[alive & ~large & ~small].mean())


def _unit(values: Tensor) -> float:
    """A power of two near the largest entry: dividing by it is exact."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0


def _balanced(primal: float, dual: float) -> float:
    """The factor for rho from the squared residuals."""
    ratio = (primal / max(dual, 1e-300)) ** 0.5
    if ratio > BALANCE:
        return 1.5
    return 1 / 1.5 if ratio < 1 / BALANCE else 1.0
