"""One half of a layer as a product A B: the best sparse B beside a given A.

    minimise  tr(A B H (A B)^T) / 2 - <C, A B>   over B (r, N) with k nonzeros

Its Hessian is (A^T A) x H (Kronecker product), of unit diagonal once the columns of A have unit norm and H has unit
diagonal. ADMM with a rising penalty, whose resolvent is two eigendecompositions A^T A = U L U^T, H = V M V^T:

    B <- U [ U^T (A^T C + rho Z - Y) V / (L_i M_j + rho) ] V^T      Z <- the k largest of B + Y / rho
                                                                    Y <- Y + rho (B - Z)

Then conjugate gradients on the support, in float64.
Source: Boyd et al. 2011, section 9.1; the step rule for rho is that of `RisingPenalty`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.solvers.least_squares.rising_penalty import CHANGED, RisingPenalty

RHO, EVERY = 0.1, 3  # the first penalty, and the steps between two changes of it
POLISH = 20  # steps of conjugate gradients, at most


@dataclass(frozen=True, eq=False)
class Metric:
    """A layer's moments with unit diagonal, float64, and what ADMM needs of them in its own precision.

    gram, cross      H (N, N), C (M, N); inputs that are constantly zero have no part in either
    scale            (N,): weights times it are in these coordinates
    values, vectors  of H = V diag(M) V^T
    """

    gram: Tensor
    cross: Tensor
    scale: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, gram: Tensor, cross: Tensor, dtype: torch.dtype) -> Metric:
        """Of G (N, N) and C (M, N)."""
        diagonal = gram.diagonal()
        live = diagonal > 0
        scale = torch.where(live, diagonal, 1.0).sqrt()
        unit = torch.where(live[:, None] & live, gram / (scale[:, None] * scale), 0.0)
        unit.diagonal().fill_(1.0)
        values, vectors = torch.linalg.eigh(unit)
        return cls(unit, cross / scale * live, scale, values.clamp(min=0).to(dtype), vectors.to(dtype))


def right_half(metric: Metric, left: Tensor, start: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """A with columns of unit norm, and the B (r, N) with `count` nonzeros that ADMM finds from `start`; float64.

    In the metric's coordinates. The product of the two is that of `left` with the B that belongs to it.
    """
    norms = left.norm(dim=0)
    # a column of zeros makes its row of B worthless: it starts, and stays, without a weight
    left, start = left / torch.where(norms > 0, norms, 1.0), start * norms[:, None]
    mask = _support(metric, left, start, count, steps)
    return left, _polished(metric, left, start * mask, mask, min(steps, POLISH))


def _support(metric: Metric, left: Tensor, start: Tensor, count: int, steps: int) -> Tensor:
    """(r, N) bool: where ADMM settles, or where it is after so many steps."""
    dtype, rises = metric.values.dtype, RisingPenalty.rises
    slope, sparse = (left.T @ metric.cross).to(dtype), start.to(dtype)
    values, vectors = torch.linalg.eigh((left.T @ left).to(dtype))
    curvature = values.clamp(min=0)[:, None] * metric.values
    mask = seen = largest(sparse, count)
    sparse, price, rho = sparse * mask, torch.zeros_like(sparse), RHO
    for step in range(1, steps + 1):
        wanted = vectors.T @ torch.add(slope - price, sparse, alpha=rho) @ metric.vectors
        free = vectors @ (wanted / (curvature + rho)) @ metric.vectors.T
        free = torch.add(free, price, alpha=1 / rho)
        mask = largest(free, count)
        sparse = free * mask
        price = (free - sparse).mul_(rho)
        if step % EVERY == 0:
            moved = int((mask ^ seen).sum()) / 2
            if moved < 1:
                break
            share, seen = moved / max(count, 1), mask
            rho *= rises[0 if share >= CHANGED[0] else 1 if share >= CHANGED[1] else 2]
    return mask


def _polished(metric: Metric, left: Tensor, weights: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Conjugate gradients on the support: not to a larger value than that of `weights`."""
    square = left.T @ left
    residual = (left.T @ metric.cross - square @ weights @ metric.gram) * mask
    direction, size = residual, float(residual.square().sum())
    for _ in range(steps):
        image = (square @ direction @ metric.gram) * mask
        curvature = float((direction * image).sum())
        # a direction that costs nothing, up to rounding, leads nowhere
        if not curvature > 1e-14 * float(direction.square().sum()):
            break
        weights = torch.add(weights, direction, alpha=size / curvature)
        residual = torch.sub(residual, image, alpha=size / curvature)
        before, size = size, float(residual.square().sum())
        direction = torch.add(residual, direction, alpha=size / before)
    return weights


def largest(scores: Tensor, count: int) -> Tensor:
    """A mask (r, N) of the entries of largest magnitude."""
    sizes = scores.abs().flatten()
    if not 0 < count < len(sizes):
        return torch.full(scores.shape, count > 0)
    mask = sizes >= sizes.kthvalue(len(sizes) - count + 1).values
    if int(mask.sum()) > count:  # several are as large as the last of them
        mask = torch.zeros_like(mask).index_fill_(0, sizes.topk(count).indices, True)
    return mask.view_as(scores)
