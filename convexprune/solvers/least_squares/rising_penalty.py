"""ADMM with a rising penalty for least squares under a sparsity pattern.

    minimise  tr(W H W^T) / 2 - <C, W>   subject to  W = D,  D in the pattern

    W <- (C - V + rho D) (H + rho I)^-1       D <- projection of W + V / rho       V <- V + rho (W - D)

in coordinates with unit diagonal H; rho rises by how much the support still changes. One eigendecomposition of H serves
every rho; a large H is inverted afresh for each, which takes no longer than to put its inverse together from
eigenvectors. Then least squares on the support.
Source: Meng, Behdin, Wang, Mazumder, NeurIPS 2024 (ALPS), Algorithm 1; its step rule for rho.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.options import check_options, number, positive, several, whole
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.grams import Grams
from convexprune.solvers.least_squares.scaling import Scaled
from convexprune.solvers.least_squares.spd_inverse import spd_inverse

CHANGED = (0.1, 0.005)  # of the support: above the first rho rises fastest, below the second slowest
# inputs from which an inverse takes about as long as the product of two such matrices, and eigenvectors as long as six
MANY, SIX = 512, 6
FIRM = 0.01  # the least rho with which H + rho I, H semidefinite to rounding, is safe to invert in float32


@dataclass(frozen=True)
class RisingPenalty:
    """`ADMM` for sparse least squares.

    Args:
        grow: Ratio of the support's size to the pattern's count; above 1 the result is a start for `SwapSearch`.
        rho: The first penalty.
        rises: Factors of rho while the support changes by at least 10%, by at least 0.5%, and by less; each > 1.
        every: Number of steps between two changes of rho.
        max_iter: Largest number of ADMM steps.
        time_limit: Seconds, or None for no limit.
        device: Where the steps run: "cpu", "cuda", ...
        dtype: Precision of the steps, torch.float32 or torch.float64; the final least squares is float64.
    """

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    grow: float = 1.0
    rho: float = 0.1
    rises: tuple[float, float, float] = (1.3, 1.2, 1.1)
    every: int = 3
    max_iter: int = 300
    time_limit: float | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        rises = several(3, number(1, least_open=True))  # a factor of 1 would never settle the support
        check_options(self, grow=number(1), rho=positive, rises=rises, every=whole(1))

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """Least squares on ADMM's support. ADMM begins at the dense weights; `start` is not used."""
        scaled = Scaled.of(problem, self.device, self.dtype)
        sparse, steps, status = self.descend(problem, scaled)
        return Attempt(problem.completed(scaled.fitted(problem, sparse, sparse != 0)), None, status, steps)

    def descend(self, problem: GroupedLeastSquares, scaled: Scaled) -> tuple[Tensor, int, Status]:
        """The scaled weights (M, N) where ADMM settles, zero outside their support; the steps; why it stopped."""
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        inverse = _Resolvent(scaled.grams, self.every, self.max_iter, self.rho)
        rho, sparse = self.rho, scaled.dense
        price = torch.zeros_like(sparse)
        mask = seen = problem.select(sparse.square(), self.grow)
        sparse = sparse * mask
        for step in range(1, self.max_iter + 1):
            weights = inverse.apply(torch.add(scaled.cross - price, sparse, alpha=rho), rho)
            free = torch.add(weights, price, alpha=1 / rho)
            mask = problem.select(free.square(), self.grow)
            sparse = free * mask
            price = (free - sparse).mul_(rho)
            if time.perf_counter() > deadline:
                return sparse, step, Status.TIME_LIMIT
            if step % self.every == 0:
                moved = int((mask ^ seen).sum()) / 2
                if moved < 1:
                    return sparse, step, Status.CONVERGED
                share = moved / max(int(mask.sum()), 1)
                rho *= self.rises[0 if share >= CHANGED[0] else 1 if share >= CHANGED[1] else 2]
                seen = mask
        return sparse, self.max_iter, Status.MAX_ITER


class _Resolvent:
    """(H + rho I)^-1 for rising rho, by what costs least: the inverse itself where many rows share it, else H's
    eigenvectors; and no eigenvectors where so few inverses are formed that they cost more.
    """

    def __init__(self, grams: Grams, every: int, steps: int, rho: float) -> None:
        """Every so many of the steps rho, which begins here, changes."""
        self.matrices = grams.matrices
        width, rows = self.matrices.shape[1], len(grams.owner) * every / len(self.matrices)
        # an inverse is two N^3; a row between two changes takes two N^2 with it, and four with eigenvectors
        self.direct = width >= MANY and rho >= FIRM and (width - rows) * steps / every < SIX * width
        self.shared = self.direct or width < rows
        self.rho, self.inverse = 0.0, self.matrices

    def apply(self, right: Tensor, rho: float) -> Tensor:
        """right (H + rho I)^-1."""
        grouped = right.reshape(len(self.matrices), -1, right.shape[1])
        if not self.shared:
            values, vectors = self._eigenpairs
            out: Tensor = ((grouped @ vectors) / (values[:, None] + rho)) @ vectors.mT
            return out.reshape(right.shape)
        if rho != self.rho:
            self.rho, self.inverse = rho, self._inverted(rho)
        return (grouped @ self.inverse).reshape(right.shape)

    def _inverted(self, rho: float) -> Tensor:
        if self.direct:
            lifted = self.matrices.clone()
            lifted.diagonal(dim1=1, dim2=2).add_(rho)
            return spd_inverse(lifted)
        values, vectors = self._eigenpairs
        return (vectors / (values[:, None] + rho)) @ vectors.mT

    @cached_property
    def _eigenpairs(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrices)
        return values.clamp(min=0), vectors
