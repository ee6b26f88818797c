"""Optimal Brain Surgeon by its KKT system, neuron by neuron: a check on the closed form, for small layers.

[ 2 G   E_Q ] [ x  ]     [ 2 c ]
[ E_Q^T  0  ] [ nu ]  =  [  0  ]          E_Q the unit columns of the removed weights
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import EqualityQuadratic
from convexprune.options import check_options, whole
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.spd_inverse import NotDefinite


@dataclass(frozen=True)
class KKT:
    """One dense solve a neuron; `max_inputs` guards against layers for which that is absurd."""

    takes: ClassVar[type] = EqualityQuadratic
    starts: ClassVar[bool] = False

    max_inputs: int = 1000

    def __post_init__(self) -> None:
        check_options(self, max_inputs=whole(1))

    def adapted(self, problem: Any) -> KKT:
        """Itself. Raises ValueError for a layer of more than `max_inputs` inputs."""
        width = problem.shape[1]
        if width > self.max_inputs:
            raise ValueError(f"KKT is for up to {self.max_inputs} inputs, this layer has {width}; use ClosedForm")
        return self

    def solve(self, problem: EqualityQuadratic, start: Tensor | None = None) -> Attempt:
        """The minimiser is its own witness. Status NUMERICAL where a KKT matrix is singular."""
        self.adapted(problem)
        width = len(problem.gram)
        x = torch.zeros_like(problem.cross)
        for i, gone in enumerate(problem.removed):
            units = torch.eye(width, dtype=torch.float64)[:, gone]
            corner = torch.zeros(units.shape[1], units.shape[1], dtype=torch.float64)
            matrix = torch.cat([torch.cat([2 * problem.gram, units], 1), torch.cat([units.T, corner], 1)])
            right = torch.cat([2 * problem.cross[i], corner.new_zeros(units.shape[1])])
            try:
                x[i] = torch.linalg.solve(matrix, right)[:width]
            except NotDefinite:
                return Attempt(problem.dense, None, Status.NUMERICAL, i)
        x[problem.removed] = 0.0
        return Attempt(x, x, Status.CONVERGED, 1)
