"""The perspective relaxation of a reconstruction, and the diagonal that makes it tight.

    B(d) = minimise  tr(w (H - diag d) w^T) - 2 <c, w> + sum_mi d_i w_mi^2 / z_mi    over w and 0 <= z <= 1 in the
                     convex hull of the pattern's masks

in coordinates where every input has second moment 1. With z a mask it is the reconstruction itself; the larger d, the
better is the bound, as long as H - diag(d) stays positive semidefinite. B is concave in d with the gradient
sum_m w_mi^2 (1 / z_mi - 1).
Source: Gunluk, Linderoth 2010 (perspective); Zheng, Sun, Li 2014 and Dong, Chen, Linderoth 2015 (the choice of d).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.patterns import Pattern

RELAXED = 1.6  # ADMM's over-relaxation
BISECTIONS = 20  # for the price of a group's budget
NEWTON = 2  # steps at each price for the share of a cell of many weights
FIXED = 1e100  # the reach of a cell that must stay


@dataclass
class Relaxation:
    """ADMM for B(d) at one d after the other, each from where the last one ended.

    w and its copy u (M, N) with scaled multipliers y; `rho` follows the residuals.
    """

    problem: SparseLeastSquares
    gram: Tensor  # H (N, N), with unit diagonal
    cross: Tensor  # (M, N)
    u: Tensor
    y: Tensor
    rho: float

    @classmethod
    def of(cls, problem: SparseLeastSquares, scale: Tensor, rho: float) -> Relaxation:
        """From the dense weights. `scale` (N,) is sqrt(diag G), 1 where an input is constant."""
        live = problem.gram.diagonal() > 0
        gram = torch.where(live[:, None] & live, problem.gram / (scale[:, None] * scale), 0.0)
        gram.diagonal().fill_(1.0)
        dense = torch.where(live, problem.target * scale, 0.0)
        cross = torch.where(live, problem.cross / scale, 0.0)
        return cls(problem, gram, cross, dense, torch.zeros_like(dense), rho)

    def solve(self, d: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """ADMM's solution w (M, N), and the gradient of B with respect to d (N,)."""
        values, vectors = torch.linalg.eigh(self.gram - torch.diag(d))
        values = values.clamp(min=0)
        w, slope = self.u, d
        for step in range(steps):
            right = 2 * self.cross + self.rho * (self.u - self.y)
            w = (right @ vectors / (2 * values + self.rho)) @ vectors.T
            x = RELAXED * w + (1 - RELAXED) * self.u + self.y
            z = self._shares(x, d)
            ratio = self.rho * x / (self.rho * z + 2 * d)  # u / z
            before, self.u = self.u, ratio * z
            self.y = x - self.u
            slope = (ratio.square() * (z - z.square())).sum(0)
            if step % 5 == 4 and step < 0.7 * steps:
                self._balance(float((w - self.u).norm()), float((self.u - before).norm()))
        return w, slope

    def _balance(self, primal: float, dual: float) -> None:
        factor = 2.0 if primal > 3 * dual else 0.5 if dual > 3 * primal else 1.0
        self.rho, self.y = self.rho * factor, self.y / factor

    def _shares(self, x: Tensor, d: Tensor) -> Tensor:
        """(M, N): z of the proximal step at x, minimise sum rho d x^2 / (rho z + 2 d)."""
        pattern, kernel, always = self.problem.pattern, self.problem.kernel, self.problem.always
        shape = (x.shape[0], x.shape[1])
        never = pattern.folded(torch.ones_like(x), kernel) < 0
        fixed = None if always is None else pattern.folded(always.double(), kernel) > 0
        cells = _Cells(pattern, kernel, (self.rho * x).square() * d, d, self.rho, never, fixed)
        return pattern.unfolded(cells.shares(pattern.quota(shape, kernel)), shape, kernel)


