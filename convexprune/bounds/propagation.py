"""Carry an error through a network by one of three rules, from the published one to the tightest.

A tensor of the network has C channels (a linear layer's outputs, a convolution's maps). D is its change over the
calibration samples, one row for each sample and position: `Spread` bounds ||D||_F, the norm of each column, and D^T D.
If a layer's input changes by D, its output changes by at most

    R + op(D)        R: its own error on the dense network's inputs (parallel), op: the pruned layer without its bias

entry by entry, before and after a 1-Lipschitz activation; docs/theory has the proofs. A rule bounds the norms of op(D).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from convexprune.bounds.gains import SCALE, Operator
from convexprune.rounding import gamma, norm_above, raised, up


@dataclass(frozen=True, eq=False)
class Repair:
    """A layer whose error was measured at the following residual sum, with the error of the other branch.

    scale  (C,): product of the scales of the norms behind the layer; None if there is no norm
    """

    layer: str
    scale: Tensor | None = None

    def faint(self, share: float) -> Tensor | None:
        """Channels (C,) that repair nothing, as their scale is below this fraction of the largest; None if all do."""
        if self.scale is None:
            return None
        size = self.scale.abs()
        off = size <= share * size.max()
        return off if bool(off.any()) else None


@dataclass(frozen=True, eq=False)
class Spread:
    """Upper bounds of a tensor's change D.

    total      bound of ||D||_F
    channels   (C,): bounds of the norms of D's columns, or None
    gram       (C, C): at least D^T D in the order of semidefinite matrices, or None
    rectified  True if D is the change behind the ReLU that follows
    repair     set if D is the change of the following residual sum, not of this tensor
    folded     for a layer's output: a function from a scale (C,) to bounds of D with scaled channels, sharper than
               scaling these bounds
    factor     where D is another change with its last axis multiplied by numbers (N,): the bounds of that, and they
    """

    total: float
    channels: Tensor | None = None
    gram: Tensor | None = None
    rectified: bool = False
    repair: Repair | None = None
    folded: Callable[[Tensor], Spread] | None = None
    factor: tuple[Spread, Tensor] | None = None

    @classmethod
    def of(cls, gram: Tensor, roundings: int = 0) -> Spread:
        """The bounds that D^T D gives, of whose entries each took so many roundings of |d_i| |d_j|."""
        gram = _covered(gram, roundings) if roundings else gram
        squares = gram.diagonal().clamp(min=0)
        return cls(norm_above(squares.sqrt()), raised(squares.sqrt()), gram)

    @classmethod
    def of_squares(cls, squares: Tensor, roundings: int) -> Spread:
        """The bounds that |d_c|^2 (C,) gives, each a sum of squares that took so many roundings."""
        norms = raised(squares.sqrt(), roundings)
        return cls(norm_above(norms), norms)

    def times(self, factor: float) -> Spread:
        """Scale the bounds by `factor`; drops the Gram bound, since positions may mix."""
        return Spread(up(self.total * factor), None if self.channels is None else raised(self.channels * factor))

    def plain(self) -> Spread:
        """Keep only the bound of ||D||_F."""
        return Spread(self.total)

    def activated(self) -> Spread:
        """The bounds behind a 1-Lipschitz function of each entry: no column grows, but D^T D may."""
        return Spread(self.total, self.channels, self.gram if self.rectified else None)

    @classmethod
    def beside(cls, parts: Sequence[Spread], widths: Sequence[int]) -> Spread:
        """The bounds of tensors joined along their channels, of which each has so many: [D_1 D_2 ...]."""
        total = norm_above(torch.tensor([part.total for part in parts], dtype=torch.float64))
        found, left = cls(0.0), 0
        for part, width in zip(parts, widths, strict=True):
            if part.total and (part.channels is None or len(part.channels) != width):
                return cls(total)
            # a sum of tensors that are 0 beside their own channels
            found, left = found.plus(part.padded(left, sum(widths) - left - width)), left + width
        return replace(found, total=min(found.total, total))

    @classmethod
    def below(cls, parts: Sequence[Spread]) -> Spread:
        """The bounds of tensors joined along another axis, one under the other."""
        changed = [part for part in parts if part.total]
        total = norm_above(torch.tensor([part.total for part in changed], dtype=torch.float64))
        channels = [part.channels for part in changed if part.channels is not None]
        if len(channels) < len(changed) or len({len(each) for each in channels}) != 1:
            return cls(total)
        grams = [part.gram for part in changed if part.gram is not None]
        gram = _covered(torch.stack(grams).sum(0), len(grams)) if len(grams) == len(changed) else None
        norms = torch.linalg.vector_norm(torch.stack(channels), dim=0)
        return _tight(total, raised(norms, len(channels) + 4), gram)

    def padded(self, left: int, right: int) -> Spread:
        """Add channels of zeros on both sides."""
        if self.channels is None:
            return self
        ends = (left, right)
        gram = None if self.gram is None else torch.nn.functional.pad(self.gram, ends * 2)
        return Spread(self.total, torch.nn.functional.pad(self.channels, ends), gram)

    def within(self, channels: Tensor) -> Spread:
        """The bounds if only these channels (C,) bool change."""
        if self.channels is None or len(self.channels) != len(channels):
            return self.plain()
        left = self.channels * channels
        return Spread(min(self.total, norm_above(left)), left)

    def widened(self, extra: Spread) -> Spread:
        """The same tensor with a change of at most `extra` on top of D, entry by entry, whatever D is of."""
        if not extra.total:
            return self
        total = self.plus(extra.grouped(None if self.channels is None else len(self.channels), self.gram is not None))
        folded = None
        if self.folded is not None:
            folded = partial(_folded, self.folded, extra)
        return replace(total, rectified=self.rectified, repair=self.repair, folded=folded)

    def grouped(self, channels: int | None, gram: bool) -> Spread:
        """The norms alone, of this many runs of channels if they divide; and  D^T D <= diag(d sum_c d_c)  from them.

        By Cauchy-Schwarz (sum_c d_c |x_c|)^2 <= sum_c d_c  sum_c d_c x_c^2.
        """
        if channels is None or self.channels is None or len(self.channels) % channels:
            return self.plain()
        parts = self.channels.reshape(channels, -1)
        runs = raised(torch.linalg.vector_norm(parts, dim=1), parts.shape[1] + 4)
        return Spread(self.total, runs, torch.diag(raised(runs * runs.sum(), channels)) if gram else None)

    def excess(self, bound: Spread) -> Spread:
        """By how much these norms are above those of `bound`."""
        over = 0.0 if self.total <= bound.total else up(self.total - bound.total)  # of NaN, inf
        known = self.grouped(None if bound.channels is None else len(bound.channels), False)
        if known.channels is None or bound.channels is None:
            return Spread(over)
        channels = raised((known.channels - bound.channels).clamp(min=0), 1)
        return Spread(max(over, norm_above(channels)), channels)

    def plus(self, other: Spread) -> Spread:
        """The bounds of a sum: (D_1 + D_2)^T (D_1 + D_2) is at most (1 + t) D_1^T D_1 + (1 + 1/t) D_2^T D_2."""
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
    """A rule that bounds the change behind an operator."""

    def through(self, operator: Operator, before: Spread) -> Spread:
        """Bounds of op(D)."""

    def scaled(self, scale: Tensor, before: Spread) -> Spread:
        """Bounds of D with each channel multiplied by its scale (C,), as by a batch norm in evaluation mode."""


@dataclass(frozen=True)
class Frobenius:
    """||op(D)||_F <= ||op||_F ||D||_F, the published norm: Dong, Chen, Pan, NIPS 2017, Theorem 3.2."""

    def through(self, operator: Operator, before: Spread) -> Spread:
        """Bounds of op(D)."""
        return Spread(up(operator.frobenius() * before.total))

    def scaled(self, scale: Tensor, before: Spread) -> Spread:
        """Multiply by max |s|; in the paper a norm's scale belongs to no layer."""
        return Spread(up(_largest(scale) * before.total))


