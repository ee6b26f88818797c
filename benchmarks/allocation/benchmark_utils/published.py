"""The published dynamic program, plainly: a table with a row for every layer and a column for every weight kept."""

import numpy as np


def published(costs, losses, budget):
    """The level of each layer; costs are integers. Xu et al., ICCV 2023, Algorithm 1."""
    best = np.zeros(budget + 1)
    taken = []
    for cost, loss in zip(costs, losses, strict=True):
        new, choice = np.full(budget + 1, np.inf), np.zeros(budget + 1, dtype=np.int16)
        for level, (spent, lost) in enumerate(zip(cost, loss, strict=True)):
            if spent <= budget:
                candidate = best[: budget + 1 - spent] + lost
                better = candidate < new[spent:]
                new[spent:][better] = candidate[better]
                choice[spent:][better] = level
        best = new
        taken.append(choice)
    left, levels = budget, []
    for cost, choice in zip(reversed(costs), reversed(taken), strict=True):
        levels.append(int(choice[left]))
        left -= cost[levels[-1]]
    return levels[::-1]
