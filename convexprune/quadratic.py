"""A least-squares objective in moments, each figure with what rounding may have done to it.

    q_m(w) = E (y_m - w x)^2 = E (r_m - D x)^2 = D G D^T - 2 <K_m, D> + v_m,    D = w - A_m,    r_m = y_m - A_m x

Where the targets are the layer's own outputs, A is its weights, and r = K = v = 0: near them nothing cancels. Where
targets are given, A = 0. G, K and v are about the means where the bias is at its best, about 0 where there is none.
Each entry of G is within e_i e_j of exact, so D G D^T is within (|D| e)^2; its own rounding is counted likewise, by
sizes s with |G_ij| <= s_i s_j.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convexprune.moments import CrossMoments, Moments
from convexprune.rounding import gamma, raised


@dataclass(frozen=True, eq=False)
class Quadratic:
    """q (M,) of the weights w (M, N).

    origin   (M, N): A
    inputs   the moments of x: G
    targets  those of r with x: K and v; None where r is 0, and else A is 0
    """

    origin: Tensor
    inputs: Moments
    targets: CrossMoments | None

    def rows(self, some: slice) -> Quadratic:
        """That of some of the outputs."""
        return Quadratic(self.origin[some], self.inputs, None if self.targets is None else self.targets.rows(some))

    @cached_property
    def varies(self) -> Tensor:
        """(N,) bool: inputs whose second moment is more than rounding."""
        return self.inputs.covariance.diagonal() > self.inputs.noise

    @cached_property
    def gram(self) -> Tensor:
        """G (N, N), for those who look for weights: rows of inputs that do not vary are 0."""
        varies = self.varies
        if bool(varies.all()):
            return self.inputs.covariance
        return torch.where(varies[:, None] & varies, self.inputs.covariance, 0.0)

    @cached_property
    def cross(self) -> Tensor:
        """C (M, N): A G + K."""
        found = self.origin @ self.gram if self.targets is None else self.targets.covariance
        return torch.where(self.varies, found, 0.0)

    @cached_property
    def energies(self) -> Tensor:
        """(M,): q(0)."""
        if self.targets is None:
            return (self.cross * self.origin).sum(1).clamp(min=0)
        return self.targets.variance

    def at(self, w: Tensor) -> Step:
        """What the judge needs at the weights w (M, N)."""
        return Step(self, w - self.origin)


@dataclass(frozen=True, eq=False)
class Step:
    """A step D from the origin of a quadratic."""

    of: Quadratic
    step: Tensor  # (M, N)

    @cached_property
    def through(self) -> Tensor:
        """D G (M, N)."""
        return self.step @ self.of.inputs.covariance

    @cached_property
    def reach(self) -> Tensor:
        """(M,): |D| s, and"""
        return self.step.abs() @ self.of.inputs.size

    @cached_property
    def blur(self) -> Tensor:
        """(M,): |D| e."""
        return self.step.abs() @ self.of.inputs.doubt

    @cached_property
    def values(self) -> Tensor:
        """(M,): q, to the nearest that the moments allow."""
        bent = (self.through * self.step).sum(1)
        targets = self.of.targets
        return bent if targets is None else bent - 2 * (targets.covariance * self.step).sum(1) + targets.variance

    @cached_property
    def doubts(self) -> Tensor:
        """(M,): by how much `values` may be off."""
        roundings = gamma(2 * self.step.shape[1] + 8)
        found = self.blur.square() + roundings * self.reach.square()
        targets = self.of.targets
        if targets is not None:
            crossed = (targets.covariance.abs() * self.step.abs()).sum(1)
            found = found + targets.doubt.square() + 2 * targets.doubt * (self.step.abs() @ targets.input_doubt)
            found = found + (roundings + targets.relative) * (2 * crossed + targets.variance.abs())
        return raised(found, self.step.shape[1] + 8)

    @cached_property
    def slopes(self) -> Tensor:
        """(M, N): K - D G, the moments of what is left, r - D x, with x."""
        return -self.through if self.of.targets is None else self.of.targets.covariance - self.through

    @cached_property
    def slope_doubts(self) -> Tensor:
        """(M, N): by how much `slopes` may be off."""
        inputs, targets, width = self.of.inputs, self.of.targets, self.step.shape[1]
        rest = gamma(width + 6)
        # the vectors are rounded up, so that the products need not be
        found = torch.outer(raised(self.blur, width + 8), inputs.doubt)
        found.addr_(raised(self.reach, width + 8) * rest, inputs.size)
        if targets is not None:
            found.addr_(raised(targets.doubt, 8), targets.input_doubt)
            found.add_(targets.covariance.abs(), alpha=(rest + targets.relative) * (1 + gamma(8)))
        return found

    @cached_property
    def along(self) -> tuple[Tensor, Tensor]:
        """(M,), (M,): E[r (r - D x)] about the means, and by how much it may be off."""
        targets = self.of.targets
        if targets is None:
            none = torch.zeros(len(self.step), dtype=torch.float64)
            return none, none
        crossed = targets.covariance * self.step
        size = targets.variance.abs() + crossed.abs().sum(1)
        doubt = targets.doubt.square() + targets.doubt * (self.step.abs() @ targets.input_doubt)
        doubt = doubt + (gamma(self.step.shape[1] + 8) + targets.relative) * size
        return targets.variance - crossed.sum(1), raised(doubt, self.step.shape[1] + 8)


@dataclass(frozen=True, eq=False)
class Residual:
    """What weights x (M, P) leave of the targets: y - x u, by its moments; pairs are a figure and its doubt.

    of      the quadratic about the means
    start   (M,): the origin's bias; None for a layer without one
    """

    of: Quadratic
    start: Tensor | None
    x: Tensor

    @cached_property
    def step(self) -> Step:
        """From the origin to x."""
        return self.of.at(self.x[:, : self.of.origin.shape[1]])

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor]:
        """(M,): E[x u - y]; 0 where no means are known, and all moments are about 0."""
        inputs, targets = self.of.inputs, self.of.targets
        none = torch.zeros(len(self.x), dtype=torch.float64)
        if inputs.mean is None:
            return none, none
        step, size = self.step.step, self.step.step.abs()
        rise = none if self.start is None else self.x[:, -1] - self.start
        aim, blur = (none, none) if targets is None or targets.mean is None else (targets.mean, targets.mean_doubt)
        sizes = size @ inputs.mean.abs() + rise.abs() + aim.abs()
        doubts = size @ inputs.mean_doubt + blur + gamma(step.shape[1] + 6) * sizes
        return step @ inputs.mean + rise - aim, raised(doubts, step.shape[1] + 8)

    @cached_property
    def errors(self) -> Tensor:
        """(M,): E (y - x u)^2, to the nearest that the moments allow."""
        # a mean of squares is not negative: what is below 0 is rounding, or of moments that no data has
        return (self.step.values + self.offsets[0].square()).clamp(min=0)

    @cached_property
    def error_doubts(self) -> Tensor:
        """(M,): by how much those may be off."""
        offset, doubt = self.offsets
        sizes = offset.square() + self.step.values.abs()
        return raised(self.step.doubts + (2 * offset.abs() + doubt) * doubt + gamma(4) * sizes)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """(M, P): E[(y - x u) u^T]."""
        (offset, doubt), mean = self.offsets, self.of.inputs.mean
        slopes, doubts = self.step.slopes, self.step.slope_doubts
        if mean is None:
            return slopes, doubts
        found = slopes - torch.outer(offset, mean)
        doubts = doubts + torch.outer(doubt + gamma(3) * offset.abs(), mean.abs())
        doubts = doubts.addr_(offset.abs() + doubt, self.of.inputs.mean_doubt).add_(found.abs(), alpha=gamma(2))
        if self.start is not None:
            found, doubts = torch.cat([found, -offset[:, None]], 1), torch.cat([doubts, doubt[:, None]], 1)
        return found, raised(doubts, 8)

    @cached_property
    def with_targets(self) -> tuple[Tensor, Tensor]:
        """(M,): E[y (y - x u)], where y = A u + r at the origin A."""
        (moments, doubts), origin = self.moments, self.of.origin
        origin = origin if self.start is None else torch.cat([origin, self.start[:, None]], 1)
        (along, more), (offset, blur) = self.step.along, self.offsets
        targets, terms = self.of.targets, origin * moments
        found = terms.sum(1) + along
        doubt = (origin.abs() * doubts).sum(1) + more + gamma(len(origin[0]) + 8) * (terms.abs().sum(1) + along.abs())
        if targets is not None and targets.mean is not None:
            found = found - targets.mean * offset
            doubt = doubt + targets.mean.abs() * (blur + gamma(4) * offset.abs())
            doubt = doubt + (offset.abs() + blur) * targets.mean_doubt + gamma(2) * found.abs()
        return found, raised(doubt, len(origin[0]) + 8)
