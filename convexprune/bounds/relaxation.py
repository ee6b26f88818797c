"""Bound two ReLU networks together over a set of inputs, by intervals and by planes substituted back to x.

Two chains have the same shapes: z_1 = W_1 x + b_1, y_l = relu(z_l), z_{l+1} = W_{l+1} y_l + b_{l+1}, and with hats the
pruned one on the same x. The change of z_L is bounded by following both networks together. With
delta_l = zhat_l - z_l and gamma_l = yhat_l - y_l,

    delta_{l+1} = What_{l+1} gamma_l + (What_{l+1} - W_{l+1}) y_l + (bhat_{l+1} - b_{l+1}),    gamma_0 = 0.

Only gamma = g(z, delta) = relu(z + delta) - relu(z) has to be relaxed. Three facts about g are used below.

1. g does not decrease in delta; for delta >= 0 it does not decrease in z, for delta < 0 it does not increase.
   Proof: g is the integral over t from z to z + delta of [t > 0], which is monotone in t.
2. Over z in [l, u], max g = max(delta + min(u, 0), -max(l, 0)), convex in delta.
   Proof: by 1 it is g(u, delta) for delta >= 0 and g(l, delta) for delta < 0. These are, where l <= 0 <= u, delta
   and 0; where u < 0, relu(u + delta) and 0; where l > 0, delta and max(delta, -l). Each pair is the formula.
3. g(z, delta) = -g(zhat, -delta), so over zhat in [l, u], min g = min(delta - min(u, 0), max(l, 0)), concave.

All figures are rounded outwards: what a product, a chord or an offset may have lost is added by its size, which the
intervals give. A network that computes in float32 adds about 1e-7 of its outputs, and that is not in them.

Source: Paulsen, Wang, Wang, ICSE 2020 (ReluDiff), for propagating the difference; Zhang, Weng, Chen, Hsieh, Daniel,
NeurIPS 2018 (CROWN), for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from convexprune.bounds.input_sets import Ball, Box, Interval, above, float64, times
from convexprune.rounding import gamma, raised


@dataclass(frozen=True, eq=False)
class ChainPair:
    """A dense chain and its pruned one: W_l (out, in), b_l (out,), and What_l, bhat_l of the same shapes.

    All are kept in float64 on the CPU. Raises ValueError for shapes that do not fit and entries that are not finite.

    doubts  of the dense layers, and of the pruned: by how much the entries of W_l and b_l may be off; None: they are
            exact
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    pruned_weights: Sequence[Tensor]
    pruned_biases: Sequence[Tensor]
    doubts: tuple[Sequence[tuple[Tensor, Tensor]], Sequence[tuple[Tensor, Tensor]]] | None = None

    def __post_init__(self) -> None:
        lists = (self.weights, self.biases, self.pruned_weights, self.pruned_biases)
        if not self.weights or len({len(each) for each in lists}) != 1:
            counts = ", ".join(str(len(each)) for each in lists)
            raise ValueError(f"{counts} weights, biases, pruned weights and pruned biases; give as many of each, >= 1")
        for place, (weight, pruned) in enumerate(zip(self.weights, self.pruned_weights, strict=True)):
            inputs = self.weights[place - 1].shape[0] if place else weight.shape[-1]
            if weight.ndim != 2 or weight.shape != pruned.shape or weight.shape[1] != inputs or not weight.numel():
                raise ValueError(
                    f"layer {place}: the weights have shapes {tuple(weight.shape)} and, pruned, {tuple(pruned.shape)}; "
                    f"expected one shape (out, {inputs})"
                )
            for bias in (self.biases[place], self.pruned_biases[place]):
                if bias.shape != weight.shape[:1]:
                    raise ValueError(f"layer {place}: a bias has shape {tuple(bias.shape)}; expected ({len(weight)},)")
        for name in ("weights", "biases", "pruned_weights", "pruned_biases"):
            object.__setattr__(self, name, tuple(float64(each, name) for each in getattr(self, name)))

    @property
    def inputs(self) -> int:
        """The number of entries of x."""
        return self.weights[0].shape[1]

    @property
    def outputs(self) -> int:
        """The number of entries of z_L."""
        return self.weights[-1].shape[0]

    @cached_property
    def changes(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """What_l - W_l and bhat_l - b_l of each layer."""
        return tuple(
            (wh - w, bh - b)
            for w, b, wh, bh in zip(self.weights, self.biases, self.pruned_weights, self.pruned_biases, strict=True)
        )

    def lost(self, size: Tensor) -> tuple[Tensor, Tensor] | None:
        """By how much z_L and zhat_L may be off for |x| <= size, (samples, outputs) each; None where all is exact."""
        if self.doubts is None or not any(bool(part.any()) for each in self.doubts for layer in each for part in layer):
            return None
        chains = (self.weights, self.biases), (self.pruned_weights, self.pruned_biases)
        one, other = (_lost(*chain, each, size) for chain, each in zip(chains, self.doubts, strict=True))
        return one, other

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z_L and zhat_L (..., outputs) of inputs (..., inputs)."""
        return _run(self.weights, self.biases, x), _run(self.pruned_weights, self.pruned_biases, x)


class Rows(NamedTuple):
    """Linear functions dense @ z + change @ (zhat - z) of a layer, each (samples or 1, rows, width).

    dense = 0 gives the difference, change = 0 the dense network, dense = change the pruned one.
    """

    dense: Tensor
    change: Tensor

    def opposite(self) -> Rows:
        """The same functions with the other sign."""
        return Rows(-self.dense, -self.change)


class Lines(NamedTuple):
    """below * t + below_at <= f <= above * t + above_at, and the widest gap between the two; each (samples, width)."""

    above: Tensor
    above_at: Tensor
    below: Tensor
    below_at: Tensor
    gap: Tensor

    def largest(self, coefficient: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and offset, (samples, rows, width), of a line above coefficient * f."""
        up = coefficient >= 0
        slope = torch.where(up, self.above[:, None], self.below[:, None])
        return coefficient * slope, coefficient * torch.where(up, self.above_at[:, None], self.below_at[:, None])


@dataclass(frozen=True, eq=False)
class Hidden:
    """Intervals of z, zhat and delta of one hidden layer over each sample's set."""

    z: Interval
    zhat: Interval
    delta: Interval

    @cached_property
    def gamma(self) -> Interval:
        """The interval of relu(zhat) - relu(z): by fact 1 any two of z, zhat, delta give one; the three intersected."""
        (zl, zu), (hl, hu), (dl, du) = self.z, self.zhat, self.delta
        y, yhat = self.z.relu(), self.zhat.relu()
        by_z = Interval(_change(torch.where(dl >= 0, zl, zu), dl), _change(torch.where(du >= 0, zu, zl), du))
        by_zhat = Interval(-_change(torch.where(dl >= 0, hl, hu), -dl), -_change(torch.where(du >= 0, hu, hl), -du))
        # each end is a difference of a sum
        step = self.delta.size
        lost = torch.where(step > 0, gamma(4) * (torch.minimum(self.z.size, self.zhat.size) + step), 0.0)
        return by_z.widened(lost).within(*by_zhat.widened(lost)).within(yhat.lower - y.upper, yhat.upper - y.lower)

    @cached_property
    def y_lines(self) -> Lines:
        """Lines around relu(z), in z."""
        return _relu_lines(self.z)

    @cached_property
    def yhat_lines(self) -> Lines:
        """Lines around relu(zhat), in zhat."""
        return _relu_lines(self.zhat)

    @cached_property
    def gamma_lines(self) -> Lines:
        """Lines around gamma, in delta: the chords of facts 2 and 3."""
        low, high = self.delta
        # fact 3 is fact 2 with the signs of delta and of the result reversed
        below = self.zhat.lower.clamp(min=0), -self.zhat.upper.clamp(max=0)
        above = -self.z.lower.clamp(min=0), self.z.upper.clamp(max=0)
        top = [torch.maximum(end + above[1], above[0]) for end in self.delta]
        bottom = [torch.minimum(end + below[1], below[0]) for end in self.delta]
        rise = [(_over(f[1] - f[0], high - low)).clamp(0, 1) for f in (top, bottom)]
        gap = torch.maximum(top[0] - bottom[0], top[1] - bottom[1]).clamp(min=0)
        # a chord's slope and offset are rounded, and its ends: it is lifted by as much
        step = self.delta.size
        lost = [torch.where(step > 0, gamma(12) * (step + side.size), 0.0) for side in (self.z, self.zhat)]
        return Lines(rise[0], top[0] - rise[0] * low + lost[0], rise[1], bottom[0] - rise[1] * low - lost[1], gap)


def _change(z: Tensor, delta: Tensor) -> Tensor:
    """g(z, delta) = relu(z + delta) - relu(z)."""
    return (z + delta).clamp(min=0) - z.clamp(min=0)


def _relu_lines(z: Interval) -> Lines:
    """Upper line: the chord. Lower line: slope 0 or 1 through the origin, whichever is closer."""
    low, high = z
    unstable = (low < 0) & (high > 0)
    above = torch.where(unstable, _over(high, high - low), (low >= 0).double())
    below = torch.where(unstable, (high > -low).double(), above)
    gap = torch.where(unstable, torch.minimum(high, -low), 0.0)
    # the chord's slope is rounded, and its offset: it is lifted by as much
    offset = torch.where(unstable, -above * low + gamma(8) * z.size, 0.0)
    return Lines(above, offset, below, torch.zeros_like(low), gap)


Bound = Callable[[ChainPair, "Box | Ball", Sequence[Hidden], Rows], Tensor]


def hidden_layers(pair: ChainPair, around: Box | Ball, bound: Bound) -> list[Hidden]:
    """Compute the intervals of every hidden layer in forward order, by `bound` from those of earlier layers."""
    seen: list[Hidden] = []
    for weight in pair.weights[:-1]:
        each = torch.eye(len(weight), dtype=torch.float64)[None]
        none = torch.zeros_like(each)
        z, zhat, delta = (
            Interval(*ordered(-bound(pair, around, seen, rows.opposite()), bound(pair, around, seen, rows)))
            for rows in (Rows(each, none), Rows(each, each), Rows(none, each))
        )
        seen.append(
            Hidden(
                z.within(zhat.lower - delta.upper, zhat.upper - delta.lower),
                zhat.within(z.lower + delta.lower, z.upper + delta.upper),
                delta.within(zhat.lower - z.upper, zhat.upper - z.lower),
            )
        )
    return seen


def by_intervals(pair: ChainPair, around: Box | Ball, seen: Sequence[Hidden], rows: Rows) -> Tensor:
    """Bound `rows` of the layer after those in `seen`, by the intervals of the last layer seen."""
    at, constant = _through(pair, around, seen, rows)
    if not seen:
        return _summed(constant, around.maximum(at.dense))
    before = seen[-1]
    y, yhat = before.z.relu(), before.zhat.relu()
    together = _summed(y.maximum(at.dense), before.gamma.maximum(at.change))
    doubt = gamma(2) * times((at.dense - at.change).abs(), y.size)
    apart = _summed(_summed(y.maximum(at.dense - at.change), doubt), yhat.maximum(at.change))
    return _summed(constant, torch.minimum(together, apart))


def by_planes(pair: ChainPair, around: Box | Ball, seen: Sequence[Hidden], rows: Rows) -> Tensor:
    """Bound `rows` of the layer after those in `seen`, by substitution back to x; never above `by_intervals`."""
    at, constant = _through(pair, around, seen, rows)
    for level in reversed(range(len(seen))):
        back, relaxed = _relax(at, seen[level])
        at, shift = _through(pair, around, seen[:level], back)
        constant = _summed(constant, _summed(relaxed, shift))
    return torch.minimum(_summed(constant, around.maximum(at.dense)), by_intervals(pair, around, seen, rows))


def _through(pair: ChainPair, around: Box | Ball, seen: Sequence[Hidden], rows: Rows) -> tuple[Rows, Tensor]:
    """Rewrite functions of a layer's (z, delta) in the (y, gamma) that it reads, and a constant; x has no gamma.

    The layer is the one after those in `seen`. The rounding of the new coefficients is in the constant, times what they
    will meet.
    """
    level = len(seen)
    weight_change, bias_change = pair.changes[level]
    constant = rows.dense @ pair.biases[level] + rows.change @ bias_change
    dense = rows.dense @ pair.weights[level] + rows.change @ weight_change
    read = seen[-1].z.relu().size if seen else around.size
    own = read @ pair.weights[level].abs().T + pair.biases[level].abs()
    other = read @ weight_change.abs().T + bias_change.abs()
    if seen:
        other = other + seen[-1].gamma.size @ pair.pruned_weights[level].abs().T
    doubt = gamma(2 * sum(pair.weights[level].shape) + 16)
    lost = doubt * (times(rows.dense.abs(), own) + times(rows.change.abs(), other))
    return Rows(dense, rows.change @ pair.pruned_weights[level]), constant + lost


def _summed(one: Tensor, other: Tensor) -> Tensor:
    """At least the sum."""
    return above(one + other)


def _relax(at: Rows, layer: Hidden) -> tuple[Rows, Tensor]:
    """Bound functions of (y, gamma) above by functions of (z, delta), the thinner way of `LinearRelaxation`'s two."""
    a, c = at
    y, yhat, moved = layer.y_lines, layer.yhat_lines, layer.gamma_lines
    with_y, y_at = y.largest(a)
    with_gamma, gamma_at = moved.largest(c)
    rest, rest_at = y.largest(a - c)
    with_yhat, yhat_at = yhat.largest(c)
    size = c.abs()
    together = a.abs() * y.gap[:, None] + size * moved.gap[:, None]
    apart = (a - c).abs() * y.gap[:, None] + size * yhat.gap[:, None]
    choice = together <= apart
    dense = torch.where(choice, with_y, rest + with_yhat)  # zhat = z + delta
    offset = torch.where(choice, y_at + gamma_at, rest_at + yhat_at).sum(2)
    # the new coefficients and offsets are rounded: times what they meet
    z, zhat, delta = (each.size[:, None] for each in (layer.z, layer.zhat, layer.delta))
    met = torch.where(choice, a.abs() * z + size * (3 * delta), (a - c).abs() * 2 * z + size * (2 * zhat + z))
    offset = offset + gamma(a.shape[2] + 16) * met.sum(2)
    return Rows(dense, torch.where(choice, with_gamma, with_yhat)), offset


def _over(above: Tensor, below: Tensor) -> Tensor:
    """above / below, or 0 for an interval without width."""
    return torch.where(below > 0, above / torch.where(below > 0, below, 1.0), 0.0)


def ordered(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Sort a lower and an upper bound that rounding may have exchanged; one that is no number bounds nothing."""
    lower, upper = (torch.where(each.isnan(), end, each) for each, end in ((lower, -math.inf), (upper, math.inf)))
    return torch.minimum(lower, upper), torch.maximum(lower, upper)


def _lost(
    weights: Sequence[Tensor], biases: Sequence[Tensor], doubts: Sequence[tuple[Tensor, Tensor]], size: Tensor
) -> Tensor:
    lost = torch.zeros_like(size)
    for weight, bias, (off, shift) in zip(weights, biases, doubts, strict=True):
        lost = raised(lost @ weight.abs().T + (size + lost) @ off.T + shift, 2 * len(weight.T) + 8)
        size = raised(size @ weight.abs().T + bias.abs(), len(weight.T) + 4)
    return lost


def _run(weights: Sequence[Tensor], biases: Sequence[Tensor], x: Tensor) -> Tensor:
    y = x
    for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        y = (y.clamp(min=0) if place else y) @ weight.T + bias
    return y
