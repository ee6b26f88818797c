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

from convexprune.forms import EqualityQuadratic
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.on_support import best_on_support
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class ClosedForm:
    """The exact minimiser; where G is singular, the one nearest to the dense weights (see `support`)."""

    takes: ClassVar[type] = EqualityQuadratic
    starts: ClassVar[bool] = False

    def solve(self, problem: EqualityQuadratic, start: Tensor | None = None) -> Attempt:
        """The minimiser is its own witness. The start is not used."""
        removed = problem.removed
        try:
            x = self._by_removed(problem) if int(removed.sum()) < int((~removed).sum()) else None
            if x is None:
                x = best_on_support(problem.gram, problem.cross, ~removed, problem.dense)
        except NotDefinite:
            return Attempt(problem.dense, None, Status.NUMERICAL, 0)
        return Attempt(x, x, Status.CONVERGED, 1)

    def _by_removed(self, problem: EqualityQuadratic) -> Tensor | None:
        """None where G has no inverse that could be trusted."""
        scale = problem.gram.diagonal().clamp(min=1e-300).sqrt()
        factor, failed = torch.linalg.cholesky_ex(problem.gram / (scale[:, None] * scale))
        if bool(failed) or float(factor.diagonal().min()) < 1e-5:
            return None
        inverse = torch.cholesky_inverse(factor) / (scale[:, None] * scale)
        optimum = torch.cholesky_solve((problem.cross / scale).T, factor).T / scale
        removed = problem.removed
        multipliers = best_on_support(inverse, optimum, removed, torch.zeros_like(optimum))
        return torch.where(removed, 0.0, optimum - multipliers @ inverse)
