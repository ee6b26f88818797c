"""Optimal Brain Surgeon in closed form: all neurons in one batch of factorisations.

    x = t - P_{:,Q} (P_QQ)^-1 t_Q,   P = G^-1,   t = C P the unconstrained optimum (in a plain layer the dense weights)

by the removed side where that is the smaller one, else by least squares on what stays; neurons with the same mask share
a factorisation.
Source: Hassibi, Stork, NIPS 1993; theory of the bordered system as in any text on quadratic programming.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import EqualityQuadratic, LeastSquares
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.on_support import best_on_support
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class ClosedForm:
    """The exact minimiser; where G is singular, the one nearest to the dense weights (see `support`)."""

    takes: ClassVar[type] = EqualityQuadratic

    def solve(self, problem: EqualityQuadratic, start: Tensor | None = None) -> Attempt:
        """The minimiser is its own witness. The start is not used."""
        weights: Tensor | None = None
        for piece in problem.pieces():
            try:
                found = self._by_removed(piece) if 2 * int(piece.removed.sum()) < piece.removed.numel() else None
                if found is None:
                    found = best_on_support(piece.gram, piece.cross, ~piece.removed, piece.dense)
            except NotDefinite:
                return Attempt(problem.dense, None, Status.NUMERICAL, 0)
            weights = found.new_zeros(len(piece.neurons), found.shape[1]) if weights is None else weights
            weights[piece.neurons] = found
        assert weights is not None  # every neuron is in a piece
        x = problem.completed(weights)
        return Attempt(x, x, Status.CONVERGED, 1)

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
