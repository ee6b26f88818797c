"""Local search on the support: in each round a number of cells enter, and as many leave, at exact costs.

A cell is the unit that the pattern keeps or drops: a weight, a block, a channel. A weight enters where
(c - H w)_j^2 / d_j is largest, its gain if d_j were the exact Schur complement 1 - H_jS H_SS^-1 H_Sj;
d_j = 1 / sqrt([H^-1]_jj) lies between its two limits. Of a cell of many weights these gains add up. The inverses then
say exactly what each removal costs, and the cheapest cells leave, each from its own group of the pattern. A round that
does not pay is taken back.
Source: the oscillating search of Somol, Pudil, Pattern Recognition 2000, with the exact costs of Hassibi, Stork 1993.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.layout import ranks
from convexprune.options import check_options, number, whole
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import gridded, shrink_apart, shrink_together
from convexprune.solvers.least_squares.on_support import refitted
from convexprune.solvers.least_squares.scaling import Scaled, in_float64_if_lost
from convexprune.solvers.least_squares.spd_inverse import NotDefinite
from convexprune.solvers.least_squares.support_inverses import SupportInverses

SPREAD = 3.0  # a bundle takes at most this many times the average number of entries
REFRESH = 6  # rounds between two factorisations from scratch: float32 updates drift
LEAST = 1e-3  # of the cells: a search that is down to this has settled
WASTE = 1.3  # padding that bundles of one part may cost, in slots


@dataclass(frozen=True)
class SwapSearch:
    """Local search on the support: in each round some cells enter and as many leave, until a round gains too little.

    The search begins at the support of `start`, which it first shrinks to the pattern; without a start, at the largest
    weights. It returns least squares on the best support that it has seen. The value is never larger than that of a
    feasible start.

    Args:
        rounds: Largest number of rounds.
        enter: Fraction of all cells that enter in the first round, in (0, 1].
        cooling: Ratio of the cells that enter in a round to those of the round before, in (0, 1].
        eps_rel: The search stops if a round gains less than this fraction of the value.
        time_limit: Seconds, or None for no limit.
        memory: Bytes for the inverses. Neurons that do not fit are searched in turns, each with its share of the count.
        device: Where the work is done: "cpu", "cuda", ...
        dtype: Working precision, torch.float32 or torch.float64; what ends NUMERICAL in float32 begins anew in float64,
            and the note says so.

    Raises:
        TypeError: For a pattern whose cells are not a set of rows times a set of inputs, and for an option of another
            type; ValueError for an option out of its range.

    Source:
        Somol, Pudil, Pattern Recognition 2000; costs of removals by Hassibi, Stork 1993.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.Reconstruction(layer, cp.Unstructured(3)), cp.SwapSearch())
        >>> solution.x.round(decimals=3).tolist()
        [[5.0, 0.0, 0.0], [0.0, -4.0, 3.0]]
    """

    takes: ClassVar[type] = GroupedLeastSquares

    rounds: int = 12
    enter: float = 0.06
    cooling: float = 0.85
    eps_rel: float = 1e-4
    time_limit: float | None = None
    memory: float = 2e9
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        share = number(0, 1, least_open=True)
        check_options(self, rounds=whole(0), enter=share, cooling=share)

    def adapted(self, problem: Any) -> SwapSearch:
        """Itself, where the cells of the problem's pattern make a grid."""
        gridded(problem, "SwapSearch")
        return self

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """Search from the support of `start` (M, P)."""
        return in_float64_if_lost(self, lambda solver: solver.attempted(problem, start))

    def attempted(self, problem: GroupedLeastSquares, start: Tensor | None) -> Attempt:
        """The search in the precision that `dtype` says."""
        scaled = Scaled.of(problem, self.device, self.dtype)
        scaled.check_inverses()
        weights = scaled.dense if start is None else scaled.taken(start[:, : scaled.dense.shape[1]])
        mask, _, rounds, status = self.improve(problem, scaled, weights)
        x = problem.completed(refitted(problem, mask.cpu()))
        if start is not None and problem.violation(start) == 0 and problem.value(start) < problem.value(x):
            x = start.detach().cpu().double()
        return Attempt(x, None, status, rounds, note=scaled.note)

    def improve(
        self, problem: GroupedLeastSquares, scaled: Scaled, weights: Tensor
    ) -> tuple[Tensor, Tensor, int, Status]:
        """From scaled weights (M, N), zero outside their support: support, weights, rounds, why it stopped."""
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        search = _Search(problem, scaled, weights, self)
        try:
            rounds = search.run(deadline)
        except NotDefinite:
            return *search.found(), 0, Status.NUMERICAL
        status = Status.TIME_LIMIT if time.perf_counter() > deadline else search.status
        return *search.found(), rounds, status


