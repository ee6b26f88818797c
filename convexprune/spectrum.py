"""The ends of the spectrum of a positive definite matrix, to the nearest; nothing here is certain.

A large matrix is not reduced to tridiagonal form for one number: some blocks of a Krylov space of the matrix, or of its
inverse by a Cholesky factor, hold the largest eigenvalue to nearly all digits. It is never above the true one but for
rounding, so the smallest is never below.
Source: Golub, Van Loan, Matrix Computations, 4th ed., section 10.3.6 (block Lanczos).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

LARGE: Final = 768  # rows from which this is faster than LAPACK's eigenvalues
BLOCK: Final = 8
BLOCKS: Final = 16  # at most; most Gram matrices need 5 to 10
STILL: Final = 1e-13  # relative: a block that adds no more is the last; a certificate does not rely on it


def smallest(matrix: Tensor, factor: Tensor) -> float:
    """The smallest eigenvalue of a matrix (n, n) with its Cholesky factor."""
    if len(matrix) < LARGE:
        return float(torch.linalg.eigvalsh(matrix)[0])
    return 1 / _largest(lambda block: torch.cholesky_solve(block, factor), factor)


def largest(matrix: Tensor) -> float:
    """The largest eigenvalue of a matrix (n, n)."""
    if len(matrix) < LARGE:
        return float(torch.linalg.eigvalsh(matrix)[-1])
    return _largest(lambda block: matrix @ block, matrix)


def _largest(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    start = torch.randn(len(like), BLOCK, generator=torch.Generator().manual_seed(0), dtype=like.dtype)
    block = torch.linalg.qr(start).Q
    basis, images, found = block, apply(block), 0.0
    for _ in range(BLOCKS):
        small = basis.T @ images
        before, found = found, float(torch.linalg.eigvalsh((small + small.T) / 2)[-1])
        if found - before <= STILL * found:
            break
        rest = images[:, -BLOCK:]
        for _ in range(2):  # twice is enough
            rest = rest - basis @ (basis.T @ rest)
        block = torch.linalg.qr(rest).Q
        basis, images = torch.cat([basis, block], 1), torch.cat([images, apply(block)], 1)
    return found
