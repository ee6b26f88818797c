"""Sparsity patterns: the sets of kept weights that each allows, and the best of these sets for given scores.

Every pattern divides the cells of a layer (single weights, blocks or channels of them) into groups of one size and
keeps the same number in each group. Kept cells are counted exactly, and ties go to the lower index. A pattern is its
three methods, so that a pattern of your own works as these do; `layout` derives from them where the cells lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from convexprune.options import several, whole


@runtime_checkable
class Pattern(Protocol):
    """A family of masks (M, N). `kernel` is the number of kernel positions behind each input channel; 1 if linear."""

    def quota(self, shape: tuple[int, int], kernel: int = 1) -> int:
        """How many cells each group keeps; raises ValueError where the pattern does not fit the shape."""

    def folded(self, values: Tensor, kernel: int = 1) -> Tensor:
        """(groups, cells): the values (M, N) >= 0 of each cell, added up; below 0 if it can never be kept."""

    def unfolded(self, cells: Tensor, shape: tuple[int, int], kernel: int = 1) -> Tensor:
        """(M, N): the inverse of `folded`, a cell's value at each of its weights."""


@dataclass(frozen=True)
class Unstructured:
    """Any `keep` weights of the layer.

    Args:
        keep: A fraction in [0, 1] (a float), rounded to the nearest count, or a count (an int).

    Raises:
        ValueError: For a fraction or count out of its range; TypeError for what is neither.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.patterns import select
        >>> scores = torch.tensor([[5.0, 2.0, 0.0, 1.0], [1.0, 4.0, 3.0, 6.0]])
        >>> select(cp.Unstructured(3), scores).int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 1]]
    """

    keep: float | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _checked_keep(self.keep))

    def quota(self, shape: tuple[int, int], kernel: int = 1) -> int:
        """The layer's count."""
        return _count(self.keep, shape[0] * shape[1], "the layer has")

    def folded(self, values: Tensor, kernel: int = 1) -> Tensor:
        """(1, M N)."""
        return values.reshape(1, -1)

    def unfolded(self, cells: Tensor, shape: tuple[int, int], kernel: int = 1) -> Tensor:
        """(M, N)."""
        return cells.reshape(shape)


@dataclass(frozen=True)
class PerRow:
    """`keep` weights of each neuron.

    Args:
        keep: A fraction in [0, 1] (a float), rounded to the nearest count, or a count (an int).

    Raises:
        ValueError: For a fraction or count out of its range; TypeError for what is neither.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.patterns import select
        >>> scores = torch.tensor([[5.0, 2.0, 0.0, 1.0], [1.0, 4.0, 3.0, 6.0]])
        >>> select(cp.PerRow(1), scores).int().tolist()
        [[1, 0, 0, 0], [0, 0, 0, 1]]
    """

    keep: float | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _checked_keep(self.keep))

    def quota(self, shape: tuple[int, int], kernel: int = 1) -> int:
        """A neuron's count."""
        return _count(self.keep, shape[1], "a neuron has")

    def folded(self, values: Tensor, kernel: int = 1) -> Tensor:
        """(M, N)."""
        return values

    def unfolded(self, cells: Tensor, shape: tuple[int, int], kernel: int = 1) -> Tensor:
        """(M, N)."""
        return cells


