"""A layer's problem restricted, neuron by neuron, to some columns and some inequality rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexprune.solvers.l1.interior_point import Bucket
from convexprune.solvers.l1.scaling import ScaledBall, ScaledLasso


def buckets_of(columns: Tensor, rows: Tensor, waste: float = 1.5) -> list[Tensor]:
    """Indices of the neurons with any column, grouped so that padding a group costs about `waste` in either size.

    columns (M, P) bool, rows (M, n) bool.
    """
    wide, tall = columns.sum(1), rows.sum(1)
    groups: dict[tuple[int, int], list[int]] = {}
    for neuron in wide.nonzero()[:, 0].tolist():
        size = tuple(round(math.log(int(count[neuron]) + 32, waste)) for count in (wide, tall))
        groups.setdefault(size, []).append(neuron)  # type: ignore[arg-type]
    return [torch.tensor(group) for _, group in sorted(groups.items())]


def restrict_ball(
    ball: ScaledBall, neurons: Tensor, columns: Tensor, rows: Tensor, sizes: Tensor, margin: float
) -> Bucket:
    """The bucket of a ball problem: H = X_A^T X_A, c = X_A^T y over a neuron's active samples A.

    Each inequality is divided by its height on the neuron's columns, for weights of typical sizes (P,), and its ceiling
    is then lowered by the margin; a row that is zero there says nothing of these columns and is left out.
    """
    device = ball.inputs.device
    which, column_mask = _padded(columns[neurons])
    where, row_mask = _padded(rows[neurons])
    batch, width, count = len(neurons), which.shape[1], where.shape[1]
    hessian = torch.zeros(batch, width, width, dtype=torch.float64, device=device)
    linear = torch.zeros(batch, width, dtype=torch.float64, device=device)
    slopes = torch.zeros(batch, count, width, dtype=torch.float64, device=device)
    bound = torch.ones(batch, count, dtype=torch.float64, device=device)
    height = torch.ones(batch, count, dtype=torch.float64, device=device)
    for i, neuron in enumerate(neurons.tolist()):
        k, r = int(column_mask[i].sum()), int(row_mask[i].sum())
        chosen, facing = which[i, :k].to(device), where[i, :r].to(device)
        samples = ball.active[:, neuron].nonzero()[:, 0]
        part = ball.inputs.index_select(0, samples).index_select(1, chosen)
        target = ball.outputs[samples, neuron]
        torch.mm(part.T, part, out=hessian[i, :k, :k]) if k == width else hessian[i, :k, :k].copy_(part.T @ part)
        linear[i, :k] = part.T @ target
        faced = ball.inputs.index_select(0, facing).index_select(1, chosen)
        height[i, :r] = heights(faced, sizes[chosen])
        slopes[i, :r, :k] = faced / height[i, :r, None]
        ceiling = ball.ceiling[facing, neuron] if len(ball.ceiling) > 1 else ball.ceiling[0, 0]
        says = faced.any(1)
        bound[i, :r] = torch.where(says, ceiling / height[i, :r] - margin, 1.0)
        row_mask[i, :r] &= says.to(row_mask.device)
    which = which.to(device)
    return Bucket(neurons.to(device), which, column_mask.to(device), where.to(device), row_mask.to(device),
                  hessian, linear, ball.prices[which], slopes, bound, height)  # fmt: skip


def heights(inputs: Tensor, sizes: Tensor) -> Tensor:
    """(n,): the root of the summed squares of a row's terms, for weights of typical sizes (P,); 1 for a zero row."""
    found = (inputs * sizes).norm(dim=1)
    return torch.where(found > 0, found, 1.0)


def restrict_lasso(lasso: ScaledLasso, neurons: Tensor, columns: Tensor) -> Bucket:
    """The bucket of a lasso: H = G, c = C on a neuron's columns, no rows."""
    which, mask = _padded(columns[neurons])
    which, mask, neurons = (each.to(lasso.gram.device) for each in (which, mask, neurons))
    hessian = lasso.gram[which[:, :, None], which[:, None, :]] * mask[:, :, None] * mask[:, None, :]
    linear = lasso.cross[neurons[:, None], which] * mask
    batch, width = which.shape
    none = torch.zeros(batch, 0, dtype=torch.long, device=which.device)
    empty = hessian.new_zeros(batch, 0)
    return Bucket(neurons, which, mask, none, none.bool(), hessian, linear, lasso.prices[which],
                  hessian.new_zeros(batch, 0, width), empty, empty)  # fmt: skip


def _padded(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the True entries of each row, padded with 0, and the mask of the real ones."""
    counts = chosen.sum(1)
    width = int(counts.max())
    index = torch.argsort(~chosen, dim=1, stable=True)[:, :width]
    mask = torch.arange(width, device=chosen.device)[None] < counts[:, None]
    return torch.where(mask, index, 0), mask
