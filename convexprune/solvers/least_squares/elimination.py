"""Exact greedy elimination down to a pattern: of the weights that may leave, the one that costs least goes next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from convexprune.patterns import NM, Pattern, PerRow, Support, Unstructured, kth_smallest
from convexprune.solvers.least_squares.support_inverses import SupportInverses

REPRICE = 4  # removals of a neuron between two looks at the layer's price


def groups_of(pattern: Pattern, shape: tuple[int, int], kernel: int) -> Tensor | None:
    """(N,): the group of each input where a pattern binds every neuron by itself; None where it binds the layer.

    Raises TypeError for a pattern whose weights cannot leave one at a time.
    """
    if isinstance(pattern, (Unstructured, Support)):
        return None
    if isinstance(pattern, PerRow):
        return torch.zeros(shape[1], dtype=torch.long)
    if isinstance(pattern, NM):
        cells = pattern.folded(torch.arange(shape[1])[None], kernel)
        group = torch.arange(len(cells))[:, None].expand_as(cells)
        return pattern.unfolded(group, (1, shape[1]), kernel)[0]
    raise TypeError(
        f"{pattern} keeps or drops whole blocks; Magnitude, ActivationMagnitude, ADMM and Refit take it, "
        "algorithms that remove one weight at a time do not"
    )


def shrink_layer(parts: Sequence[SupportInverses], surplus: int) -> None:
    """Remove `surplus` weights of all parts together, the cheapest first.

    Every neuron below the price loses one weight at a time; the price is that at which the surplus would be gone by
    today's costs. Removals make the rest dearer, so this is the order of one removal at a time, but for ties.
    """
    while surplus > 0:
        costs = torch.cat([part.costs.flatten() for part in parts])
        price = kth_smallest(costs[None], surplus)[0]
        for part in parts:
            for _ in range(REPRICE):
                surplus -= _leave_below(part, price, surplus)
    for part in parts:
        part.settle()


def _leave_below(part: SupportInverses, price: Tensor, most: int) -> int:
    """One removal in each neuron whose cheapest weight costs at most `price`; how many there were."""
    cheapest, slots = part.costs.min(1)
    chosen = (cheapest <= price) & torch.isfinite(cheapest)
    count = int(chosen.sum())
    if count > most:
        least = torch.topk(cheapest, most, largest=False).indices
        chosen, count = torch.zeros_like(chosen).index_fill_(0, least, True), most
    if count:
        part.leave(slots, chosen)
    return count


def shrink_groups(part: SupportInverses, group: Tensor, quota: int) -> None:
    """Bring every group of every neuron down to `quota`; `group` (N,) says which group an input belongs to."""
    held = torch.zeros(len(part.index), int(group.max()) + 1, dtype=torch.long, device=group.device)
    held.index_add_(1, group, part.mask.long())
    while bool((held > quota).any()):
        crowded = (held > quota).gather(1, group[part.index])
        cheapest, slots = torch.where(crowded, part.costs, torch.inf).min(1)
        chosen = torch.isfinite(cheapest)
        part.leave(slots, chosen)
        held.scatter_add_(1, group[part.index.gather(1, slots[:, None])], -chosen[:, None].long())
    part.settle()
