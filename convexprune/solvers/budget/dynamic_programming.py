"""Dynamic programming over the layers, with the budget divided into buckets.

    f_l[b] = min_k  f_{l-1}[b - ceil(c_lk / w)] + d_lk,        w = budget / buckets

Costs are rounded up to whole buckets. The result therefore fits the budget, and it is at least as good as every choice
that costs at most budget - L w: each layer wastes at most one bucket. With integer costs and one bucket for each unit
the result is exact. The time is layers x buckets x levels operations, the memory layers x buckets numbers.
Source: Xu et al., ICCV 2023, Algorithm 1; Dudzinski, Walukiewicz, EJOR 1987.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from convexprune import knapsack
from convexprune.forms import KnapsackProblem
from convexprune.options import check_options, optional, whole
from convexprune.rounding import gamma
from convexprune.solution import Attempt, Status
from convexprune.solvers.budget.lagrangian_price import LagrangianPrice, infeasible


@dataclass(frozen=True)
class DynamicProgramming:
    """The optimum up to the rounding of the costs.

    buckets  number of buckets of the budget; None: one for each unit, if all costs are integers
    """

    takes: ClassVar[type] = KnapsackProblem
    starts: ClassVar[bool] = False

    buckets: int | None = 10_000

    def __post_init__(self) -> None:
        check_options(self, buckets=optional(whole(1)))

    def solve(self, problem: KnapsackProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used; the witness is the price of `LagrangianPrice`.

        Status INFEASIBLE if the budget is below the cheapest choice. Status MAX_ITER, with the choice of
        `LagrangianPrice`, if the budget is so close to the cheapest choice that no choice fits after rounding.
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
        # spend the part of the budget that rounding has left over
        choice = knapsack.filled(cost, loss, problem.room, choice)
        return Attempt(problem.point(choice), first.witness, Status.CONVERGED, len(cost))

    def _rounded(self, cost: knapsack.Array, budget: float) -> tuple[knapsack.Choice, int]:
        real = np.where(np.isfinite(cost), cost, 0)
        if self.buckets is None:
            if bool((real != np.round(real)).any()):
                raise ValueError("buckets is None, but some costs are no integers; give a number of buckets")
            return np.where(np.isfinite(cost), cost, -1).astype(np.int64), int(min(budget, real.max(1).sum()))
        if budget == 0:  # only what is free fits
            return np.where(cost == 0, 0, -1).astype(np.int64), self.buckets
        # a quotient above a whole number by a few rounding errors is that number; what is above the budget never fits
        exact = np.minimum(real / budget, 2.0) * self.buckets
        rounded = np.ceil(exact * (1 - gamma(8)))
        return np.where(np.isfinite(cost), rounded, -1).astype(np.int64), self.buckets


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
