"""A better lower bound for a reconstruction: another solver's point with a witness of the perspective relaxation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from convexprune.problem import PerspectiveProblem, Solver
from convexprune.solution import Attempt


@dataclass(frozen=True)
class Bounded:
    """Leaves the inner solver's point alone and improves its witness.

    The bound is concave in the witness v, and the minimiser w(v) of its inner problem points uphill: v <- v + t (w - v)
    with the t among 1, 1/2, 1/4, ... that raises the bound, up to `steps` times.
    """

    takes: ClassVar[type] = PerspectiveProblem
    inner: Solver
    steps: int = 50

    def solve(self, problem: PerspectiveProblem, start: Tensor | None = None) -> Attempt:
        """The inner solver's attempt with a witness of its own."""
        attempt = self.inner.solve(problem, start)
        width = problem.target.shape[1]
        starts = [problem.target, attempt.x.detach().cpu().double()[:, :width]]
        best = max(starts, key=problem.lower_bound)
        bound = problem.lower_bound(best)
        for _ in range(self.steps):
            towards = problem.perspective_point(best) - best
            for halving in range(12):
                trial = best + 0.5**halving * towards
                found = problem.lower_bound(trial)
                if found > bound:
                    best, bound = trial, found
                    break
            else:
                break
        return replace(attempt, witness=best)
