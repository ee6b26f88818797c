"""How much a layer can enlarge a difference of its inputs, in the Frobenius norm: rigorous upper bounds.

A convolution with zero padding is a part of the circular one on a torus as large as the padded input, and that one is
block diagonal in frequencies: its norm is the largest singular value over all of them, computed, not iterated for.
Source: Sedghi, Gupta, Long, ICLR 2019, Theorem 6, for the torus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-10  # relative: what the transform and the decomposition may miss in float64


def linear_gain(weight: Tensor) -> float:
    """||W||_2."""
    return float(torch.linalg.matrix_norm(weight.detach().cpu().double(), 2)) * (1 + ROUNDING)


def convolution_gain(weight: Tensor, size: Sequence[int], dilation: Sequence[int], groups: int = 1) -> float:
    """The norm of a convolution (out, in / groups, *kernel) on inputs padded to `size`; any stride only lowers it.

    The larger of the groups' norms. `size` must hold the dilated kernel.
    """
    kernel = weight.detach().cpu().double()
    axes = tuple(range(2, kernel.ndim))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel.shape[2:], strict=True)]
    if any(s < r for s, r in zip(size, reach, strict=True)):
        raise ValueError(f"size is {tuple(size)}; it must hold the dilated kernel {tuple(reach)}")
    spread = kernel.new_zeros(*kernel.shape[:2], *size)
    spread[(slice(None), slice(None), *(slice(0, r, d) for r, d in zip(reach, dilation, strict=True)))] = kernel
    waves = torch.fft.fftn(spread, dim=axes).flatten(2).permute(2, 0, 1)  # (frequencies, out, in / groups)
    parts = waves.chunk(groups, dim=1)
    largest = max(_largest(part) for part in parts)
    return largest * (1 + ROUNDING)


def norm_gain(scale: Tensor) -> float:
    """max |s| of a batch norm in evaluation mode: y = s (x - mean) + shift."""
    return float(scale.detach().cpu().double().abs().max())


def pooling_gain(kernel: Sequence[int], stride: Sequence[int], average: bool) -> float:
    """sqrt(prod ceil(k / s)), the most windows that an input is in; for averages over the root of a window's size."""
    overlap = math.prod(math.ceil(k / s) for k, s in zip(kernel, stride, strict=True))
    return math.sqrt(overlap / (math.prod(kernel) if average else 1))


def _largest(matrices: Tensor) -> float:
    """The largest singular value of (F, M, N) complex matrices, from the smaller of their Gram matrices."""
    tall = matrices.shape[1] >= matrices.shape[2]
    gram = matrices.mH @ matrices if tall else matrices @ matrices.mH
    return math.sqrt(max(float(torch.linalg.eigvalsh(gram)[:, -1].max()), 0.0))
