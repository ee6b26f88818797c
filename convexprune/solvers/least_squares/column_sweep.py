"""One sweep over the inputs, left to right, with factors that all neurons share.

When input j is pruned in a neuron, the error w_j is made good by the inputs to its right only:
    w_{j:} <- w_{j:} - w_j U_{j,j:} / U_jj,     U upper triangular with U^T U = (H + damping I)^-1
so that every neuron uses the same rows of U whatever it has lost. In blocks of inputs, the weights with the smallest
w_j^2 / U_jj^2 leave.
Source: Frantar, Alistarh, ICML 2023 (SparseGPT), Algorithm 1.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.layout import Layout, ranks
from convexprune.options import check_options, positive, whole
from convexprune.patterns import PerRow, Unstructured, select
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import layout_of
from convexprune.solvers.least_squares.scaling import Scaled
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class ColumnSweep:
    """One sweep over the inputs, as in SparseGPT.

    The sweep takes the inputs in blocks and chooses the mask of each block at once. A block holds the inputs of a group
    of the pattern, as in N:M, or `block` inputs if that is fewer; it then gets its share of the group's count. For
    patterns of blocks or channels, a given support, and weights that must stay, the whole mask is chosen first.

    Args:
        damping: Ridge that is added to H, as a fraction of its mean diagonal; the method is unstable without it.
        block: Largest number of inputs in a block.
        device: Where the sweep runs: "cpu", "cuda", ...
        dtype: Precision of the sweep, torch.float32 or torch.float64.

    Raises:
        ValueError: For an option out of its range; TypeError for one of another type.

    Source:
        Frantar, Alistarh, ICML 2023 (SparseGPT), Algorithm 1.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.Reconstruction(layer, cp.PerRow(1)), cp.ColumnSweep())
        >>> solution.x.round(decimals=3).tolist()
        [[5.0, 0.0, 0.0], [0.0, -4.0, 0.0]]
    """

    takes: ClassVar[type] = SparseLeastSquares
    starts: ClassVar[bool] = False

    damping: float = 0.01
    block: int = 128
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self, damping=positive, block=whole(1))

    def solve(self, problem: SparseLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used. Status NUMERICAL where the Gram matrix with its damping is not positive definite."""
        try:
            scaled = Scaled.of(problem, self.device, self.dtype)
            # the published damping is uniform in the inputs' own units
            ridge = self.damping * float(problem.gram.diagonal().mean()) / scaled.scale[0].square()
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled.grams64.matrices[0] + torch.diag(ridge)))
            factor = torch.linalg.cholesky(inverse, upper=True).to(scaled.dense)
        except NotDefinite:
            return Attempt(problem.completed(problem.target), None, Status.NUMERICAL, 0)
        weights = scaled.optimum.T.contiguous()  # (N, M): an input's weights lie together
        masks = _Masks(problem, weights, factor.diagonal())
        for begin, end in masks.blocks(self.block):
            errors = _sweep(weights[begin:end], masks.of(weights, begin, end), factor[begin:end, begin:end])
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


class _Masks:
    """The masks of blocks of inputs, which are asked for in order; see `ColumnSweep`."""

    def __init__(self, problem: SparseLeastSquares, weights: Tensor, diagonal: Tensor) -> None:
        layout = layout_of(problem)
        self.quota, self.size, self.width = layout.quota, layout.never.shape[1], len(weights)
        self.group, self.diagonal = layout.group.to(weights.device), diagonal
        self.seen = torch.zeros(layout.groups, dtype=torch.long, device=weights.device)
        self.mask = None
        self.cuts = [0, self.width]
        if layout.single and not bool(layout.never.any()) and problem.always is None:
            self.cuts = _cuts(layout)
        else:
            self.mask = problem.select(self._scores(weights, 0, self.width).cpu()).to(weights.device).T

    def blocks(self, most: int) -> list[tuple[int, int]]:
        """The first and the last input of each block: between two cuts, and at most `most` inputs."""
        return [
            (begin, min(begin + most, end))
            for start, end in itertools.pairwise(self.cuts)
            for begin in range(start, end, most)
        ]

    def of(self, weights: Tensor, begin: int, end: int) -> Tensor:
        """(b, M) bool: what stays of a block, for the weights (N, M) now."""
        if self.mask is not None:
            return self.mask[begin:end]
        scores, group = self._scores(weights, begin, end), self.group[:, begin:end]
        return (self._whole if {begin, end} <= set(self.cuts) else self._part)(scores, group).T

    def _scores(self, weights: Tensor, begin: int, end: int) -> Tensor:
        """(M, b)."""
        return (weights[begin:end] / self.diagonal[begin:end, None]).square().T

    def _whole(self, scores: Tensor, group: Tensor) -> Tensor:
        """(M, b) bool, of a block of whole groups: the quota of each."""
        flat = group.flatten()
        if bool((flat[1:] >= flat[:-1]).all()):  # one group lies behind the other
            return select(PerRow(self.quota), scores.reshape(-1, self.size)).reshape(scores.shape)
        return (ranks(scores.flatten(), flat) < self.quota).reshape(scores.shape)

    def _part(self, scores: Tensor, group: Tensor) -> Tensor:
        """(M, b) bool, of a part of the groups: their count up to its end less that up to its beginning.

        So the counts of all parts add up exactly.
        """
        held = torch.bincount(group.flatten(), minlength=len(self.seen))
        keep = self.quota * (self.seen + held) // self.size - self.quota * self.seen // self.size
        self.seen += held
        own = group[:, 0]
        most = int(keep[own[0]])
        if bool((group == own[0]).all()):
            return select(Unstructured(most), scores)
        if bool((group == own[:, None]).all() & (held[own] == scores.shape[1]).all() & (keep[own] == most).all()):
            return select(PerRow(most), scores)
        return (ranks(scores.flatten(), group.flatten()) < keep[group.flatten()]).reshape(scores.shape)


def _cuts(layout: Layout) -> list[int]:
    """The places between inputs, and both ends, that no group of single weights reaches across."""
    width = layout.cell.shape[1]
    inputs = torch.arange(width).expand_as(layout.cell).flatten()
    own = torch.empty_like(inputs).scatter_(0, layout.cell.flatten(), inputs).reshape(layout.never.shape)
    begun, ended = (torch.bincount(ends + 1, minlength=width + 1) for ends in (own.amin(1), own.amax(1)))
    across = (begun - ended).cumsum(0)[1:width]
    return [0, *((across == 0).nonzero()[:, 0] + 1).tolist(), width]
