"""Exact greedy elimination down to a pattern: each step removes the cheapest of the cells that may leave."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.layout import Grid, Layout, ranks
from convexprune.patterns import kth_smallest
from convexprune.solvers.least_squares.spd_inverse import NotDefinite
from convexprune.solvers.least_squares.support_inverses import SupportInverses

REPRICE = 4  # removals of a bundle between two looks at the groups' prices


def gridded(problem: GroupedLeastSquares, solver: str) -> tuple[Layout, Grid]:
    """The layout of a problem's pattern, and its grid. Raises TypeError in the name of a solver where it has none."""
    layout = layout_of(problem)
    grid = grid_of(problem, layout)
    if grid is None:
        raise TypeError(
            f"{solver} takes patterns whose cells are single weights, or some rows times some inputs; those of "
            f"{problem.pattern} are not. Balanced, Best, Fast, RisingPenalty, ADMM, ColumnSweep, LayerwiseOBS, "
            "Magnitude, ActivationMagnitude and Refit take it"
        )
    return layout, grid


def grid_of(problem: GroupedLeastSquares, layout: Layout) -> Grid | None:
    """The grid of a layout; None where there is none, or where a bundle has rows of groups with other Gram matrices."""
    grid, groups = layout.grid, len(problem.parts)
    if grid is None or groups == 1 or grid.single:
        return grid
    index, real = grid.members
    owner = index // (len(grid.rows) // groups)
    return grid if bool(((owner == owner[:, :1]) | ~real).all()) else None


def layout_of(problem: GroupedLeastSquares) -> Layout:
    """The layout of a problem's pattern."""
    return Layout.of(problem.pattern, (problem.target.shape[0], problem.target.shape[1]), problem.kernel)


def shrink_apart(part: SupportInverses, group: Tensor, quota: int) -> None:
    """Bring every group of every bundle down to `quota`; `group` (R, K) numbers the groups of each bundle from 0."""
    held = torch.zeros(len(part.index), int(group.max()) + 1, dtype=torch.long, device=group.device)
    held.scatter_add_(1, group, part.mask.long())
    while bool((held > quota).any()):
        crowded = (held > quota).gather(1, group.gather(1, part.index))
        cheapest, slots = torch.where(crowded, part.costs, torch.inf).min(1)
        chosen = torch.isfinite(cheapest)
        if not bool(chosen.any()):
            raise NotDefinite("no cell of a crowded group has a finite cost")
        gone = group.gather(1, part.index.gather(1, slots[:, None]))
        part.leave(slots, chosen)
        held.scatter_add_(1, gone, -chosen[:, None].long())
    part.settle()


def shrink_together(parts: Sequence[SupportInverses], surplus: Tensor, groups: Sequence[Tensor] | None = None) -> None:
    """Remove `surplus` (G,) cells of each group from all parts together, the cheapest first.

    `groups` has the group (R, K) of each cell of each part; None where there is one group.

    Each round removes one cell below its group's price from every bundle; at this price, today's costs would remove
    exactly the surplus. Costs only rise, so this equals removing one cell at a time, up to ties.
    """
    left = surplus.clone()
    while bool((left > 0).any()):
        before = left.clone()
        prices = _prices(parts, left, groups)
        for at, part in enumerate(parts):
            for _ in range(REPRICE):
                _leave_below(part, prices, left, None if groups is None else groups[at])
        if torch.equal(left, before):
            raise NotDefinite("no cell of a crowded group has a finite cost")
    for part in parts:
        part.settle()


def _prices(parts: Sequence[SupportInverses], surplus: Tensor, groups: Sequence[Tensor] | None) -> Tensor:
    """(G,): for each group the cost of the last cell of its surplus; -inf for a group without a surplus."""
    costs = torch.cat([part.costs.flatten() for part in parts])
    if groups is None:
        return kth_smallest(costs[None], int(surplus))[0]
    own = torch.cat([group.gather(1, part.index).flatten() for group, part in zip(groups, parts, strict=True)])
    inside = ranks(-costs, own) < surplus[own]
    empty = costs.new_full(surplus.shape, -torch.inf)
    return empty.scatter_reduce(0, own[inside], costs[inside], "amax")


def _leave_below(part: SupportInverses, prices: Tensor, left: Tensor, group: Tensor | None) -> None:
    """Remove the cheapest cell of each bundle where it costs at most its group's price; count `left` (G,) down."""
    costs = part.costs
    if group is None:
        cheapest, slots = costs.min(1)
        chosen, own = (cheapest <= prices) & torch.isfinite(cheapest), torch.zeros_like(slots)
    else:
        held = group.gather(1, part.index)
        cheapest, slots = torch.where((costs <= prices[held]) & (left > 0)[held], costs, torch.inf).min(1)
        chosen, own = torch.isfinite(cheapest), held.gather(1, slots[:, None])[:, 0]
    counts = torch.bincount(own[chosen], minlength=len(left))
    if bool((counts > left).any()):  # if more cells are chosen than may leave, only the cheapest of them leave
        which = chosen.nonzero()[:, 0]
        which = which[ranks(-cheapest[which], own[which]) < left[own[which]]]
        chosen = torch.zeros_like(chosen).index_fill_(0, which, True)
        counts = torch.bincount(own[which], minlength=len(left))
    if bool(counts.any()):
        part.leave(slots, chosen)
        left -= counts
