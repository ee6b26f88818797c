"""ADMM for the L1 problems: all neurons at once, first order to find the support, Newton to finish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.problem import Problem, judge
from convexprune.solution import Attempt, Certificate, Status, TracePoint
from convexprune.solvers.l1.splitting import Splitting, splitting
from convexprune.solvers.l1.working_set import WorkingSet
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty

CHECK = 20  # steps between two looks at the certificate
ADAPT = 10  # steps between two changes of rho
SETTLED = 400  # rho stays as it is from here on: ADMM converges for any fixed rho, not for one that keeps moving


@dataclass(frozen=True)
class ADMM:
    """Over-relaxed ADMM with adaptive rho that ends in a sparse and feasible point.

    For a problem with a sparsity pattern, which is not convex: `RisingPenalty` with the same max_iter, time_limit,
    device and dtype; the other options do not apply.

    eps_abs, eps_rel  stop when the certificate has violation <= eps_abs and relative gap <= eps_rel
    max_iter          first-order steps
    time_limit        seconds, or None
    device, dtype     where and in what the first-order steps run; verdicts are always float64
    alpha             over-relaxation, in (0, 2)
    handover          the relative gap and violation at which the finish takes over
    finish            the Newton-type finish, or None to stop at ADMM's own accuracy
    """

    eps_abs: float = 1e-6
    eps_rel: float = 1e-5
    max_iter: int = 5000
    time_limit: float | None = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    alpha: float = 1.7
    handover: float = 0.05
    finish: WorkingSet | None = field(default_factory=WorkingSet)

    def __post_init__(self) -> None:
        for name in ("eps_abs", "eps_rel", "handover"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a finite number > 0")
        if not 0 < self.alpha < 2:
            raise ValueError(f"alpha is {self.alpha}; over-relaxation must be in (0, 2)")
        if self.max_iter < 1:
            raise ValueError(f"max_iter is {self.max_iter}; it must be at least 1")
        if self.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {self.dtype}; the steps run in torch.float32 or torch.float64")

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """Propose a point (M, P) and a witness; `start` is a warm start."""
        if isinstance(problem, SparseLeastSquares):
            return RisingPenalty(
                max_iter=self.max_iter, time_limit=self.time_limit, device=self.device, dtype=self.dtype
            ).solve(problem)
        begun = time.perf_counter()
        deadline = math.inf if self.time_limit is None else begun + self.time_limit
        trivial = _zero_if_feasible(problem)
        if trivial is not None:
            return trivial
        split = splitting(problem, start, self.alpha, torch.device(self.device), self.dtype)
        run = _Run(problem, self._meets, begun)
        handover = self.handover
        for step in range(1, self.max_iter + 1):
            split.step()
            if step % ADAPT == 0 and step <= SETTLED:
                split.balance()
            late = time.perf_counter() > deadline
            if step % CHECK and step < self.max_iter and not late:
                continue
            certificate = run.look(split, step)
            status = self._verdict(problem, certificate)
            if status is None and late:
                status = Status.TIME_LIMIT
            if status is not None:
                return run.attempt(status)
            if self.finish is not None and max(certificate.relative_gap, certificate.violation) < handover:
                if self._finished(problem, split, run, deadline):
                    return run.attempt(Status.CONVERGED)
                handover /= 4
        # badly scaled inputs keep first-order steps far from the optimum; the finish minds them less
        if self.finish is not None and self._finished(problem, split, run, deadline):
            return run.attempt(Status.CONVERGED)
        return run.attempt(Status.MAX_ITER)

    def _verdict(self, problem: Problem, certificate: Certificate) -> Status | None:
        if not math.isfinite(certificate.value):
            return Status.NUMERICAL
        if self._meets(certificate):
            return Status.CONVERGED
        if certificate.bound == math.inf:  # the witness proves it
            return Status.INFEASIBLE
        return None

    def _finished(self, problem: Problem, split: Splitting, run: _Run, deadline: float) -> bool:
        """Hand over to the finish; whether its certificate meets the rule."""
        assert self.finish is not None
        finish = replace(self.finish, eps_abs=self.eps_abs, eps_rel=self.eps_rel, device=self.device)
        offset = time.perf_counter() - run.begun
        finer = finish.refine(problem, split.point.cpu().double(), split.witness, deadline)
        run.adopt(finer, offset)
        return self._meets(run.best_certificate)

    def _meets(self, certificate: Certificate) -> bool:
        return certificate.meets(self.eps_abs, self.eps_rel)


class _Run:
    """What a run has seen: its trace, and the best point by the problem's own verdict."""

    def __init__(self, problem: Problem, meets: Callable[[Certificate], bool], begun: float) -> None:
        self.problem, self.meets, self.begun = problem, meets, begun
        self.trace: list[TracePoint] = []
        self.best: tuple[Tensor, Tensor] | None = None
        self.last: tuple[Tensor, Tensor] | None = None
        self.best_certificate = Certificate(math.inf, -math.inf, math.inf)
        self.steps = 0

    def look(self, split: Splitting, step: int) -> Certificate:
        """Judge the splitting's point now."""
        certificate = judge(self.problem, split.point, split.witness)
        self.trace.append(TracePoint(time.perf_counter() - self.begun, certificate))
        self._keep(split.point, split.witness, certificate)
        self.steps, self.last = step, (split.point, split.witness)
        return certificate

    def adopt(self, attempt: Attempt, offset: float) -> None:
        """Take over what the finish found."""
        self.trace += [TracePoint(offset + p.seconds, p.certificate) for p in attempt.trace]
        self._keep(attempt.x, attempt.witness, judge(self.problem, attempt.x, attempt.witness))

    def _keep(self, x: Tensor, witness: Tensor, certificate: Certificate) -> None:
        def merit(c: Certificate) -> tuple[bool, float]:  # what meets the rule comes before what has a smaller sum
            return not self.meets(c), c.violation + abs(c.relative_gap)

        if self.best is None or merit(certificate) < merit(self.best_certificate):
            self.best, self.best_certificate = (x.clone(), witness.clone()), certificate

    def attempt(self, status: Status) -> Attempt:
        """The best of the run; of an infeasible problem the last, whose witness proves the largest bound."""
        found = self.last if status is Status.INFEASIBLE else self.best
        assert found is not None
        return Attempt(*found, status, self.steps, tuple(self.trace))


def _zero_if_feasible(problem: Problem) -> Attempt | None:
    """The zero point, when it is feasible and nothing is better: an L1 norm cannot be below 0."""
    zero = torch.zeros(problem.shape, dtype=torch.float64)
    if problem.violation(zero) == 0 and problem.value(zero) == 0:
        return Attempt(zero, None, Status.CONVERGED, 0)
    return None
