"""Optimal Brain Surgeon by its KKT system, neuron by neuron: a check on the closed form, for small layers.

[ 2 G   E_Q ] [ x  ]     [ 2 c ]
[ E_Q^T  0  ] [ nu ]  =  [  0  ]          E_Q the unit columns of the removed weights
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import EqualityQuadratic, LeastSquares
from convexprune.options import check_options, whole
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.closed_form import shown
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
        """The minimiser is its own witness, as for `ClosedForm`. Status NUMERICAL where a KKT matrix is singular."""
        self.adapted(problem)
        x: Tensor | None = None
        for piece in problem.pieces():
            try:
                found = torch.stack([_solved(piece, row) for row in range(len(piece.cross))])
            except NotDefinite:
                return Attempt(problem.dense, None, Status.NUMERICAL, 0)
            x = found.new_zeros(len(piece.neurons), found.shape[1]) if x is None else x
            x[piece.neurons] = torch.where(piece.removed, 0.0, found)
        assert x is not None  # every neuron is in a piece
        return shown(problem, problem.completed(x))


def _solved(piece: LeastSquares, row: int) -> Tensor:
    """(N,): one neuron's weights, solved for in coordinates where every input has second moment 1."""
    diagonal = piece.gram.diagonal()
    scale = torch.where(diagonal > 0, diagonal, 1.0).sqrt()
    unit = piece.gram / (scale[:, None] * scale)
    unit.diagonal().fill_(1.0)  # an input that does not vary is no unknown
    units = torch.eye(len(unit), dtype=torch.float64)[:, piece.removed[row]]
    corner = torch.zeros(units.shape[1], units.shape[1], dtype=torch.float64)
    matrix = torch.cat([torch.cat([2 * unit, units], 1), torch.cat([units.T, corner], 1)])
    right = torch.cat([2 * piece.cross[row] / scale, corner.new_zeros(units.shape[1])])
    found: Tensor = torch.linalg.solve(matrix, right)[: len(unit)] / scale
    return found
