"""Water-filling: the error budget in closed form, from the order in which the layers reach their caps.

At a price p of the goal a layer spends g_l e_l = min(g_l cap_l, n_l / p). The goal is met at the u = 1 / p with

    sum_l min(g_l cap_l, n_l u) = goal

The left side is concave and piecewise linear in u; sorting the breakpoints u_l = g_l cap_l / n_l finds the piece.
Source: Boyd, Vandenberghe, Convex Optimization, 2004, example 5.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import BudgetProblem
from convexprune.solution import Attempt, Status


@dataclass(frozen=True)
class WaterFilling:
    """The exact optimum of an `ErrorBudget`, in the time of a sort; the price is the witness."""

    takes: ClassVar[type] = BudgetProblem
    starts: ClassVar[bool] = False

    def solve(self, problem: BudgetProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        full = problem.gains * problem.caps
        if float(full.sum()) <= problem.goal:  # every layer may be removed
            return Attempt(problem.caps[:, None].clone(), 0.0, Status.CONVERGED, 1)
        breaks, order = (full / problem.sizes).sort()
        # with k layers at their caps, the other layers share the rest of the goal in proportion to their sizes
        rest = problem.goal - full[order].cumsum(0).roll(1).index_fill(0, torch.tensor(0), 0.0)
        levels = rest / problem.sizes[order].flip(0).cumsum(0).flip(0)
        breaks[-1] = float("inf")
        level = float(levels[int((levels <= breaks).nonzero()[0])])
        errors = torch.minimum(problem.caps, level * problem.sizes / problem.gains.clamp(min=1e-300))
        over = problem.violation(errors[:, None])
        if over:  # what rounding spent too much
            errors = errors * (1 - 2 * over - 2.0**-52)
        return Attempt(errors[:, None], 1 / level, Status.CONVERGED, 1)
