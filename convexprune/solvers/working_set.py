"""A working-set method: solve on the columns and rows that matter, look at all of them, add those that were missed.

Each neuron keeps a few columns (weights that may be nonzero) and a few inequality rows (samples that may be tight). The
restricted problem is solved to the last digits by `interior_point`, and the full multipliers X^T Z and outputs X x^T say
what to add.
Source: the idea is that of Johnson, Guestrin, ICML 2015 (Blitz) and Massias et al., ICML 2018 (celer).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.problem import BallProblem, LassoProblem, Problem, judge
from convexprune.solution import Attempt, Certificate, Status, TracePoint
from convexprune.solvers.interior_point import Bucket, Coupling, interior_point
from convexprune.solvers.restricted import buckets_of, restrict_ball, restrict_lasso

INNER = 1e-10  # relative gap of a settled restricted problem: zeros and nonzeros are then told apart at sight
OUTER = 1e-3  # relative gap of the first, whose only business is to show which columns and rows were missed
LOOSE,TIGHT,LR=0.05,1e-9,0.01
FIRST = 0.3  # relative gap at which the first interior point starts; later ones start at OUTER


@dataclass(frozen=True)
class WorkingSet:
    """The Newton-type finish of `ADMM`, and a solver in its own right.

    eps_abs, eps_rel  stop when the certificate has violation <= eps_abs and relative gap <= eps_rel
    max_iter          Newton steps for each restricted problem
    max_rounds        how often columns and rows may be added
    time_limit        seconds, or None
    margin            how far inside the constraints to stay, relative to the output's size: rounding the weights to
                      float32 then leaves them feasible
    memory            bytes that the restricted problems may take; more raises MemoryError
    device            where the batches are solved: "cpu", "cuda", ... always in float64
    """

    eps_abs: float = 1e-6
    eps_rel: float = 1e-6
    max_iter: int = 60
    max_rounds: int = 12
    time_limit: float | None = None
    margin: float = 3e-7
    memory: float = 4e9
    device: str = "cpu"

    def solve(self, problem: Problem, start: Tensor | None = None) -> Attempt:
        """Solve from `start` (M, P), by default the dense layer: all its columns are then in the first working set."""
        return self.refine(problem, problem.dense if start is None else start, None)

    def refine(
        self, problem: Problem, point: Tensor, witness: Tensor | None, deadline: float = math.inf,
    ) -> Attempt:  # fmt: skip
        """Finish from a point (M, P) and a dual witness that another method has found."""
        if self.time_limit is not None:
            deadline = min(deadline, time.perf_counter() + self.time_limit)
        if isinstance(problem, BallProblem):
            view: BallView | LassoView = BallView(problem, point, witness, self)
        elif isinstance(problem, LassoProblem):
            view = LassoView(problem, point, self)
        else:
            raise TypeError(f"WorkingSet takes L1 problems over a ball or a lasso, not {type(problem).__name__}")
        return self._rounds(problem, view, deadline)

    def _rounds(self, problem: Problem, view: BallView | LassoView, deadline: float) -> Attempt:
        begun, steps = time.perf_counter(), 0
        trace: list[TracePoint] = []
        best = Attempt(view.point, view.witness, Status.MAX_ITER, 0)
        best_certificate: Certificate | None = None
        status = Status.MAX_ITER
        for count in range(self.max_rounds):
            steps += view.solve_restricted(*((FIRST, OUTER) if count == 0 else (OUTER, INNER)), deadline)
            certificate = judge(problem, view.point, view.witness)
            trace.append(TracePoint(time.perf_counter() - begun, certificate))
            if best_certificate is None or _merit(certificate) <= _merit(best_certificate):
                best, best_certificate = Attempt(view.point, view.witness, status, steps), certificate
            if certificate.relative_gap <= self.eps_rel and certificate.violation <= self.eps_abs:
                status = Status.CONVERGED
                break
            if time.perf_counter() > deadline:
                status = Status.TIME_LIMIT
                break
            if not view.grow(LOOSE if count == 0 else 1e-9) and count > 0:
                status = Status.NUMERICAL
                break
        return Attempt(best.x, best.witness, status, steps, tuple(trace))


class LassoView:
    """The working sets of a lasso: columns only, the price of the quadratic fixed at 1 / lam."""

    def __init__(self, problem: LassoProblem, point: Tensor, options: WorkingSet) -> None:
        self.problem, self.options = problem, options
        self.device = torch.device(options.device)
        self.gram, self.cross = problem.gram.to(self.device), problem.cross.to(self.device)
        self.point = point.detach().to(self.device, torch.float64)
        self.columns = (self.point != 0) | (self._slope().abs() >= 0.9 * problem.lam)

    @property
    def witness(self) -> Tensor:
        """The point itself: its residual is the dual variable."""
        return self.point

    def _slope(self) -> Tensor:
        return self.cross - self.point @ self.gram

    def solve_restricted(self, gap: float, eps_rel: float, deadline: float) -> int:
        """Solve on the columns; sets `point`; returns the Newton steps."""
        lam = self.problem.lam
        if lam == 0:
            self.point = torch.linalg.lstsq(self.gram, self.cross.T, driver="gelsd").solution.T.to(self.device)
            return 1
        groups = buckets_of(self.columns.cpu(), torch.zeros(len(self.columns), 0, dtype=torch.bool))
        buckets = [restrict_lasso(self.problem, group, self.columns.cpu(), self.device) for group in groups]
        unit = _typical(self.point)
        mu = _centre(buckets, self.point, gap)
        for bucket in buckets:
            u = torch.gather(self.point[bucket.neurons], 1, bucket.columns) * bucket.column_mask
            bucket.begin(u, bucket.ceiling, mu, 1.0)
        outcome = interior_point(
            buckets, Coupling(1 / lam), eps_rel=eps_rel, max_iter=self.options.max_iter, deadline=deadline
        )
        self.point = torch.zeros_like(self.point)
        for bucket in buckets:
            _put(self.point, bucket, bucket.sparse(unit))
        return outcome.iterations

    def grow(self, loose: float) -> bool:
        """Add the columns whose slope exceeds lam or nearly does; False when there is none."""
        nearly = 1 - loose if loose > TIGHT else 1 + TIGHT
        wanted = self.columns | (self._slope().abs() > self.problem.lam * nearly)
        grown = bool((wanted != self.columns).any())
        self.columns = wanted
        return grown


class BallView:
    """The working sets of a ball problem: columns and inequality rows of each neuron."""

    def __init__(self, problem: BallProblem, point: Tensor, witness: Tensor | None, options: WorkingSet) -> None:
        self.problem, self.options = problem, options
        self.device = torch.device(options.device)
        self.inputs = problem.inputs.to(self.device, torch.float64)
        self.outputs, self.active = problem.outputs.to(self.device), problem.active.to(self.device)
        self.point = point.detach().to(self.device, torch.float64)
        blank = torch.zeros_like(self.outputs)
        self.witness = blank if witness is None else witness.detach().to(self.device, torch.float64)
        self.energy = float(self.outputs[self.active].square().sum())
        self.scale = math.sqrt(self.energy / max(int(self.active.sum()), 1)) or 1.0
        # rows of zeros cannot be moved inside; the others by the margin, in units of the output's rms
        reach = self.inputs.norm(dim=1, keepdim=True)
        shift = options.margin * self.scale * (reach / reach.mean().clamp(min=1e-300)).clamp(max=1)
        self.ceiling = problem.ceiling.to(self.device).expand_as(self.outputs) - shift
        self.radius = problem.radius * (1 - options.margin)
        self.tau = self._first_tau()
        self._first_sets(witness is not None)

    def _first_tau(self) -> float:
        force = float(torch.where(self.active, self.witness, 0).norm())
        if force > 0 and self.radius > 0:
            return force / self.radius
        slope = (self.inputs.T @ torch.where(self.active, self.outputs, 0)).abs().amax()
        return 10 / max(float(slope), 1e-300)

    def _first_sets(self, informed: bool) -> None:
        produced = self.inputs @ self.point.T
        alive = (self.point != 0).any(1) & self.active.any(0)
        self.columns = (self.point != 0) & alive[:, None]
        near = produced > self.ceiling - 0.005 * produced.abs().amax(0)
        if informed:
            slope = self.witness.T @ self.inputs
            self.columns |= (slope.abs() > 0.75) & alive[:, None]
            pushing = torch.where(self.active, 0, self.witness.clamp(max=0))
            typical = -pushing.sum() / (pushing < 0).sum().clamp(min=1)
            near |= pushing < -0.01 * typical
        self.rows = (near & ~self.active & alive).T

    def solve_restricted(self, gap: float, eps_rel: float, deadline: float) -> int:
        """Solve on the columns and rows; sets `point`, `witness`, `tau`; returns the Newton steps."""
        columns, rows = self.columns.cpu(), self.rows.cpu()
        self._check_memory(columns, rows)
        ceiling = self.ceiling.cpu()
        buckets = [restrict_ball(self.problem, self.inputs, group, columns, rows, ceiling)
                   for group in buckets_of(columns, rows)]  # fmt: skip
        unit = _typical(self.point)
        mu, ratio = _centre(buckets, self.point, gap), self._ratio(buckets)
        for bucket in buckets:
            u = torch.gather(self.point[bucket.neurons], 1, bucket.columns) * bucket.column_mask
            z = -torch.gather(self.witness.T[bucket.neurons], 1, bucket.rows) * bucket.row_mask
            bucket.begin(u, z.clamp(min=0), mu, ratio)
        coupling = Coupling(self.tau, 0.5 * (self.energy - self.radius**2), mu / self.tau)
        outcome = interior_point(
            buckets, coupling, eps_rel=eps_rel, max_iter=self.options.max_iter, deadline=deadline
        )
        self.tau = coupling.tau
        self._adopt(buckets, unit)
        return outcome.iterations

    def _ratio(self, buckets: list[Bucket]) -> float:
        """A typical room of the rows over a typical multiplier: what makes the two comparable."""
        pushing = -self.witness[(self.witness < 0) & ~self.active]
        price = float(pushing.mean()) if len(pushing) else self.tau * self.scale
        return self.scale / max(price, 1e-300)

    def _adopt(self, buckets: list[Bucket], unit: float) -> None:
        """The exactly sparse point, and the witness: -tau times the residual on the ball, -z on the rows."""
        interior, self.point = torch.zeros_like(self.point), torch.zeros_like(self.point)
        witness = torch.where(self.active, 0, self.witness)
        for bucket in buckets:
            _put(interior, bucket, bucket.u)
            _put(self.point, bucket, bucket.sparse(unit))
            rows = torch.zeros(len(bucket.neurons), len(witness), dtype=torch.float64, device=self.device)
            witness[:, bucket.neurons] = -rows.scatter_add_(1, bucket.rows, bucket.z * bucket.row_mask).T
        residual = torch.where(self.active, self.inputs @ interior.T - self.outputs, 0)
        self.witness = witness - self.tau * residual

    def grow(self, loose: float) -> bool:
        """Add columns with |X^T Z| > 1 and rows above their ceiling, or nearly so; False when there is none."""
        slope = self.witness.T @ self.inputs
        over = (self.inputs @ self.point.T > self.ceiling - LR * self.scale*(loose>TIGHT) + 1e-12) & ~self.active
        columns = self.columns | ((slope.abs() > (1 - loose if loose > TIGHT else 1 + TIGHT)) & self.active.any(0)[:, None])
        held = columns.any(1)
        pushing = (self.witness < 0) & ~self.active & (held & ~self.columns.any(1))
        rows = self.rows | ((over | pushing) & held).T
        grown = bool((columns != self.columns).any()) or bool((rows != self.rows).any())
        self.columns, self.rows = columns, rows
        return grown

    def _check_memory(self, columns: Tensor, rows: Tensor) -> None:
        wide, tall = columns.sum(1).double(), rows.sum(1).double()
        need = 8 * float((3 * wide * wide + 3 * wide * tall).sum())
        if need > self.options.memory:
            raise MemoryError(
                f"the restricted problems need {need / 1e9:.1f} GB, more than memory={self.options.memory / 1e9:.1f} GB; "
                "raise WorkingSet(memory=...), or stop at ADMM's own accuracy with ADMM(finish=None)"
            )


def _merit(certificate: Certificate) -> float:
    return max(certificate.violation, 0.0) + max(certificate.relative_gap, 0.0)


def _typical(point: Tensor) -> float:
    nonzero = point[point != 0].abs()
    return float(nonzero.mean()) if len(nonzero) else 1.0


def _centre(buckets: list[Bucket], point: Tensor, gap: float) -> float:
    """The product at which the relative complementarity gap is `gap`."""
    size = float(point.abs().sum()) or _typical(point) * len(point)
    return gap * size / (sum(bucket.count() for bucket in buckets) + 1)


def _put(target: Tensor, bucket: Bucket, u: Tensor) -> None:
    """Scatter a bucket's (B, w) coefficients into (M, P)."""
    rows = torch.zeros(len(u), target.shape[1], dtype=target.dtype, device=target.device)
    target[bucket.neurons] = rows.scatter_add_(1, bucket.columns, u * bucket.column_mask)
