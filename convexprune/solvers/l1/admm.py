"""ADMM for the L1 problems: all neurons at once, first order to find the support, Newton to finish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from convexprune.forms import BallProblem, GroupedLeastSquares, LassoProblem, declared
from convexprune.options import between, check_options, positive
from convexprune.problem import Problem, Solver, judge
from convexprune.solution import Attempt, Certificate, Status, TracePoint
from convexprune.solvers.l1.splitting import Splitting, splitting
from convexprune.solvers.l1.working_set import WorkingSet
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty
from convexprune.solvers.least_squares.spd_inverse import NotDefinite

CHECK = 20  # steps between two looks at the certificate
ADAPT = 10  # steps between two changes of rho
SETTLED = 400  # rho stays as it is from here on: ADMM converges for any fixed rho, not for one that keeps moving

SHARED: Final = ("max_iter", "time_limit", "device", "dtype")  # options that RisingPenalty has as well
GIVEN: Final = ("eps_abs", "eps_rel", "device")  # options of the finish that are ADMM's own


@dataclass(frozen=True)
class ADMM:
    """Over-relaxed ADMM with adaptive rho that ends in a sparse and feasible point.

    For a problem with a sparsity pattern, which is not convex, it is `RisingPenalty` with the same max_iter,
    time_limit, device and dtype.

    Args:
        eps_abs: The largest violation with which the run has converged.
        eps_rel: The largest relative gap with which the run has converged: 1e-2 or 1e-3 stops early, with a sparse
            point inside the constraints that is proven to be so near the optimum.
        max_iter: Largest number of first-order steps, in each precision.
        time_limit: Seconds, or None for no limit.
        device: Where the first-order steps run: "cpu", "cuda", ...
        dtype: Precision of the first-order steps. If a run in torch.float32 ends MAX_ITER or NUMERICAL, it goes on in
            torch.float64 from its best point, and the note says so. Verdicts are always float64.
        alpha: Over-relaxation, in (0, 2).
        handover: The relative gap and violation at which the finish takes over; it also does where the steps stall.
        finish: The Newton-type finish, which runs with ADMM's eps_abs, eps_rel and device; None stops at ADMM's own
            accuracy. If it needs more than its memory, ADMM's own point stays, and the note says so.

    Raises:
        ValueError: For an option out of its range, and for one that does not apply: on a problem with a sparsity
            pattern all but the four above.
        TypeError: For an option of another type.

    Source:
        Aghasi, Abdi, Romberg, SIMODS 2020, section 4; Boyd et al., Foundations and Trends in Machine Learning 2011.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> solution = cp.solve(cp.NetTrim(layer, epsilon=0.1), cp.ADMM(eps_rel=1e-4))
        >>> solution.status.name, solution.certificate.violation <= 1e-6
        ('CONVERGED', True)
    """

    takes: ClassVar[tuple[type, ...]] = (BallProblem, LassoProblem, GroupedLeastSquares)

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
        check_options(self, alpha=between(0, 2), handover=positive)
        self._check_finish()

    def adapted(self, problem: Problem) -> Solver:
        """With the finish as it will run; `RisingPenalty` for a problem with a sparsity pattern."""
        if GroupedLeastSquares in declared(problem):
            return self._rising()
        if self.finish is None:
            return self
        return replace(self, finish=replace(self.finish, **{name: getattr(self, name) for name in GIVEN}))

    def solve(self, problem: Any, start: Tensor | None = None) -> Attempt:
        """Propose a point (M, P) and a witness; `start` is a warm start."""
        if GroupedLeastSquares in declared(problem):
            return self._rising().solve(problem, start)
        begun = time.perf_counter()
        deadline = math.inf if self.time_limit is None else begun + self.time_limit
        trivial = _zero_if_feasible(problem) if BallProblem in declared(problem) else None
        if trivial is not None:
            return trivial
        run = _Run(problem, self._meets, begun)
        status = self._descend(problem, start, run, deadline, self.dtype)
        if status in (Status.MAX_ITER, Status.NUMERICAL) and self.dtype is torch.float32:
            run.notes.append(f"float32 ended {status.name}, float64 went on from its best point")
            status = self._descend(problem, run.found, run, deadline, torch.float64)
        return run.attempt(status)

    def _descend(
        self, problem: Any, start: Tensor | None, run: _Run, deadline: float, dtype: torch.dtype
    ) -> Status:  # fmt: skip
        """First-order steps in one precision, and the finish when they are close; why they stopped."""
        try:
            split = splitting(problem, start, self.alpha, torch.device(self.device), dtype)
        except NotDefinite:
            return Status.NUMERICAL
        handover, before, patience = self.handover, run.steps, _Patience()
        for step in range(1, self.max_iter + 1):
            split.step()
            if step % ADAPT == 0 and step <= SETTLED:
                split.balance()
            late = time.perf_counter() > deadline
            if step % CHECK and step < self.max_iter and not late:
                continue
            certificate = run.look(split, before + step)
            status = self._verdict(problem, certificate)
            if status is not None or late:
                return status or Status.TIME_LIMIT
            distance = max(certificate.relative_gap, certificate.violation)
            stalled = patience.ends(step, distance)
            if distance < handover or stalled:
                if self._finished(problem, run, deadline, split, stalled):
                    return Status.CONVERGED
                handover = min(handover, distance) / 4
        return Status.CONVERGED if self._finished(problem, run, deadline, split, stalled=True) else Status.MAX_ITER

    def _rising(self) -> RisingPenalty:
        for name, default in vars(ADMM()).items():
            if name not in SHARED and getattr(self, name) != default:
                raise ValueError(
                    f"ADMM({name}={getattr(self, name)!r}): {name} does not apply to a problem with a sparsity "
                    "pattern, where ADMM is RisingPenalty; leave it out, or name RisingPenalty with its own options"
                )
        return RisingPenalty(**{name: getattr(self, name) for name in SHARED})

    def _check_finish(self) -> None:
        if self.finish is None:
            if self.handover != ADMM.handover:
                raise ValueError(f"handover is {self.handover}, but there is no finish to hand over to; leave it out")
            return
        if not isinstance(self.finish, WorkingSet):
            raise TypeError(f"finish is {self.finish!r}; give a WorkingSet(), or None")
        for name in GIVEN:
            own = getattr(self.finish, name)
            if own not in (getattr(WorkingSet, name), getattr(self, name)):
                raise ValueError(f"finish has {name}={own!r}, but ADMM's {name} counts: ADMM({name}={own!r})")

    def _verdict(self, problem: Problem, certificate: Certificate) -> Status | None:
        if not math.isfinite(certificate.value):
            return Status.NUMERICAL
        if self._meets(certificate):
            return Status.CONVERGED
        if certificate.bound == math.inf:  # the witness proves it
            return Status.INFEASIBLE
        return None

    def _finished(self, problem: Problem, run: _Run, deadline: float, split: Splitting, stalled: bool) -> bool:
        """Hand over to the finish; whether its certificate meets the rule. One that does not fit is not asked again.

        Where the steps have stalled, as with inputs of unlike scales, it also begins once from the dense layer.
        """
        if self._refined(problem, run, deadline, split.point.cpu().double(), split.witness):
            return True
        if not stalled or run.anew:
            return False
        run.anew = True
        return self._refined(problem, run, deadline, problem.dense, None)

    def _refined(self, problem: Problem, run: _Run, deadline: float, point: Tensor, witness: Tensor | None) -> bool:
        if self.finish is None or run.crowded:
            return False
        finish = replace(self.finish, **{name: getattr(self, name) for name in GIVEN})
        offset = time.perf_counter() - run.begun
        try:
            finer = finish.refine(problem, point, witness, deadline)
        except MemoryError as error:
            run.crowded = True
            run.notes.append(f"the finish did not run: {error}")
            return False
        if finer.note:
            run.crowded = True
            run.notes.append(finer.note)
        run.adopt(finer, offset)
        return self._meets(run.best_certificate)

    def _meets(self, certificate: Certificate) -> bool:
        return certificate.meets(self.eps_abs, self.eps_rel)


class _Patience:
    """Says when first-order steps have stalled: a distance that has not halved while their number doubled."""

    def __init__(self) -> None:
        self.next, self.least, self.before = SETTLED, math.inf, math.inf

    def ends(self, step: int, distance: float) -> bool:
        """To be asked at every look."""
        self.least = min(self.least, distance)
        if step < self.next:
            return False
        stalled = self.least > self.before / 2
        self.before, self.next = self.least, 2 * self.next
        return stalled


class _Run:
    """The record of a run: its trace, and the best point by the problem's own verdict."""

    def __init__(self, problem: Problem, meets: Callable[[Certificate], bool], begun: float) -> None:
        self.problem, self.meets, self.begun = problem, meets, begun
        self.trace: list[TracePoint] = []
        self.best: tuple[Tensor, Tensor] | None = None
        self.last: tuple[Tensor, Tensor] | None = None
        self.best_certificate = Certificate(math.inf, -math.inf, math.inf)
        self.steps = 0
        self.anew = False  # the finish has begun from the dense layer
        self.crowded = False  # the finish needs more memory than it may take
        self.notes: list[str] = []

    @property
    def found(self) -> Tensor | None:
        """The best point so far; None where none is finite."""
        return None if self.best is None or not bool(torch.isfinite(self.best[0]).all()) else self.best[0]

    def look(self, split: Splitting, step: int) -> Certificate:
        """Judge the splitting's point now."""
        certificate = judge(self.problem, split.point, split.witness)
        self.trace.append(TracePoint(time.perf_counter() - self.begun, certificate))
        self._keep(split.point, split.witness, certificate)
        self.steps, self.last = step, (split.point, split.witness)
        return certificate

    def adopt(self, attempt: Attempt, offset: float) -> None:
        """Take over the finish's point and trace."""
        self.trace += [TracePoint(offset + p.seconds, p.certificate) for p in attempt.trace]
        self._keep(attempt.x, attempt.witness, judge(self.problem, attempt.x, attempt.witness))

    def _keep(self, x: Tensor, witness: Tensor, certificate: Certificate) -> None:
        def merit(
            c: Certificate,
        ) -> tuple[bool, float]:  # points that meet the rule come first
            return not self.meets(c), c.violation + abs(c.relative_gap) if math.isfinite(c.value) else math.inf

        if self.best is None or merit(certificate) < merit(self.best_certificate):
            self.best, self.best_certificate = (x.clone(), witness.clone()), certificate

    def attempt(self, status: Status) -> Attempt:
        """The best of the run; of an infeasible problem the last, whose witness proves the largest bound."""
        found = self.last if status is Status.INFEASIBLE else self.best
        note = "; ".join(self.notes)
        if found is None:
            return Attempt(self.problem.dense, None, status, self.steps, note=note)
        return Attempt(*found, status, self.steps, tuple(self.trace), note)


def _zero_if_feasible(problem: Problem) -> Attempt | None:
    """The zero point, when it is feasible and nothing is better: an L1 norm cannot be below 0."""
    zero = torch.zeros(problem.shape, dtype=torch.float64)
    if problem.violation(zero) == 0 and problem.value(zero) == 0:
        return Attempt(zero, None, Status.CONVERGED, 0)
    return None
