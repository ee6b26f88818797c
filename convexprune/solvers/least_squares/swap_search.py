"""Local search on the support: in each round some weights enter, and as many leave, at exact costs.

Weights enter where (c - H w)_j^2 / d_j is largest, their gain if d_j were the exact Schur complement
1 - H_jS H_SS^-1 H_Sj; d_j = 1 / sqrt([H^-1]_jj) lies between its two limits. The inverses then say exactly what each
removal costs, and the cheapest weights leave, of the whole layer or of each group, as the pattern binds them. A round
that does not pay is taken back.
Source: the oscillating search of Somol, Pudil, Pattern Recognition 2000, with the exact costs of Hassibi, Stork 1993.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.patterns import Support
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import groups_of, shrink_groups, shrink_layer
from convexprune.solvers.least_squares.on_support import refitted
from convexprune.solvers.least_squares.scaling import Scaled
from convexprune.solvers.least_squares.spd_inverse import NotDefinite
from convexprune.solvers.least_squares.support_inverses import SupportInverses

SPREAD = 3.0  # a neuron takes at most this many times the average number of entries
REFRESH = 6  # rounds between two factorisations from scratch: float32 updates drift
LEAST = 1e-3  # of the weights: a search that is down to this has settled
WASTE = 1.3  # padding that neurons of one part may cost, in slots


@dataclass(frozen=True)
class SwapSearch:
    """Rounds of swaps, until one gains less than `eps_rel` of the value.

    Begins at `start`'s support, shrunk to the pattern where it is larger; without one, at the largest weights. Returns
    least squares on the best support seen: never a larger value than that of a feasible start.

    rounds   at most this many
    enter    how many weights enter in the first round, as a fraction of all weights
    cooling  each round lets in this many times those of the round before
    memory   bytes for the inverses; neurons that do not fit are searched in turns, each with its share of the count
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
        if not 0 < self.enter <= 1:
            raise ValueError(f"enter is {self.enter}; it must be a fraction of the weights in (0, 1]")
        if not 0 < self.cooling <= 1:
            raise ValueError(f"cooling is {self.cooling}; it must be a factor in (0, 1]")
        if self.rounds < 0:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 0")

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """Search from the support of `start` (M, P)."""
        scaled = Scaled.of(problem, self.device, self.dtype)
        weights = scaled.dense
        if start is not None:
            scale = scaled.grams64.rows(scaled.scale)
            weights = (start.detach().cpu()[:, : scale.shape[1]] * scale).to(scaled.dense)
        mask, _, rounds, status = self.improve(problem, scaled, weights)
        x = problem.completed(refitted(problem, mask.cpu()))
        if start is not None and problem.violation(start) == 0 and problem.value(start) < problem.value(x):
            x = start.detach().cpu().double()
        return Attempt(x, None, status, rounds)

    def improve(
        self, problem: GroupedLeastSquares, scaled: Scaled, weights: Tensor
    ) -> tuple[Tensor, Tensor, int, Status]:
        """From scaled weights (M, N), zero outside their support: support, weights, rounds, why it stopped."""
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        search = _Search(problem, scaled, weights, self)
        try:
            rounds = search.run(deadline)
        except NotDefinite:
            return search.mask, search.weights, 0, Status.NUMERICAL
        status = Status.TIME_LIMIT if time.perf_counter() > deadline else search.status
        return search.mask, search.weights, rounds, status


