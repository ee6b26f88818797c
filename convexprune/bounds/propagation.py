"""How an error goes through a network: three rules, from the published one to the tightest that is proven here.

A tensor of the network has C channels (a linear layer's outputs, a convolution's maps). D is its change over the
calibration samples, one row for each sample and position: `Spread` bounds ||D||_F, the norm of each column, and D^T D.
A layer reads a tensor that has changed by D and changes by at most

    R + op(D)        R: its own error on the dense network's inputs (parallel), op: the pruned layer without its bias

entry by entry, before and after a 1-Lipschitz activation; proofs in docs/theory. A rule bounds the norms of op(D).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from convexprune.bounds.gains import Operator
from convexprune.rounding import gamma, norm_above, raised, up


@dataclass(frozen=True, eq=False)
class Repair:
    """A layer that was judged by the residual sum ahead of it, other branch included.

    scale  (C,) of the norms that its output has passed since, or None
    """

    layer: str
    scale: Tensor | None = None

    def faint(self, share: float) -> Tensor | None:
        """(C,) bool: channels whose scale is below this share of the largest, which repair nothing; None if all do."""
        if self.scale is None:
            return None
        size = self.scale.abs()
        off = size <= share * size.max()
        return off if bool(off.any()) else None


@dataclass(frozen=True, eq=False)
class Spread:
    """Upper bounds of a tensor's change D.

    total      of ||D||_F
    channels   (C,) of the norms of D's columns, or None
    gram       (C, C), at least D^T D in the order of semidefinite matrices, or None
    rectified  whether D is the change after the ReLU that comes next
    repair     where D is not this tensor's change but that of the residual sum that it goes into
    folded     of a layer's output: scale (C,) -> the bounds of D with its channels scaled, sharper than from D's own
    """

    total: float
    channels: Tensor | None = None
    gram: Tensor | None = None
    rectified: bool = False
    repair: Repair | None = None
    folded: Callable[[Tensor], Spread] | None = None

    @classmethod
    def of(cls, gram: Tensor, rectified: bool = False) -> Spread:
        """All there is to know from D^T D."""
        squares = gram.diagonal().clamp(min=0)
        return cls(norm_above(squares.sqrt()), raised(squares.sqrt()), gram, rectified)

    def times(self, factor: float) -> Spread:
        """A map that enlarges each channel, and the whole, at most by `factor`, and may mix positions: no Gram left."""
        return Spread(up(self.total * factor), None if self.channels is None else raised(self.channels * factor))

    def plain(self) -> Spread:
        """Only the norm of the whole."""
        return Spread(self.total)

    def activated(self) -> Spread:
        """Behind a 1-Lipschitz function of each entry: columns do not grow, D^T D may."""
        return Spread(self.total, self.channels, self.gram if self.rectified else None)

    def padded(self, left: int, right: int) -> Spread:
        """Beside channels of zeros."""
        if self.channels is None:
            return self
        ends = (left, right)
        gram = None if self.gram is None else torch.nn.functional.pad(self.gram, ends * 2)
        return Spread(self.total, torch.nn.functional.pad(self.channels, ends), gram)

    def within(self, channels: Tensor) -> Spread:
        """With only these channels (C,) bool changed."""
        if self.channels is None or len(self.channels) != len(channels):
            return self.plain()
        left = self.channels * channels
        return Spread(min(self.total, norm_above(left)), left)

    def plus(self, other: Spread) -> Spread:
        """Of a sum of two tensors: (a D_1 + b D_2)^T (...) is at most (1 + t) D_1^T D_1 + (1 + 1/t) D_2^T D_2."""
        if not other.total:
            return self
        if not self.total:
            return other
        channels = gram = None
        if self.channels is not None and other.channels is not None and len(self.channels) == len(other.channels):
            channels = raised(self.channels + other.channels)
            if self.gram is not None and other.gram is not None:
                share = other.total / self.total
                gram = _covered((1 + share) * self.gram + (1 + 1 / share) * other.gram, 8)
        return _tight(up(self.total, other.total), channels, gram)


class Rule(Protocol):
    """How far an error gets through an operator."""

    def through(self, operator: Operator, before: Spread) -> Spread:
        """Bounds of op(D)."""

    def scaled(self, scale: Tensor, before: Spread) -> Spread:
        """Bounds of D with each channel times its scale (C,): a batch norm in evaluation mode."""


@dataclass(frozen=True)
class Frobenius:
    """||op(D)||_F <= ||op||_F ||D||_F, the published norm: Dong, Chen, Pan, NIPS 2017, Theorem 3.2."""

    def through(self, operator: Operator, before: Spread) -> Spread:
        """Bounds of op(D)."""
        return Spread(up(operator.frobenius() * before.total))

    def scaled(self, scale: Tensor, before: Spread) -> Spread:
        """Max |s|: a norm's scale belongs to no layer in the paper."""
        return Spread(up(_largest(scale) * before.total))


