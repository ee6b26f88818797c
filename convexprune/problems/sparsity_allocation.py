"""How much each layer may lose: a multiple-choice knapsack.

    minimise  sum_l d_l(k_l)   subject to   sum_l c_l(k_l) <= budget,    one level k_l of each curve

For any price p >= 0 no choice within the budget has a value below  sum_l min_k (d_lk + p c_lk) - p budget.
Source: Xu et al., ICCV 2023, eq. 8; Sinha, Zoltners, Oper. Res. 1979.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from convexprune import knapsack
from convexprune.curve import EXACT, Curve
from convexprune.extras import extras
from convexprune.forms import KnapsackProblem
from convexprune.options import number
from convexprune.problem import Formulation
from convexprune.rounding import UNIT, down, gamma, summed, up


@dataclass(frozen=True, eq=False, init=False)
class SparsityAllocation(KnapsackProblem):
    """One level for each layer, at the least summed distortion that the budget allows.

    curves  one for each layer; curves of the same `tie` take the same level
    budget  in the unit of the curves' costs

    A point x is (L, 1): the number of the level of each curve. Raises ValueError for no curves, a budget that is not
    a number >= 0, names that repeat, and ties of curves with different numbers of levels.
    """

    curves: tuple[Curve, ...]
    budget: float

    def __init__(self, curves: Sequence[Curve], budget: float) -> None:
        if not isinstance(curves, Iterable):
            raise TypeError(f"curves is {curves!r}; give a Curve for each layer")
        object.__setattr__(self, "curves", tuple(curves))
        number(0)("budget", budget)
        object.__setattr__(self, "budget", float(budget))
        for at, curve in enumerate(self.curves):
            if not isinstance(curve, Curve):
                raise TypeError(f"curves[{at}] is a {type(curve).__name__}; give a Curve for each layer")
        if not self.curves:
            raise ValueError("no curves; give one for each layer")
        names = [curve.name for curve in self.curves]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise ValueError(f"two curves have the name {twice[0]!r}; each layer has one")
        for group in self.groups:
            lengths = {self.curves[index].name: len(self.curves[index].kept) for index in group}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"the tied curves have different numbers of levels: {lengths}; give each the same")

    @property
    def shape(self) -> tuple[int, int]:
        """(L, 1)."""
        return len(self.curves), 1

    @property
    def dense(self) -> Tensor:
        """(L, 1): the levels that keep most."""
        return torch.tensor([[float(curve.kept.argmax())] for curve in self.curves], dtype=torch.float64)

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Groups of curve indices that must take the same level."""
        found: dict[object, list[int]] = {}
        for index, curve in enumerate(self.curves):
            found.setdefault(index if curve.tie is None else curve.tie, []).append(index)
        return tuple(tuple(group) for group in found.values())

    @cached_property
    def levels(self) -> tuple[np.ndarray, ...]:
        """The levels of each group that no other one of it beats in both cost and distortion, by rising cost."""
        return tuple(_undominated(*self._summed(group)) for group in self.groups)

    @property
    def dominated(self) -> int:
        """How many levels another one of the same curve beats in both."""
        sizes = [len(self.curves[group[0]].kept) for group in self.groups]
        return sum(sizes) - sum(len(levels) for levels in self.levels)

    @cached_property
    def table(self) -> tuple[knapsack.Array, knapsack.Array]:
        """Cost and distortion (G, K) of the undominated levels of each group, padded with inf."""
        width = max(len(levels) for levels in self.levels)
        cost = np.full((len(self.groups), width), np.inf)
        loss = np.full((len(self.groups), width), np.inf)
        for row, (group, levels) in enumerate(zip(self.groups, self.levels, strict=True)):
            spent, lost = self._summed(group)
            cost[row, : len(levels)], loss[row, : len(levels)] = spent[levels], lost[levels]
        return cost, loss

    @cached_property
    def slack(self) -> float:
        """By how much two orders of summing the costs may differ, relative to the sum; 0 where they are integers."""
        whole = all(bool((curve.costs == curve.costs.round()).all()) for curve in self.curves)
        exact = summed((float(curve.costs.max()) for curve in self.curves), math.inf) < EXACT
        return 0.0 if whole and exact else gamma(4 * (len(self.curves) + 4))

    @property
    def room(self) -> float:
        """The budget, with what rounding may add to a sum of costs: what solvers compare with."""
        return self.budget * (1 + self.slack)

    @property
    def cheapest(self) -> float:
        """The smallest budget that any choice fits: what the cheapest level of every layer costs together."""
        return summed(self.table[0][:, 0].tolist(), math.inf)

    def point(self, choice: knapsack.Choice) -> Tensor:
        """(L, 1): the point of a choice (G,) among `levels`."""
        x = torch.zeros(self.shape, dtype=torch.float64)
        for group, levels, at in zip(self.groups, self.levels, choice, strict=True):
            x[list(group), 0] = float(levels[at])
        return x

    def cost(self, x: Tensor) -> float:
        """sum_l c_l(k_l)."""
        chosen = self._chosen(x)
        if chosen is None:
            return math.inf
        return summed((float(curve.costs[k]) for curve, k in zip(self.curves, chosen, strict=True)), math.inf)

    def value(self, x: Tensor) -> float:
        """sum_l d_l(k_l); inf where x names no levels."""
        chosen = self._chosen(x)
        if chosen is None:
            return math.inf
        return summed((float(curve.distortion[k]) for curve, k in zip(self.curves, chosen, strict=True)), math.inf)

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off: it is rounded once."""
        return UNIT * abs(self.value(x))

    def violation(self, x: Tensor) -> float:
        """What is spent beyond the budget, relative to it; inf where x names no levels or parts what is tied.

        An excess that is the rounding of the costs' sum is none.
        """
        chosen = self._chosen(x)
        if chosen is None or any(len({chosen[index] for index in group}) > 1 for group in self.groups):
            return math.inf
        cost = self.cost(x)
        if cost <= self.budget * (1 + 2 * self.slack):
            return 0.0
        return up((cost - self.budget) / max(self.budget, 1.0), gamma(4) * (cost + self.budget) / max(self.budget, 1.0))

    def lower_bound(self, witness: float | tuple[float, float] | None) -> float:
        """The bound at a price, or at (price, value): where a search shows that nothing is below the value, that value.

        inf where nothing fits the budget. Any witness at all gives a valid bound.
        """
        cost, loss = self.table
        budget = self.budget * (1 + 3 * self.slack)  # nothing that `violation` passes is left out
        if self.cheapest > budget:
            return math.inf
        price, value = witness if isinstance(witness, tuple) else (witness or 0.0, None)
        priced = knapsack.dual(cost, loss, budget, float(price))
        bound = max(priced, knapsack.dual(cost, loss, budget, 0.0))
        if value is None or not -math.inf < priced <= bound < value < math.inf:
            return bound
        found, complete = knapsack.best_below(cost, loss, budget, float(price), value)
        if not complete:
            return bound
        least = value if found is None else min(value, self.value(self.point(found)))
        return max(bound, down(least, gamma(8 * (len(cost) + 4)) * (abs(least) + knapsack.size(loss))))

    def to_cvxpy(self) -> Formulation:
        """The same problem with a boolean for every level of every group."""
        with extras():
            import cvxpy as cp

        sizes = [len(self.curves[group[0]].kept) for group in self.groups]
        ends = np.cumsum([0, *sizes])
        taken = cp.Variable(int(ends[-1]), boolean=True, name="taken")
        summed = [self._summed(group) for group in self.groups]
        cost, loss = (np.concatenate([pair[part] for pair in summed]) for part in (0, 1))
        owner = np.repeat(np.arange(len(sizes)), sizes)
        number = np.concatenate([np.arange(size, dtype=float) for size in sizes])
        once, spread = _rows(owner, np.ones(len(owner))), _rows(owner, number)
        place = np.zeros(len(self.curves), dtype=int)
        for row, group in enumerate(self.groups):
            place[list(group)] = row
        constraints = [once @ taken == 1, cost @ taken <= self.budget]
        program = cp.Problem(cp.Minimize(loss @ taken), constraints)
        return Formulation(program, cp.reshape((spread @ taken)[place], self.shape, order="C"), lambda: None)

    def _summed(self, group: Sequence[int]) -> tuple[knapsack.Array, knapsack.Array]:
        members = [self.curves[index] for index in group]
        return tuple(  # type: ignore[return-value]
            np.array([summed(level, math.inf) for level in zip(*each, strict=True)])
            for each in ([c.costs.tolist() for c in members], [c.distortion.tolist() for c in members])
        )

    def _chosen(self, x: Tensor) -> list[int] | None:
        flat = x.detach().cpu().double().flatten()
        whole = flat.round()
        if len(flat) != len(self.curves) or not bool(torch.isfinite(flat).all()):
            return None
        sizes = torch.tensor([len(curve.kept) for curve in self.curves])
        # a solver's booleans are only nearly whole
        if bool(((flat - whole).abs() > 1e-4).any() | (whole < 0).any() | (whole >= sizes).any()):
            return None
        return [int(k) for k in whole]


def _undominated(cost: knapsack.Array, loss: knapsack.Array) -> np.ndarray:
    order = np.lexsort((loss, cost))
    below = np.minimum.accumulate(loss[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = loss[order][1:] < below[:-1]
    return order[first]


def _rows(owner: np.ndarray, values: knapsack.Array) -> object:
    """(G, n), sparse: entry j stands in row owner[j]."""
    with extras():
        from scipy.sparse import csr_array

    return csr_array((values, (owner, np.arange(len(owner)))))
