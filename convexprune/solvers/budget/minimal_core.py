"""The exact optimum of a multiple-choice knapsack: a price, and a search among the choices that it leaves open.

At the optimal price p the bound L(p) is close below the optimum, and a choice better than L(p) + room can only be made
of levels whose reduced cost is at most the room: a few a layer. The room grows until the search finds a choice, which
is then the best of all.
Source: Pisinger, European Journal of Operational Research 1995.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from convexprune import knapsack
from convexprune.forms import KnapsackProblem
from convexprune.solution import Attempt, Status
from convexprune.solvers.budget.lagrangian_price import infeasible

FIRST = 2.0**-6  # of the distance between the bound and the choice known first


@dataclass(frozen=True)
class MinimalCore:
    """Proven optimal at full integer budgets, and at costs that are no integers.

    The witness is the price and the value that nothing is below. Status MAX_ITER where the open choices are too many
    to be searched (the best one found is returned, with the price's bound), TIME_LIMIT between two searches.

    time_limit  seconds, or None
    """

    takes: ClassVar[type] = KnapsackProblem
    starts: ClassVar[bool] = False

    time_limit: float | None = None

    def solve(self, problem: KnapsackProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used. Status INFEASIBLE where the budget is below the cheapest choice."""
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        cost, loss = problem.table
        priced = knapsack.divide(cost, loss, problem.room)
        if priced is None:
            return infeasible(problem)
        choice = knapsack.filled(cost, loss, problem.room, priced.under)
        value = problem.value(problem.point(choice))
        room, searches = FIRST * (value - priced.bound), 0
        while priced.bound < value:
            if time.perf_counter() > deadline:
                return Attempt(problem.point(choice), priced.price, Status.TIME_LIMIT, searches)
            below = min(priced.bound + room, value)
            found, complete = knapsack.best_below(cost, loss, problem.room, priced.price, below)
            searches += 1
            if not complete:
                return Attempt(problem.point(choice), priced.price, Status.MAX_ITER, searches)
            if found is not None:
                choice, value = found, problem.value(problem.point(found))
            if found is not None or below >= value:
                break
            room *= 4
        return Attempt(problem.point(choice), (priced.price, value), Status.CONVERGED, searches)
