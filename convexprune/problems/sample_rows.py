"""Products of the samples with weights, block by block, and by how much rounding may have moved them.

A computed inner product x w of P terms is off by at most gamma_P sum_i |x_i| |w_i|, and by Cauchy-Schwarz in units of
the columns' norms c that is at most gamma_P |x / c| |w c|: a height for each sample times a blur for each neuron.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convexprune.rounding import down, exact_dot, gamma, least_eigenvalue, raised, up

BLOCK = 8192  # rows that are converted to float64 at a time


@dataclass(frozen=True, eq=False)
class SampleRows:
    """X (n, P), in the dtype it is stored in."""

    inputs: Tensor

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and those in float64."""
        for start in range(0, len(self.inputs), BLOCK):
            rows = slice(start, min(start + BLOCK, len(self.inputs)))
            yield rows, self.inputs[rows].double()

    @cached_property
    def spans(self) -> Tensor:
        """(P,): norms of the columns."""
        squares = torch.zeros(self.inputs.shape[1], dtype=torch.float64)
        for _, x in self.blocks():
            squares += x.square().sum(0)
        return squares.sqrt()

    @cached_property
    def columns(self) -> Tensor:
        """(P,): the same, but 1 where a column is zero: a unit."""
        return torch.where(self.spans > 0, self.spans, 1.0)

    @cached_property
    def level_spans(self) -> Tensor:
        """(P,): norms of the columns in units of the rows' heights."""
        level = torch.where(self.heights > 0, self.heights, 1.0)
        squares = torch.zeros(self.inputs.shape[1], dtype=torch.float64)
        for rows, x in self.blocks():
            squares += (x / level[rows, None]).square().sum(0)
        return squares.sqrt()

    @cached_property
    def heights(self) -> Tensor:
        """(n,): norms of the rows in units of the columns."""
        parts = [(x / self.columns).square_().sum(1).sqrt_() for _, x in self.blocks()]
        return raised(torch.cat(parts), self.inputs.shape[1] + 8)

    def blur(self, weight: Tensor) -> Tensor:
        """(M,): times a row's height, by how much its product with these weights (M, P) may be off."""
        width = weight.shape[1]
        return raised((weight * self.columns).norm(dim=1), width + 8) * gamma(width + 3)

    def sure(self, x: Tensor, weight: Tensor) -> Tensor:
        """(rows, M): the same for each product itself; 0 where no terms meet. As costly as the products."""
        return raised(x.abs() @ weight.abs().T, weight.shape[1]) * gamma(weight.shape[1] + 3)

    def reach(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(P, M), (P, M): at least |X^T z|, for z (n, M), and how much of that is rounding."""
        found = torch.zeros(self.inputs.shape[1], z.shape[1], dtype=torch.float64)
        for rows, x in self.blocks():
            found += x.T @ z[rows]
        # n terms are off by at most gamma sum_n |x_n| |z_n|: by Cauchy-Schwarz in units of the rows' heights, for one
        # row may be far larger than another, and its multiplier as much smaller
        roundings = min(len(z), BLOCK) + len(z) // BLOCK + 4
        norms = raised((z * self.heights[:, None]).square().sum(0).sqrt(), len(z) + 8) * gamma(roundings)
        doubt = torch.outer(raised(self.level_spans, len(z) + 8), norms)
        return raised(found.abs_() + doubt), doubt

    def settle_reach(self, z: Tensor, reach: Tensor, which: Tensor) -> None:
        """Put |X^T z|, rounded once and up, for some (P, M) of its entries."""
        for column in which.any(1).nonzero()[:, 0].tolist():
            x = self.inputs[:, column].double()
            for neuron in which[column].nonzero()[:, 0].tolist():
                reach[column, neuron] = up(abs(exact_dot(x, z[:, neuron])))

    def settle(self, y: Tensor, weight: Tensor, blur: Tensor) -> None:
        """Where the sign of a product y (n, M) with the weights is in doubt, put the product rounded once."""
        for rows, x in self.blocks():
            near = y[rows].abs() <= torch.outer(self.heights[rows], blur)
            if not bool(near.any()):
                continue
            doubt = self.sure(x, weight)
            near &= (y[rows].abs() <= doubt) & (doubt > 0)
            for row, neuron in near.nonzero().tolist():
                y[rows.start + row, neuron] = exact_dot(x[row], weight[neuron])

    def least_gain(self, rows: Tensor) -> float:
        """At most the smallest singular value of some rows (k,) in units of the columns, zero columns left out."""
        used = self.spans > 0
        if not len(rows) or not bool(used.any()):
            return 0.0
        x = (self.inputs[rows].double() / self.columns)[:, used]
        # no column is longer than 1, so an entry of x^T x is off by at most gamma, and the matrix by P times that
        least = down(least_eigenvalue(x.T @ x), gamma(len(rows) + 8) * x.shape[1])
        return math.sqrt(least) * (1 - gamma(2)) if 0 < least < math.inf else 0.0
