"""The largest weights stay, as they are: the field's oldest baseline.

Source: Janowsky 1989; Han, Pool, Tran, Dally, NIPS 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from convexprune.problem import SparseLeastSquares
from convexprune.solution import Attempt, Status


@dataclass(frozen=True)
class Magnitude:
    """Scores W_ij^2; the pattern decides among whom they compete. `Refit(Magnitude())` adapts what stays."""

    takes: ClassVar[type] = SparseLeastSquares

    def solve(self, problem: SparseLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        mask = problem.select(problem.target.square())
        return Attempt(problem.completed(problem.target * mask), None, Status.CONVERGED, 1)
