"""Multiple-choice knapsack on arrays: find the price that divides the budget, and search exactly around it.

    minimise  sum_l d_l(k_l)   subject to   sum_l c_l(k_l) <= budget

With a price p >= 0 on the budget, every choice satisfies

    sum_l d_l(k_l) = L(p) + sum_l r_l(k_l) + p (budget - cost),    r_lk = d_lk + p c_lk - min_k (d_lk + p c_lk) >= 0
    L(p) = sum_l min_k (d_lk + p c_lk) - p budget

so L(p) is a lower bound. A choice of value below v has sum_l r_l(k_l) + p (budget - cost) < v - L(p), so only a few
levels of each layer can be part of it. Costs and distortions are (L, K) arrays, padded with inf.
Source: Sinha, Zoltners, Oper. Res. 1979; Pisinger, EJOR 1995 (a minimal core).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convexprune.rounding import down, gamma, summed

Array = NDArray[np.float64]
Choice = NDArray[np.int64]

MOST = 2_000_000  # limit on the number of partial choices kept at a time


@dataclass(frozen=True, eq=False)
class Priced:
    """The optimal price, and two choices that are optimal at this price, one below the budget and one above.

    price   p, the maximiser of L
    bound   L(p), minus a bound of its rounding error
    under   the choice at that price that costs at most the budget
    over    the choice that costs more; the same as `under` if the budget is no restriction
    """

    price: float
    bound: float
    under: Choice
    over: Choice


def dual(cost: Array, distortion: Array, budget: float, price: float) -> float:
    """L(p), certainly not above its exact value; -inf for a price that is negative, or beyond what can be computed."""
    real = np.isfinite(cost)
    if not (0 <= price < math.inf) or not math.isfinite(price * float(np.where(real, cost, 0).max())):
        return -math.inf
    spent, lost = price * np.where(real, cost, 0), np.where(real, distortion, 0)
    # a sum of two terms, one of them a product
    paid = np.where(real, lost + spent - gamma(6) * (np.abs(lost) + spent), np.inf)
    least, rent = summed(paid.min(1).tolist(), -math.inf), price * budget
    if not (math.isfinite(least) and math.isfinite(rent)):
        return -math.inf
    return down(least - rent, gamma(4) * (abs(least) + rent))


def size(distortion: Array) -> float:
    """What sums of negative distortions may cancel: 0 where none is negative."""
    return 2 * float(np.where(np.isfinite(distortion), -distortion, 0).clip(min=0).max(1).sum())


def divide(cost: Array, distortion: Array, budget: float) -> Priced | None:
    """Find the price that divides the budget, by secants of two choices; None if no choice fits the budget."""
    rows = np.arange(len(cost))

    def at(price: float) -> tuple[Choice, float, float]:
        # among equal levels the cheaper: levels are sorted by cost, and argmin takes the first
        choice = np.where(np.isfinite(cost), distortion + price * np.where(np.isfinite(cost), cost, 0), np.inf).argmin(
            1
        )
        return choice, float(cost[rows, choice].sum()), float(distortion[rows, choice].sum())

    over, over_cost, over_loss = at(0.0)
    if over_cost <= budget:
        return Priced(0.0, dual(cost, distortion, budget, 0.0), over, over)
    under = np.where(np.isfinite(cost), cost, np.inf).argmin(1)
    under_cost, under_loss = float(cost[rows, under].sum()), float(distortion[rows, under].sum())
    if under_cost > budget:
        return None
    price = 0.0
    while True:
        # the line through both choices is an edge of the convex hull, or the next price finds a corner below it
        price = max((under_loss - over_loss) / (over_cost - under_cost), 0.0)
        choice, spent, loss = at(price)
        if spent <= budget and spent > under_cost and loss < under_loss:
            under, under_cost, under_loss = choice, spent, loss
        elif spent > budget and spent < over_cost and loss > over_loss:
            over, over_cost, over_loss = choice, spent, loss
        else:
            return Priced(price, dual(cost, distortion, budget, price), under, over)


def filled(cost: Array, distortion: Array, budget: float, choice: Choice) -> Choice:
    """Improve a choice within the budget: while an upgrade fits, take the one that saves most for its cost."""
    choice, rows = choice.copy(), np.arange(len(cost))
    left = budget - float(cost[rows, choice].sum())
    while True:
        spent = cost - cost[rows, choice][:, None]
        saved = distortion[rows, choice][:, None] - distortion
        fits = np.isfinite(cost) & (spent <= left) & (saved > 0)
        if not fits.any():
            return choice
        rate = np.where(fits, saved / np.where(fits, np.maximum(spent, 1e-300), 1.0), -1.0)
        row, level = np.unravel_index(rate.argmax(), rate.shape)
        left -= float(spent[row, level])
        choice[row] = level


def best_below(cost: Array, distortion: Array, budget: float, price: float, below: float) -> tuple[Choice | None, bool]:
    """The best choice of value < `below` within the budget, or None; and whether the search was complete.

    Layer by layer, the search keeps the partial choices that can still end below. It drops a partial choice if another
    one costs no more and loses no more. It gives up, incomplete, if more than MOST are left.
    """
    bound = dual(cost, distortion, budget, price)
    room = below - bound
    if not room > 0:
        return None, True
    real = np.isfinite(cost)
    paid = np.where(real, distortion + price * np.where(real, cost, 0), np.inf)
    least = paid.min(1, keepdims=True)
    slack = gamma(8 * (len(cost) + 4)) * (float(np.abs(least).sum()) + room + price * budget + size(distortion))
    reduced = np.where(real, paid - least, np.inf)
    core = [np.flatnonzero(row <= room + slack) for row in reduced]
    order = sorted(range(len(core)), key=lambda layer: -len(core[layer]))
    cheapest = np.array([cost[layer, core[layer]].min() for layer in order])
    dearest = np.array([cost[layer, core[layer]].max() for layer in order])
    # the least and the largest cost of all later layers
    low = np.append(cheapest[::-1].cumsum()[::-1][1:], 0.0)
    high = np.append(dearest[::-1].cumsum()[::-1][1:], 0.0)
    thrift = (room + slack) / price if price > 0 else math.inf  # the largest part of the budget that may be left
    spent, lost, over = np.zeros(1), np.zeros(1), np.zeros(1)
    steps: list[tuple[Choice, Choice]] = []
    for turn, layer in enumerate(order):
        levels = core[layer]
        new_spent = (spent[:, None] + cost[layer, levels]).ravel()
        new_lost = (lost[:, None] + distortion[layer, levels]).ravel()
        new_over = (over[:, None] + reduced[layer, levels]).ravel()
        alive = np.flatnonzero(
            (new_over <= room + slack) & (new_spent + low[turn] <= budget) & (new_spent + high[turn] >= budget - thrift)
        )
        alive = alive[np.lexsort((new_lost[alive], new_spent[alive]))]
        losses = new_lost[alive]
        first = np.ones(len(alive), dtype=bool)
        first[1:] = losses[1:] < np.minimum.accumulate(losses)[:-1]
        alive = alive[first]
        if len(alive) == 0:
            return None, True
        if len(alive) > MOST:
            return None, False
        spent, lost, over = new_spent[alive], new_lost[alive], new_over[alive]
        steps.append((alive // len(levels), levels[alive % len(levels)]))
    at = int(lost.argmin())
    if not lost[at] < below:
        return None, True
    choice = np.zeros(len(cost), dtype=np.int64)
    for layer, (parents, levels) in zip(reversed(order), reversed(steps), strict=True):
        choice[layer] = levels[at]
        at = int(parents[at])
    return choice, True
