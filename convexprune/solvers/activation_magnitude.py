"""The weights with the largest product of magnitude and input norm stay, as they are.

Source: Sun, Liu, Bair, Kolter, ICLR 2024 (Wanda); there the weights of one neuron compete: pattern `PerRow`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from convexprune.problem import SparseLeastSquares
from convexprune.solution import Attempt, Status


@dataclass(frozen=True)
class ActivationMagnitude:
    """Scores W_ij^2 G_jj, with G_jj = E[x_j^2] (the variance, where the layer has a bias)."""

    takes: ClassVar[type] = SparseLeastSquares

    def solve(self, problem: SparseLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        mask = problem.select(problem.target.square() * problem.gram.diagonal())
        return Attempt(problem.completed(problem.target * mask), None, Status.CONVERGED, 1)