class _Search:
    """The best supports so far with their weights (scaled, in the working dtype), improved turn by turn."""

    def __init__(self, problem: GroupedLeastSquares, scaled: Scaled, start: Tensor, options: SwapSearch) -> None:
        self.scaled, self.options = scaled, options
        shape, device = (problem.target.shape[0], problem.target.shape[1]), scaled.dense.device
        group = groups_of(problem.pattern, shape, problem.kernel)
        self.group = None if group is None else group.to(device)
        self.quota = problem.pattern.quota(shape, problem.kernel)
        self.pinned = None if problem.always is None else problem.always.to(device)
        self.mask, self.allowed = _first_supports(problem, scaled, start)
        self.still = isinstance(problem.pattern, Support)
        self.weights = torch.zeros_like(scaled.optimum)
        self.values = torch.zeros_like(scaled.optimum[:, 0])
        self.room = _room(scaled)
        self.status = Status.CONVERGED

    def run(self, deadline: float) -> int:
        """Search turn by turn; returns the rounds."""
        if self.still:
            self.mask = self.allowed
            return 0
        return sum(self._turn(rows, deadline) for rows in self._turns())

    def _turns(self) -> list[Tensor]:
        """The neurons, so grouped that the inverses of a group fit the memory."""
        counts = self.mask.sum(1)
        order = counts.argsort()
        slots = counts[order] + SPREAD * self.options.enter * self.mask.shape[1]
        need = (3 * self.scaled.dense.element_size() * slots.double().square()).cumsum(0)
        turn = (need / self.options.memory).long()
        return [order[turn == t] for t in range(int(turn.max()) + 1) if bool((turn == t).any())]

    def _turn(self, rows: Tensor, deadline: float) -> int:
        """Search among some neurons, with the count that they hold together; returns the rounds."""
        parts, fresh = self._parts(rows), True
        self._shrink(parts, int(self.allowed[rows].sum()))
        self._adopt(parts)
        share, active = self.options.enter, rows
        for count in range(self.options.rounds):
            if time.perf_counter() > deadline or share < LEAST:
                return count
            if not fresh:
                parts, fresh = self._parts(active), True
            held = self.mask[active], self.weights[active], self.values[active]
            self._enter(parts, active, share)
            self._shrink(parts, int(held[0].sum()))
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
        """The inverses of some neurons, those of similar size together."""
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
        grams = self.scaled.grams[rows]
        inverses = SupportInverses(
            grams, self.scaled.cross[rows], self.mask[rows], grams.rows(self.scaled.ridge), self._spare(), pinned
        )
        return _Part(rows, inverses)

    def _spare(self) -> int:
        """How many weights enter a neuron in the first round, in the mean."""
        return math.ceil(self.options.enter * self.mask.shape[1])

    def _enter(self, parts: list[_Part], active: Tensor, share: float) -> None:
        """Let the most promising weights outside the supports enter."""
        mask, grams = self.mask[active], self.scaled.grams[active]
        slope = self.scaled.cross[active] - grams.product(self.weights[active])
        gains = torch.where(mask | ~grams.rows(self.scaled.live), 0.0, slope.square() / grams.rows(self.room))
        wanted = math.ceil(share * mask.numel())
        if self.group is None:
            most = min(math.ceil(SPREAD * share * mask.shape[1]) + 1, gains.shape[1])
            best, columns = torch.topk(gains, most, dim=1)
            floor = best.flatten().topk(min(wanted, best.numel())).values[-1]
        else:
            gains = _best_of_groups(gains, self.group)
            most = min(math.ceil(wanted / len(active)), gains.shape[1])
            best, columns = torch.topk(gains, most, dim=1)
            floor = best.new_zeros(())
        chosen = (best >= floor) & (best > 0)
        place = torch.empty_like(self.values, dtype=torch.long)
        place[active] = torch.arange(len(active), device=active.device)
        for part in parts:
            own = place[part.rows]
            width = int(chosen[own].sum(1).max())
            if width:
                part.inverses.enter(columns[own, :width], chosen[own, :width])

    def _shrink(self, parts: list[_Part], budget: int) -> None:
        inverses = [part.inverses for part in parts]
        if self.group is None:
            shrink_layer(inverses, sum(int(each.live.sum()) for each in inverses) - budget)
        else:
            for each in inverses:
                shrink_groups(each, self.group, self.quota)

    def _adopt(self, parts: list[_Part]) -> None:
        """Take over the supports and weights of the parts, and what they cost."""
        for rows, inverses in parts:
            self.mask[rows], self.weights[rows] = inverses.mask, inverses.scattered
            delta = self.weights[rows] - self.scaled.optimum[rows]
            self.values[rows] = (self.scaled.grams[rows].product(delta) * delta).sum(1)

    def _settled(self, active: Tensor, mask: Tensor, weights: Tensor, values: Tensor) -> bool:
        """Take a round back where it did not pay: neuron by neuron if they are independent, else altogether."""
        worse = self.values[active] > values
        if self.group is None:
            worse = torch.full_like(worse, float((self.values[active] - values).sum()) > 0)
        back = active[worse]
        self.mask[back], self.weights[back], self.values[back] = mask[worse], weights[worse], values[worse]
        return not bool(worse.any())


class _Part(NamedTuple):
    """The inverses of some neurons."""

    rows: Tensor
    inverses: SupportInverses


def _narrowed(parts: list[_Part], moved: Tensor, active: Tensor) -> list[_Part]:
    """The parts of those neurons `active` that have `moved`."""
    going = active[moved]
    found = []
    for rows, inverses in parts:
        which = torch.isin(rows, going).nonzero()[:, 0]
        if len(which):
            found.append(_Part(rows[which], inverses.narrowed(which)))
    return found


def _first_supports(problem: GroupedLeastSquares, scaled: Scaled, start: Tensor) -> tuple[Tensor, Tensor]:
    """(M, N) bool: the supports to begin with, and how the pattern's count divides among the neurons."""
    begun = start != 0
    # what the start has comes first, by its size; what that leaves of the count goes to large weights
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
    """The gains with all but the best of each group set to 0, where there are several groups."""
    count = int(group.max()) + 1
    if count == 1:
        return gains
    index = group.expand_as(gains)
    best = gains.new_zeros(len(gains), count).scatter_reduce(1, index, gains, "amax")
    return torch.where(gains == best.gather(1, index), gains, 0.0)
