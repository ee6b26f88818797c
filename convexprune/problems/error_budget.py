"""How much each layer may err for the network to stay within an error: a convex budget problem.

    minimise  sum_l n_l log(cap_l / e_l)   subject to   sum_l g_l e_l <= goal,   0 < e_l <= cap_l

e_l is the layer's own error, g_l what the network's bound makes of it (`guarantee`), cap_l the error of removing the
layer whole. The objective is what L1 pruning does: over wide ranges a layer keeps about a constant share of its n_l
weights less for each factor that its error may grow by. For any price p >= 0 the Lagrangian's minimum is a bound:

    sum_l min_e ( n_l log(cap_l / e) + p g_l e ) - p goal,   at e = min(cap_l, n_l / (p g_l))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import BudgetProblem
from convexprune.options import numbers, positive
from convexprune.problem import Formulation
from convexprune.rounding import down, gamma, raised, total, total_doubt, up


@dataclass(frozen=True, eq=False)
class ErrorBudget(BudgetProblem):
    """One error for each of L layers, as large as the network's goal allows.

    gains   (L,) >= 0: g_l
    sizes   (L,) > 0: n_l, the layers' numbers of weights
    caps    (L,) > 0: in the unit of the errors, || . ||_F over the calibration samples
    goal    > 0: the network's error, in the same unit

    A point x is (L, 1): the errors. Raises ValueError naming the figure that is out of range.
    """

    gains: Tensor
    sizes: Tensor
    caps: Tensor
    goal: float

    def __post_init__(self) -> None:
        for name, least in (("gains", "0"), ("sizes", "a number > 0"), ("caps", "a number > 0")):
            numbers(name, getattr(self, name))
            value = getattr(self, name).detach().cpu().double()
            object.__setattr__(self, name, value)
            if value.ndim != 1 or len(value) != len(self.gains) or not len(value):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one figure for each layer")
            poor = ~torch.isfinite(value) | ((value < 0) if name == "gains" else (value <= 0))
            if bool(poor.any()):
                index = int(poor.nonzero()[0])
                raise ValueError(f"{name}[{index}] is {float(value[index])}; it must be finite, at least {least}")
        positive("goal", self.goal)

    @property
    def shape(self) -> tuple[int, int]:
        """(L, 1)."""
        return len(self.gains), 1

    @property
    def dense(self) -> Tensor:
        """(L, 1): no error anywhere."""
        return torch.zeros(self.shape, dtype=torch.float64)

    def value(self, x: Tensor) -> float:
        """The objective, to the nearest; inf where an error is not above 0, or not finite."""
        errors = self._checked(x)
        if not bool(((errors > 0) & (errors < math.inf)).all()):
            return math.inf
        return total(self.sizes * _log_ratio(self.caps, errors))

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        errors = self._checked(x)
        terms = self.sizes * _log_ratio(self.caps, errors).abs()
        # a ratio far from 1 is rounded once, which moves its logarithm by u; a logarithm is good to its last place
        ratios = torch.where(_near(self.caps / errors), 0.0, gamma(2) * self.sizes)
        return up(float(raised((gamma(8) * terms + ratios).sum(), len(terms))))

    def violation(self, x: Tensor) -> float:
        """The largest excess over the goal or a cap, relative to it; an error below 0 by as much; rounded up.

        inf for errors that are not finite.
        """
        errors = self._checked(x)
        if not bool(torch.isfinite(errors).all()):
            return math.inf
        spent = self.gains * errors
        over = total(torch.cat([spent, torch.tensor([-self.goal], dtype=torch.float64)]))
        over = up(over, gamma(4) * float(spent.abs().sum())) / self.goal
        beyond = float(((errors - self.caps) / self.caps).max())
        below = float((-errors / self.caps).max())
        most = max(over, beyond, below)
        return up(most, gamma(4) * most) if most > 0 else 0.0

    def lower_bound(self, witness: Any) -> float:
        """The Lagrangian's minimum at a price, which is clipped to >= 0; rounded down.

        A layer's term is p g cap while that is at most n, at e = cap, and n (log(p g cap / n) + 1) beyond.
        """
        if witness is None:
            return 0.0
        price = max(float(witness), 0.0)
        if not price < math.inf:
            return 0.0
        full = price * self.gains * self.caps
        beyond = full > self.sizes
        terms = torch.where(beyond, self.sizes * (_log_ratio(full, self.sizes) + 1), full)
        paid = price * self.goal
        doubts = gamma(8) * (terms.abs() + torch.where(beyond, self.sizes, 0.0))
        doubt = float(raised(doubts.sum(), len(terms))) + total_doubt(terms) + gamma(8) * paid
        bound = down(total(terms) - paid, doubt)
        return bound if 0 < bound < math.inf else 0.0

    def to_cvxpy(self) -> Formulation:
        """The same, with errors in units of what each layer would get if no other were at its cap."""
        with extras():
            import cvxpy as cp

        weight = self.sizes / self.sizes.sum()
        unit = torch.minimum(self.caps, weight * self.goal / self.gains.clamp(min=1e-300))
        share = cp.Variable(self.shape, name="share")
        weights, units, costs, most = (
            each.numpy()[:, None] for each in (weight, unit, self.gains * unit / self.goal, self.caps / unit)
        )
        within = cp.sum(cp.multiply(costs, share)) <= 1
        program = cp.Problem(cp.Minimize(-cp.sum(cp.multiply(weights, cp.log(share)))), [within, share <= most])
        errors: Any = cp.multiply(units, share)
        # the dual's unit: objective over the sum of sizes, constraint over the goal
        return Formulation(program, errors, lambda: float(within.dual_value) * float(self.sizes.sum()) / self.goal)

    def _checked(self, x: Tensor) -> Tensor:
        if tuple(x.shape) != self.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected {self.shape}")
        return x.detach().cpu().double()[:, 0]


def _log_ratio(above: Tensor, below: Tensor) -> Tensor:
    """log(above / below) of numbers > 0, to a unit of the last place, also where the two are nearly equal."""
    ratio = above / below
    apart = torch.where((ratio > 0) & (ratio < math.inf), ratio.log(), above.log() - below.log())
    return torch.where(_near(ratio), torch.log1p((above - below) / below), apart)


def _near(ratio: Tensor) -> Tensor:
    """Where a difference is exact."""
    return (ratio > 0.5) & (ratio < 2)
