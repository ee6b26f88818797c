"""A ball problem in the solvers' own units, where a column, an output and a weight are of about the size 1.

    minimise <prices, |v|>   over   || (X' v^T - Y')_active ||_F <= radius'  and  X' v^T <= V'  where inactive

with X' = X / c, Y' = Y / h, v = c x / h, a unit c for each column, h for all outputs, and prices = C / c, C the unit of
a typical column; a multiplier Z' is C Z. Units are powers of two: nothing is rounded anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from convexprune.forms import BallProblem, LassoProblem

UNEQUAL: Final = 30.0  # a column with more than this times the median energy gets a unit of its own
FAINT: Final = 1e6  # and so does one with the median energy over this: inputs that a ReLU rarely lets through do not


@dataclass(frozen=True, eq=False)
class Units:
    """columns (P,), c, float64; output, h."""

    columns: Tensor
    output: float

    def inside(self, point: Tensor) -> Tensor:
        """(M, P), float64: v of x."""
        return point.to(self.columns) * (self.columns / self.output)

    def outside(self, point: Tensor) -> Tensor:
        """(M, P), float64: x of v."""
        return point.double() * (self.output / self.columns)


@dataclass(frozen=True, eq=False)
class ScaledBall:
    """X' (n, P) in a dtype of choice, Y' and V' in float64, all on one device; prices (P,).

    energies  (P,), float64: |X'_p|^2, the mean of them for typical columns
    usual     C
    """

    inputs: Tensor
    outputs: Tensor
    active: Tensor
    ceiling: Tensor
    radius: float
    energies: Tensor
    prices: Tensor
    units: Units
    usual: float

    @classmethod
    def of(cls, problem: BallProblem, device: torch.device, dtype: torch.dtype = torch.float64) -> ScaledBall:
        """The same problem, scaled."""
        whole, output = _unit(problem.inputs), _unit(problem.outputs)
        inputs = (problem.inputs.to(device) / whole).to(dtype)
        energies = _energies(torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float64).square())
        columns = _powers(energies)
        usual = float(columns.median()) if len(columns) else 1.0
        return cls(
            inputs / columns.to(dtype), problem.outputs.to(device) / output, problem.active.to(device),
            problem.ceiling.to(device) / output, problem.radius / output, energies / columns.square(),
            usual / columns, Units(whole * columns, output), whole * usual,
        )  # fmt: skip

    def multiplier(self, witness: Tensor) -> Tensor:
        """(n, M), float64: Z' of Z."""
        return witness.double() * self.usual

    def witness(self, multiplier: Tensor) -> Tensor:
        """(n, M), float64: Z of Z'."""
        return multiplier.double() / self.usual


@dataclass(frozen=True, eq=False)
class ScaledLasso:
    """G' = G / (c c^T), C' = C / (h c) and the same prices, in float64 on one device.

    minimise  1/2 tr(v G' v^T) - <C', v> + lam' <prices, |v|>   over v = c x / h,  lam' = lam / (h C)
    """

    gram: Tensor
    cross: Tensor
    lam: float
    prices: Tensor
    units: Units

    @classmethod
    def of(cls, problem: LassoProblem, device: torch.device) -> ScaledLasso:
        """The same problem, scaled."""
        gram, cross = problem.gram.to(device), problem.cross.to(device)
        columns = _powers(_energies(gram.diagonal()))
        usual = float(columns.median()) if len(columns) else 1.0
        cross = cross / columns
        output = _unit(cross)
        gram = gram / columns[:, None] / columns
        return cls(gram, cross / output, problem.lam / output / usual, usual / columns, Units(columns, output))


def _powers(energies: Tensor) -> Tensor:
    """Powers of two near the roots."""
    return torch.exp2(energies.log2().div(2).floor())


def _energies(columns: Tensor) -> Tensor:
    """(P,): the mean energy of the typical columns; columns much larger or smaller than these keep their own."""
    alive = columns > 0
    if not bool(alive.any()):
        return torch.ones_like(columns)
    median = columns[alive].median()
    large, small = columns > UNEQUAL * median, alive & (columns < median / FAINT)
    return torch.where(large | small, columns, columns[~large & ~small].mean())


def _unit(values: Tensor) -> float:
    """A power of two near the largest entry."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
