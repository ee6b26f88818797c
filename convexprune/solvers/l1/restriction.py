"""A layer's problem restricted, neuron by neuron, to some columns and some inequality rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from convexprune.forms import BallProblem, LassoProblem
from convexprune.solvers.l1.interior_point import Bucket


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


def restrict_ball(problem: BallProblem, inputs: Tensor, neurons: Tensor, columns: Tensor, rows: Tensor,
                  margin: float) -> Bucket:  # fmt: skip
    """The bucket of a ball problem: H = X_A^T X_A, c = X_A^T y over a neuron's active samples A.

    inputs (n, P) float64 on the working device. Each row's ceiling is lowered by margin * its norm on the neuron's
    columns; a row that is zero there says nothing of these columns and is left out.
    """
    device = inputs.device
    which, column_mask = _padded(columns[neurons])
    where, row_mask = _padded(rows[neurons])
    batch, width, height = len(neurons), which.shape[1], where.shape[1]
    hessian = torch.zeros(batch, width, width, dtype=torch.float64, device=device)
    linear = torch.zeros(batch, width, dtype=torch.float64, device=device)
    slopes = torch.zeros(batch, height, width, dtype=torch.float64, device=device)
    bound = torch.ones(batch, height, dtype=torch.float64, device=device)
    for i, neuron in enumerate(neurons.tolist()):
        k, r = int(column_mask[i].sum()), int(row_mask[i].sum())
        chosen, facing = which[i, :k].to(device), where[i, :r].to(device)
        samples = problem.active[:, neuron].nonzero()[:, 0]
        part = inputs.index_select(0, samples.to(device)).index_select(1, chosen)
        target = problem.outputs[samples, neuron].to(device)
        torch.mm(part.T, part, out=hessian[i, :k, :k]) if k == width else hessian[i, :k, :k].copy_(part.T @ part)
        linear[i, :k] = part.T @ target
        slopes[i, :r, :k] = inputs.index_select(0, facing).index_select(1, chosen)
        ceiling = problem.ceiling[where[i, :r], neuron] if len(problem.ceiling) > 1 else problem.ceiling[0, 0]
        reach = slopes[i, :r].norm(dim=1)
        bound[i, :r] = torch.where(reach > 0, ceiling.to(device) - margin * reach, 1.0)
        row_mask[i, :r] &= (reach > 0).to(row_mask.device)
    return Bucket(neurons.to(device), which.to(device), column_mask.to(device), where.to(device), row_mask.to(device),
                  hessian, linear, slopes, bound)  # fmt: skip


def restrict_lasso(problem: LassoProblem, neurons: Tensor, columns: Tensor, device: torch.device) -> Bucket:
    """The bucket of a lasso: H = G, c = C on a neuron's columns, no rows."""
    which, mask = _padded(columns[neurons])
    which, mask = which.to(device), mask.to(device)
    gram, cross = problem.gram.to(device), problem.cross.to(device)
    hessian = gram[which[:, :, None], which[:, None, :]] * mask[:, :, None] * mask[:, None, :]
    linear = cross[neurons.to(device)[:, None], which] * mask
    batch, width = which.shape
    none = torch.zeros(batch, 0, dtype=torch.long, device=device)
    return Bucket(neurons.to(device), which, mask, none, none.bool(), hessian, linear,
                  hessian.new_zeros(batch, 0, width), hessian.new_zeros(batch, 0))  # fmt: skip


def _padded(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the True entries of each row, padded with 0, and the mask of the real ones."""
    counts = chosen.sum(1)
    width = int(counts.max())
    index = torch.argsort(~chosen, dim=1, stable=True)[:, :width]
    mask = torch.arange(width, device=chosen.device)[None] < counts[:, None]
    return torch.where(mask, index, 0), mask
