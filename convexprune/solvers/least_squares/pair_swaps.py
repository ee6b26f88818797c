"""What it changes, exactly, to put one weight into a support and to take another out at once.

For a neuron with support S, P = (H_SS)^-1, w = C_S P, and for an input j outside U = P H_Sj, d = H_jj - H_jS U,
r = C_j - H_jS w. Entering alone gains r^2 / d; with i leaving at the same time the value changes by

    (w_i - U_i r / d)^2 / (P_ii + U_i^2 / d)  -  r^2 / d

for all pairs in two matrix products. Entry and exit priced apart miss the pairs of correlated inputs, which replace
each other nearly for nothing.
Source: the block inverse; the cost of a removal (Hassibi, Stork 1993) after the entry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from convexprune.solvers.least_squares.support_inverses import SupportInverses


class Offers(NamedTuple):
    """Inputs that may enter each of R bundles of one neuron.

    columns  (R, a): the inputs
    gains    (R, a) >= 0: by how much the value falls if one enters and none leaves; 0 for an input that may not
    pays     (R, a) >= 0: by how much it falls with the best exit; an exit counts once, for the entry it serves best
    """

    columns: Tensor
    gains: Tensor
    pays: Tensor

    def most(self, count: int, price: Tensor | None, least: Tensor) -> tuple[Tensor, Tensor]:
        """The `count` best inputs (R, k) of each bundle, and which of them pay more than `least`.

        With a price, for which any bundle gives up a cell, an entry may also be paid for elsewhere.
        """
        worth = self.pays if price is None else torch.maximum(self.pays, self.gains - price)
        best, at = worth.topk(min(count, worth.shape[1]), dim=1)
        return self.columns.gather(1, at), best > least


def offers(inverses: SupportInverses, columns: Tensor, slope: Tensor, group: Tensor | None) -> Offers:
    """The exact prices of the inputs `columns` (R, a), all outside the supports.

    slope (R, N) is C - w H. With `group` (R, N) an entry's exit is of its own group. Slopes of 0 mark what may not
    enter.
    """
    live = inverses.live if inverses.pinned is None else inverses.live & ~inverses.pinned.gather(1, inverses.index)
    facing = inverses.grams.blocks(inverses.index, columns).mul_(inverses.live[:, :, None])
    lift = torch.bmm(inverses.inverse, facing)  # U
    left = (1 + inverses.ridge - (facing * lift).sum(1)).clamp(min=torch.finfo(slope.dtype).eps)  # d
    steep = slope.gather(1, columns)
    step, gains = steep / left, steep.square() / left
    costs = torch.addcmul(inverses.weights[:, 0, :, None], lift, step[:, None], value=-1).square_()
    costs /= torch.addcdiv(inverses.pivots[:, :, None], lift.square_(), left[:, None])
    shut = ~live[:, :, None]
    if group is not None:
        held = group.gather(1, inverses.index)
        shut = shut | (held[:, :, None] != group.gather(1, columns)[:, None])
    cost, exit_ = costs.masked_fill_(shut, torch.inf).min(1)
    pays = (gains - cost).clamp(min=0)
    first = torch.zeros_like(inverses.pivots).scatter_reduce(1, exit_, pays, "amax")
    return Offers(columns, gains, torch.where(pays == first.gather(1, exit_), pays, 0.0))


def price_of(gains: Tensor, costs: Tensor) -> Tensor:
    """The price above which as many of the gains lie as costs lie below it; inf where no gain pays a cost."""
    gains = gains.sort(descending=True).values
    costs = costs.sort().values
    both = min(len(gains), len(costs))
    paying = int((gains[:both] > costs[:both]).sum())
    if not paying:
        return costs.new_tensor(torch.inf)
    # between the last pair that pays and the first that does not
    low = torch.cat([costs[paying - 1 : paying], gains[paying : paying + 1]]).max()
    high = torch.cat([gains[paying - 1 : paying], costs[paying : paying + 1]]).min()
    return (low + high) / 2
