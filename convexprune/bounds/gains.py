"""How much a layer can enlarge a difference of its inputs, as a whole and channel by channel: rigorous upper bounds.

A convolution with zero padding is a part of the circular one on a torus as large as the padded input, and that one is
block diagonal in frequencies: its norm is the largest singular value over all of them, computed, not iterated for.
Source: Sedghi, Gupta, Long, ICLR 2019, Theorem 6, for the torus.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from convexprune.rounding import UNIT, gamma, norm_above, raised, spectral_norm, up


class Operator(Protocol):
    """A layer without its bias: D -> op(D), from channels to channels."""

    def scaled(self, scale: Tensor) -> Operator:
        """With each output channel times its scale (out,)."""

    @property
    def channels(self) -> int:
        """How many it reads."""

    def frobenius(self) -> float:
        """Of the published bounds: >= ||op(D)||_F / ||D||_F by the norm of all weights."""

    @property
    def spectral(self) -> float:
        """||op||_2."""

    def rows(self) -> Tensor:
        """(out,) norms of the operators from all inputs to one output channel."""

    def blocks(self, groups: int) -> Tensor:
        """(out, groups) norms of the operators from one of `groups` runs of input channels to one output channel."""

    def taps(self) -> Iterator[Tensor]:
        """(out, in) matrices: op is the sum of these, each on shifted positions."""


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """D -> D W^T, W (out, in)."""

    weight: Tensor

    def scaled(self, scale: Tensor) -> Operator:
        """Rows times their scale."""
        return LinearOperator(_scaled(self.weight, scale))

    @property
    def channels(self) -> int:
        """The inputs."""
        return self.weight.shape[1]

    def frobenius(self) -> float:
        """||W||_F."""
        return norm_above(self._matrix())

    @cached_property
    def spectral(self) -> float:
        """||W||_2."""
        return spectral_norm(self._matrix())

    def rows(self) -> Tensor:
        """||w_o||."""
        return _norms(self._matrix(), dim=1)

    def blocks(self, groups: int) -> Tensor:
        """The norms of runs of w_o: |W| where each input is a run of its own."""
        matrix = self._matrix()
        return _norms(matrix.reshape(len(matrix), groups, -1), dim=2)

    def taps(self) -> Iterator[Tensor]:
        """W."""
        yield self._matrix()

    def _matrix(self) -> Tensor:
        return self.weight.detach().cpu().double()


@dataclass(frozen=True, eq=False)
class ConvolutionOperator:
    """A convolution (out, in / groups, *kernel) of inputs padded to `size`; a stride only lowers its norms.

    Raises ValueError where `size` does not hold the dilated kernel.
    """

    weight: Tensor
    size: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1

    def __post_init__(self) -> None:
        if any(s < r for s, r in zip(self.size, self._reach(), strict=True)):
            raise ValueError(f"size is {tuple(self.size)}; it must hold the dilated kernel {tuple(self._reach())}")

    def scaled(self, scale: Tensor) -> Operator:
        """Kernels times their scale."""
        return replace(self, weight=_scaled(self.weight, scale))

    @property
    def channels(self) -> int:
        """The input channels."""
        return self.weight.shape[1] * self.groups

    def frobenius(self) -> float:
        """sqrt(taps) ||W||_F: an input is in as many patches as the kernel has taps."""
        return up(up(math.sqrt(math.prod(self.weight.shape[2:]))) * norm_above(self._kernel()))

    @cached_property
    def spectral(self) -> float:
        """The largest singular value over all frequencies, and over the groups."""
        parts = zip(self._waves().chunk(self.groups, dim=1), self._kernel().chunk(self.groups), strict=True)
        return max(up(spectral_norm(part), self._lost * norm_above(kernel)) for part, kernel in parts)

    def rows(self) -> Tensor:
        """The largest norm of a row over all frequencies."""
        return _norms(self._waves(), dim=2).amax(0) + self._lost * _norms(self._kernel().flatten(1), dim=1)

    def blocks(self, groups: int) -> Tensor:
        """The same, of parts of the rows."""
        waves = self._apart(self._waves().abs())
        runs = waves.reshape(*waves.shape[:2], groups, -1)
        kernel = self._apart(_norms(self._kernel().flatten(2), dim=2)[None])[0]
        lost = _norms(kernel.reshape(len(kernel), groups, -1), dim=2) * self._lost
        return _norms(runs, dim=3).amax(0) + lost

    def taps(self) -> Iterator[Tensor]:
        """The kernel, one position after the other."""
        for tap in self._kernel().flatten(2).permute(2, 0, 1).unsqueeze(1):
            yield self._apart(tap)[0]

    def _apart(self, stack: Tensor) -> Tensor:
        """(*, out, in / groups) as (*, out, in), with zeros between the groups."""
        if self.groups == 1:
            return stack
        whole = stack.new_zeros(len(stack), stack.shape[1], self.channels)
        rows, width = stack.shape[1] // self.groups, stack.shape[2]
        for group in range(self.groups):
            part = slice(group * rows, (group + 1) * rows)
            whole[:, part, group * width : (group + 1) * width] = stack[:, part]
        return whole

    def _waves(self) -> Tensor:
        """(frequencies, out, in / groups)."""
        kernel, reach = self._kernel(), self._reach()
        spread = kernel.new_zeros(*kernel.shape[:2], *self.size)
        spread[(slice(None), slice(None), *(slice(0, r, d) for r, d in zip(reach, self.dilation, strict=True)))] = (
            kernel
        )
        waves: Tensor = torch.fft.fftn(spread, dim=tuple(range(2, kernel.ndim)))
        return waves.flatten(2).permute(2, 0, 1)

    @property
    def _lost(self) -> float:
        """Times the kernel's norm, by how much its transform may be off at any frequency.

        Over all F frequencies together it is off by 8 u log2(F) of their norm, sqrt(F) times that of the kernel:
        Higham, Theorem 24.2, with weights that are exact to u; twice that for sizes that are no powers of two.
        """
        waves = math.prod(self.size)
        return gamma(16 * (math.log2(waves) + len(self.size) + 1)) * math.sqrt(waves)

    def _kernel(self) -> Tensor:
        return self.weight.detach().cpu().double()

    def _reach(self) -> list[int]:
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]


def _norms(rows: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=dim)
    return raised(norms, 2 * rows.shape[dim] + 8)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    kernel = weight.detach().cpu().double()
    return kernel * scale.detach().cpu().double().reshape(-1, *[1] * (kernel.ndim - 1))


def pooling_gain(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], average: bool) -> float:
    """The root of the most windows that an input is in; for averages of whole windows over that of a window's size.

    Along an axis those are ceil(k / (s / gcd(s, d))): the taps that lie a multiple of the stride apart.
    """
    overlap = math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(kernel, stride, dilation, strict=True))
    size = math.prod(kernel) if average else 1
    root = math.sqrt(overlap / size)
    return root if Fraction(root) ** 2 * size >= overlap else up(root, 2 * UNIT * root)
