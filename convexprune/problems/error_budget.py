"""How much each layer may err for the network to stay within an error: a convex budget problem.

    minimise  sum_l n_l log(cap_l / e_l)   subject to   sum_l g_l e_l <= goal,   0 < e_l <= cap_l

e_l is the layer's own error, g_l what the network's bound makes of it (`guarantee`), cap_l the error of removing the
layer whole. The objective is what L1 pruning does: over wide ranges a layer keeps about a constant share of its n_l
weights less for each factor that its error may grow by. For any price p >= 0 the Lagrangian's minimum is a bound:

    sum_l min_e ( n_l log(cap_l / e) + p g_l e ) - p goal,   at e = min(cap_l, n_l / (p g_l))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import BudgetProblem
from convexprune.problem import Formulation


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
            value = getattr(self, name).detach().cpu().double()
            object.__setattr__(self, name, value)
            if value.ndim != 1 or len(value) != len(self.gains) or not len(value):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected one figure for each layer")
            poor = ~torch.isfinite(value) | ((value < 0) if name == "gains" else (value <= 0))
            if bool(poor.any()):
                index = int(poor.nonzero()[0])
                raise ValueError(f"{name}[{index}] is {float(value[index])}; it must be finite, at least {least}")
        if not 0 < self.goal < float("inf"):
            raise ValueError(f"goal is {self.goal}; it must be a finite number > 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(L, 1)."""
        return len(self.gains), 1

    @property
    def dense(self) -> Tensor:
        """(L, 1): no error anywhere."""
        return torch.zeros(self.shape, dtype=torch.float64)

    def value(self, x: Tensor) -> float:
        """The objective; inf where an error is not above 0."""
        errors = self._checked(x)
        if not bool((errors > 0).all()):
            return float("inf")
        return float((self.sizes * (self.caps / errors).log()).sum())

    def violation(self, x: Tensor) -> float:
        """The largest excess over the goal or a cap, relative to it; an error below 0 by as much."""
        errors = self._checked(x)
        over = float(self.gains @ errors) / self.goal - 1
        return max(0.0, over, float((errors / self.caps - 1).max()), float((-errors / self.caps).max()))

    def lower_bound(self, witness: Any) -> float:
        """The Lagrangian's minimum at a price, which is clipped to >= 0."""
        if witness is None:
            return 0.0
        price = max(float(witness), 0.0)
        if not price < float("inf"):
            return 0.0
        costs = price * self.gains
        best = torch.minimum(self.caps, self.sizes / costs.clamp(min=1e-300))
        terms = self.sizes * (self.caps / best).log() + costs * best
        return max(0.0, float(terms.sum()) - price * self.goal)

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
