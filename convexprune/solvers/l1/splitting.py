"""The operator splittings that `ADMM` iterates: one step, the residuals, the point and the witness they hold."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from convexprune.forms import BallProblem, LassoProblem, declared
from convexprune.solvers.l1.scaling import ScaledBall, ScaledLasso

UNPAID = 1e30  # in units where the largest slope is about 1
BALANCE = 3.0  # residuals further apart than this factor change rho


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

    T <- project(X U - A);  S <- soft(U - B, w' / (rho w));  (X^T X + w I) U <- X^T (T + A) + w (S + B);
    A <- A + T - X U;  B <- B + S - U, with T and S over-relaxed. Everything is transposed: U, S are (P, M).
    It works on the scaled problem, whose prices of weights are w'. The weight w of the second block against the first
    acts as a scaling of X's columns.
    """

    def __init__(self, problem: BallProblem, start: Tensor | None, alpha: float, device: torch.device,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.alpha, self.scaled = alpha, ScaledBall.of(problem, device, dtype)
        self.inputs, self.active, self.radius = self.scaled.inputs, self.scaled.active, self.scaled.radius
        self.outputs = self.scaled.outputs.to(dtype)
        self.top = torch.where(self.active, torch.inf, self.scaled.ceiling.to(dtype))
        weight = 0.05 * self.scaled.energies[:, None]
        kernel = (self.inputs.T @ self.inputs).double() + torch.diag(weight[:, 0])
        self.kernel = torch.cholesky_inverse(torch.linalg.cholesky(kernel)).to(dtype)
        self.weight, self.prices = weight.to(dtype), self.scaled.prices[:, None].to(dtype)
        size = float(self.scaled.units.inside(problem.dense.to(device)).abs().mean()) or 1.0
        self.rho = 0.1 / (float(weight.median()) * size)
        begun = self.scaled.units.inside((torch.zeros_like(problem.dense) if start is None else start).to(device))
        self.S = begun.T.to(dtype).contiguous()
        self.U, self.B = self.S.clone(), torch.zeros_like(self.S)
        self.XU = self.inputs @ self.U
        self.A = torch.zeros_like(self.outputs)
        self.T = self.outputs

    def step(self) -> None:
        """One iteration: two products with X, one with the kernel."""
        self.T = self._project(self.XU - self.A)
        before = self.S
        self.S = _shrunk(self.U - self.B, self.prices / (self.rho * self.weight))
        self.moved = self.S - before
        relaxed = torch.lerp(self.XU, self.T, self.alpha)
        sparse = torch.lerp(self.U, self.S, self.alpha)
        self.A += relaxed
        self.B += sparse
        self.U = self.kernel @ torch.addmm(self.weight * self.B, self.inputs.T, self.A)
        self.XU = self.inputs @ self.U
        self.A -= self.XU
        self.B -= self.U

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
        return self.scaled.units.outside(self.S.T)

    @property
    def witness(self) -> Tensor:
        """(n, M), float64: rho A, the multiplier of T = X U."""
        return self.scaled.witness(self.A.double() * self.rho)


class LassoSplitting:
    """S = U: (G + rho I) U <- C + rho (S + B);  S <- soft(U - B, lam w' / rho);  B <- B + S - U (Boyd et al., 2011)."""

    def __init__(self, problem: LassoProblem, start: Tensor | None, alpha: float, device: torch.device,
                 dtype: torch.dtype) -> None:  # fmt: skip
        self.scaled, self.alpha = ScaledLasso.of(problem, device), alpha
        values, vectors = torch.linalg.eigh(self.scaled.gram)
        self.values, self.vectors = values.clamp(min=0).to(dtype), vectors.to(dtype)
        self.cross = self.scaled.cross.T.to(dtype)
        # a price that no slope reaches keeps its weight at 0, however much larger it is
        self.prices = (self.scaled.lam * self.scaled.prices[:, None]).clamp(max=UNPAID).to(dtype)
        self.rho = float(values.clamp(min=0).mean()) or 1.0
        self.S = (
            torch.zeros_like(self.cross) if start is None else self.scaled.units.inside(start.to(device)).T.to(dtype)
        )
        self.B = torch.zeros_like(self.S)

    def step(self) -> None:
        """One iteration: two products with the eigenvectors, whatever rho is."""
        right = self.cross + self.rho * (self.S + self.B)
        self.U = self.vectors @ ((self.vectors.T @ right) / (self.values + self.rho)[:, None])
        relaxed = torch.lerp(self.S, self.U, self.alpha)
        before = self.S
        self.S = _shrunk(relaxed - self.B, self.prices / self.rho)
        self.moved = self.S - before
        self.B += self.S - relaxed

    def balance(self) -> None:
        """rho up when the primal residual dominates, down when the dual one does."""
        factor = _balanced(float((self.S - self.U).norm() ** 2), float(self.moved.norm() ** 2))
        self.rho *= factor
        self.B /= factor

    @property
    def point(self) -> Tensor:
        """(M, P), float64."""
        return self.scaled.units.outside(self.S.T)

    @property
    def witness(self) -> Tensor:
        """(M, P): the point, whose residual is the dual variable."""
        return self.point


def _shrunk(x: Tensor, limit: Tensor) -> Tensor:
    """Soft thresholding."""
    return x - torch.minimum(torch.maximum(x, -limit), limit)


def _balanced(primal: float, dual: float) -> float:
    """The factor for rho from the squared residuals."""
    ratio = (primal / max(dual, 1e-300)) ** 0.5
    if ratio > BALANCE:
        return 1.5
    return 1 / 1.5 if ratio < 1 / BALANCE else 1.0