@dataclass(frozen=True)
class Spectral:
    """||op(D)||_F <= ||op||_2 ||D||_F, with the operator's true norm."""

    def through(self, operator: Operator, before: Spread) -> Spread:
        """Bounds of op(D)."""
        return Spread(up(operator.spectral * before.total))

    def scaled(self, scale: Tensor, before: Spread) -> Spread:
        """Multiply by max |s|."""
        return Spread(up(_largest(scale) * before.total))


@dataclass(frozen=True)
class ByChannel:
    """The smallest of three bounds for each output o, and the spectral norm for the whole:

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
        """Multiply each channel by its own scale."""
        s = scale.detach().cpu().double()
        whole = up(_largest(s) * before.total)
        if before.channels is None or len(before.channels) != len(s):
            return Spread(whole)
        gram = None if before.gram is None else _covered(s[:, None] * before.gram * s, 2 * SCALE + 4)
        return _tight(whole, raised(before.channels * s.abs(), SCALE + 1), gram)


def _tight(total: float, channels: Tensor | None, gram: Tensor | None) -> Spread:
    """Tighten each of the three bounds by the others."""
    if gram is not None:
        roots = raised(gram.diagonal().clamp(min=0).sqrt())
        channels = roots if channels is None else torch.minimum(channels, roots)
    return Spread(total if channels is None else min(total, norm_above(channels)), channels, gram)


def _carried(tap: Tensor, gram: Tensor) -> Tensor:
    """At least A G A^T, in the order of semidefinite matrices."""
    size = tap.abs() @ gram.diagonal().clamp(min=0).sqrt()
    return _above(tap @ gram @ tap.T, size, 2 * len(gram) + 2 * SCALE + 8)


def _covered(gram: Tensor, roundings: int) -> Tensor:
    """At least a matrix whose entries took so many roundings of what two of its diagonal allow."""
    return _above(gram, gram.diagonal().clamp(min=0).sqrt(), roundings)


def _above(gram: Tensor, size: Tensor, roundings: int) -> Tensor:
    """Errors of at most c s_i s_j in each of the C^2 entries are at most C c diag(s)^2, by Cauchy-Schwarz."""
    above = gram.clone()
    above.diagonal().add_(raised(len(size) * size.square(), 8) * gamma(roundings))
    return above


def _folded(before: Callable[[Tensor], Spread], extra: Spread, scale: Tensor) -> Spread:
    return before(scale).widened(ByChannel().scaled(scale, extra))


def _largest(scale: Tensor) -> float:
    return float(raised(scale.detach().cpu().double().abs().max(), SCALE))