@dataclass(frozen=True)
class Spectral:
    """||op(D)||_F <= ||op||_2 ||D||_F, with the operator's true norm."""

    def through(self, operator: Operator, before: Spread) -> Spread:
        """Bounds of op(D)."""
        return Spread(up(operator.spectral * before.total))

    def scaled(self, scale: Tensor, before: Spread) -> Spread:
        """Max |s|."""
        return Spread(up(_largest(scale) * before.total))


@dataclass(frozen=True)
class ByChannel:
    """Channel by channel, the least of three for each output o, and the spectral norm of the whole:

    sum_c ||op_oc|| d_c                     the pruned weights' zeros count: for a linear layer this is |W| d
    ||op_o|| ||D||_F
    sum_k sqrt(w_ok (D^T D) w_ok^T)         over the taps k of the kernel; one tap and exact for a linear layer
    """

    def through(self, operator: Operator, before: Spread) -> Spread:
        """Bounds of op(D)."""
        whole = up(operator.spectral * before.total)
        channels = raised(operator.rows() * before.total)
        gram = None
        if before.channels is not None and operator.channels % len(before.channels) == 0:
            parts = raised(operator.blocks(len(before.channels)) @ before.channels, len(before.channels))
            channels = torch.minimum(channels, parts)
        if before.gram is not None and operator.channels == len(before.gram):
            pieces = [_carried(tap, before.gram) for tap in operator.taps()]
            sizes = [math.sqrt(max(float(piece.trace()), 0.0)) for piece in pieces]
            # (sum A_k)^T (sum A_k) <= sum A_k^T A_k / share_k for shares that sum to 1
            gram = sum(
                (piece * (sum(sizes) / size) for piece, size in zip(pieces, sizes, strict=True) if size > 0),
                start=torch.zeros_like(pieces[0]),
            )
            gram = _covered(gram, len(sizes) + 8)
            roots = [piece.diagonal().clamp(min=0).sqrt() for piece in pieces]
            channels = torch.minimum(channels, raised(torch.stack(roots).sum(0), len(roots) + 4))
        return _tight(whole, channels, gram)

    def scaled(self, scale: Tensor, before: Spread) -> Spread:
        """Each channel by its own."""
        s = scale.detach().cpu().double()
        whole = up(_largest(s) * before.total)
        if before.channels is None or len(before.channels) != len(s):
            return Spread(whole)
        gram = None if before.gram is None else _covered(s[:, None] * before.gram * s, 4)
        return _tight(whole, raised(before.channels * s.abs()), gram)


def _tight(total: float, channels: Tensor | None, gram: Tensor | None) -> Spread:
    """The three bounds, each no larger than what the others say."""
    if gram is not None:
        roots = raised(gram.diagonal().clamp(min=0).sqrt())
        channels = roots if channels is None else torch.minimum(channels, roots)
    return Spread(total if channels is None else min(total, norm_above(channels)), channels, gram)


def _carried(tap: Tensor, gram: Tensor) -> Tensor:
    """At least A G A^T, in the order of semidefinite matrices."""
    size = tap.abs() @ gram.diagonal().clamp(min=0).sqrt()
    return _above(tap @ gram @ tap.T, size, 2 * len(gram) + 8)


def _covered(gram: Tensor, roundings: int) -> Tensor:
    """At least a matrix whose entries took so many roundings of what two of its diagonal allow."""
    return _above(gram, gram.diagonal().clamp(min=0).sqrt(), roundings)


def _above(gram: Tensor, size: Tensor, roundings: int) -> Tensor:
    """Errors of at most c s_i s_j in each of the C^2 entries are at most C c diag(s)^2, by Cauchy-Schwarz."""
    above = gram.clone()
    above.diagonal().add_(raised(len(size) * size.square(), 8) * gamma(roundings))
    return above


def _largest(scale: Tensor) -> float:
    return float(scale.detach().cpu().double().abs().max())
