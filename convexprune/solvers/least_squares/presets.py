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
from convexprune.solvers.least_squares.on_support import improved_on_support, refitted
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty
from convexprune.solvers.least_squares.scaling import Scaled, in_float64_if_lost
from convexprune.solvers.least_squares.swap_search import SwapSearch

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
        sparse, steps, _ = RisingPenalty(self.grow, every=2, max_iter=45).descend(problem, scaled)
        search = SwapSearch(rounds=self.rounds, enter=0.03, pairs=4)
        mask, weights, rounds, status = search.improve(problem, scaled, sparse)
        if status is Status.MAX_ITER:
            status = Status.CONVERGED
        cross = scaled.grams64.product(scaled.optimum64)
        weights = improved_on_support(scaled.grams64, cross, weights.cpu().double(), mask.cpu(), 12)
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

    grow: float = 1.15
    rounds: int = 12
    time_limit: float | None = None
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
        begun = time.perf_counter()
        scaled = Scaled.of(problem, self.device, self.dtype)
        scaled.check_inverses()
        sparse, steps, _ = RisingPenalty(self.grow, time_limit=self.time_limit).descend(problem, scaled)
        left = None if self.time_limit is None else max(self.time_limit - (time.perf_counter() - begun), 1e-9)
        search = SwapSearch(rounds=self.rounds, time_limit=left)
        mask, _, rounds, status = search.improve(problem, scaled, sparse)
        x = problem.completed(refitted(problem, mask.cpu()))
        return Attempt(x, None, status, steps + rounds, note=scaled.note)


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