@dataclass(frozen=True, eq=False)
class _Cells:
    """The share that each cell (groups, cells) takes of its group's budget at a price.

    `force` (M, N) is (rho x)^2 d; cells that can `never` be kept have a share of 0, `fixed` ones of 1, at any price.
    """

    pattern: Pattern
    kernel: int
    force: Tensor
    d: Tensor
    rho: float
    never: Tensor
    fixed: Tensor | None

    def shares(self, quota: int) -> Tensor:
        """The shares at the price at which they add up to the quota, by bisection in every group at once."""
        least, most = self._worth(1.0), self._worth(0.0)
        if quota == 0 or int((~self.never).sum(1).max()) <= quota:
            return (~self.never).to(least) * (quota > 0)
        # at the first price the best cells alone fill the quota, at the second no more than the quota take part
        low = least.topk(quota, 1).values[:, -1:].clamp(min=1e-150)
        high = torch.maximum(most.topk(quota + 1, 1).values[:, -1:], low)
        demand = self._single() if least.numel() == self.force.numel() else self._many
        z = torch.zeros_like(least)
        for _ in range(BISECTIONS):
            price = (low * high).sqrt()
            z = demand(price, z)
            full = z.sum(1, keepdim=True) > quota
            low, high = torch.where(full, price, low), torch.where(full, high, price)
        return demand(high, z)

    def _worth(self, z: float) -> Tensor:
        """Square root of the marginal gain of a cell at share z: the largest price at which it is still selected."""
        worth = self._fold(self.force / (self.rho * z + 2 * self.d).square(), 0.0).sqrt()
        return worth if self.fixed is None else worth.masked_fill(self.fixed, FIXED)

    def _single(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The demand of cells of one weight each, in closed form."""
        reach, own = self._fold(self.force.sqrt(), 0.0), self._fold(self.d.expand_as(self.force), 1.0)
        if self.fixed is not None:
            reach = reach.masked_fill(self.fixed, FIXED)
        return lambda price, _: ((reach / price - 2 * own) / self.rho).clamp(0, 1)

    def _many(self, price: Tensor, z: Tensor) -> Tensor:
        """The demand of cells of many weights: Newton's method on 1 / worth, which is nearly linear in z."""
        shape = (self.force.shape[0], self.force.shape[1])
        for _ in range(NEWTON):
            spread = self.rho * self.pattern.unfolded(z, shape, self.kernel) + 2 * self.d
            now = self._fold(self.force / spread.square(), 0.0)
            falls = self.rho * self._fold(self.force / spread**3, 0.0)
            z = (z + now * (now.sqrt() / price - 1) / falls.clamp(min=1e-300)).clamp(0, 1)
        return z if self.fixed is None else z.masked_fill(self.fixed, 1.0)

    def _fold(self, values: Tensor, otherwise: float) -> Tensor:
        """The values of the cells, `otherwise` where a cell can never be kept."""
        return self.pattern.folded(values, self.kernel).masked_fill(self.never, otherwise)


def centred(gram: Tensor, weights: Tensor, d: Tensor, barrier: float, steps: int = 10) -> Tensor:
    """Argmax of <weights, d> + barrier (log det(H - diag d) + sum log d), by Newton's method from an interior d."""
    eye = torch.eye(len(d), dtype=d.dtype)
    for _ in range(steps):
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram - torch.diag(d)))
        # in units of d, so that entries of all sizes are treated alike
        slope = d * (weights / barrier - inverse.diagonal()) + 1
        curvature = (d[:, None] * d) * inverse.square() + eye
        move = torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(curvature))[:, 0]
        length = min(1.0, 0.9 / max(float((-move).max()), 1e-300))
        while bool(torch.linalg.cholesky_ex(gram - torch.diag(d + length * d * move)).info):
            length *= 0.7
        d = d * (1 + (length if length == 1 else 0.95 * length) * move)
        if float(slope @ move) < 1e-2:
            break
    return d
