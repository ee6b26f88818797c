"""Layer-wise Optimal Brain Surgeon as published: one inverse, saliencies sorted once, updates one after the other.

    L_q = w_q^2 / [P]_qq,    w <- w - w_q P e_q / [P]_qq,    P = (E[x x^T] + I / alpha)^-1

with what was removed before put back to zero after each update. Its theory holds for the first removal only, since P is
never brought up to date: a baseline; `ExactOBS` is the exact method.
Source: Dong, Chen, Pan, NIPS 2017, Algorithm 1, and the published code (Woodbury's recursion from alpha I is this P).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.options import check_options, positive
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class LayerwiseOBS:
    """The published algorithm; all neurons remove their r-th weight together.

    alpha  where Woodbury's recursion starts: a ridge 1 / alpha in the inputs' own units
    """

    takes: ClassVar[type] = SparseLeastSquares
    starts: ClassVar[bool] = False

    alpha: float = 1e6

    def __post_init__(self) -> None:
        check_options(self, alpha=positive)

    def inverse(self, problem: SparseLeastSquares) -> Tensor:
        """(N, N), float64: P."""
        ridge = torch.eye(len(problem.gram), dtype=torch.float64) / self.alpha
        return torch.cholesky_inverse(torch.linalg.cholesky(problem.gram + ridge))

    def solve(self, problem: SparseLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used. Status NUMERICAL where the Gram matrix with its ridge is not positive definite."""
        try:
            inverse = self.inverse(problem)
        except NotDefinite:
            return Attempt(problem.completed(problem.target), None, Status.NUMERICAL, 0)
        pivots = inverse.diagonal()
        saliency = problem.target.square() / pivots
        keep = problem.select(saliency)
        weights = problem.target.clone()
        # a neuron's removals in rising saliency; neurons with fewer removals wait at the end
        order = torch.where(keep, torch.inf, saliency).argsort(dim=1, stable=True)
        counts = (~keep).sum(1)
        alive = torch.ones_like(keep)
        for step in range(int(counts.max())):
            rows = (counts > step).nonzero()[:, 0]
            inputs = order[rows, step]
            alive[rows, inputs] = False
            size = weights[rows, inputs] / pivots[inputs]
            weights[rows] = (weights[rows] - size[:, None] * inverse[inputs]) * alive[rows]
        return Attempt(problem.completed(weights), None, Status.CONVERGED, int(counts.sum()))
