"""A better lower bound for a reconstruction: another solver's point with a witness of the perspective relaxation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import torch
from torch import Tensor

from convexprune.forms import PerspectiveProblem, adapted
from convexprune.options import check_options, whole
from convexprune.problem import Problem, Solver, can_start, check_solver
from convexprune.solution import Attempt
from convexprune.solvers.least_squares.perspective import Relaxation, centred
from convexprune.solvers.least_squares.spd_inverse import NotDefinite

SINGULAR: Final = "no better bound: the Gram matrix is singular; use layer.damped(1e-6) or so"


@dataclass(frozen=True)
class Bounded:
    """Leaves the inner solver's point alone and improves its witness (v, d).

    In turns: ADMM solves the relaxation for a diagonal d, then d moves to where the relaxation's gradient, with a
    barrier that keeps G - diag(d) positive definite, is largest; `rounds` times, with `steps` of ADMM each. Where G is
    singular no d > 0 exists and the witness is the inner solver's, as the note then says: damp the layer.
    """

    takes: ClassVar[type] = PerspectiveProblem
    inner: Solver
    rounds: int = 3
    steps: int = 40

    def __post_init__(self) -> None:
        check_solver(self.inner)
        check_options(self, rounds=whole(0), steps=whole(1))

    @property
    def starts(self) -> bool:
        """Whether the inner solver can begin from a start."""
        return can_start(self.inner)

    def adapted(self, problem: Problem) -> Bounded:
        """With the inner solver as it will run."""
        return replace(self, inner=adapted(self.inner, problem))

    def solve(self, problem: PerspectiveProblem, start: Tensor | None = None) -> Attempt:
        """The inner solver's attempt with a witness of its own."""
        attempt = self.inner.solve(problem, start)
        diagonal = problem.gram.diagonal()
        live = diagonal > 0
        begun = problem.diagonal
        if not bool((begun[live] > 0).all()) or not bool(live.any()):
            return replace(attempt, note=f"{attempt.note}; {SINGULAR}" if attempt.note else SINGULAR)
        scale = torch.where(live, diagonal, 1.0).sqrt()
        d = torch.where(live, 0.5 * begun / scale.square(), 0.5)
        relaxation = Relaxation.of(problem, scale, 2 * float(d.mean()))
        best, bound = attempt.witness, problem.lower_bound(attempt.witness)
        for turn in range(self.rounds + 1):
            w, gradient = relaxation.solve(d, self.steps)
            witness = (w / scale, torch.where(live, d * scale.square(), 0.0))
            found = problem.lower_bound(witness)
            if found > bound:
                best, bound = witness, found
            if turn == self.rounds or not float(gradient @ d) > 0:
                break
            try:
                d = centred(relaxation.gram, gradient, d, 0.5**turn * float(gradient @ d) / len(d))
            except NotDefinite:  # too close to the edge for float64: keep the best bound so far
                break
        return replace(attempt, witness=best)
