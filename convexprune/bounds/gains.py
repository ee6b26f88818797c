"""Rigorous upper bounds on how much a layer enlarges a difference of its inputs, as a whole and channel by channel.

A convolution with zero padding is a part of the circular convolution on a torus as large as the padded input. The
circular one is block diagonal in frequencies, so its norm is the largest singular value over all frequencies; that is
computed directly, not by iterations.
Source: Sedghi, Gupta, Long, ICLR 2019, Theorem 6, for the torus.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Protocol

import torch
from torch import Tensor

from convexprune.rounding import gamma, norm_above, raised, spectral_norm, up

SCALE: Final = 6  # roundings of a norm's scale w / sqrt(var + eps), and of a weight that it multiplies


class Operator(Protocol):
    """A layer without its bias: D -> op(D), from channels to channels."""

    def scaled(self, scale: Tensor) -> Operator:
        """The operator with each output channel multiplied by its scale (out,)."""

    @property
    def channels(self) -> int:
        """Number of input channels."""

    def frobenius(self) -> float:
        """The gain of the published bounds, >= ||op(D)||_F / ||D||_F, from the Frobenius norm of the weights."""

    @property
    def spectral(self) -> float:
        """||op||_2."""

    def rows(self) -> Tensor:
        """Norm (out,) of the operator from all inputs to each output channel."""

    def blocks(self, groups: int) -> Tensor:
        """Norm (out, groups) of the operator from each of `groups` runs of input channels to each output channel."""

    def taps(self) -> Iterator[Tensor]:
        """Matrices (out, in) whose sum, each applied to shifted positions, is the operator."""


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """D -> D W^T, W (out, in)."""

    weight: Tensor

    def scaled(self, scale: Tensor) -> Operator:
        """Multiply each row by its scale."""
        return LinearOperator(_scaled(self.weight, scale))

    def behind(self, factor: Tensor) -> LinearOperator:
        """The operator on inputs that are multiplied by these numbers (in,): each column by its own."""
        return LinearOperator(self.weight.detach().cpu().double() * factor.detach().cpu().double())

    @property
    def channels(self) -> int:
        """Number of inputs."""
        return self.weight.shape[1]

    def frobenius(self) -> float:
        """||W||_F."""
        return up(norm_above(self._matrix()) * (1 + gamma(SCALE + 2)))

    @cached_property
    def spectral(self) -> float:
        """||W||_2."""
        matrix = self._matrix()
        return up(spectral_norm(matrix), gamma(SCALE) * norm_above(matrix))

    def rows(self) -> Tensor:
        """||w_o||."""
        return _norms(self._matrix(), dim=1)

    def blocks(self, groups: int) -> Tensor:
        """The norm of each run of inputs in each row; |W| if every input is a run of its own."""
        matrix = self._matrix()
        return _norms(matrix.reshape(len(matrix), groups, -1), dim=2)

    def taps(self) -> Iterator[Tensor]:
        """W."""
        yield self._matrix()

    def _matrix(self) -> Tensor:
        return self.weight.detach().cpu().double()


@dataclass(frozen=True, eq=False)
class ConvolutionOperator:
    """A convolution (out, in / groups, *kernel) of inputs padded to `size`; a stride can only lower its norms.

    Raises ValueError if the dilated kernel is larger than `size`.
    """

    weight: Tensor
    size: Sequence[int]
    dilation: Sequence[int]
    groups: int = 1

    def __post_init__(self) -> None:
        if any(s < r for s, r in zip(self.size, self._reach(), strict=True)):
            raise ValueError(f"size is {tuple(self.size)}; it must hold the dilated kernel {tuple(self._reach())}")

    def scaled(self, scale: Tensor) -> Operator:
        """Multiply each kernel by its scale."""
        return replace(self, weight=_scaled(self.weight, scale))

    @property
    def channels(self) -> int:
        """Number of input channels."""
        return self.weight.shape[1] * self.groups

    def frobenius(self) -> float:
        """sqrt(taps) ||W||_F: an input is in as many patches as the kernel has taps."""
        taps = up(math.sqrt(math.prod(self.weight.shape[2:])))
        return up(taps * norm_above(self._kernel()) * (1 + gamma(SCALE + 4)))

    @cached_property
    def spectral(self) -> float:
        """The largest singular value over all frequencies, and over the groups."""
        parts = zip(self._waves().chunk(self.groups, dim=1), self._kernel().chunk(self.groups), strict=True)
        return max(up(spectral_norm(part), self._lost * norm_above(kernel)) for part, kernel in parts)

    def rows(self) -> Tensor:
        """The largest norm of a row over all frequencies."""
        return _norms(self._waves(), dim=2).amax(0) + self._lost * _norms(self._kernel().flatten(1), dim=1)

    def blocks(self, groups: int) -> Tensor:
        """The largest norm of each part of a row over all frequencies."""
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
        """Reshape (*, out, in / groups) to (*, out, in), with zeros between the groups."""
        if self.groups == 1:
            return stack
        whole = stack.new_zeros(len(stack), stack.shape[1], self.channels)
        rows, width = stack.shape[1] // self.groups, stack.shape[2]
        for group in range(self.groups):
            part = slice(group * rows, (group + 1) * rows)
            whole[:, part, group * width : (group + 1) * width] = stack[:, part]
        return whole

    def _waves(self) -> Tensor:
        """(frequencies, out, in / groups); of two opposite frequencies, which are conjugate, only one."""
        kernel, reach = self._kernel(), self._reach()
        spread = kernel.new_zeros(*kernel.shape[:2], *self.size)
        spread[(slice(None), slice(None), *(slice(0, r, d) for r, d in zip(reach, self.dilation, strict=True)))] = (
            kernel
        )
        waves: Tensor = torch.fft.rfftn(spread, dim=tuple(range(2, kernel.ndim)))
        return waves.flatten(2).permute(2, 0, 1)

    @property
    def _lost(self) -> float:
        """Times the kernel's norm, by how much its transform may be off at any frequency.

        Over all F frequencies together it is off by 8 u log2(F) of their norm, sqrt(F) times that of the kernel:
        Higham, Theorem 24.2, with weights that are exact to u; twice that for sizes that are no powers of two.
        """
        waves = math.prod(self.size)
        return gamma(16 * (math.log2(waves) + len(self.size) + 1) + SCALE) * math.sqrt(waves)

    def _kernel(self) -> Tensor:
        return self.weight.detach().cpu().double()

    def _reach(self) -> list[int]:
        return [d * (k - 1) + 1 for d, k in zip(self.dilation, self.weight.shape[2:], strict=True)]


def _norms(rows: Tensor, dim: int) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=dim)
    return raised(norms, 2 * rows.shape[dim] + SCALE + 8)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    kernel = weight.detach().cpu().double()
    return kernel * scale.detach().cpu().double().reshape(-1, *[1] * (kernel.ndim - 1))
