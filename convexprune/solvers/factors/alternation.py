"""Alternation between the two factors of a layer, W ~ A B, while their numbers of nonzeros fall.

    A <- sparse least squares beside B    (Gram matrix B G B^T: `Fast`, in the end `Balanced`)
    B <- sparse least squares beside A    (`half`: ADMM, the Hessian being (A^T A) x G)

Both begin dense, at A = I + noise and B = A^-1 W for M <= N, and at B = I + noise and A = W B^-1 for M > N: there the
error is zero, and I itself would be a point that the alternation leaves slowly. The counts fall geometrically over many
rounds of few steps, to k_A and k_B; then some rounds of more steps follow. The share of the nonzeros in the square
factor is one of a few that are tried. The best point of all is returned, and a single sparse matrix beside I is one
of them: the result is never worse than the single matrix, less the ones of I.
Source: the alternation between two factors, each by ADMM, is Boza, Macko, ICLR 2025; their metric is the diagonal of
G, here it is G. The schedule of counts is that of gradual pruning, Zhu, Gupta 2017, in the geometric mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import FactoredLeastSquares
from convexprune.options import check_options, number, whole
from convexprune.problem import Solver
from convexprune.solution import Attempt, Status
from convexprune.solvers.factors.half import Metric, right_half
from convexprune.solvers.least_squares.on_support import refitted
from convexprune.solvers.least_squares.presets import Balanced, Fast

NOISE = 0.05  # the standard deviation of what is added to I
SETTLED = 0.8  # of the falling rounds: then the counts are the last
QUICK = 5  # ADMM steps of a falling round

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Alternation:
    """Two sparse factors by alternation. On a 64 x 576 layer each of the `shares` takes 5 s, `Best` 1 s.

    Args:
        shares: Of the nonzeros, those in the square factor (the smaller one); each is tried, and the best kept.
        falling: Rounds in which the numbers of nonzeros fall.
        rounds: Rounds after that, at the final numbers.
        steps: ADMM steps in each of these.
        seed: Of the noise at the start.
        time_limit: Seconds, or None for no limit; the best point so far is returned.
        dtype: Precision of ADMM, torch.float32 or torch.float64; the least squares is float64.

    Raises:
        ValueError: For an option out of its range; TypeError for one of another type.

    Example:
        >>> import torch, convexprune as cp
        >>> weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
        >>> problem = cp.SparseFactors(cp.Layer.from_moments(weight, torch.eye(12)), keep=0.5)
        >>> solution = cp.solve(problem, cp.Alternation(shares=(0.2,)))
        >>> left, right = problem.factors(solution.x)
        >>> left.shape, right.shape, solution.certificate.violation
        (torch.Size([6, 6]), torch.Size([6, 12]), 0.0)
    """

    takes: ClassVar[type] = FactoredLeastSquares
    starts: ClassVar[bool] = False

    shares: tuple[float, ...] = (0.15, 0.22)
    falling: int = 100
    rounds: int = 12
    steps: int = 60
    seed: int = 0
    time_limit: float | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        check_options(self, shares=_shares, falling=whole(1), rounds=whole(0), steps=whole(1))

    def solve(self, problem: FactoredLeastSquares, start: Tensor | None = None) -> Attempt:
        """The start is not used."""
        deadline = math.inf if self.time_limit is None else time.perf_counter() + self.time_limit
        best = problem.joined(*_nothing(problem))
        least, rounds, status = problem.value(best), 0, Status.CONVERGED
        for pair in self._pairs(problem):
            rounds += 1
            if pair is not None and (value := problem.value(x := problem.joined(*pair))) < least:
                best, least = x, value
            if time.perf_counter() > deadline:
                status = Status.TIME_LIMIT
                break
        return Attempt(best, None, status, rounds)

    def _pairs(self, problem: FactoredLeastSquares) -> Iterator[Pair | None]:
        """First the single matrix; then of each round its pair, or None while it has more nonzeros than the count."""
        yield from _single(problem)
        if problem.count < 2:  # one nonzero is no product
            return
        metric = Metric.of(problem.gram, problem.cross, self.dtype)
        for share in dict.fromkeys(self._counts(problem, share) for share in self.shares):
            yield from self._alternated(problem, metric, share)

    def _counts(self, problem: FactoredLeastSquares, share: float) -> tuple[int, int]:
        """Of A and B, no more than they have entries: what one has no room for goes to the other."""
        (out, into), width, count = problem.target.shape, problem.width, problem.count
        square, other = (out * width, width * into) if out <= into else (width * into, out * width)
        few = min(max(round(share * count), count - other, 1), square)
        rest = min(count - few, other)
        return (few, rest) if out <= into else (rest, few)

    def _alternated(
        self, problem: FactoredLeastSquares, metric: Metric, counts: tuple[int, int]
    ) -> Iterator[Pair | None]:
        left, right = _begun(problem, metric, self.seed)
        sizes = left.numel(), right.numel()
        for turn in range(1, self.falling + self.rounds + 1):
            way = min(1.0, turn / max(SETTLED * self.falling, 1))
            few, many = (round(size ** (1 - way) * least**way) for size, least in zip(sizes, counts, strict=True))
            last = turn > self.falling
            left = _left_half(problem, metric, right, few, Balanced() if last else Fast())
            left, right = right_half(metric, left, right, many, self.steps if last else QUICK)
            yield (left, right / metric.scale) if way == 1.0 else None


def _shares(name: str, value: Any) -> None:
    """One number in (0, 1) or several."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is {value!r}; it must be a tuple of numbers, such as (0.15, 0.22)")
    if not value:
        raise ValueError(f"{name} is {value!r}; it must have at least one entry")
    for at, entry in enumerate(value):
        number(0, 1, least_open=True, most_open=True)(f"{name}[{at}]", entry)


