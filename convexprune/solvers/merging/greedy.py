"""Merge the pair with the smallest saliency, again and again.

    s_ij = <a_j^2> ||w_i - w_j||^2;    at the smallest: a_i <- a_i + a_j, and neuron j leaves

A merge changes one column of saliencies (a_i) and removes one row and one column (j). So each neuron keeps a short list
of its nearest neighbours, and a heap holds the best pair of each neuron. If the neighbour in an entry has left, the
entry is a lower bound of the true value and is updated when it reaches the top; an empty list is computed again.
Distances are computed block by block.
Source: Srinivas, Babu, BMVC 2015, Algorithm 1.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from convexprune.forms import MergingProblem
from convexprune.options import check_options, whole
from convexprune.solution import Attempt, Status

BLOCK = 2**25  # numbers in a block of distances


@dataclass(frozen=True, eq=False)
class Merges:
    """Every merge of a run, in order: `left` (t,) joined `into` (t,), at `saliency` (t,)."""

    neurons: int
    left: Tensor
    into: Tensor
    saliency: Tensor

    def assignment(self, survivors: int) -> Tensor:
        """Survivor index (n,) of each neuron when `survivors` remain."""
        count = self.neurons - survivors
        if not 0 <= count <= len(self.left):
            raise ValueError(
                f"survivors is {survivors}; this run went from {self.neurons} to {self.neurons - len(self.left)}"
            )
        joined = torch.arange(self.neurons)
        # go through later merges first: a neuron that survived an early merge may have left in a later one
        for left, into in zip(self.left[:count].flip(0).tolist(), self.into[:count].flip(0).tolist(), strict=True):
            joined[left] = joined[into]
        return joined

    def published_cutoff(self) -> int:
        """Number of neurons that the published rule removes: merges up to the mode of the saliencies' histogram."""
        values = self.saliency.numpy()
        if len(values) < 2 or values.min() == values.max():
            return len(values)
        low, high = np.quantile(values, [0.25, 0.75])
        counts, edges = np.histogram(values, bins="fd" if high > low else "sturges")
        mode = edges[counts.argmax() : counts.argmax() + 2].mean()
        return int(np.argmax(values > mode)) if bool((values > mode).any()) else len(values)


@dataclass(frozen=True)
class GreedyMerging:
    """The published greedy algorithm: it finds the same merges as a search over all pairs, up to rounding.

    neighbours     length of each neuron's list of neighbours
    device, dtype  for finding the candidates; the distances in the lists are float64
    """

    takes: ClassVar[type] = MergingProblem
    starts: ClassVar[bool] = False

    neighbours: int = 16
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self, neighbours=whole(1))

    def solve(self, problem: MergingProblem, start: Tensor | None = None) -> Attempt:
        """The start is not used. With `max_saliency` the merges stop at the last one whose total is within it."""
        if problem.keep is not None:
            merges = self.merges(problem, problem.keep)
            joined = merges.assignment(problem.keep)
        else:
            merges = self.merges(problem, 1)
            low, high = 1, problem.shape[0]  # the sum grows with nearly every merge, which bisection relies on
            while low < high:
                middle = (low + high) // 2
                if problem.violation(merges.assignment(middle)[:, None].double()) == 0:
                    high = middle
                else:
                    low = middle + 1
            joined = merges.assignment(high)
        return Attempt(joined[:, None].double(), None, Status.CONVERGED, len(merges.left))

    def merges(self, problem: MergingProblem, survivors: int = 1) -> Merges:
        """All merges until `survivors` remain."""
        screen = _Neighbours(problem.features, self.neighbours, self.device, self.dtype)
        outgoing = problem.outgoing.T.clone(memory_format=torch.contiguous_format)  # (n, out), to be added to
        importance = outgoing.square().mean(1).tolist()
        n = len(outgoing)
        near, distance = screen.lists(torch.arange(n))
        at, version = [0] * n, [0] * n
        heap = [(importance[j] * distance[j][0], j, 0) for j in range(n) if distance[j]]
        heapq.heapify(heap)
        left: list[int] = []
        into: list[int] = []
        saliency: list[float] = []
        alive = screen.alive
        while len(left) < n - survivors:
            cost, j, made = heapq.heappop(heap)
            if not alive[j] or made != version[j]:
                continue
            i = near[j][at[j]]
            if alive[i]:
                left.append(j)
                into.append(i)
                saliency.append(cost)
                alive[j] = False
                outgoing[i] += outgoing[j]
                importance[i] = float(outgoing[i].square().mean())
                changed = i
            else:
                changed = j
                while at[j] < len(near[j]) and not alive[near[j][at[j]]]:
                    at[j] += 1
                if at[j] == len(near[j]):
                    (near[j],), (distance[j],) = screen.lists(torch.tensor([j]))
                    at[j] = 0
            version[changed] += 1
            reach = distance[changed][at[changed]] if distance[changed] else math.inf
            heapq.heappush(heap, (importance[changed] * reach, changed, version[changed]))
        return Merges(n, torch.tensor(left), torch.tensor(into), torch.tensor(saliency, dtype=torch.float64))


class _Neighbours:
    """The nearest remaining neighbours of neurons with features (n, d)."""

    def __init__(self, features: Tensor, count: int, device: str, dtype: torch.dtype) -> None:
        self.features, self.count = features, count
        centred = features - features.mean(0)  # keeps the distances and reduces cancellation
        self.rows = centred.to(device, dtype)
        self.squares = self.rows.square().sum(1)
        self.alive = np.ones(len(features), dtype=bool)

    def lists(self, which: Tensor) -> tuple[list[list[int]], list[list[float]]]:
        """The nearest neighbours of each of the neurons `which`, and their squared distances in rising order."""
        living = torch.from_numpy(np.flatnonzero(self.alive))
        others = living.to(self.rows.device)
        everyone = len(living) == len(self.rows)
        rows, squares = (self.rows, self.squares) if everyone else (self.rows[others], self.squares[others])
        size = max(1, BLOCK // max(len(living), 1))
        near: list[list[int]] = []
        distance: list[list[float]] = []
        for part in torch.split(which, size):
            mine = self.rows[part.to(self.rows.device)]
            apart = torch.addmm(squares, mine, rows.T, alpha=-2)
            most = min(self.count + 1, len(living))  # the neuron itself is nearly always among them
            found = living[apart.topk(most, dim=1, largest=False).indices.cpu()]
            for j, candidates in zip(part.tolist(), found, strict=True):
                candidates = candidates[candidates != j][: self.count]
                exact = (self.features[candidates] - self.features[j]).square().sum(1)
                order = exact.argsort(stable=True)
                near.append(candidates[order].tolist())
                distance.append(exact[order].tolist())
        return near, distance
