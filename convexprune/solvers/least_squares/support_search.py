"""The search behind `SwapSearch`: supports, their weights and values, and the rounds that change them.

Rounds of many: the weights with the largest estimated gains enter, and as many leave at their exact costs. Rounds of
pairs, where cells are single weights: those enter of which an exchange pays by its exact price; see `pair_swaps`.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.layout import ranks
from convexprune.solution import Status
from convexprune.solvers.least_squares.elimination import gridded, shrink_apart, shrink_together
from convexprune.solvers.least_squares.pair_swaps import Offers, offers, price_of
from convexprune.solvers.least_squares.scaling import Scaled
from convexprune.solvers.least_squares.support_inverses import SupportInverses

SPREAD = 3.0  # a bundle takes at most this many times the average number of entries
REFRESH = 6  # rounds between two factorisations from scratch: float32 updates drift
LEAST = 1e-3  # of the cells: a search that is down to this has settled
PAIRED = 16  # entries of a neuron that are priced exactly in a round: more find hardly more
AT_ONCE = 3  # of them that may enter in a round
PAYS = 1e-5  # of a neuron's mean value: an exchange that gains less is left
STAYS = 0.7  # of the bundles: the inverses of fewer are copied, so that the rest need no work
WASTE = 1.3  # padding that bundles of one part may cost, in slots


class Schedule(NamedTuple):
    """The options of `SwapSearch` that say what a search does."""

    rounds: int
    enter: float
    cooling: float
    pairs: int
    eps_rel: float
    memory: float


class Search:
    """The best supports so far (B, K) with their weights (B, h, N), scaled and in the working dtype; see `Grid`."""

    def __init__(self, problem: GroupedLeastSquares, scaled: Scaled, start: Tensor, options: Schedule) -> None:
        self.scaled, self.options = scaled, options
        layout, grid = gridded(problem, "SwapSearch")
        self.quota, self.still, self.groups = layout.quota, layout.forced, layout.groups
        self.grid = grid = grid.to(scaled.dense.device)
        self.grams = scaled.grams[grid.members[0][:, 0]]
        self.group = None if layout.groups == 1 else grid.group
        self.apart = None if layout.groups == 1 else grid.apart
        self.live = grid.allowed & grid.holding(scaled.grams.rows(scaled.live))
        self.pinned = None if problem.always is None else grid.holding(problem.always.to(scaled.dense.device))
        begun, allowed = _first_supports(problem, scaled, start)
        self.mask, self.allowed = grid.holding(begun) & self.live, grid.holding(allowed) & self.live
        self.cross, self.optimum = grid.bundled(scaled.cross), grid.bundled(scaled.optimum)
        self.weights = torch.zeros_like(self.optimum)
        self.slopes = torch.zeros_like(self.optimum)
        self.values = torch.zeros_like(self.optimum[:, 0, 0])
        self.stale = torch.zeros_like(self.values, dtype=torch.bool)  # bundles whose inverses are of another support
        self.room = _room(scaled)
        self.status = Status.CONVERGED

    def found(self) -> tuple[Tensor, Tensor]:
        """Support and weights (M, N)."""
        return self.grid.spread(self.mask), self.grid.unbundled(self.weights)

    def run(self, deadline: float) -> int:
        """Search turn by turn; returns the rounds."""
        if self.still:
            self.mask = self.allowed
            return 0
        return sum(self._turn(rows, deadline) for rows in self._turns())

    def _turns(self) -> list[Tensor]:
        """The bundles, so grouped that the inverses of a group fit the memory."""
        counts = self.mask.sum(1)
        order = counts.argsort()
        slots = (counts[order] + SPREAD * self.options.enter * self.mask.shape[1]) * self._width
        need = (3 * self.scaled.dense.element_size() * slots.double().square()).cumsum(0)
        turn = (need / self.options.memory).long()
        return [order[turn == t] for t in range(int(turn.max()) + 1) if bool((turn == t).any())]

    def _turn(self, rows: Tensor, deadline: float) -> int:
        """Search among some bundles, with the counts that they hold together; returns the rounds."""
        parts = self._parts(rows)
        self._shrink(parts, rows, self.allowed[rows])
        self._adopt(parts)
        count, parts = self._rounds_of_many(parts, rows, deadline)
        if self.grid.single and self.options.pairs:
            count += self._rounds_of_pairs(self._fresh(parts, rows), rows, deadline)
        return count

    def _rounds_of_many(self, parts: list[_Part], rows: Tensor, deadline: float) -> tuple[int, list[_Part]]:
        """The rounds, and the parts that are left."""
        share, active = self.options.enter, rows
        for count in range(self.options.rounds):
            if time.perf_counter() > deadline or share < LEAST:
                return count, parts
            parts = self._fresh(parts if count % REFRESH else [], active) if count else parts
            held = self._state(active)
            self._enter(parts, active, share)
            self._shrink(parts, active, held.mask)
            self._adopt(parts)
            kept = self._settled(active, held)
            share *= self.options.cooling if kept else 0.5
            gained = float((held.values - self.values[active]).sum())
            moved = (held.mask != self.mask[active]).any(1)
            if gained > self.options.eps_rel * float(self.values[rows].sum()) and bool(moved.any()):
                active = active[moved] if not kept or float(moved.float().mean()) < STAYS else active
            elif len(active) < len(rows):
                active = rows  # the price has moved meanwhile: ask everyone once more
            elif kept:
                return count + 1, parts
        if self.options.rounds:
            self.status = Status.MAX_ITER
        return self.options.rounds, parts

    def _rounds_of_pairs(self, parts: list[_Part], rows: Tensor, deadline: float) -> int:
        """Exact exchanges: within a neuron, and of one's entry against another's exit where a group joins them."""
        active, least = rows, PAYS * self.values[rows].mean()
        for count in range(self.options.pairs):
            if time.perf_counter() > deadline:
                return count
            held = self._state(active)
            if not self._enter_pairs(parts, active, least):
                return count
            self._shrink(parts, active, held.mask)
            self._adopt(parts)
            stays = self._settled_apart(active, held)
            if not bool(stays.any()):
                return count + 1
            if float(stays.float().mean()) < STAYS or bool(self.stale[active].any()):
                active = active[stays]
                parts = self._fresh(parts, active)
        self.status = Status.MAX_ITER
        return self.options.pairs

    def _fresh(self, parts: list[_Part], active: Tensor) -> list[_Part]:
        """The parts of the bundles `active`: those that are there, but for inverses that do not fit any more."""
        wanted = torch.zeros_like(self.stale)
        wanted[active] = True
        found = []
        for rows, inverses in parts:
            which = (wanted & ~self.stale)[rows].nonzero()[:, 0]
            if len(which) and not inverses.worn:
                whole = len(which) == len(rows)
                found.append(_Part(rows, inverses) if whole else _Part(rows[which], inverses.narrowed(which)))
                wanted[rows[which]] = False
        return found + self._parts(wanted.nonzero()[:, 0])

    def _enter_pairs(self, parts: list[_Part], active: Tensor, least: Tensor) -> int:
        """Let those enter that pay by their exact prices; returns their number."""
        found = [self._offers(part) for part in parts]
        price = None
        if self.group is None:
            costs = [_least(part.inverses.costs, AT_ONCE).flatten() for part in parts]
            gains = [-_least(-each.gains, AT_ONCE).flatten() for each in found]
            price = price_of(torch.cat(gains), torch.cat(costs))
        total = 0
        for part, each in zip(parts, found, strict=True):
            columns, chosen = each.most(AT_ONCE, price, least)
            width = int(chosen.sum(1).max())
            if width:
                part.inverses.enter(columns[:, :width], chosen[:, :width])
                total += int(chosen.sum())
        return total

    def _offers(self, part: _Part) -> Offers:
        """The exact prices of those entries that may pay most."""
        rows, inverses = part
        slope = self.slopes[rows][:, 0].masked_fill(self.mask[rows] | ~self.live[rows], 0.0)
        # no entry gains more than with the least Schur complement that it can have
        worth = (slope / inverses.grams.rows(self.room)).square()
        if self.apart is not None:
            group = self.apart[rows]
            cheapest = torch.full_like(slope, torch.inf)
            cheapest.scatter_reduce_(1, group.gather(1, inverses.index), inverses.costs, "amin")
            worth = torch.where(slope == 0, -torch.inf, worth - cheapest.gather(1, group))
        columns = worth.topk(min(PAIRED if self.groups == 1 else 2 * PAIRED, worth.shape[1]), dim=1).indices
        return offers(inverses, columns, slope, None if self.group is None else self.group[rows])

    def _settled_apart(self, active: Tensor, held: _State) -> Tensor:
        """(A,) bool: the bundles worth another look, once those that came out worse are taken back."""
        back = (self.values[active] > held.values) & (self.mask[active].sum(1) == held.mask.sum(1))
        if float((self.values[active] - held.values)[~back].sum()) > 0:
            back = torch.ones_like(back)
        self._restore(active, held, back)
        moved = (held.mask != self.mask[active]).any(1)
        return moved & ~back

    def _parts(self, rows: Tensor) -> list[_Part]:
        """The inverses of some bundles, those of similar size together."""
        counts = self.mask[rows].sum(1)
        order = counts.argsort()
        sizes = counts[order].tolist()
        parts, begun = [], 0
        for end in range(1, len(sizes) + 1):
            if end == len(sizes) or sizes[end] > WASTE * sizes[begun] + 16:
                parts.append(self._part(rows[order[begun:end]]))
                begun = end
        return parts

    def _part(self, rows: Tensor) -> _Part:
        pinned = None if self.pinned is None else self.pinned[rows]
        spare = math.ceil(self.options.enter * self.mask.shape[1])  # mean number of cells that enter in the first round
        grams = self.grams[rows]
        ridge = grams.rows(self.scaled.ridge)
        self.stale[rows] = False
        inverses = SupportInverses(grams, self.cross[rows], self.mask[rows], ridge, spare, pinned, self.grid)
        return _Part(rows, inverses)

    @property
    def _width(self) -> int:
        """How many inputs a cell has at most."""
        return 1 if self.mask.shape[1] == self.cross.shape[2] else self.grid.places[0].shape[1]

    def _enter(self, parts: list[_Part], active: Tensor, share: float) -> None:
        """Let the most promising cells outside the supports enter."""
        mask, grams = self.mask[active], self.grams[active]
        worth = self.grid.summed(self.slopes[active].square() / grams.rows(self.room)[:, None])
        gains = torch.where(mask | ~self.live[active], 0.0, worth)
        wanted = math.ceil(share * mask.numel())
        if self.apart is not None:
            gains = _best_of_groups(gains, self.apart[active])
            most = min(math.ceil(wanted / len(active)), gains.shape[1])
            best, columns = torch.topk(gains, most, dim=1)
            floor = best.new_zeros(())
        else:
            if self.group is not None:  # each group its share
                each = math.ceil(wanted / self.groups)
                first = ranks(gains.flatten(), self.group[active].flatten()) < each
                gains = torch.where(first.reshape(gains.shape), gains, 0.0)
            most = min(math.ceil(SPREAD * share * mask.shape[1]) + 1, gains.shape[1])
            best, columns = torch.topk(gains, most, dim=1)
            floor = best.flatten().topk(min(wanted, best.numel())).values[-1]
        chosen = (best >= floor) & (best > 0)
        place = torch.empty_like(self.values, dtype=torch.long)
        place[active] = torch.arange(len(active), device=active.device)
        for part in parts:
            own = place[part.rows]
            width = int(chosen[own].sum(1).max())
            if width:
                part.inverses.enter(columns[own, :width], chosen[own, :width])

    def _shrink(self, parts: list[_Part], active: Tensor, held: Tensor) -> None:
        """Shrink the parts of the bundles `active` to the counts of the supports `held`, or to the groups' quota."""
        inverses = [part.inverses for part in parts]
        if self.apart is not None:
            for part in parts:
                shrink_apart(part.inverses, self.apart[part.rows], self.quota)
        elif self.group is None:
            more = sum(int(each.live.sum()) for each in inverses) - int(held.sum())
            shrink_together(inverses, torch.tensor([max(more, 0)], device=held.device))
        else:
            groups = [self.group[part.rows] for part in parts]
            surplus = -self._counts(self.group[active], held)
            for group, each in zip(groups, inverses, strict=True):
                surplus += self._counts(group, each.mask)
            shrink_together(inverses, surplus.clamp(min=0), groups)

    def _counts(self, group: Tensor, mask: Tensor) -> Tensor:
        """(G,): how many cells of each group a mask holds."""
        return torch.bincount(group[mask], minlength=self.groups)

    def _adopt(self, parts: list[_Part]) -> None:
        """Take over the supports and weights of the parts, and their values."""
        for rows, inverses in parts:
            self.mask[rows], self.weights[rows] = inverses.mask, inverses.scattered
            delta = self.optimum[rows] - self.weights[rows]
            self.slopes[rows] = inverses.grams.product(delta)
            self.values[rows] = (self.slopes[rows] * delta).sum((1, 2))

    def _settled(self, active: Tensor, held: _State) -> bool:
        """Take a round back where it did not pay: bundle by bundle if they are independent, else altogether."""
        worse = self.values[active] > held.values
        if self.apart is None:
            worse = torch.full_like(worse, float((self.values[active] - held.values).sum()) > 0)
        self._restore(active, held, worse)
        return not bool(worse.any())

    def _state(self, active: Tensor) -> _State:
        return _State(*(each[active] for each in (self.mask, self.weights, self.slopes, self.values)))

    def _restore(self, active: Tensor, held: _State, which: Tensor) -> None:
        """Put the bundles of `active` that are in `which` (A,) bool back to what was held."""
        back = active[which]
        self.stale[back] = True
        for now, before in zip((self.mask, self.weights, self.slopes, self.values), held, strict=True):
            now[back] = before[which]


