"""A working-set method: solve on the columns and rows that matter, look at all of them, add those that were missed.

Each neuron keeps a few columns (weights that may be nonzero) and a few inequality rows (samples that may be tight). The
restricted problem is solved to the last digits by `interior_point`, and the full multipliers X^T Z and outputs X x^T
say what to add.
Source: the idea is that of Johnson, Guestrin, ICML 2015 (Blitz) and Massias et al., ICML 2018 (celer).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from convexprune.forms import BallProblem, LassoProblem, declared
from convexprune.options import check_options, number, whole
from convexprune.problem import Problem, judge
from convexprune.solution import Attempt, Certificate, Status, TracePoint
from convexprune.solvers.l1.working_set_state import BallView, LassoView, Limits

FIRST, LATER = 0.3, 1e-2  # relative gap at which the first and the later interior points start
COLD = 10.0, 100.0, 1.0  # the same, one after the other, for those that start from nothing that is near the optimum
DONE = Status.CONVERGED, Status.TIME_LIMIT


@dataclass(frozen=True)
class WorkingSet:
    """The Newton-type finish of `ADMM`, and a solver in its own right.

    eps_abs, eps_rel  stop when the certificate has violation <= eps_abs and relative gap <= eps_rel; the larger
                      eps_rel, the fewer Newton steps, and the further inside the constraints the point stays
    max_iter          Newton steps for each restricted problem
    max_rounds        how often columns and rows may be added
    time_limit        seconds, or None
    margin            how far inside the constraints to stay, relative to the output's size: rounding the weights to
                      float32 then leaves them feasible
                      (it costs about as much in the gap: for eps_rel below 1e-6 set it to 0); for a larger
                      eps_rel it grows to 0.4 of that
    memory            bytes that the restricted problems may take; more raises MemoryError, but once there is a point
                      it ends the run with that point, and the note says so
    device            where the batches are solved: "cpu", "cuda", ... points and multipliers always in float64
    """

    takes: ClassVar[tuple[type, ...]] = (BallProblem, LassoProblem)

    eps_abs: float = 1e-6
    eps_rel: float = 1e-6
    max_iter: int = 60
    max_rounds: int = 8
    time_limit: float | None = None
    margin: float = 3e-7
    memory: float = 4e9
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_options(self, max_rounds=whole(1), margin=number(0))

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """Solve from `start` (M, P), by default the dense layer: all its columns are then in the first working set."""
        return self.refine(problem, problem.dense if start is None else start, None)

    def refine(
        self, problem: Any, point: Tensor, witness: Tensor | None, deadline: float = math.inf,
    ) -> Attempt:  # fmt: skip
        """Finish from a point (M, P) and a dual witness that another method has found."""
        if self.time_limit is not None:
            deadline = min(deadline, time.perf_counter() + self.time_limit)
        limits = Limits(self.eps_abs, self.eps_rel, self.max_iter, self.margin, self.memory, torch.device(self.device))
        if BallProblem in declared(problem):
            return self._solved(problem, BallView(problem, point, witness, limits), deadline, witness is None)
        return self._solved(problem, LassoView(problem, point, limits), deadline, False)

    def _solved(self, problem: Problem, view: BallView | LassoView, deadline: float, cold: bool) -> Attempt:
        """Grow the working sets; if that leads nowhere and it may begin anew, take everything, then no margin."""
        run = _Run(view, time.perf_counter())
        status = self._rounds(problem, run, FIRST, deadline)
        if status not in DONE and view.tighten():
            status = self._rounds(problem, run, FIRST, deadline)
        for gap in COLD if cold else ():
            if status in DONE or not view.whole():
                break
            status = self._rounds(problem, run, gap, deadline)
            if status not in DONE and view.press():
                status = self._rounds(problem, run, LATER, deadline)
        return Attempt(*run.best, status, run.steps, tuple(run.trace), run.note)

    def _rounds(self, problem: Problem, run: _Run, gap: float, deadline: float) -> Status:
        view = run.view
        for _ in range(self.max_rounds):
            try:
                run.steps += view.solve_restricted(gap, deadline)
            except MemoryError as error:
                if not run.trace:
                    raise
                run.note = f"the working sets could not grow: {error}"
                return Status.MAX_ITER
            certificate = judge(problem, view.point, view.witness)
            meets = certificate.meets(self.eps_abs, self.eps_rel)
            run.take(certificate, meets)
            if meets:
                return Status.CONVERGED
            if time.perf_counter() > deadline:
                return Status.TIME_LIMIT
            if not (view.widen() if view.lost else view.grow()):
                return Status.NUMERICAL
            gap = LATER
        return Status.MAX_ITER


class _Run:
    """The record of a run, and its best point."""

    def __init__(self, view: BallView | LassoView, begun: float) -> None:
        self.view, self.begun, self.steps = view, begun, 0
        self.trace: list[TracePoint] = []
        self.note = ""
        self.best, self.merit = (view.point, view.witness), math.inf

    def take(self, certificate: Certificate, meets: bool) -> None:
        """The view's point now, with its certificate."""
        self.trace.append(TracePoint(time.perf_counter() - self.begun, certificate))
        merit = -math.inf if meets else _merit(certificate)
        if merit <= self.merit:
            self.best, self.merit = (self.view.point, self.view.witness), merit


def _merit(certificate: Certificate) -> float:
    return max(certificate.violation, 0.0) + max(certificate.relative_gap, 0.0)
