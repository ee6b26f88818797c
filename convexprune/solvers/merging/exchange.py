"""Vertex substitution for the p-median problem of neuron merging, and multipliers that bound the optimum.

A survivor r changes places with another neuron i while that lowers the sum. Let d1_j and d2_j be the costs of joining
neuron j to its nearest and its second nearest survivor. Then

    change(r, i) = sum_j min(c_ji - d1_j, 0) + sum_{j joined r} clamp(c_ji - d1_j, 0, d2_j - d1_j)

for all pairs at once. The multipliers rise by subgradient steps.
Source: Teitz, Bart 1968; Whitaker 1983; Schubert, Rousseeuw 2021; Cornuejols, Fisher, Nemhauser 1977.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import MergingProblem
from convexprune.options import check_options, whole
from convexprune.solution import Attempt, Status
from convexprune.solvers.merging.greedy import GreedyMerging

LEAST = 1e-9  # a swap must gain more than this fraction of the sum, which rounding could fake


@dataclass(frozen=True)
class Exchange:
    """Local search on the set of survivors, from `start` or from the answer of `GreedyMerging`.

    max_iter     largest number of swaps
    bound_steps  number of subgradient steps for the witness; 0: no witness
    time_limit   seconds, or None
    memory       bytes available; n^2 costs must fit
    """

    takes: ClassVar[type] = MergingProblem

    max_iter: int = 1000
    bound_steps: int = 300
    time_limit: float | None = None
    memory: float = 4e9

    def __post_init__(self) -> None:
        check_options(self, bound_steps=whole(0))

    def adapted(self, problem: Any) -> Exchange:
        """Itself. Raises MemoryError where the costs do not fit: use GreedyMerging there."""
        n = problem.shape[0]
        if 3 * 8 * n * n > self.memory:
            raise MemoryError(
                f"{n} neurons have {n * n:,} costs; raise memory above {24 * n * n:.1e}, or use GreedyMerging"
            )
        return self

    def solve(self, problem: MergingProblem, start: Tensor | None = None) -> Attempt:
        """The result is never worse than the start."""
        self.adapted(problem)
        n = problem.shape[0]
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        x = GreedyMerging().solve(problem).x if start is None else start
        costs = _costs(problem)
        survivors = (x.flatten().round().long() == torch.arange(n)).nonzero()[:, 0]
        survivors, swaps, status = self._improved(costs, survivors, deadline)
        if problem.max_saliency is not None:
            survivors, swaps = self._fewer(problem.max_saliency, costs, survivors, deadline, swaps)
        joined = _nearest(costs, survivors)
        better = joined[:, None].double()
        if problem.violation(better) > problem.violation(x) or (
            problem.violation(better) == problem.violation(x) and problem.value(better) > problem.value(x)
        ):
            better = x.detach().cpu().double()
        witness = self._multipliers(costs, survivors) if self.bound_steps else None
        return Attempt(better, witness, status, swaps)

    def _improved(self, costs: Tensor, survivors: Tensor, deadline: float) -> tuple[Tensor, int, Status]:
        """The survivors after all swaps that lower the sum, the number of swaps, and the status."""
        n = len(costs)
        if len(survivors) == n:
            return survivors, 0, Status.CONVERGED
        for swaps in range(self.max_iter):
            if time.perf_counter() > deadline:
                return survivors, swaps, Status.TIME_LIMIT
            change = _changes(costs, survivors)
            best = int(change.argmin())
            r, i = divmod(best, n)
            now = float(costs[:, survivors].min(1).values.sum())
            if not float(change[r, i]) < -LEAST * now:
                return survivors, swaps, Status.CONVERGED
            survivors = survivors.clone()
            survivors[r] = i
        return survivors, self.max_iter, Status.MAX_ITER

    def _fewer(self, limit: float, costs: Tensor, survivors: Tensor, deadline: float, swaps: int) -> tuple[Tensor, int]:
        """Remove survivors one at a time while the sum stays within the limit."""
        while len(survivors) > 1 and time.perf_counter() < deadline:
            losses = torch.stack([costs[:, torch.cat([survivors[:r], survivors[r + 1 :]])].min(1).values.sum()
                                  for r in range(len(survivors))])  # fmt: skip
            r = int(losses.argmin())
            fewer, more, _ = self._improved(costs, torch.cat([survivors[:r], survivors[r + 1 :]]), deadline)
            swaps += more
            if float(costs[:, fewer].min(1).values.sum()) > limit:
                break
            survivors = fewer
        return survivors, swaps

    def _multipliers(self, costs: Tensor, survivors: Tensor) -> Tensor:
        """The multipliers (n,) with the highest bound among all subgradient steps."""
        count, n = len(survivors), len(costs)
        upper = float(costs[:, survivors].min(1).values.sum())
        v = costs[:, survivors].topk(min(2, count), dim=1, largest=False).values[:, -1].clone()
        best, highest, scale, stuck = v, -math.inf, 1.0, 0
        for _ in range(self.bound_steps):
            reduced = (costs - v[:, None]).clamp(max=0)
            chosen = reduced.sum(0).topk(count, largest=False)
            bound = float(v.sum() + chosen.values.sum())
            if bound > highest:
                best, highest, stuck = v, bound, 0
            else:
                stuck += 1
                if stuck == 10:
                    scale, stuck, v = scale / 2, 0, best
                    continue
            slope = 1.0 - (costs[:, chosen.indices] < v[:, None]).double().sum(1)
            size = float(slope.square().sum())
            if size == 0 or upper - bound <= 1e-12 * abs(upper):
                break
            v = (v + scale * (upper - bound) / size * slope).clamp(min=0)
        assert len(best) == n
        return best


def _costs(problem: MergingProblem) -> Tensor:
    """The costs c(j, i), (n, n), float64."""
    rows = problem.features - problem.features.mean(0)
    squares = rows.square().sum(1)
    apart = torch.addmm(squares[:, None] + squares, rows, rows.T, alpha=-2).clamp_(min=0)
    apart.fill_diagonal_(0)
    return problem.importance[:, None] * apart


def _nearest(costs: Tensor, survivors: Tensor) -> Tensor:
    """The cheapest survivor for each neuron (n,); a survivor's is itself."""
    joined = survivors[costs[:, survivors].argmin(1)]
    joined[survivors] = survivors
    return joined


def _changes(costs: Tensor, survivors: Tensor) -> Tensor:
    """The change of the sum (p, n) if neuron i takes the place of survivor r."""
    own = costs[:, survivors]
    if len(survivors) == 1:
        first, second = own[:, 0], torch.full_like(own[:, 0], math.inf)
        nearest = torch.zeros(len(costs), dtype=torch.long)
    else:
        two = own.topk(2, dim=1, largest=False)
        (first, second), nearest = two.values.T, two.indices[:, 0]
    beyond = costs - first[:, None]
    gained = beyond.clamp(max=0).sum(0)
    lost = torch.minimum(beyond.clamp(min=0), (second - first)[:, None])
    change = torch.zeros(len(survivors), len(costs), dtype=costs.dtype).index_add_(0, nearest, lost)
    return change.add_(gained)