class _State(NamedTuple):
    """What is known of some bundles."""

    mask: Tensor
    weights: Tensor
    slopes: Tensor
    values: Tensor


class _Part(NamedTuple):
    """The inverses of some bundles."""

    rows: Tensor
    inverses: SupportInverses


def _least(values: Tensor, count: int) -> Tensor:
    """The `count` least values of each row, or all of them."""
    return values.topk(min(count, values.shape[1]), dim=1, largest=False).values


def _first_supports(problem: GroupedLeastSquares, scaled: Scaled, start: Tensor) -> tuple[Tensor, Tensor]:
    """(M, N) bool: the supports to begin with, and an allowed one, which says how the counts divide."""
    begun = start != 0
    # the start's own weights come first, by size; the rest of the count goes to the largest other weights
    own = start.square() / scaled.grams.rows(_room(scaled))
    other = scaled.optimum.square()
    top = own.max().clamp(min=1e-30), other.max().clamp(min=1e-30)
    allowed = problem.select(torch.where(begun, 1 + own / top[0], 0.5 * other / top[1]))
    live = scaled.grams.rows(scaled.live)
    return (allowed | begun) & live, allowed & live


def _room(scaled: Scaled) -> Tensor:
    """(G, N): the geometric mean of the least and the largest Schur complement that an input can have."""
    damped = scaled.grams.matrices + scaled.ridge[..., None] * torch.eye(scaled.dense.shape[1]).to(scaled.dense)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal(dim1=1, dim2=2).rsqrt()


def _best_of_groups(gains: Tensor, group: Tensor) -> Tensor:
    """The gains (R, K) with all but the best of each group (R, K) set to 0, where a bundle has several groups."""
    count = int(group.max()) + 1
    if count == 1:
        return gains
    best = gains.new_zeros(len(gains), count).scatter_reduce(1, group, gains, "amax")
    return torch.where(gains == best.gather(1, group), gains, 0.0)
