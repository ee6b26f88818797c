"""Three presets for a reconstruction: `Fast`, `Balanced` and `Best`. Each combines solvers of this folder.

Fast      a short ADMM, and conjugate gradients on its support
Balanced  ADMM to a support somewhat too large, exact elimination down to the pattern, a few rounds of swaps
Best      the same with the full ADMM, swaps until they no longer pay, and exact least squares

Where the cells of a pattern cannot be swapped, because they are not some rows times some inputs, the last two are
`RisingPenalty`: the full ADMM and exact least squares.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares
from convexprune.options import check_options, number, positive, whole
from convexprune.problem import Solver
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.elimination import grid_of, layout_of
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty
from convexprune.solvers.least_squares.scaling import Scaled, in_float64_if_lost
from convexprune.solvers.least_squares.swap_search import SwapSearch

ENTER, PAIRS = 0.03, 4  # of the cells, in a round of many; rounds of pairs
SHORT = 14  # ADMM steps in which a quickly rising penalty settles


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

    flops: float = 5e9
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
        every = min(most // SHORT, 3)
        rises = (1.3, 1.2, 1.1) if every == 3 else (1.3, 1.3, 1.2)
        sparse, steps, status = RisingPenalty(every=every, rises=rises, max_iter=most).descend(problem, scaled)
        weights = scaled.refined(sparse, sparse != 0, self.polish)
        return Attempt(problem.completed(scaled.restored(weights)), None, status, steps)


@dataclass(frozen=True)
class Balanced:
    """The default: a lower error than ADMM alone, in about the same time.

    Args:
        grow: Ratio of ADMM's support size to the pattern's count; the elimination removes the rest.
        rounds: Number of rounds of swaps after the elimination.
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
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self, grow=number(1), rounds=whole(0))

    def adapted(self, problem: Any) -> Solver:
        """Itself, or `RisingPenalty` where the pattern's cells cannot be swapped."""
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
    """The preset with the lowest error; it takes about ten times as long as ADMM.

    Args:
        grow: Ratio of ADMM's support size to the pattern's count; the elimination removes the rest.
        rounds: Largest number of rounds of swaps after the elimination.
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
    rounds: int = 4
    pairs: int = 12
    time_limit: float | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self, grow=number(1), rounds=whole(0), pairs=whole(0))

    def adapted(self, problem: Any) -> Solver:
        """Itself, or `RisingPenalty` where the pattern's cells cannot be swapped."""
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
        search = SwapSearch(rounds=self.rounds, enter=ENTER, pairs=self.pairs, time_limit=_left(self.time_limit, begun))
        begin = scaled.taken(first.x[:, : scaled.dense.shape[1]])
        mask, weights, rounds, status = search.improve(problem, scaled, begin)
        x = problem.completed(scaled.fitted(problem, weights, mask))
        if problem.value(first.x) < problem.value(x):
            x = first.x
        return Attempt(x, None, status, first.iterations + rounds, note=scaled.note)


def _left(time_limit: float | None, begun: float) -> float | None:
    return None if time_limit is None else max(time_limit - (time.perf_counter() - begun), 1e-9)


def _swapping(solver: Balanced | Best, problem: GroupedLeastSquares) -> Solver:
    if grid_of(problem, layout_of(problem)) is not None:
        return solver
    for name in ("grow", "rounds"):
        if getattr(solver, name) != getattr(type(solver), name):
            given = f"{type(solver).__name__}({name}={getattr(solver, name)!r})"
            raise ValueError(
                f"{given}: {name} does not apply to {problem.pattern}, whose cells are not some rows times some inputs "
                "and cannot be swapped; leave it out"
            )
    return RisingPenalty(time_limit=getattr(solver, "time_limit", None), device=solver.device, dtype=solver.dtype)
