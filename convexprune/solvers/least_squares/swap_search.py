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
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.options import check_options, number, whole
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import gridded
from convexprune.solvers.least_squares.scaling import Scaled, in_float64_if_lost
from convexprune.solvers.least_squares.spd_inverse import NotDefinite
from convexprune.solvers.least_squares.support_search import Schedule, Search


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
        pairs: Largest number of rounds of exact exchanges after those, where cells are single weights.
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
    pairs: int = 30
    eps_rel: float = 1e-4
    time_limit: float | None = None
    memory: float = 2e9
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        share = number(0, 1, least_open=True)
        check_options(self, rounds=whole(0), enter=share, cooling=share, pairs=whole(0))

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
        mask, weights, rounds, status = self.improve(problem, scaled, weights)
        x = problem.completed(scaled.fitted(problem, weights, mask))
        if start is not None and problem.violation(start) == 0 and problem.value(start) < problem.value(x):
            x = start.detach().cpu().double()
        return Attempt(x, None, status, rounds, note=scaled.note)

    def improve(
        self, problem: GroupedLeastSquares, scaled: Scaled, weights: Tensor
    ) -> tuple[Tensor, Tensor, int, Status]:
        """From scaled weights (M, N), zero outside their support: support, weights, rounds, why it stopped."""
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        schedule = Schedule(self.rounds, self.enter, self.cooling, self.pairs, self.eps_rel, self.memory)
        search = Search(problem, scaled, weights, schedule)
        try:
            rounds = search.run(deadline)
        except NotDefinite:
            return *search.found(), 0, Status.NUMERICAL
        status = Status.TIME_LIMIT if time.perf_counter() > deadline else search.status
        return *search.found(), rounds, status
