"""Sets of inputs around samples: the maximum of a linear function on a set, points of it, and steps within it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexprune.options import number
from convexprune.rounding import gamma, raised


class Interval(NamedTuple):
    """Entry by entry, (samples, width)."""

    lower: Tensor
    upper: Tensor

    def within(self, lower: Tensor, upper: Tensor) -> Interval:
        """The intersection with ends that took one rounding each; this interval where rounding has made it empty."""
        low, high = torch.maximum(self.lower, below(lower)), torch.minimum(self.upper, above(upper))
        fits = low <= high
        return Interval(torch.where(fits, low, self.lower), torch.where(fits, high, self.upper))

    def relu(self) -> Interval:
        """The interval of relu(z)."""
        return Interval(self.lower.clamp(min=0), self.upper.clamp(min=0))

    @property
    def size(self) -> Tensor:
        """max |x|."""
        return torch.maximum(self.lower.abs(), self.upper.abs())

    def widened(self, by: Tensor) -> Interval:
        """With both ends further out."""
        return Interval(self.lower - by, self.upper + by)

    def maximum(self, rows: Tensor) -> Tensor:
        """Max of rows @ x over the interval, (samples, rows), of rows (samples or 1, rows, width); rounded up."""
        half = (self.upper - self.lower) / 2 + gamma(2 * rows.shape[2] + 12) * self.size
        return times(rows, (self.lower + self.upper) / 2) + times(rows.abs(), half)


@dataclass(frozen=True, eq=False)
class Box:
    """Every x within `radius` of the center in the max norm, and between `least` and `most` where those are given.

    center (samples, inputs); least, most: numbers, or tensors that broadcast with the center. Raises ValueError for a
    radius or limits that leave no point.
    """

    center: Tensor
    radius: float
    least: float | Tensor | None = None
    most: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_set(self)
        for name in ("least", "most"):
            _check_limit(name, getattr(self, name), self.center)
        empty = ~(self.lower <= self.upper).all(1)
        if bool(empty.any()):
            row = int(empty.nonzero()[0])
            entry = int((~(self.lower <= self.upper))[row].nonzero()[0])
            raise ValueError(
                f"sample {row} has no point between least and most within {self.radius}: its entry {entry} is "
                f"{float(self.center[row, entry]):.4g}; give least and most in the units of the inputs"
            )

    @cached_property
    def lower(self) -> Tensor:
        """The smallest value of each coordinate, (samples, inputs)."""
        low = below(self.center - self.radius) if self.radius else self.center
        return low if self.least is None else torch.maximum(low, torch.as_tensor(self.least).detach().cpu().double())

    @cached_property
    def upper(self) -> Tensor:
        """The largest value of each coordinate, (samples, inputs)."""
        high = above(self.center + self.radius) if self.radius else self.center
        return high if self.most is None else torch.minimum(high, torch.as_tensor(self.most).detach().cpu().double())

    @property
    def size(self) -> Tensor:
        """At least max |x|, (samples, inputs)."""
        return Interval(self.lower, self.upper).size

    def maximum(self, rows: Tensor) -> Tensor:
        """Max over the set of rows @ x, (samples, rows), of rows (samples or 1, rows, inputs); rounded up."""
        return Interval(self.lower, self.upper).maximum(rows)

    def points(self, count: int, generator: torch.Generator) -> Tensor:
        """Random points (samples, count, inputs): half of them uniform in the box, half at corners."""
        draws = torch.rand(len(self.center), count, self.center.shape[1], generator=generator, dtype=torch.float64)
        draws[:, ::2] = draws[:, ::2].round()  # a linear function is largest at a corner
        return torch.lerp(self.lower[:, None], self.upper[:, None], draws)

    def ascend(self, x: Tensor, gradient: Tensor, step: float) -> Tensor:
        """Move (samples, count, inputs) by `step` widths of the box along the gradient's sign, then into the set."""
        low, high = self.lower[:, None], self.upper[:, None]
        return torch.minimum(torch.maximum(x + step * (high - low) * gradient.sign(), low), high)


