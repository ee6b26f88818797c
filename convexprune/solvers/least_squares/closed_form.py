"""Optimal Brain Surgeon in closed form: all neurons in one batch of factorisations.

    x = t - P_{:,Q} (P_QQ)^-1 t_Q,   P = G^-1,   t = C P the unconstrained optimum (in a plain layer the dense weights)

by the removed side where that is the smaller one, else by least squares on what stays; neurons with the same mask share
a factorisation. Where the certificate does not show the optimum, what rounding and a ridge left is worked off by
conjugate gradients on the free weights, with the same least squares as preconditioner.
Source: Hassibi, Stork, NIPS 1993; theory of the bordered system as in any text on quadratic programming.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from convexprune.forms import EqualityQuadratic, LeastSquares
from convexprune.problem import judge
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.on_support import best_on_support
from convexprune.solvers.least_squares.spd_inverse import NotDefinite

GAP: Final = 1e-6  # a relative gap up to it counts as none
NONE: Final = 1e-24  # of the value at 0: an error this small is that of weights rounded at 1e-12
STEPS = 6  # of the conjugate gradients: eigenvalues below the ridge come in few clusters
UNSHOWN: Final = (
    "the certificate does not show that the point is optimal: the layer's moments are nearly singular, and "
    "layer.damped(1e-6) makes the bound tight"
)


@dataclass(frozen=True)
class ClosedForm:
    """The exact minimiser; where G is singular, the one nearest to the dense weights (see `support`)."""

    takes: ClassVar[type] = EqualityQuadratic
    starts: ClassVar[bool] = False

    def solve(self, problem: EqualityQuadratic, start: Tensor | None = None) -> Attempt:
        """The minimiser is its own witness, and CONVERGED if that shows it. The start is not used."""
        pieces = [*problem.pieces()]
        try:
            weights = [self._exact(piece) for piece in pieces]
            attempt = shown(problem, _gathered(problem, pieces, weights))
            if attempt.status is Status.CONVERGED:
                return attempt
            weights = [_refined(piece, found) for piece, found in zip(pieces, weights, strict=True)]
        except NotDefinite:
            return Attempt(problem.dense, None, Status.NUMERICAL, 0)
        refined = shown(problem, _gathered(problem, pieces, weights))
        return refined if problem.value(refined.x) <= problem.value(attempt.x) else attempt

    def _exact(self, piece: LeastSquares) -> Tensor:
        found = self._by_removed(piece) if 2 * int(piece.removed.sum()) < piece.removed.numel() else None
        return best_on_support(piece.gram, piece.cross, ~piece.removed, piece.dense) if found is None else found

    def _by_removed(self, piece: LeastSquares) -> Tensor | None:
        """None where G has no inverse that could be trusted."""
        diagonal = piece.gram.diagonal()
        scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
        factor, failed = torch.linalg.cholesky_ex(piece.gram / (scale[:, None] * scale))
        if bool(failed) or float(factor.diagonal().min()) < 1e-5:
            return None
        # in coordinates with unit diagonal: x = w sqrt(G_ii)
        inverse = torch.cholesky_inverse(factor)
        optimum = torch.cholesky_solve((piece.cross / scale).T, factor).T
        multipliers = best_on_support(inverse, optimum, piece.removed, torch.zeros_like(optimum))
        return torch.where(piece.removed, 0.0, (optimum - multipliers @ inverse) / scale)


def shown(problem: EqualityQuadratic, x: Tensor) -> Attempt:
    """The point as its own witness: CONVERGED where the certificate shows that it is optimal, else UNPROVEN."""
    proof = judge(problem, x, x)
    if proof.relative_gap <= GAP or proof.value <= NONE * problem.value(torch.zeros_like(x)):
        return Attempt(x, x, Status.CONVERGED, 1)
    return Attempt(x, x, Status.UNPROVEN, 1, note=UNSHOWN)


def _gathered(problem: EqualityQuadratic, pieces: list[LeastSquares], weights: list[Tensor]) -> Tensor:
    """The problem's point, of what was found for each piece."""
    found = weights[0].new_zeros(len(pieces[0].neurons), weights[0].shape[1])
    for piece, own in zip(pieces, weights, strict=True):
        found[piece.neurons] = own
    return problem.completed(found)


def _refined(piece: LeastSquares, weights: Tensor) -> Tensor:
    """Nearer to the minimiser than weights (neurons, N) that a ridge has kept from it.

    Source: Hestenes, Stiefel 1952, preconditioned.
    """
    free = ~piece.removed

    def preconditioned(slopes: Tensor) -> Tensor:
        return best_on_support(piece.gram, slopes, free, torch.zeros_like(slopes))

    residual = (piece.cross - weights @ piece.gram) * free
    direction = preconditioned(residual)
    size = (residual * direction).sum(1, keepdim=True)
    for _ in range(STEPS):
        image = (direction @ piece.gram) * free
        curvature = (direction * image).sum(1, keepdim=True)
        weights = weights + torch.where((curvature > 0) & (size > 0), size / curvature, 0.0) * direction
        residual = (piece.cross - weights @ piece.gram) * free  # afresh: it is a small difference
        ahead = preconditioned(residual)
        before, size = size, (residual * ahead).sum(1, keepdim=True)
        direction = ahead + torch.where(before > 0, size / before, 0.0) * direction
    return weights
