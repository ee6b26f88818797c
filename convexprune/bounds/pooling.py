"""By how much a pool enlarges a difference of its inputs, from its windows counted one by one.

Along an axis window i reads some of the entries. What the pool does on all axes is a product of what it does on each,
so that the squares of the gains multiply:

    maximum   over the axes, the most windows that read one entry
    average   over the axes, max_i sum_j a_ij  max_j sum_i a_ij   with a_ij = 1 / divisor_i; 0 where i does not read j

Source: |max a - max b| <= max |a - b|; ||A||_2^2 <= ||A||_1 ||A||_inf, Golub and Van Loan, Corollary 2.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.rounding import raised, up


@dataclass(frozen=True, eq=False)
class Windows:
    """Along one axis of `size` entries: window i reads starts[i] + dilation j for j < lengths[i], if it is an entry.

    divisors  (windows,): the axis's share of what an average divides by
    """

    size: int
    starts: Tensor
    lengths: Tensor
    divisors: Tensor
    dilation: int = 1

    @classmethod
    def sliding(
        cls, size: int, windows: int, kernel: int, stride: int, padding: int, dilation: int = 1, pad: bool = True
    ) -> Windows:
        """Of a kernel that moves by a stride over the padded entries, `pad`: an average counts the padding.

        The last windows may hang over the padding (ceil_mode); what is beyond it is never counted.
        """
        starts = torch.arange(windows) * stride - padding
        first, end = (-padding, size + padding) if pad else (0, size)
        counted = (starts + kernel).clamp(max=end) - starts.clamp(min=first)
        return cls(size, starts, torch.full_like(starts, kernel), counted, dilation)

    @classmethod
    def adaptive(cls, size: int, windows: int) -> Windows:
        """Window i of w reads floor(i size / w), ..., ceil((i + 1) size / w) - 1."""
        places = torch.arange(windows)
        starts = places * size // windows
        lengths = -(-(places + 1) * size // windows) - starts
        return cls(size, starts, lengths, lengths)

    def most(self) -> int:
        """The most windows that read one entry, and 1 where there are none."""
        return max(int(self._sums(torch.ones(len(self.starts)).double())[0].max()), 1)

    def average(self, divisor: int | None = None) -> float:
        """The square of the gain of the averages; `divisor` stands in place of the windows' own."""
        whole = torch.ones(len(self.starts)).double()
        columns, rows = self._sums(whole if divisor else whole / self.divisors.clamp(min=1))
        # as many terms as an entry has windows or a window entries, a division each, and products of three axes
        terms = self.most() + int(self.lengths.max()) + 8
        return float(raised(columns.max() * rows.max(), terms))

    def _sums(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Over the windows that read each entry (size,), and over the entries that each window reads (windows,)."""
        columns = torch.zeros(self.size, dtype=torch.float64)
        rows = torch.zeros_like(shares)
        for tap in range(int(self.lengths.max())):
            read = self.starts + self.dilation * tap
            inside = (tap < self.lengths) & (read >= 0) & (read < self.size)
            columns.index_add_(0, read[inside], shares[inside])
            rows += shares * inside
        return columns, rows


def max_pool_gain(axes: Sequence[Windows]) -> float:
    """sqrt of the most windows that read one entry, over all axes."""
    return _root(float(math.prod(axis.most() for axis in axes)))


def average_pool_gain(axes: Sequence[Windows], divisor: int | None = None) -> float:
    """The gain of an average, which divides by `divisor` if there is one."""
    gain = _root(math.prod(axis.average(divisor) for axis in axes))
    return up(gain / abs(divisor)) if divisor else gain


def _root(square: float) -> float:
    """At least the root, and the root of 1 is 1."""
    root = math.sqrt(square)
    return root if root.is_integer() and root * root == square else up(root)