class _Search:
    """The best supports so far (B, K) with their weights (B, h, N), scaled and in the working dtype; see `Grid`."""

    def __init__(self, problem: GroupedLeastSquares, scaled: Scaled, start: Tensor, options: SwapSearch) -> None:
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
        self.values = torch.zeros_like(self.optimum[:, 0, 0])
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
        parts, fresh = self._parts(rows), True
        self._shrink(parts, rows, self.allowed[rows])
        self._adopt(parts)
        share, active = self.options.enter, rows
        for count in range(self.options.rounds):
            if time.perf_counter() > deadline or share < LEAST:
                return count
            if not fresh:
                parts, fresh = self._parts(active), True
            held = self.mask[active], self.weights[active], self.values[active]
            self._enter(parts, active, share)
            self._shrink(parts, active, held[0])
            self._adopt(parts)
            kept = self._settled(active, *held)
            share *= self.options.cooling if kept else 0.5
            gained = float((held[2] - self.values[active]).sum())
            moved = (held[0] != self.mask[active]).any(1)
            if gained > self.options.eps_rel * float(self.values[rows].sum()) and bool(moved.any()):
                if kept and (count + 1) % REFRESH and not any(part.inverses.worn for part in parts):
                    if float(moved.float().mean()) < 0.7:
                        parts, active = _narrowed(parts, moved, active), active[moved]
                    continue
                active = active[moved]
            elif len(active) < len(rows):
                active = rows  # the price has moved meanwhile: ask everyone once more
            elif kept:
                return count + 1
            fresh = False
        self.status = Status.MAX_ITER
        return self.options.rounds

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
        inverses = SupportInverses(grams, self.cross[rows], self.mask[rows], ridge, spare, pinned, self.grid)
        return _Part(rows, inverses)

    @property
    def _width(self) -> int:
        """How many inputs a cell has at most."""
        return 1 if self.mask.shape[1] == self.cross.shape[2] else self.grid.places[0].shape[1]

    def _enter(self, parts: list[_Part], active: Tensor, share: float) -> None:
        """Let the most promising cells outside the supports enter."""
        mask, grams = self.mask[active], self.grams[active]
        slope = self.cross[active] - grams.product(self.weights[active])
        worth = self.grid.summed(slope.square() / grams.rows(self.room)[:, None])
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
            delta = self.weights[rows] - self.optimum[rows]
            self.values[rows] = (self.grams[rows].product(delta) * delta).sum((1, 2))

    def _settled(self, active: Tensor, mask: Tensor, weights: Tensor, values: Tensor) -> bool:
        """Take a round back where it did not pay: bundle by bundle if they are independent, else altogether."""
        worse = self.values[active] > values
        if self.apart is None:
            worse = torch.full_like(worse, float((self.values[active] - values).sum()) > 0)
        back = active[worse]
        self.mask[back], self.weights[back], self.values[back] = mask[worse], weights[worse], values[worse]
        return not bool(worse.any())


class _Part(NamedTuple):
    """The inverses of some bundles."""

    rows: Tensor
    inverses: SupportInverses


def _narrowed(parts: list[_Part], moved: Tensor, active: Tensor) -> list[_Part]:
    """The parts of those bundles `active` that have `moved`."""
    going = active[moved]
    found = []
    for rows, inverses in parts:
        which = torch.isin(rows, going).nonzero()[:, 0]
        if len(which):
            found.append(_Part(rows[which], inverses.narrowed(which)))
    return found


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
