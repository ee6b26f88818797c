"""The exact optimum of a small reconstruction: best subsets by branch and bound, joined over the neurons.

For one neuron, f(k) = the least value with k weights. A node has decided some inputs, in or out; with the undecided
ones all in, least squares gives a lower bound of everything below it, and thousands of nodes are solved in one batch.
The neurons meet only in their counts: for a pattern over the whole layer an exact dynamic program over the neurons
divides the budget. Where groups join neurons in any other way, all of them are searched as one. For patterns whose
cells hold many weights, read cell for input, and bundle of neurons for neuron.
Source: Furnival, Wilson, Technometrics 1974 (leaps and bounds).
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares, SparseLeastSquares
from convexprune.layout import Grid, Layout
from convexprune.options import check_options, whole
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import gridded
from convexprune.solvers.least_squares.on_support import refitted, ridge_of
from convexprune.solvers.least_squares.spd_inverse import NotDefinite

BATCH = 4096  # nodes that are solved together


@dataclass(frozen=True)
class BranchAndBound:
    """An oracle for small layers: its point is optimal where the status is CONVERGED.

    The certificate does not say so (a problem's bound knows nothing of the search): compare values with it.

    Args:
        max_inputs: Largest number of cells that are searched together: the inputs of a neuron, the blocks beside one
            another, or all cells of the layer if groups join neurons and are not the whole layer.
        time_limit: Seconds, or None for no limit.

    Raises:
        ValueError: For a larger layer.
        TypeError: For a pattern whose cells are not a set of rows times a set of inputs.
    """

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    max_inputs: int = 30
    time_limit: float | None = None

    def __post_init__(self) -> None:
        check_options(self, max_inputs=whole(1))

    def adapted(self, problem: Any) -> BranchAndBound:
        """Itself, where the layer is small enough and the cells of the pattern make a grid."""
        layout, grid = gridded(problem, "BranchAndBound")
        together = grid.group.shape[1] if layout.groups == 1 or grid.apart is not None else grid.group.numel()
        if together > self.max_inputs and not layout.forced:
            single = layout.single and together == grid.group.shape[1]
            unit, what = ("inputs", "inputs") if single else ("cells", "cells that are chosen together")
            raise ValueError(
                f"BranchAndBound is for up to {self.max_inputs} {unit}, this layer has {together} {what}; use Best"
            )
        return self

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """The best support of all."""
        self.adapted(problem)
        layout, grid = gridded(problem, "BranchAndBound")
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        try:
            mask, nodes = _chosen(problem, layout, grid, deadline)
            weights = refitted(problem, mask)
        except NotDefinite:
            return Attempt(problem.completed(problem.target), None, Status.NUMERICAL, 0)
        late = time.perf_counter() > deadline
        return Attempt(problem.completed(weights), None, Status.TIME_LIMIT if late else Status.CONVERGED, nodes)


def _chosen(problem: GroupedLeastSquares, layout: Layout, grid: Grid, deadline: float) -> tuple[Tensor, int]:
    """(M, N) bool: the best support, and how many nodes it took."""
    if layout.forced:
        return problem.select(torch.ones_like(problem.target)), 1
    bundles = _bundles(problem, grid, deadline)
    if layout.groups == 1:
        mask = _joined(bundles, layout.quota)
    elif grid.apart is not None:
        each = zip(bundles, grid.apart, strict=True)
        mask = torch.stack([bundle.best(group, layout.quota) for bundle, group in each])
    else:
        together = _Together(bundles, deadline)
        mask = together.best(grid.group.flatten(), layout.quota).reshape(grid.group.shape)
    return grid.spread(mask), sum(bundle.nodes for bundle in bundles)


def _bundles(problem: GroupedLeastSquares, grid: Grid, deadline: float) -> list[_Bundle]:
    always = torch.zeros_like(grid.allowed) if problem.always is None else grid.holding(problem.always)
    rows, real = grid.members
    height = len(grid.rows) // len(problem.parts)
    return [
        _Bundle(
            problem.parts[int(rows[at, 0]) // height], rows[at, real[at]] % height, grid.inputs,
            always[at], grid.allowed[at], deadline,
        )
        for at in range(len(grid.group))
    ]  # fmt: skip


class _Search(ABC):
    """A search among supports, which are boolean rows (C,) of cells; `always` and `allowed` (C,) are given."""

    def __init__(self, always: Tensor, allowed: Tensor, deadline: float) -> None:
        self.always, self.allowed, self.deadline = always, allowed, deadline

    @abstractmethod
    def value(self, masks: Tensor) -> Tensor:
        """(B,): least-squares values, less the energy, for masks (B, C)."""

    def best(self, group: Tensor, quota: int) -> Tensor:
        """(C,) bool: the best support with at most `quota` cells of each group (C,)."""
        best = self._greedy(group, quota)
        least = float(self.value(best[None])[0])
        # a node: cells decided in, cells still possible, and its bound; the most damaging cell is decided first.
        # Depth first and in batches, so that memory stays small: those with the best bounds are on top of the stack
        order = [each for each in self._order().tolist() if bool(self.allowed[each] & ~self.always[each])]
        root = self.allowed[None]
        stack = [(0, self.always[None], root, self.value(root))]
        stack = stack if float(stack[0][3]) < least else []
        while stack and time.perf_counter() < self.deadline:
            level, inside, possible, bounds = stack.pop()
            inside, possible, bounds = self._children(order[level], inside, possible, bounds, group, quota)
            done = (_counts(possible, group) <= quota).all(1)
            if bool(done.any()) and float(bounds[done].min()) < least:
                least = float(bounds[done].min())
                best = possible[done][bounds[done].argmin()]
            worst_first = bounds.argsort(descending=True)
            open_ = worst_first[(~done & (bounds < least))[worst_first]]
            parts = torch.split(open_, BATCH) if len(open_) else ()
            stack += [(level + 1, inside[part], possible[part], bounds[part]) for part in parts]
        return best

    def _children(
        self, cell: int, inside: Tensor, possible: Tensor, bounds: Tensor, group: Tensor, quota: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes with one more cell decided: in, then out."""
        with_, without = inside.clone(), possible.clone()
        with_[:, cell], without[:, cell] = True, False
        inside, before = torch.cat([with_, inside]), torch.cat([possible, possible])
        possible, bounds = torch.cat([possible, without]), torch.cat([bounds, bounds])
        # a group whose quota is reached takes no more: its undecided cells are out
        full = _counts(inside, group)
        possible = torch.where((full >= quota)[:, group], inside, possible)
        fits = (full <= quota).all(1) & (inside <= possible).all(1)
        inside, possible, before, bounds = inside[fits], possible[fits], before[fits], bounds[fits]
        changed = (possible != before).any(1).nonzero()[:, 0]
        for part in torch.split(changed, BATCH):
            bounds[part] = self.value(possible[part])
        return inside, possible, bounds

    def _order(self) -> Tensor:
        """Cells whose absence costs most come first: the branch without them dies early."""
        without = self.allowed & ~torch.eye(len(self.allowed), dtype=torch.bool)
        return self.value(without).argsort(descending=True)

    def _greedy(self, group: Tensor, quota: int) -> Tensor:
        """Backward elimination: a support to beat."""
        mask = self.allowed
        while bool((crowded := _counts(mask[None], group)[0] > quota).any()):
            may = (mask & crowded[group] & ~self.always).nonzero()[:, 0]
            trials = mask.repeat(len(may), 1)
            trials[torch.arange(len(may)), may] = False
            mask = trials[self.value(trials).argmin()]
        return mask


class _Bundle(_Search):
    """The search of one bundle of neurons."""

    def __init__(
        self,
        problem: SparseLeastSquares,
        rows: Tensor,
        inputs: Tensor,
        always: Tensor,
        allowed: Tensor,
        deadline: float,
    ) -> None:
        super().__init__(always, allowed, deadline)
        diagonal = problem.gram.diagonal()
        live = diagonal > 0
        scale = torch.where(live, diagonal, 1.0).sqrt()
        unit = torch.where(live[:, None] & live, problem.gram / (scale[:, None] * scale), 0.0)
        unit.diagonal().fill_(1.0)
        self.gram = unit + ridge_of(unit) * torch.eye(len(unit), dtype=torch.float64)
        self.cross = torch.where(live, problem.cross[rows] / scale, 0.0)  # (h, N)
        self.inputs, self.nodes = inputs, 0
        self.values = torch.full((len(self.allowed) + 1,), math.inf, dtype=torch.float64)
        self.masks = torch.zeros(len(self.allowed) + 1, len(self.allowed), dtype=torch.bool)

    def value(self, masks: Tensor) -> Tensor:
        """(B,): -tr c_S^T (G_SS)^-1 c_S for masks (B, K)."""
        self.nodes += len(masks)
        held = masks[:, self.inputs].double()
        blocks = self.gram * held[:, :, None] * held[:, None, :] + torch.diag_embed(1 - held)
        right = (self.cross * held[:, None]).mT
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), right, upper=False)
        found: Tensor = -half.square().sum((1, 2))
        return found

    def every_count(self, most: int) -> None:
        """Fill `values` and `masks` for every count up to `most`: by trying all, where they are few, else a search."""
        counts = range(int(self.always.sum()), min(most, int(self.allowed.sum())) + 1)
        if 2 ** int((self.allowed & ~self.always).sum()) <= BATCH:
            return self._try_all(counts)
        group = torch.zeros(len(self.allowed), dtype=torch.long)
        for count in counts:
            mask = self.best(group, count)
            self.masks[count], self.values[count] = mask, self.value(mask[None])[0]

    def _try_all(self, counts: range) -> None:
        free = (self.allowed & ~self.always).nonzero()[:, 0]
        masks = self.always.repeat(2 ** len(free), 1)
        masks[:, free] = (torch.arange(len(masks))[:, None] >> torch.arange(len(free)) & 1).bool()
        values, held = self.value(masks), masks.sum(1)
        for count in counts:
            least = torch.where(held == count, values, math.inf).argmin()
            self.masks[count], self.values[count] = masks[least], values[least]


