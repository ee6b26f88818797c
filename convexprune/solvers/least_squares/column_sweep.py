"""One sweep over the inputs, left to right, with factors that all neurons share.

When input j is pruned in a neuron, the error w_j is made good by the inputs to its right only:
    w_{j:} <- w_{j:} - w_j U_{j,j:} / U_jj,     U upper triangular with U^T U = (H + damping I)^-1
so that every neuron uses the same rows of U whatever it has lost. In blocks of inputs, the weights with the smallest
w_j^2 / U_jj^2 leave.
Source: Frantar, Alistarh, ICML 2023 (SparseGPT), Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.patterns import NM, Pattern, PerRow, Unstructured, select
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.scaling import Scaled
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class ColumnSweep:
    """SparseGPT's scheme.

    damping  added to H, as a fraction of its mean diagonal: part of the method, which is unstable without it
    block    inputs whose masks are chosen together, each block with its share of the count; of N:M each group by
             itself. Patterns that do not divide into blocks of inputs are chosen for the whole layer at once
    """

    takes: ClassVar[type] = SparseLeastSquares
    starts: ClassVar[bool] = False

    damping: float = 0.01
    block: int = 128
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping is {self.damping}; it must be a finite number > 0")
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be at least 1")

    def solve(self, problem: SparseLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used. Status NUMERICAL where the Gram matrix with its damping is not positive definite."""
        try:
            scaled = Scaled.of(problem, self.device, self.dtype)
            # the published damping is uniform in the inputs' own units
            ridge = self.damping * float(problem.gram.diagonal().mean()) / scaled.scale.square()
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled.gram64 + torch.diag(ridge)))
            factor = torch.linalg.cholesky(inverse, upper=True).to(scaled.gram)
        except NotDefinite:
            return Attempt(problem.completed(problem.target), None, Status.NUMERICAL, 0)
        weights = scaled.optimum.T.contiguous()  # (N, M): an input's weights lie together
        mask = _whole_mask(problem, weights, factor)
        width = len(weights)
        block = problem.pattern.m if isinstance(problem.pattern, NM) and mask is None else self.block
        for begin in range(0, width, block):
            end = min(begin + block, width)
            if mask is None:
                scores = (weights[begin:end] / factor.diagonal()[begin:end, None]).square()
                keep = _block_mask(problem.pattern, scores, begin, width)
            else:
                keep = mask[begin:end]
            errors = _sweep(weights[begin:end], keep, factor[begin:end, begin:end])
            weights[end:] -= factor[begin:end, end:].T @ errors
        return Attempt(problem.completed(scaled.restored(weights.T)), None, Status.CONVERGED, 1)


def _sweep(weights: Tensor, keep: Tensor, factor: Tensor) -> Tensor:
    """Prune the block's inputs (b, M) one after the other, in place; their scaled errors (b, M)."""
    errors = torch.zeros_like(weights)
    for j in range(len(weights)):
        errors[j] = torch.where(keep[j], 0.0, weights[j] / factor[j, j])
        weights[j:].addr_(factor[j, j:], errors[j], alpha=-1)
    weights.mul_(keep)
    return errors


def _whole_mask(problem: SparseLeastSquares, weights: Tensor, factor: Tensor) -> Tensor | None:
    """(N, M) bool: the mask of the whole layer where the pattern does not divide into blocks of inputs, else None."""
    pattern = problem.pattern
    if problem.always is None and (
        isinstance(pattern, (Unstructured, PerRow)) or (isinstance(pattern, NM) and problem.kernel == 1)
    ):
        return None
    scores = (weights / factor.diagonal()[:, None]).square().T
    return problem.select(scores.cpu()).to(weights.device).T


def _block_mask(pattern: Pattern, scores: Tensor, begin: int, width: int) -> Tensor:
    """(b, M) bool for scores (b, M): the pattern's mask of a block of inputs.

    Counts are those of the inputs up to the block's end less those up to its beginning, so that they add up exactly.
    """
    end, out = begin + len(scores), scores.shape[1]
    if isinstance(pattern, NM):
        return select(pattern, scores.T).T
    cells = width * out if isinstance(pattern, Unstructured) else width
    quota = pattern.quota((out, width))
    before, after = (quota * (at * cells // width) // cells for at in (begin, end))
    kind = Unstructured if isinstance(pattern, Unstructured) else PerRow
    return select(kind(after - before), scores.T).T
