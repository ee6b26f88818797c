"""Exact greedy elimination from all weights down: each step removes the cheapest cell, and the others adapt.

A cell is the unit that the pattern keeps or drops: a weight, a block, a channel. Each neuron (each bundle of neurons
that keep and drop together) is taken apart by itself and its removals are recorded, in order and with their costs;
merging the records by cost gives the greedy order of the whole layer, so that one run serves every sparsity.
Source: Frantar, Singh, Alistarh, NeurIPS 2022 (ExactOBS); a neuron's order is that of Hassibi, Stork 1993.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.options import check_options
from convexprune.patterns import excess
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import gridded, shrink_apart, shrink_together
from convexprune.solvers.least_squares.on_support import refitted
from convexprune.solvers.least_squares.scaling import Scaled, in_float64_if_lost
from convexprune.solvers.least_squares.spd_inverse import NotDefinite
from convexprune.solvers.least_squares.support_inverses import SupportInverses


@dataclass(frozen=True, eq=False)
class Traces:
    """The removals of every bundle in order: of every neuron, where cells are single weights.

    order  (B, K)  the cell (the input) that leaves at each step; -1 where nothing was left to remove
    cost   (B, K)  by how much the bundle's value rises at that step; inf there
    """

    order: Tensor
    cost: Tensor

    def support(self, keep: int) -> Tensor:
        """(B, K) bool: the greedy support with `keep` cells in the whole layer.

        The layer's cheapest next removal is always taken; since a bundle's order is fixed, that is a merge of the
        records by their running maximum.
        """
        out, width = self.order.shape
        mask = torch.ones(out, width, dtype=torch.bool)
        drop = out * width - keep
        if drop <= 0:
            return mask
        level = torch.cummax(self.cost, 1).values.flatten()
        taken = torch.zeros(out * width, dtype=torch.bool)
        taken[torch.argsort(level, stable=True)[:drop]] = True  # stable: within a bundle, its own order
        bundles, steps = taken.reshape(out, width).nonzero(as_tuple=True)
        mask[bundles, self.order[bundles, steps]] = False
        return mask


@dataclass(frozen=True)
class ExactOBS:
    """Greedy elimination with inverses that are kept up to date.

    Args:
        memory: Bytes for the inverses; neurons are taken in turns that fit. A pattern with several groups that join
            neurons needs the inverses of all neurons at once.
        device: Where the work is done: "cpu", "cuda", ...
        dtype: Working precision, torch.float32 or torch.float64; what ends NUMERICAL in float32 begins anew in float64,
            and the note says so.

    Raises:
        TypeError: For a pattern whose cells are not a set of rows times a set of inputs.
        MemoryError: For a pattern that joins neurons whose inverses do not fit.
    """

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    memory: float = 2e9
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self)

    def adapted(self, problem: Any) -> ExactOBS:
        """Itself, where the cells of the problem's pattern make a grid and the memory is enough."""
        layout, grid = gridded(problem, "ExactOBS")
        if not (layout.forced or layout.groups == 1 or grid.apart is not None):
            need = len(grid.group) * self._bytes(problem)
            if need > self.memory:
                raise MemoryError(
                    f"{problem.pattern} joins neurons, whose inverses need {need / 1e9:.1f} GB together, more than "
                    f"memory={self.memory / 1e9:.1f} GB; raise it, or use SwapSearch or Best"
                )
        return self

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """Least squares on the greedy support. Everything begins at the full support; `start` is not used."""
        return in_float64_if_lost(self, lambda solver: solver.attempted(problem))

    def attempted(self, problem: GroupedLeastSquares) -> Attempt:
        """The elimination in the precision that `dtype` says.

        Raises torch.linalg.LinAlgError where rounding leaves no finite cost before the pattern is met.
        """
        layout, grid = gridded(problem, "ExactOBS")
        note = ""
        if layout.forced:
            mask = problem.select(torch.ones_like(problem.target))
        else:
            walk = _Walk(problem, self)
            note = walk.scaled.note
            if layout.groups == 1:
                mask = grid.spread(self._traced(problem, walk).support(layout.quota))
            else:
                mask = grid.spread(self._grouped(problem, walk, layout.quota))
        if excess(problem.pattern, mask, problem.kernel):
            raise NotDefinite("no cell that is left has a finite cost")
        x = problem.completed(refitted(problem, mask))
        return Attempt(x, None, Status.CONVERGED, int((~mask).sum()), note=note)

    def traces(self, problem: GroupedLeastSquares) -> Traces:
        """The whole record of every bundle; cells with a weight in `problem.always` leave last."""
        return self._traced(problem, _Walk(problem, self))

    def _traced(self, problem: GroupedLeastSquares, walk: _Walk) -> Traces:
        order = torch.full(walk.full.shape, -1)
        cost = torch.full(walk.full.shape, torch.inf, dtype=torch.float64)
        for bundles in self._turns(problem, len(order)):
            part = walk.whole(bundles)
            # cells that carry no signal, or can never be kept, leave first
            full = walk.full[bundles]
            begun = (~full).sum(1)
            first = torch.arange(full.shape[1]) < begun[:, None]
            order[bundles] = torch.where(first, full.long().argsort(dim=1, stable=True), -1)
            cost[bundles] = torch.where(first, 0.0, torch.inf).double()
            for step in range(int(full.sum(1).max())):
                cheapest, slots = part.costs.min(1)
                chosen = torch.isfinite(cheapest)
                if not bool(chosen.any()):
                    break
                cells = part.index.gather(1, slots[:, None])[:, 0]
                which, at = bundles[chosen.cpu()], (begun + step)[chosen.cpu()]
                order[which, at] = cells[chosen].cpu()
                cost[which, at] = cheapest[chosen].cpu().double() * walk.scaled.unit**2
                part.leave(slots, chosen)
        return Traces(order, cost)

    def _grouped(self, problem: GroupedLeastSquares, walk: _Walk, quota: int) -> Tensor:
        """(B, K) bool."""
        grid, apart = walk.grid, walk.grid.apart
        if apart is None:
            part = walk.whole(torch.arange(len(grid.group)))
            group = grid.group.to(part.index.device)
            counts = torch.bincount(group[part.mask], minlength=int(group.max()) + 1)
            shrink_together([part], (counts - quota).clamp(min=0), [group])
            return part.mask.cpu()
        mask = torch.zeros_like(grid.allowed)
        for bundles in self._turns(problem, len(mask)):
            part = walk.whole(bundles)
            shrink_apart(part, apart[bundles].to(part.index.device), quota)
            mask[bundles] = part.mask.cpu()
        return mask

    def _bytes(self, problem: GroupedLeastSquares) -> int:
        """Bytes of the inverses of one bundle."""
        return 3 * torch.finfo(self.dtype).bits // 8 * problem.target.shape[1] ** 2

    def _turns(self, problem: GroupedLeastSquares, count: int) -> list[Tensor]:
        """The bundles in turns that fit the memory."""
        return list(torch.split(torch.arange(count), max(1, int(self.memory / self._bytes(problem)))))


class _Walk:
    """The start of an elimination: the support of all cells that carry a signal and may be kept."""

    def __init__(self, problem: GroupedLeastSquares, options: ExactOBS) -> None:
        self.scaled = Scaled.of(problem, options.device, options.dtype)
        self.scaled.check_inverses()
        self.grid = grid = gridded(problem, "ExactOBS")[1]
        self.full = grid.allowed & grid.holding(self.scaled.grams.rows(self.scaled.live).cpu())
        self.pinned = None if problem.always is None else grid.holding(problem.always)
        self.there = grid.to(self.scaled.dense.device)
        self.grams = self.scaled.grams[self.there.members[0][:, 0]]
        self.cross = self.there.bundled(self.scaled.cross)

    def whole(self, bundles: Tensor) -> SupportInverses:
        """The inverses of some bundles at their full support."""
        device = self.scaled.dense.device
        full, which = self.full[bundles].to(device), bundles.to(device)
        pinned = None if self.pinned is None else self.pinned[bundles].to(device)
        grams = self.grams[which]
        ridge = grams.rows(self.scaled.ridge)
        return SupportInverses(grams, self.cross[which], full, ridge, pinned=pinned, grid=self.there)
