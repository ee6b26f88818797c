"""Three presets for a reconstruction: `Fast`, `Balanced` and `Best`. Each combines solvers of this folder.

Fast      a short ADMM, and conjugate gradients on its support
Balanced  ADMM to a support somewhat too large, exact elimination down to the pattern, a few rounds of swaps
Best      from Balanced's point, swaps until they no longer pay

The last two invert a matrix of each neuron's own weights, at kept^3 a neuron where a step of ADMM is 2 N^2. They are
`RisingPenalty` alone, the full ADMM and least squares, where that would cost more than `limit` N^2, and where the cells
of a pattern cannot be swapped because they are not some rows times some inputs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.layout import Grid, Layout
from convexprune.options import check_options, number, positive, whole
from convexprune.problem import Solver
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import grid_of, layout_of
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty
from convexprune.solvers.least_squares.scaling import Scaled, in_float64_if_lost
from convexprune.solvers.least_squares.swap_search import SwapSearch

ENTER, PAIRS = 0.03, 1  # of the cells, in a round of many; rounds of pairs: the first one gains most
SHORT = 20  # ADMM steps in which a quickly rising penalty settles


@dataclass(frozen=True)
class Fast:
    """A good support in about the time of one sweep over the columns: a short ADMM, then conjugate gradients.

    Args:
        flops: Limit on the cost of the ADMM steps: small layers get the full schedule, large ones a shorter one.
        polish: Number of conjugate-gradient steps on the support.
        device: Where the work is done: "cpu", "cuda", ...
        dtype: Working precision, torch.float32 or torch.float64; what ends NUMERICAL in float32 begins anew in float64,
            and the note says so.

    Raises:
        ValueError: For an option out of its range; TypeError for one of another type.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.Reconstruction(layer, cp.Unstructured(3)), cp.Fast())
        >>> solution.x.round(decimals=3).tolist()
        [[5.0, 0.0, 0.0], [0.0, -4.0, 3.0]]
    """

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    flops: float = 2e10
    polish: int = 8
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self, flops=positive, polish=whole(0))

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        return in_float64_if_lost(self, lambda solver: solver.attempted(problem))

    def attempted(self, problem: GroupedLeastSquares) -> Attempt:
        """The attempt in the precision that `dtype` says."""
        scaled = Scaled.of(problem, self.device, self.dtype)
        out, width = scaled.dense.shape
        most = max(int(self.flops / (2 * out * width**2)), SHORT)
        every, rises = (3, (1.3, 1.2, 1.1)) if most >= 2 * SHORT else (2, (1.3, 1.3, 1.2))
        sparse, steps, status = RisingPenalty(every=every, rises=rises, max_iter=most).descend(problem, scaled)
        weights = scaled.refined(sparse, sparse != 0, self.polish)
        return Attempt(problem.completed(scaled.restored(weights)), None, status, steps)


@dataclass(frozen=True)
class Balanced:
    """The default: a lower error than ADMM alone, in a few times its time; on large layers, ADMM itself.

    Args:
        grow: Ratio of ADMM's support size to the pattern's count; the elimination removes the rest.
        rounds: Number of rounds of swaps after the elimination.
        limit: Cost of the inverses above which ADMM works alone: kept^3 of a neuron over inputs^2, the mean of all.
            With half of the weights kept it is inputs / 8.
        device: Where the work is done: "cpu", "cuda", ...
        dtype: Working precision, torch.float32 or torch.float64; what ends NUMERICAL in float32 begins anew in float64,
            and the note says so.

    Raises:
        ValueError: For an option out of its range, and for `grow` or `rounds` with a pattern whose cells cannot be
            swapped; TypeError for an option of another type.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.Reconstruction(layer, cp.Unstructured(3)), cp.Balanced())
        >>> solution.x.round(decimals=3).tolist()
        [[5.0, 0.0, 0.0], [0.0, -4.0, 3.0]]
    """

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    grow: float = 1.05
    rounds: int = 1
    limit: float = 100.0
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self, grow=number(1), rounds=whole(0), limit=number(0, least_open=True, infinite=True))

    def adapted(self, problem: Any) -> Solver:
        """Itself, or `RisingPenalty` where cells cannot be swapped, or the inverses cost more than `limit`."""
        return _swapping(self, problem)

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        if (plain := self.adapted(problem)) is not self:
            return plain.solve(problem)
        return in_float64_if_lost(self, lambda solver: solver.attempted(problem))

    def attempted(self, problem: GroupedLeastSquares) -> Attempt:
        """The attempt in the precision that `dtype` says."""
        scaled = Scaled.of(problem, self.device, self.dtype)
        scaled.check_inverses()
        return self.searched(problem, scaled, None)

    def searched(self, problem: GroupedLeastSquares, scaled: Scaled, time_limit: float | None) -> Attempt:
        """The attempt for a problem that is scaled, in at most so many seconds."""
        begun = time.perf_counter()
        admm = RisingPenalty(self.grow, every=2, max_iter=45, time_limit=time_limit)
        sparse, steps, _ = admm.descend(problem, scaled)
        search = SwapSearch(rounds=self.rounds, enter=ENTER, pairs=PAIRS, time_limit=_left(time_limit, begun))
        mask, weights, rounds, status = search.improve(problem, scaled, sparse)
        if status is Status.MAX_ITER:
            status = Status.CONVERGED
        weights = scaled.refined(scaled.refined(weights, mask), mask)
        return Attempt(problem.completed(scaled.restored(weights)), None, status, steps + rounds, note=scaled.note)


@dataclass(frozen=True)
class Best:
    """The preset with the lowest error: never above `Balanced`, in two to three times its time.

    Args:
        grow: Ratio of ADMM's support size to the pattern's count; the elimination removes the rest.
        rounds: Largest number of rounds in which many weights are swapped, after those of `Balanced`.
        pairs: Largest number of rounds after these in which pairs are exchanged at exact prices.
        limit: Cost of the inverses above which ADMM works alone: kept^3 of a neuron over inputs^2, the mean of all.
            With half of the weights kept it is inputs / 8.
        time_limit: Seconds for all steps together, or None for no limit.
        device: Where the work is done: "cpu", "cuda", ...
        dtype: Working precision, torch.float32 or torch.float64; what ends NUMERICAL in float32 begins anew in float64,
            and the note says so.

    Raises:
        ValueError: For an option out of its range, and for `grow` or `rounds` with a pattern whose cells cannot be
            swapped; TypeError for an option of another type.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.Reconstruction(layer, cp.PerRow(1)), cp.Best())
        >>> solution.x.round(decimals=3).tolist()
        [[5.0, 0.0, 0.0], [0.0, -4.0, 0.0]]
    """

    takes: ClassVar[type] = GroupedLeastSquares
    starts: ClassVar[bool] = False

    grow: float = 1.05
    rounds: int = 6
    pairs: int = 12
    limit: float = 300.0
    time_limit: float | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(
            self, grow=number(1), rounds=whole(0), pairs=whole(0), limit=number(0, least_open=True, infinite=True)
        )

    def adapted(self, problem: Any) -> Solver:
        """Itself, or `RisingPenalty` where cells cannot be swapped, or the inverses cost more than `limit`."""
        return _swapping(self, problem)

    def solve(self, problem: GroupedLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        if (plain := self.adapted(problem)) is not self:
            return plain.solve(problem)
        return in_float64_if_lost(self, lambda solver: solver.attempted(problem))

    def attempted(self, problem: GroupedLeastSquares) -> Attempt:
        """The attempt in the precision that `dtype` says."""
        begun = time.perf_counter()
        scaled = Scaled.of(problem, self.device, self.dtype)
        scaled.check_inverses()
        balanced = Balanced(self.grow, device=self.device, dtype=self.dtype)
        first = balanced.searched(problem, scaled, self.time_limit)
        if first.status is not Status.CONVERGED:
            return first
        search = SwapSearch(self.rounds, pairs=self.pairs, time_limit=_left(self.time_limit, begun))
        begin = scaled.taken(first.x[:, : scaled.dense.shape[1]])
        mask, weights, rounds, status = search.improve(problem, scaled, begin)
        x = problem.completed(scaled.fitted(problem, weights, mask))
        if problem.value(first.x) < problem.value(x):
            x = first.x
        return Attempt(x, None, status, first.iterations + rounds, note=scaled.note)


def _left(time_limit: float | None, begun: float) -> float | None:
    return None if time_limit is None else max(time_limit - (time.perf_counter() - begun), 1e-9)


def _swapping(solver: Balanced | Best, problem: GroupedLeastSquares) -> Solver:
    layout = layout_of(problem)
    grid = grid_of(problem, layout)
    if grid is not None and _inverses(layout, grid) <= solver.limit:
        return solver
    for name in () if grid else ("grow", "rounds", "pairs"):
        if getattr(solver, name, None) != getattr(type(solver), name, None):
            given = f"{type(solver).__name__}({name}={getattr(solver, name)!r})"
            raise ValueError(
                f"{given}: {name} does not apply to {problem.pattern}, whose cells are not some rows times some inputs "
                "and cannot be swapped; leave it out"
            )
    return RisingPenalty(time_limit=getattr(solver, "time_limit", None), device=solver.device, dtype=solver.dtype)


def _inverses(layout: Layout, grid: Grid) -> float:
    """The cost of the inverses: kept^3 summed over the bundles, as if all kept the same, over M N^2."""
    bundles, sets = grid.group.shape
    cells = min(layout.quota * layout.groups, int(grid.allowed.sum())) / bundles
    kept = cells * len(grid.inputs) / sets
    return bundles * kept**3 / (len(grid.rows) * len(grid.inputs) ** 2)