@dataclass(frozen=True)
class NM:
    """`n` of every `m` consecutive inputs; of a convolution, of `m` consecutive input channels at a kernel position.

    Sparse tensor cores read the layout 2:4.

    Args:
        n: Number of weights that each group keeps, from 0 to m.
        m: Size of a group; it must divide the number of input channels.

    Raises:
        ValueError: For numbers out of their range; TypeError for what are no whole numbers.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.patterns import select
        >>> scores = torch.tensor([[5.0, 2.0, 0.0, 1.0], [1.0, 4.0, 3.0, 6.0]])
        >>> select(cp.NM(2, 4), scores).int().tolist()
        [[1, 1, 0, 0], [0, 1, 0, 1]]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        whole(1)("m", self.m)
        whole(0, int(self.m))("n", self.n)

    def quota(self, shape: tuple[int, int], kernel: int = 1) -> int:
        """n."""
        channels = shape[1] // kernel
        if shape[1] % kernel or channels % self.m:
            raise ValueError(
                f"NM({self.n}, {self.m}) does not fit {channels} input channels: they must be a multiple of {self.m}; "
                "leave this layer out (build may return None) or choose another pattern"
            )
        return self.n

    def folded(self, values: Tensor, kernel: int = 1) -> Tensor:
        """(M N / m, m)."""
        out = len(values)
        return values.reshape(out, -1, self.m, kernel).transpose(2, 3).reshape(-1, self.m)

    def unfolded(self, cells: Tensor, shape: tuple[int, int], kernel: int = 1) -> Tensor:
        """(M, N)."""
        return cells.reshape(shape[0], -1, kernel, self.m).transpose(2, 3).reshape(shape)


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of rows times consecutive inputs, `keep` of them.

    Args:
        size: Rows and consecutive inputs of a block; they must divide the layer.
        keep: A fraction in [0, 1] (a float), rounded to the nearest count, or a count (an int).

    Raises:
        ValueError: For a number out of its range; TypeError for one of another type.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.patterns import select
        >>> scores = torch.tensor([[5.0, 2.0, 0.0, 1.0], [1.0, 4.0, 3.0, 6.0]])
        >>> select(cp.Blocks((2, 2), 1), scores).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0]]
    """

    size: tuple[int, int]
    keep: float | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        several(2, whole(1))("size", self.size)
        object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))

    def quota(self, shape: tuple[int, int], kernel: int = 1) -> int:
        """The layer's count of blocks."""
        if shape[0] % self.size[0] or shape[1] % self.size[1]:
            raise ValueError(
                f"blocks of {self.size} do not tile a layer of shape {tuple(shape)}; leave this layer out (build may "
                "return None) or choose another size"
            )
        return _count(self.keep, shape[0] * shape[1] // math.prod(self.size), "the layer's blocks are")

    def folded(self, values: Tensor, kernel: int = 1) -> Tensor:
        """(1, blocks)."""
        (height, width), (out, into) = self.size, values.shape
        return values.reshape(out // height, height, into // width, width).sum((1, 3)).reshape(1, -1)

    def unfolded(self, cells: Tensor, shape: tuple[int, int], kernel: int = 1) -> Tensor:
        """(M, N)."""
        tiles = cells.reshape(shape[0] // self.size[0], shape[1] // self.size[1])
        return tiles.repeat_interleave(self.size[0], 0).repeat_interleave(self.size[1], 1)


@dataclass(frozen=True)
class Channels:
    """Whole input channels, for all neurons and kernel positions, `keep` of them.

    `compact` then removes the channels that nothing reads from the network. Behind a Flatten each input of a layer is a
    channel of its own.

    Args:
        keep: A fraction in [0, 1] (a float), rounded to the nearest count, or a count (an int).

    Raises:
        ValueError: For a fraction or count out of its range; TypeError for what is neither.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.patterns import select
        >>> scores = torch.tensor([[5.0, 2.0, 0.0, 1.0], [1.0, 4.0, 3.0, 6.0]])
        >>> select(cp.Channels(2), scores).int().tolist()
        [[1, 0, 0, 1], [1, 0, 0, 1]]
    """

    keep: float | int

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _checked_keep(self.keep))

    def quota(self, shape: tuple[int, int], kernel: int = 1) -> int:
        """The count of channels."""
        if shape[1] % kernel:
            raise ValueError(f"{shape[1]} inputs are no whole channels of {kernel} kernel positions")
        return _count(self.keep, shape[1] // kernel, "the layer's channels are")

    def folded(self, values: Tensor, kernel: int = 1) -> Tensor:
        """(1, N / kernel)."""
        return values.reshape(len(values), -1, kernel).sum((0, 2))[None]

    def unfolded(self, cells: Tensor, shape: tuple[int, int], kernel: int = 1) -> Tensor:
        """(M, N)."""
        return cells[0].repeat_interleave(kernel).expand(shape)


@dataclass(frozen=True, eq=False)
class Support:
    """The weights where a mask is True, and no others.

    Args:
        mask: Boolean tensor (M, N) on the CPU.

    Raises:
        TypeError: For what is no tensor; ValueError for one that is not boolean, dense and two-dimensional.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.patterns import select
        >>> scores = torch.tensor([[5.0, 2.0, 0.0, 1.0], [1.0, 4.0, 3.0, 6.0]])
        >>> select(cp.Support(scores > 2.5), scores).int().tolist()
        [[1, 0, 0, 0], [0, 1, 1, 1]]
    """

    mask: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Tensor):
            raise TypeError(f"mask is a {type(self.mask).__name__}; give a boolean tensor (out, in)")
        if self.mask.dtype != torch.bool or self.mask.ndim != 2 or self.mask.layout != torch.strided:
            kind = f"{self.mask.layout} {self.mask.dtype}" if self.mask.layout != torch.strided else self.mask.dtype
            raise ValueError(f"mask is {kind} {tuple(self.mask.shape)}; give a dense boolean tensor (out, in)")
        if self.mask.device.type == "meta":
            raise ValueError("mask is on the meta device and holds no values; give one on the CPU")

    def quota(self, shape: tuple[int, int], kernel: int = 1) -> int:
        """All of the mask."""
        if tuple(self.mask.shape) != tuple(shape):
            raise ValueError(f"the support has shape {tuple(self.mask.shape)}, the layer {tuple(shape)}")
        return int(self.mask.sum())

    def folded(self, values: Tensor, kernel: int = 1) -> Tensor:
        """(1, M N): -1 outside the mask."""
        return torch.where(self.mask.to(values.device), values, -1).reshape(1, -1)

    def unfolded(self, cells: Tensor, shape: tuple[int, int], kernel: int = 1) -> Tensor:
        """(M, N)."""
        return cells.reshape(shape)


# patterns whose methods agree, which tests see to; one of your own is checked with each problem
KNOWN: Final = (Unstructured, PerRow, NM, Blocks, Channels, Support)


def select(
    pattern: Pattern, scores: Tensor, kernel: int = 1, always: Tensor | None = None, grow: float = 1.0
) -> Tensor:
    """(M, N) bool: of the masks that the pattern allows, the one with the largest sum of `scores` (M, N) >= 0.

    `always` (M, N) bool marks weights that stay whatever their score; they count as kept. Ties go to the lower index.
    `grow` > 1 keeps that many times the pattern's count, rounded: a support to start from and to shrink.

    Raises ValueError where `always` holds more than the pattern keeps or what it can never keep, or scores are NaN.
    """
    shape = (scores.shape[0], scores.shape[1])
    quota = pattern.quota(shape, kernel)
    cells = pattern.folded(scores, kernel)
    if bool(torch.isnan(cells).any()):
        raise ValueError("scores hold NaN; check the layer's moments")
    if always is not None:
        fixed = pattern.folded(always.to(cells), kernel) > 0
        crowded = int(fixed.sum(1).max())
        if crowded > quota:
            raise ValueError(f"{crowded} weights of a group must stay, but {pattern} keeps only {quota}")
        if bool((pattern.unfolded(cells < 0, shape, kernel) & always).any()):
            raise ValueError(f"`always` marks weights that {pattern} can never keep; leave them out of it")
        cells = torch.where(fixed, math.inf, cells)
    chosen = _largest(cells, min(round(quota * grow), cells.shape[1])) & (cells >= 0)
    return pattern.unfolded(chosen, shape, kernel)


def excess(pattern: Pattern, mask: Tensor, kernel: int = 1) -> int:
    """How many cells a mask (M, N) bool keeps beyond what the pattern allows; 0 when it is allowed."""
    shape = mask.shape[0], mask.shape[1]
    held = (pattern.folded(mask.double(), kernel) > 0).sum(1)
    over = int((held - pattern.quota(shape, kernel)).clamp(min=0).sum())
    never = pattern.folded(torch.ones_like(mask, dtype=torch.float64), kernel) < 0
    if bool(never.any()):
        numbers = torch.arange(never.numel(), device=mask.device).reshape(never.shape)
        held_never = pattern.unfolded(never, shape, kernel) & mask
        over += len(torch.unique(pattern.unfolded(numbers, shape, kernel)[held_never]))
    return over


def joined(patterns: Sequence[Pattern]) -> Pattern | None:
    """The pattern of matrices of one shape, one below the other, whose count is that of all; None where there is none.

    Equal fractions stay that fraction, of all weights and rounded once. Counts add up, so that they may differ.
    """
    first, kinds = patterns[0], {type(pattern) for pattern in patterns}
    if kinds == {Support}:
        return Support(torch.cat([pattern.mask for pattern in patterns if isinstance(pattern, Support)]))
    if kinds <= {Unstructured} or kinds <= {Blocks}:
        counts = [pattern.keep for pattern in patterns if isinstance(pattern, (Unstructured, Blocks))]
        sizes = {tuple(pattern.size) for pattern in patterns if isinstance(pattern, Blocks)}
        if all(isinstance(keep, int) for keep in counts) and len(sizes) <= 1:
            return replace(first, keep=sum(counts))  # type: ignore[type-var]
    # by their words: 1 and 1.0 are equal numbers, but one weight and all of them
    same = kinds <= {Unstructured, PerRow, NM, Blocks} and len({repr(pattern) for pattern in patterns}) == 1
    return first if same else None


def spans(pattern: Pattern) -> bool:
    """Whether the rows share one count, so that a weight kept in one row is a weight less in the others."""
    return isinstance(pattern, (Unstructured, Blocks))


def counted(pattern: Pattern, mask: Tensor, kernel: int = 1) -> Pattern:
    """A pattern that spans the rows, with the count that a mask (M, N) bool holds."""
    held = int((pattern.folded(mask.to(torch.int64), kernel) > 0).sum())
    return replace(pattern, keep=held)  # type: ignore[type-var]


def kth_smallest(cells: Tensor, k: int) -> Tensor:
    """(groups, 1): the k-th smallest entry of each row of cells (groups, n), 1 <= k <= n, none of them NaN."""
    if cells.device.type == "cpu" and cells.dtype in (torch.float32, torch.float64):
        # NumPy selects with vector instructions: 20 times faster than torch.kthvalue on a row of 600,000
        return torch.from_numpy(np.partition(cells.detach().numpy(), k - 1, axis=1)[:, k - 1 : k])
    return torch.kthvalue(cells, k, dim=1, keepdim=True).values


def _largest(cells: Tensor, quota: int) -> Tensor:
    """bool: the `quota` largest entries of each row, ties to the lower index."""
    if quota <= 0 or quota >= cells.shape[1]:
        return torch.full_like(cells, quota > 0, dtype=torch.bool)
    least = kth_smallest(cells, cells.shape[1] - quota + 1)
    above, level = cells > least, cells == least
    wanted = quota - above.sum(1, keepdim=True)
    if bool((level.sum(1, keepdim=True) == wanted).all()):
        return above | level
    return above | (level & (level.cumsum(1) <= wanted))


def _checked_keep(keep: Any) -> float | int:
    """The fraction or count as a Python number."""
    wanted = "a fraction in [0, 1] (a float) or a count >= 0 (an int)"
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"keep is {keep!r}; it must be {wanted}")
    found = int(keep) if isinstance(keep, Integral) else float(keep)
    if not found >= 0 or (isinstance(found, float) and found > 1):
        raise ValueError(f"keep is {keep!r}; it must be {wanted}")
    return found


def _count(keep: float | int, total: int, of: str) -> int:
    if isinstance(keep, int):
        if keep > total:
            raise ValueError(f"keep is {keep}, but {of} only {total}")
        return keep
    return math.floor(keep * total + 0.5)
