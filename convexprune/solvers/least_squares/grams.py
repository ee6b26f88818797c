"""The Gram matrices of a module's neurons: one that all share, or one for each group of a grouped convolution.

For patterns whose cells hold many weights, a "neuron" here is a bundle of neurons that keep and drop together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grams:
    """Neuron i has the matrix `matrices[owner[i]]`.

    matrices  (G, N, N)
    owner     (R,): a group for each neuron
    """

    matrices: Tensor
    owner: Tensor

    @classmethod
    def of(cls, matrices: Tensor, neurons: int) -> Grams:
        """For neurons in groups of one size, one below the other."""
        groups = torch.arange(len(matrices), device=matrices.device)
        return cls(matrices, groups.repeat_interleave(neurons // len(matrices)))

    def __getitem__(self, which: Tensor | slice) -> Grams:
        """Those of the neurons `which`."""
        return replace(self, owner=self.owner[which])

    def to(self, device: str, dtype: torch.dtype) -> Grams:
        """The same on another device, in another precision."""
        return Grams(self.matrices.to(device, dtype), self.owner.to(device))

    def rows(self, values: Tensor) -> Tensor:
        """(R, k): for each neuron the row of `values` (G, k) of its group."""
        return values.expand(len(self.owner), -1) if len(values) == 1 else values[self.owner]

    def product(self, weights: Tensor) -> Tensor:
        """Weights (R, N), or (R, h, N) for bundles of h neurons: each row times the matrix of its neuron."""
        if len(self.matrices) == 1:
            return weights @ self.matrices[0]
        padded = weights.new_zeros(len(self.matrices), self._most, *weights.shape[1:])
        padded[self.owner, self._place] = weights
        found: Tensor = (padded.flatten(1, -2) @ self.matrices).reshape(padded.shape)[self.owner, self._place]
        return found

    def blocks(self, left: Tensor, right: Tensor) -> Tensor:
        """(R, a, b): of each neuron's matrix the rows `left` (R, a) and the columns `right` (R, b)."""
        if len(self.matrices) == 1:
            return self.matrices[0][left[:, :, None], right[:, None, :]]
        return self.matrices[self.owner[:, None, None], left[:, :, None], right[:, None, :]]

    @cached_property
    def _place(self) -> Tensor:
        """(R,): a number for each neuron in its group."""
        order = self.owner.argsort(stable=True)
        held = self.owner[order]
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(held, held)
        return place

    @cached_property
    def _most(self) -> int:
        return int(self._place.max()) + 1