class _Together(_Search):
    """The search of all bundles as one; the cells of the first come first."""

    def __init__(self, bundles: list[_Bundle], deadline: float) -> None:
        always, allowed = (torch.cat([getattr(each, name) for each in bundles]) for name in ("always", "allowed"))
        super().__init__(always, allowed, deadline)
        self.bundles = bundles

    def value(self, masks: Tensor) -> Tensor:
        """(B,): the sum over the bundles, whose values depend on their own cells alone."""
        total = torch.zeros(len(masks), dtype=torch.float64)
        for bundle, own in zip(self.bundles, masks.chunk(len(self.bundles), 1), strict=True):
            supports, which = torch.unique(own, dim=0, return_inverse=True)
            total += bundle.value(supports)[which]
        return total


def _counts(masks: Tensor, group: Tensor) -> Tensor:
    """(B, groups): how many cells of each group the masks (B, C) hold."""
    counts = torch.zeros(len(masks), int(group.max()) + 1, dtype=torch.long)
    return counts.index_add_(1, group, masks.long())


def _joined(bundles: list[_Bundle], budget: int) -> Tensor:
    """(B, K) bool: the division of the budget with the least sum of values, by dynamic programming over the bundles."""
    for bundle in bundles:
        bundle.every_count(budget)
    best = torch.zeros(1, dtype=torch.float64)
    choices = []
    for bundle in bundles:
        counts = bundle.values.isfinite().nonzero()[:, 0]
        longest = min(len(best) - 1 + int(counts.max()), budget)
        table = torch.full((len(counts), longest + 1), math.inf, dtype=torch.float64)
        for row, count in enumerate(counts.tolist()):
            reach = min(len(best), longest + 1 - count)
            if reach > 0:
                table[row, count : count + reach] = best[:reach] + bundle.values[count]
        best, which = table.min(0)
        choices.append(counts[which])
    at, masks = int(best.argmin()), []
    for bundle, chosen in zip(reversed(bundles), reversed(choices), strict=True):
        count = int(chosen[at])
        masks.append(bundle.masks[count])
        at -= count
    return torch.stack(masks[::-1])
