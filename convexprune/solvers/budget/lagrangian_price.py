"""Put a price on the budget: every layer takes the level that is best at this price.

The price at which the total cost crosses the budget solves the linear relaxation. The choice just below the budget is
optimal except for one layer; single upgrades spend the rest of the budget.
Source: Everett, Operations Research 1963; Sinha, Zoltners, Oper. Res. 1979.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from convexprune import knapsack
from convexprune.forms import KnapsackProblem
from convexprune.solution import Attempt, Status


@dataclass(frozen=True)
class LagrangianPrice:
    """Near-optimal in a few passes over the curves; its price, the witness, gives the linear relaxation's bound."""

    takes: ClassVar[type] = KnapsackProblem
    starts: ClassVar[bool] = False

    def solve(self, problem: KnapsackProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used. Status INFEASIBLE if the budget is below the cheapest choice."""
        cost, loss = problem.table
        priced = knapsack.divide(cost, loss, problem.room)
        if priced is None:
            return infeasible(problem)
        choice = knapsack.filled(cost, loss, problem.room, priced.under)
        return Attempt(problem.point(choice), priced.price, Status.CONVERGED, 1)


def infeasible(problem: KnapsackProblem) -> Attempt:
    """The answer of every solver if no choice fits the budget: the cheapest levels, and their cost."""
    cost, _ = problem.table
    note = f"the budget is {problem.budget:,.15g}; the cheapest choice costs {problem.cheapest:,.15g}"
    return Attempt(problem.point(cost.argmin(1)), None, Status.INFEASIBLE, 0, note=note)
