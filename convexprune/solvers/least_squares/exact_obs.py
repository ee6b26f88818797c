"""Exact greedy elimination from all weights down: the weight whose loss costs least goes next, the others adapt.

Each neuron is taken apart by itself and its removals are recorded, in order and with their costs; merging the records
by cost gives the greedy order of the whole layer, so that one run serves every sparsity.
Source: Frantar, Singh, Alistarh, NeurIPS 2022 (ExactOBS); a neuron's order is that of Hassibi, Stork 1993.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.patterns import Support
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import groups_of, shrink_groups
from convexprune.solvers.least_squares.on_support import best_on_support
from convexprune.solvers.least_squares.scaling import Scaled
from convexprune.solvers.least_squares.support_inverses import SupportInverses


@dataclass(frozen=True, eq=False)
class Traces:
    """Every neuron's removals in order.

    order  (M, N)  the input that leaves at each step; -1 where nothing was left to remove
    cost   (M, N)  by how much the neuron's value rises at that step; inf there
    """

    order: Tensor
    cost: Tensor

    def support(self, keep: int) -> Tensor:
        """(M, N) bool: the greedy support with `keep` weights in the whole layer.

        The layer's cheapest next removal is always taken; since a neuron's order is fixed, that is a merge of the
        records by their running maximum.
        """
        out, width = self.order.shape
        mask = torch.ones(out, width, dtype=torch.bool)
        drop = out * width - keep
        if drop <= 0:
            return mask
        level = torch.cummax(self.cost, 1).values.flatten()
        taken = torch.zeros(out * width, dtype=torch.bool)
        taken[torch.argsort(level, stable=True)[:drop]] = True  # stable: within a neuron, its own order
        neurons, steps = taken.reshape(out, width).nonzero(as_tuple=True)
        mask[neurons, self.order[neurons, steps]] = False
        return mask


@dataclass(frozen=True)
class ExactOBS:
    """Greedy elimination with inverses that are kept up to date.

    memory  bytes for the inverses: neurons are taken in turns that fit
    """

    takes: ClassVar[type] = SparseLeastSquares
    starts: ClassVar[bool] = False

    memory: float = 2e9
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def solve(self, problem: SparseLeastSquares, start: Tensor | None = None) -> Attempt:
        """Least squares on the greedy support. Everything begins at the full support; `start` is not used."""
        shape = (problem.target.shape[0], problem.target.shape[1])
        group = groups_of(problem.pattern, shape, problem.kernel)
        if isinstance(problem.pattern, Support):
            mask = problem.select(torch.ones(shape, dtype=torch.float64))
        elif group is None:
            mask = self.traces(problem).support(problem.pattern.quota(shape, problem.kernel))
        else:
            mask = self._grouped(problem, group, problem.pattern.quota(shape, problem.kernel))
        weights = best_on_support(problem.gram, problem.cross, mask, problem.target)
        return Attempt(problem.completed(weights), None, Status.CONVERGED, int((~mask).sum()))

    def traces(self, problem: SparseLeastSquares) -> Traces:
        """The whole record of every neuron; weights in `problem.always` leave last."""
        scaled = Scaled.of(problem, self.device, self.dtype)
        out, width = scaled.dense.shape
        order = torch.full((out, width), -1)
        cost = torch.full((out, width), torch.inf, dtype=torch.float64)
        for rows in self._turns(scaled):
            part = self._whole(problem, scaled, rows)
            live = int(scaled.live.sum())
            dead = (~scaled.live).nonzero()[:, 0].cpu()
            order[rows, : len(dead)], cost[rows, : len(dead)] = dead, 0.0
            for step in range(len(dead), len(dead) + live):
                cheapest, slots = part.costs.min(1)
                chosen = torch.isfinite(cheapest)
                if not bool(chosen.any()):
                    break
                inputs = part.index.gather(1, slots[:, None])[:, 0]
                order[rows, step] = torch.where(chosen, inputs, -1).cpu()
                cost[rows, step] = cheapest.cpu().double()
                part.leave(slots, chosen)
        return Traces(order, cost)

    def _grouped(self, problem: SparseLeastSquares, group: Tensor, quota: int) -> Tensor:
        scaled = Scaled.of(problem, self.device, self.dtype)
        mask = torch.zeros_like(problem.target, dtype=torch.bool)
        for rows in self._turns(scaled):
            part = self._whole(problem, scaled, rows)
            shrink_groups(part, group.to(scaled.gram.device), quota)
            mask[rows] = part.mask.cpu()
        return mask

    def _turns(self, scaled: Scaled) -> list[Tensor]:
        out, width = scaled.dense.shape
        most = max(1, int(self.memory / (3 * scaled.gram.element_size() * width * width)))
        return [torch.arange(begin, min(begin + most, out)) for begin in range(0, out, most)]

    def _whole(self, problem: SparseLeastSquares, scaled: Scaled, rows: Tensor) -> SupportInverses:
        full = scaled.live.expand(len(rows), -1)
        pinned = None if problem.always is None else problem.always[rows].to(full.device)
        return SupportInverses(scaled.gram, scaled.cross[rows.to(full.device)], full, scaled.ridge, pinned=pinned)
