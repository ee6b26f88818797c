"""Conjugate gradients for least squares on given supports: all neurons at once, one matrix product a step.

Source: Hestenes, Stiefel 1952, with the projection onto each neuron's support.
"""

from __future__ import annotations

import torch
from torch import Tensor


def on_support(gram: Tensor, cross: Tensor, weights: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Improve weights (M, N), zero outside mask, towards argmin of tr(W H W^T) - 2 <C, W>; not to a larger value.

    gram (N, N) has unit diagonal."""
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