@dataclass(frozen=True, eq=False)
class Ball:
    """Every x within `radius` of the center in the 2-norm; center (samples, inputs). Raises as `Box` does."""

    center: Tensor
    radius: float

    def __post_init__(self) -> None:
        _check_set(self)

    @property
    def size(self) -> Tensor:
        """At least max |x|, (samples, inputs)."""
        return above(self.center.abs() + self.radius)

    def maximum(self, rows: Tensor) -> Tensor:
        """Max over the set of rows @ x, (samples, rows), of rows (samples or 1, rows, inputs): Cauchy-Schwarz.

        Rounded up.
        """
        unit = rows.abs().amax(2, keepdim=True)  # squares may leave the range of float64
        unit = torch.where((unit > 0) & unit.isfinite(), unit, 1.0)
        norms: Tensor = unit[..., 0] * torch.linalg.vector_norm(rows / unit, dim=2)
        sizes = raised(norms, rows.shape[2] + 12)
        return times(rows, self.center) + self.radius * sizes + gamma(rows.shape[2] + 12) * times(rows.abs(), self.size)

    def points(self, count: int, generator: torch.Generator) -> Tensor:
        """Random points (samples, count, inputs): half of them on the sphere, half inside it."""
        shape = (len(self.center), count, self.center.shape[1])
        away = _unit(torch.randn(shape, generator=generator, dtype=torch.float64))
        reach = torch.rand(*shape[:2], 1, generator=generator, dtype=torch.float64)
        reach[:, ::2] = 1.0
        return self.center[:, None] + self.radius * reach * away

    def ascend(self, x: Tensor, gradient: Tensor, step: float) -> Tensor:
        """Move (samples, count, inputs) by `step` diameters along the gradient, and back into the set."""
        away = x + 2 * step * self.radius * _unit(gradient) - self.center[:, None]
        size: Tensor = torch.linalg.vector_norm(away, dim=2, keepdim=True)
        return self.center[:, None] + (self.radius / size.clamp(min=1e-300)).clamp(max=1.0) * away


def times(rows: Tensor, x: Tensor) -> Tensor:
    """The products (samples, rows) of rows (samples or 1, rows, width) and x (samples, width)."""
    return x @ rows[0].T if len(rows) == 1 else (rows @ x[..., None])[..., 0]


def below(ends: Tensor) -> Tensor:
    """The next smaller numbers: certainly not above what took one rounding; a sum of 0 took none."""
    return torch.where(ends == 0, ends, torch.nextafter(ends, torch.full_like(ends, -math.inf)))


def above(ends: Tensor) -> Tensor:
    """The next larger numbers."""
    return torch.where(ends == 0, ends, torch.nextafter(ends, torch.full_like(ends, math.inf)))


def float64(tensor: Tensor, name: str) -> Tensor:
    """A float64 copy on the CPU; raises ValueError, with the name, for numbers that are not finite."""
    kept = tensor.detach().cpu().double()
    kept = kept.clone() if kept.is_inference() else kept  # autograd cannot use it
    if not bool(kept.isfinite().all()):
        raise ValueError(f"{name} hold numbers that are not finite")
    return kept


def _unit(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / size.clamp(min=1e-300)


def _check_set(around: Box | Ball) -> None:
    center = around.center
    if not isinstance(center, Tensor) or center.is_complex() or center.device.type == "meta":
        what = f"a tensor {center.dtype} on {center.device}" if isinstance(center, Tensor) else repr(center)
        raise TypeError(f"the center is {what:.80}; give a tensor (samples, inputs) of real numbers")
    if center.ndim != 2 or not len(center):
        raise ValueError(f"the center has shape {tuple(center.shape)}; expected (samples, inputs), at least one sample")
    number(0)("the radius", around.radius)
    object.__setattr__(around, "center", float64(center, "the centers"))


def _check_limit(name: str, limit: Any, center: Tensor) -> None:
    if limit is None:
        return
    if not isinstance(limit, Tensor):
        number(infinite=True)(name, limit)
        return
    if limit.is_complex() or limit.device.type == "meta" or bool(limit.isnan().any()):
        raise ValueError(f"{name} holds NaN, complex numbers, or none at all (the meta device)")
    sizes = zip(reversed(limit.shape), reversed(center.shape), strict=False)
    if limit.ndim > 2 or any(own not in (1, size) for own, size in sizes):
        raise ValueError(
            f"{name} has shape {tuple(limit.shape)}, which does not fit the center's {tuple(center.shape)}"
        )
