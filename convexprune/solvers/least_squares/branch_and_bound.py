"""The exact optimum of a small reconstruction: best subsets by branch and bound, joined over the neurons.

For one neuron, f(k) = the least value with k weights. A node has decided some inputs, in or out; with the undecided
ones all in, least squares gives a lower bound of everything below it, and thousands of nodes are solved in one batch.
The neurons meet only in their counts: for a pattern over the whole layer an exact dynamic program over the neurons
divides the budget.
Source: Furnival, Wilson, Technometrics 1974 (leaps and bounds).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.patterns import Support
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import groups_of
from convexprune.solvers.least_squares.on_support import best_on_support, ridge_of
from convexprune.solvers.least_squares.spd_inverse import NotDefinite

BATCH = 4096  # nodes that are solved together


@dataclass(frozen=True)
class BranchAndBound:
    """An oracle for layers of up to `max_inputs` inputs: its point is optimal where the status is CONVERGED.

    The certificate does not say so (a problem's bound knows nothing of the search): compare values with it.
    """

    takes: ClassVar[type] = SparseLeastSquares
    max_inputs: int = 30
    time_limit: float | None = None

    def solve(self, problem: SparseLeastSquares, start: Tensor | None = None) -> Attempt:
        """The best support of all. Raises ValueError for a larger layer, TypeError for patterns of blocks."""
        out, width = problem.target.shape
        if width > self.max_inputs:
            raise ValueError(f"BranchAndBound is for up to {self.max_inputs} inputs, this layer has {width}; use Best")
        group = groups_of(problem.pattern, (out, width), problem.kernel)
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        always = torch.zeros(out, width, dtype=torch.bool) if problem.always is None else problem.always
        quota = problem.pattern.quota((out, width), problem.kernel)
        try:
            if isinstance(problem.pattern, Support):
                mask, nodes = problem.pattern.mask, 1
            else:
                neurons = [_Neuron(problem, m, always[m], deadline) for m in range(out)]
                mask = _joined(neurons, quota) if group is None else _apart(neurons, group, quota)
                nodes = sum(neuron.nodes for neuron in neurons)
            weights = best_on_support(problem.gram, problem.cross, mask, problem.target)
        except NotDefinite:
            return Attempt(problem.completed(problem.target), None, Status.NUMERICAL, 0)
        late = time.perf_counter() > deadline
        return Attempt(problem.completed(weights), None, Status.TIME_LIMIT if late else Status.CONVERGED, nodes)


class _Neuron:
    """The search of one neuron; supports are boolean rows, values are least-squares values less the energy."""

    def __init__(self, problem: SparseLeastSquares, neuron: int, always: Tensor, deadline: float) -> None:
        diagonal = problem.gram.diagonal()
        live = diagonal > 0
        scale = torch.where(live, diagonal, 1.0).sqrt()
        unit = torch.where(live[:, None] & live, problem.gram / (scale[:, None] * scale), 0.0)
        unit.diagonal().fill_(1.0)
        self.gram = unit + ridge_of(unit) * torch.eye(len(unit), dtype=torch.float64)
        self.cross = torch.where(live, problem.cross[neuron] / scale, 0.0)
        self.always, self.deadline, self.nodes = always, deadline, 0
        self.values = torch.full((len(scale) + 1,), math.inf, dtype=torch.float64)
        self.masks = torch.zeros(len(scale) + 1, len(scale), dtype=torch.bool)

    def value(self, masks: Tensor) -> Tensor:
        """(B,): -c_S^T (G_SS)^-1 c_S for masks (B, N)."""
        self.nodes += len(masks)
        held = masks.double()
        blocks = self.gram * held[:, :, None] * held[:, None, :] + torch.diag_embed(1 - held)
        right = (self.cross * held)[..., None]
        half = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), right, upper=False)
        found: Tensor = -half.square().sum((1, 2))
        return found

    def every_count(self, most: int) -> None:
        """Fill `values` and `masks` for every count up to `most`, by one search a count."""
        group = torch.zeros(len(self.cross), dtype=torch.long)
        for count in range(int(self.always.sum()), most + 1):
            mask = self.best(group, count)
            self.masks[count], self.values[count] = mask, self.value(mask[None])[0]

    def best(self, group: Tensor, quota: int) -> Tensor:
        """(N,) bool: the best support with at most `quota` inputs of each group."""
        best = self._greedy(group, quota)
        least = float(self.value(best[None])[0])
        # a node: inputs decided in, inputs still possible, and its bound; the most damaging input is decided first.
        # Depth first and in batches, so that memory stays small: those with the best bounds are on top of the stack
        order = [each for each in self._order().tolist() if not bool(self.always[each])]
        root = torch.ones_like(self.always)[None]
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
        self, input_: int, inside: Tensor, possible: Tensor, bounds: Tensor, group: Tensor, quota: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The nodes with one more input decided: in, then out."""
        with_, without = inside.clone(), possible.clone()
        with_[:, input_], without[:, input_] = True, False
        inside, before = torch.cat([with_, inside]), torch.cat([possible, possible])
        possible, bounds = torch.cat([possible, without]), torch.cat([bounds, bounds])
        # a group whose quota is reached takes no more: its undecided inputs are out
        full = _counts(inside, group)
        possible = torch.where((full >= quota)[:, group], inside, possible)
        fits = (full <= quota).all(1) & (inside <= possible).all(1)
        inside, possible, before, bounds = inside[fits], possible[fits], before[fits], bounds[fits]
        changed = (possible != before).any(1).nonzero()[:, 0]
        for part in torch.split(changed, BATCH):
            bounds[part] = self.value(possible[part])
        return inside, possible, bounds

    def _order(self) -> Tensor:
        """Inputs whose absence costs most come first: the branch without them dies early."""
        width = len(self.cross)
        without = ~torch.eye(width, dtype=torch.bool)
        return self.value(without).argsort(descending=True)

    def _greedy(self, group: Tensor, quota: int) -> Tensor:
        """Backward elimination: a support to beat."""
        mask = torch.ones_like(self.always)
        while bool((crowded := _counts(mask[None], group)[0] > quota).any()):
            may = (mask & crowded[group] & ~self.always).nonzero()[:, 0]
            trials = mask.repeat(len(may), 1)
            trials[torch.arange(len(may)), may] = False
            mask = trials[self.value(trials).argmin()]
        return mask


def _counts(masks: Tensor, group: Tensor) -> Tensor:
    """(B, groups): how many inputs of each group the masks (B, N) hold."""
    counts = torch.zeros(len(masks), int(group.max()) + 1, dtype=torch.long)
    return counts.index_add_(1, group, masks.long())


def _apart(neurons: list[_Neuron], group: Tensor, quota: int) -> Tensor:
    """(M, N) bool: each neuron by itself."""
    return torch.stack([neuron.best(group, quota) for neuron in neurons])


def _joined(neurons: list[_Neuron], budget: int) -> Tensor:
    """(M, N) bool: the division of the budget with the least sum of values, by dynamic programming over the neurons."""
    for neuron in neurons:
        neuron.every_count(min(budget, len(neuron.cross)))
    best = torch.zeros(1, dtype=torch.float64)
    choices = []
    for neuron in neurons:
        counts = neuron.values.isfinite().nonzero()[:, 0]
        longest = min(len(best) - 1 + int(counts.max()), budget)
        table = torch.full((len(counts), longest + 1), math.inf, dtype=torch.float64)
        for row, count in enumerate(counts.tolist()):
            reach = min(len(best), longest + 1 - count)
            if reach > 0:
                table[row, count : count + reach] = best[:reach] + neuron.values[count]
        best, which = table.min(0)
        choices.append(counts[which])
    at, masks = int(best.argmin()), []
    for neuron, chosen in zip(reversed(neurons), reversed(choices), strict=True):
        count = int(chosen[at])
        masks.append(neuron.masks[count])
        at -= count
    return torch.stack(masks[::-1])