def _left_half(problem: FactoredLeastSquares, metric: Metric, right: Tensor, count: int, solver: Solver) -> Tensor:
    """(M, r): the best A with so many nonzeros beside B (r, N) in the metric's coordinates."""
    half = problem.left(right / metric.scale, min(count, right.shape[0] * len(problem.target)))
    if count >= half.target.numel():
        return refitted(half, torch.ones_like(half.target, dtype=torch.bool))
    return solver.solve(half).x


def _begun(problem: FactoredLeastSquares, metric: Metric, seed: int) -> Pair:
    """A dense A (M, r) and B (r, N), in the metric's coordinates, whose product is about W."""
    target, width = problem.target * metric.scale, problem.width
    out, into = target.shape
    short = min(out, into)
    noise = torch.Generator().manual_seed(seed)
    square = NOISE * torch.randn(short, max(width, short), generator=noise, dtype=torch.float64)
    square.diagonal().add_(1.0)
    if out <= into:
        square = square[:, :width]
        return square, torch.linalg.lstsq(square, target).solution
    square = square[:, :width].T
    return torch.linalg.lstsq(square.T, target.T).solution.T, square


def _single(problem: FactoredLeastSquares) -> Iterator[Pair]:
    """A single sparse matrix beside I, where there is room for it."""
    (out, into), count = problem.target.shape, problem.count
    short = min(out, into)
    if problem.width < short or count <= short:
        return
    half = problem.single(count - short)
    weights = Balanced().solve(half).x[:, :into]
    left, right = _nothing(problem)
    if out <= into:
        left[:, :short], right[:short] = torch.eye(short), weights
    else:
        left[:, :short], right[:short] = weights, torch.eye(short)
    yield left, right


def _nothing(problem: FactoredLeastSquares) -> Pair:
    out, into = problem.target.shape
    return torch.zeros(out, problem.width, dtype=torch.float64), torch.zeros(problem.width, into, dtype=torch.float64)
