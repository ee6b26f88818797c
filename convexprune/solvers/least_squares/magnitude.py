"""The largest weights stay, as they are: the field's oldest baseline, and the same with the inputs' norms.

Source: Janowsky 1989; Han, Pool, Tran, Dally, NIPS 2015; Sun, Liu, Bair, Kolter, ICLR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.solution import Attempt, Status


@dataclass(frozen=True)
class Magnitude:
    """Scores W_ij^2; the pattern decides among whom they compete. `Refit(Magnitude())` adapts what stays."""

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        mask = problem.select(problem.target.square())
        return Attempt(problem.completed(problem.target * mask), None, Status.CONVERGED, 1)


@dataclass(frozen=True)
class ActivationMagnitude:
    """Scores W_ij^2 G_jj, with G_jj = E[x_j^2] (the variance, where the layer has a bias).

    Source: Sun, Liu, Bair, Kolter, ICLR 2024 (Wanda); there the weights of one neuron compete: pattern `PerRow`.
    """

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        mask = problem.select(torch.cat([part.target.square() * part.gram.diagonal() for part in problem.parts]))
        return Attempt(problem.completed(problem.target * mask), None, Status.CONVERGED, 1)
