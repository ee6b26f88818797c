"""Least squares on given supports: each neuron's best weights where its mask allows them.

Where the Gram matrix is nearly singular many weights are best; a ridge of 1e-10 in coordinates with unit diagonal
takes those nearest to the dense ones. Moments that were stored in float32 may be indefinite by their rounding: the
ridge is then 1e-10 more than twice the most negative eigenvalue, and moments that are worse than that are refused.
Inputs that are constantly zero get weight 0; all others are alike once they are scaled, however small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convexprune.solvers.least_squares.spd_inverse import NotDefinite

RIDGE = 1e-10
WELL = 1e-4  # a matrix whose Cholesky pivots are all larger needs no ridge
INDEFINITE = 1e-4  # eigenvalues below minus this are no rounding errors
MEMORY = 2**24  # bytes of a batch of Gram matrices: what the factorisations read then stays in the cache


def best_on_support(gram: Tensor, cross: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """(M, N), float64: argmin of tr(W G W^T) - 2 <C, W> over W that is zero outside `mask` (M, N) bool.

    gram (N, N), cross (M, N), target (M, N), the dense weights, all float64 on one device. Neurons with the same mask
    share one factorisation.
    Raises torch.linalg.LinAlgError where a Gram matrix is not positive semidefinite.
    """
    diagonal = gram.diagonal()
    live = diagonal > 0
    scale = torch.where(live, diagonal, 1.0).sqrt()
    unit = gram / (scale[:, None] * scale)
    ridge = ridge_of(
        torch.where(live[:, None] & live, unit, torch.eye(len(unit), dtype=unit.dtype, device=unit.device))
    )
    right = (cross / scale + ridge * target * scale) * live
    out = torch.zeros_like(target)
    supports, owner = torch.unique(mask & live, dim=0, return_inverse=True)
    if len(supports) == len(mask):  # no two are alike: keep the order
        supports, owner = mask & live, torch.arange(len(mask), device=mask.device)
    for which in _batches(supports.sum(1)):
        index, held = _padded(supports[which])
        block = unit[index[:, :, None], index[:, None, :]]
        block.mul_(held[:, :, None]).mul_(held[:, None, :])
        block.diagonal(dim1=1, dim2=2).copy_(1 + ridge * held.double())
        factor = torch.linalg.cholesky(block)
        neurons, of = _sharing(owner, which)
        places = index[of]
        wanted = torch.gather(right[neurons], 1, places) * held[of]
        found = _solved(factor, of, wanted) * held[of]
        out[neurons] = torch.zeros_like(right[neurons]).scatter_add_(1, places, found)
    return out / scale


def improved_on_support(gram: Tensor, cross: Tensor, weights: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Improve weights (M, N), zero outside mask, towards argmin of tr(W H W^T) - 2 <C, W>; not to a larger value.

    Conjugate gradients, all neurons at once, one matrix product a step. gram (N, N) has unit diagonal.
    Source: Hestenes, Stiefel 1952, with the projection onto each neuron's support.
    """
    weights = weights * mask
    residual = (cross - weights @ gram) * mask
    direction, size = residual, residual.square().sum(1, keepdim=True)
    least = 16 * torch.finfo(weights.dtype).eps
    for _ in range(steps):
        image = (direction @ gram) * mask
        curvature = (direction * image).sum(1, keepdim=True)
        # a direction that costs nothing, up to rounding, is one that H does not see: it leads nowhere
        seen = curvature > least * direction.square().sum(1, keepdim=True)
        length = torch.where(seen, size / curvature, 0.0)
        weights = weights + length * direction
        residual = residual - length * image
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp(min=1e-30) * direction
    return weights


def ridge_of(unit: Tensor) -> float:
    """The ridge with which a Gram matrix (N, N) of unit diagonal, and every principal part of it, is positive definite.

    Raises torch.linalg.LinAlgError for a matrix that is indefinite by more than rounding.
    """
    factor, failed = torch.linalg.cholesky_ex(unit)
    if not bool(failed) and float(factor.diagonal().min()) > WELL:
        return 0.0
    damped = unit + RIDGE * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    if not bool(torch.linalg.cholesky_ex(damped).info):
        return RIDGE
    least = float(torch.linalg.eigvalsh(unit)[0])
    if least < -INDEFINITE:
        raise NotDefinite(
            f"the Gram matrix has the eigenvalue {least:.1e} in coordinates with unit diagonal: it is no matrix of "
            "second moments; check the layer's moments"
        )
    return RIDGE + 2 * abs(least)


def _sharing(owner: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """The neurons whose supports are in the batch `which`, and where in it."""
    place = owner.new_full((int(owner.max()) + 1,), -1)
    place[which] = torch.arange(len(which), device=owner.device)
    neurons = (place[owner] >= 0).nonzero()[:, 0]
    neurons = neurons[place[owner[neurons]].argsort()]  # in the batch's order, so that the factors need no copy
    return neurons, place[owner[neurons]]


def _solved(factor: Tensor, of: Tensor, right: Tensor) -> Tensor:
    """Row i of right (R, k) solved with factor[of[i]]; `of` is sorted and names every factor."""
    if len(factor) == 1:
        return torch.cholesky_solve(right.T, factor[0]).T
    if 8 * len(of) * right.shape[1] ** 2 > 2 * MEMORY:  # few supports, many neurons: a factor at a time
        parts = zip(factor, torch.split(right, torch.bincount(of).tolist()), strict=True)
        return torch.cat([torch.cholesky_solve(part.T, one).T for one, part in parts])
    if len(of) > len(factor):
        factor = factor[of]
    # two triangular solves are ten times faster on a CPU batch than torch.cholesky_solve
    half = torch.linalg.solve_triangular(factor, right[..., None], upper=False)
    whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return whole[..., 0]


def _batches(counts: Tensor) -> list[Tensor]:
    """Supports of similar size together, none of them empty, each batch within MEMORY."""
    order = counts.argsort()
    order = order[counts[order] > 0]
    batches, begun = [], 0
    sizes = counts[order].tolist()
    for end in range(1, len(sizes) + 1):
        full = end == len(sizes) or 8 * (end + 1 - begun) * sizes[min(end, len(sizes) - 1)] ** 2 > MEMORY
        if full or sizes[end] > 1.15 * sizes[begun] + 8:
            batches.append(order[begun:end])
            begun = end
    return batches


def _padded(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of each row's True entries, padded, and which of them are real."""
    counts = mask.sum(1)
    width = int(counts.max())
    index = torch.argsort(mask.logical_not(), dim=1, stable=True)[:, :width]
    return index, torch.arange(width, device=mask.device) < counts[:, None]
