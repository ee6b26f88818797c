"""Three ways to a good reconstruction: `Fast`, `Balanced` and `Best`, each the parts of this folder put together.

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
    """A good support in about the time of a single sweep over the columns.

    flops   what the ADMM steps may cost: small layers get the full schedule, large ones one that rises faster
    polish  conjugate-gradient steps on the support
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
        sparse = improved_on_support(scaled.grams, scaled.cross, sparse, sparse != 0, self.polish)
        return Attempt(problem.completed(scaled.restored(sparse)), None, status, steps)


@dataclass(frozen=True)
class Balanced:
    """The default: below the error of ADMM alone in about its time.

    grow    how much too large ADMM's support is
    rounds  of swaps after the elimination

    Raises ValueError where these were given and the pattern's cells cannot be swapped.
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
        sparse, steps, _ = RisingPenalty(self.grow, every=2, max_iter=45).descend(problem, scaled)
        search = SwapSearch(rounds=self.rounds, enter=0.03)
        mask, weights, rounds, status = search.improve(problem, scaled, sparse)
        if status is Status.MAX_ITER:
            status = Status.CONVERGED
        cross = scaled.grams64.product(scaled.optimum64)
        weights = improved_on_support(scaled.grams64, cross, weights.cpu().double(), mask.cpu(), 12)
        return Attempt(problem.completed(scaled.restored(weights)), None, status, steps + rounds)


@dataclass(frozen=True)
class Best:
    """The lowest error that is known how to reach in some ten times ADMM's time.

    grow        how much too large ADMM's support is
    rounds      of swaps after the elimination
    time_limit  seconds for both, or None

    Raises ValueError where the first two were given and the pattern's cells cannot be swapped.
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
        sparse, steps, _ = RisingPenalty(self.grow, time_limit=self.time_limit).descend(problem, scaled)
        left = None if self.time_limit is None else max(self.time_limit - (time.perf_counter() - begun), 1e-9)
        search = SwapSearch(rounds=self.rounds, time_limit=left)
        mask, _, rounds, status = search.improve(problem, scaled, sparse)
        return Attempt(problem.completed(refitted(problem, mask.cpu())), None, status, steps + rounds)


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
