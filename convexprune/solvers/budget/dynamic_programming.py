"""Dynamic programming over the layers, with the budget in buckets.

    f_l[b] = min_k  f_{l-1}[b - ceil(c_lk / w)] + d_lk,        w = budget / buckets

Costs are rounded up to whole buckets, so what it returns fits the budget, and no choice that costs at most
budget - L w is better: at most one bucket a layer is wasted. With integer costs and a bucket for each unit it is exact.
Layers x buckets x levels operations, layers x buckets numbers of memory.
Source: Xu et al., ICCV 2023, Algorithm 1; Dudzinski, Walukiewicz, EJOR 1987.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from convexprune import knapsack
from convexprune.forms import KnapsackProblem
from convexprune.rounding import gamma
from convexprune.solution import Attempt, Status
from convexprune.solvers.budget.lagrangian_price import LagrangianPrice, infeasible


@dataclass(frozen=True)
class DynamicProgramming:
    """Exact up to the rounding of the costs.

    buckets  how finely the budget is divided; None: one for each unit, where all costs are integers
    """

    takes: ClassVar[type] = KnapsackProblem

    buckets: int | None = 10_000

    def __post_init__(self) -> None:
        if self.buckets is not None and self.buckets < 1:
            raise ValueError(f"buckets is {self.buckets}; it must be at least 1, or None for one for each unit")

    def solve(self, problem: KnapsackProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used; the witness is the price, from the same curves.

        Status INFEASIBLE where the budget is below the cheapest choice; MAX_ITER, with the price's choice, where it is
        so close above it that no choice fits the rounded costs.
        """
        cost, loss = problem.table
        if problem.cheapest > problem.room:
            return infeasible(problem)
        first = LagrangianPrice().solve(problem)
        rounded, buckets = self._rounded(cost, problem.room)
        choice = _swept(rounded, loss, buckets)
        if choice is None:
            note = f"no choice fits {buckets} buckets after rounding; use more of them"
            return Attempt(first.x, first.witness, Status.MAX_ITER, 0, note=note)
        # what the rounding left of the budget is spent
        choice = knapsack.filled(cost, loss, problem.room, choice)
        return Attempt(problem.point(choice), first.witness, Status.CONVERGED, len(cost))

    def _rounded(self, cost: knapsack.Array, budget: float) -> tuple[knapsack.Choice, int]:
        real = np.where(np.isfinite(cost), cost, 0)
        if self.buckets is None:
            if bool((real != np.round(real)).any()):
                raise ValueError("buckets is None, but some costs are no integers; give a number of buckets")
            return np.where(np.isfinite(cost), cost, -1).astype(np.int64), int(min(budget, real.max(1).sum()))
        spare = budget if budget > 0 else 1.0
        # a quotient a few roundings above a whole number is that number
        exact = real / spare * self.buckets
        whole = np.ceil(exact * (1 - gamma(8)))
        return np.where(np.isfinite(cost), whole, -1).astype(np.int64), self.buckets


def _swept(cost: knapsack.Choice, loss: knapsack.Array, buckets: int) -> knapsack.Choice | None:
    """The best choice (L,) whose costs (whole buckets, -1 for no level) sum to at most `buckets`."""
    best = np.zeros(buckets + 1)
    taken = np.zeros((len(cost), buckets + 1), dtype=np.int16 if cost.shape[1] < 2**15 else np.int32)
    for layer in range(len(cost)):
        new = np.full(buckets + 1, np.inf)
        for level in range(cost.shape[1]):
            spent = int(cost[layer, level])
            if not 0 <= spent <= buckets:
                continue
            candidate = best[: buckets + 1 - spent] + loss[layer, level]
            better = candidate < new[spent:]
            new[spent:][better] = candidate[better]
            taken[layer, spent:][better] = level
        best = new
    if not np.isfinite(best[buckets]):
        return None
    choice, left = np.zeros(len(cost), dtype=np.int64), buckets
    for layer in reversed(range(len(cost))):
        choice[layer] = taken[layer, left]
        left -= int(cost[layer, choice[layer]])
    return choice
