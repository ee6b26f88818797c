"""The exact optimum of a multiple-choice knapsack: find a price, then search the choices that the price leaves open.

At the optimal price p the bound L(p) is close below the optimum. A choice with a value below L(p) + room can contain
only levels whose reduced cost is at most `room`: a few for each layer. The room grows until the search finds a choice;
that choice is the best of all.
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
from convexprune.options import check_options
from convexprune.solution import Attempt, Status
from convexprune.solvers.budget.lagrangian_price import infeasible

FIRST = 2.0**-6  # the first room, as a fraction of the distance between the bound and the first choice


@dataclass(frozen=True)
class MinimalCore:
    """Divide a budget among layers at proven optimality, whether or not the costs are integers.

    The witness is the price and the optimal value. The status is MAX_ITER if too many choices are left open to search
    them (the point is then the best choice found, with the price's bound), and TIME_LIMIT if the time runs out between
    two searches.

    Args:
        time_limit: Seconds, or None for no limit.

    Example:
        >>> import convexprune as cp
        >>> from torch import tensor
        >>> first = cp.Curve("first", kept=tensor([1, 2, 4]), distortion=tensor([9.0, 4.0, 0.0]))
        >>> second = cp.Curve("second", kept=tensor([1, 2, 4]), distortion=tensor([5.0, 3.0, 0.0]))
        >>> solution = cp.solve(cp.SparsityAllocation([first, second], budget=5), cp.MinimalCore())
        >>> solution.x.flatten().tolist(), solution.certificate.value  # the levels 2 and 0
        ([2.0, 0.0], 5.0)
    """

    takes: ClassVar[type] = KnapsackProblem
    starts: ClassVar[bool] = False

    time_limit: float | None = None

    def __post_init__(self) -> None:
        check_options(self)

    def solve(self, problem: KnapsackProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used. Status INFEASIBLE if the budget is below the cheapest choice."""
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
