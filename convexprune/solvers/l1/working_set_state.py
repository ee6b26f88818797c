"""The working sets of a problem: the columns and rows of each neuron, which are solved together, checked and grown.

`solve_restricted` solves the changed neurons, `grow` adds missing columns and rows, `widen` adds columns after a
breakdown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.forms import BallProblem, LassoProblem
from convexprune.solvers.l1.interior_point import Bucket, Coupling, interior_point
from convexprune.solvers.l1.restriction import buckets_of, restrict_ball, restrict_lasso

INNER = 1e-10  # relative gap of a restricted problem: at this accuracy zeros and nonzeros are told apart at sight
LOST = 1e-3  # a restricted problem that ended with a larger gap has broken down and is not taken over
RUNAWAY = 100  # a multiplier this many times the largest known one grows without limit
LEAST = 8  # columns that a neuron gets at least when it gets more
TIGHT = 1e-9  # how far a multiplier may pass its limit before its column counts as missed


@dataclass(frozen=True)
class Limits:
    """The limits of a run, and its margin inside the constraints; see `WorkingSet`."""

    eps_abs: float
    max_iter: int
    margin: float
    memory: float
    device: torch.device


class LassoView:
    """The working sets of a lasso: columns only, the price of the quadratic fixed at 1 / lam."""

    def __init__(self, problem: LassoProblem, point: Tensor, limits: Limits) -> None:
        self.problem, self.limits = problem, limits
        self.device = limits.device
        self.gram, self.cross = problem.gram.to(self.device), problem.cross.to(self.device)
        self.point = point.detach().to(self.device, torch.float64).clone()
        self.columns = (self.point != 0) | (self._slope().abs() >= 0.9 * problem.lam)
        self.changed = torch.ones(len(self.point), dtype=torch.bool, device=self.device)
        self.lost = False

    @property
    def witness(self) -> Tensor:
        """The point itself: its residual is the dual variable."""
        return self.point

    def _slope(self) -> Tensor:
        return self.cross - self.point @ self.gram

    def solve_restricted(self, gap: float, deadline: float) -> int:
        """Solve the changed neurons on their columns; sets `point`; returns the Newton steps."""
        lam = self.problem.lam
        columns = (self.columns & self.changed[:, None]).cpu()
        buckets = [restrict_lasso(self.problem, group, columns, self.device)
                   for group in buckets_of(columns, columns[:, :0])]  # fmt: skip
        if not buckets:  # nothing is known to want a weight
            return 0
        unit = _typical(self.point)
        mu = _centre(buckets, self.point, gap)
        for bucket in buckets:
            u = torch.gather(self.point[bucket.neurons], 1, bucket.columns) * bucket.column_mask
            bucket.begin(u, bucket.ceiling, mu, 1.0)
        outcome = interior_point(
            buckets, Coupling(1 / lam), eps_rel=INNER, max_iter=self.limits.max_iter, deadline=deadline
        )
        self.lost = outcome.gap > LOST
        if not self.lost:
            for bucket in buckets:
                _put(self.point, bucket, bucket.sparse(unit))
        return outcome.iterations

    def grow(self) -> bool:
        """Add the columns whose slope exceeds lam; False when there is none."""
        wanted = self.columns | (self._slope().abs() > self.problem.lam * (1 + TIGHT))
        self.changed = (wanted != self.columns).any(1)
        self.columns = wanted
        return bool(self.changed.any())

    def widen(self) -> bool:
        """False: a lasso on any columns has a solution, so more columns would not help."""
        return False


class BallView:
    """The working sets of a ball problem: columns and inequality rows of each neuron."""

    def __init__(self, problem: BallProblem, point: Tensor, witness: Tensor | None, limits: Limits) -> None:
        self.problem, self.limits = problem, limits
        self.device = limits.device
        self.inputs = problem.inputs.to(self.device, torch.float64)
        self.outputs, self.active = problem.outputs.to(self.device), problem.active.to(self.device)
        self.point = point.detach().to(self.device, torch.float64).clone()
        blank = torch.zeros_like(self.outputs)
        self.witness = blank if witness is None else witness.detach().to(self.device, torch.float64).clone()
        self.energies = torch.where(self.active, self.outputs, 0).square().sum(0)
        self.scale = math.sqrt(float(self.energies.sum()) / max(int(self.active.sum()), 1)) or 1.0
        self.ceiling = problem.ceiling.to(self.device)
        # a row's margin is this times its norm: in units of the output's rms for a row of typical norm
        self.margin = limits.margin * self.scale / max(float(self.inputs.norm(dim=1).mean()), 1e-300)
        # enlarge a ball narrower than the tolerance to half of it, so that the method has an interior
        least = 0.5 * limits.eps_abs * math.sqrt(float(self.energies.sum()))
        self.radius = max(problem.radius * (1 - limits.margin), least)
        self.changed = torch.ones(len(self.point), dtype=torch.bool, device=self.device)
        self.lost, self.pressed = False, torch.zeros_like(self.changed)
        self.tau = self._first_tau()
        self._first_sets(witness is not None)

    def _first_tau(self) -> float:
        force = float(torch.where(self.active, self.witness, 0).norm())
        if force > 0 and self.radius > 0:
            return force / self.radius
        # at the optimum Z = -tau r with <Z, Y> about ||x||_1, and r is at most the radius
        size = self.radius * float(self.energies.sum().sqrt())
        return float(self.point.abs().sum()) / size if size > 0 else 1.0

    def _first_sets(self, informed: bool) -> None:
        produced = self.inputs @ self.point.T
        alive = (self.point != 0).any(1)
        self.columns = self.point != 0
        near = (produced > self.ceiling - 0.005 * produced.abs().amax(0)) & (produced != 0)
        if informed:
            slope = self.witness.T @ self.inputs
            self.columns |= (slope.abs() > 0.75) & alive[:, None]
            pushing = torch.where(self.active, 0, self.witness.clamp(max=0))
            typical = -pushing.sum() / (pushing < 0).sum().clamp(min=1)
            near |= pushing < -0.01 * typical
        self.rows = (near & ~self.active & alive).T

    def solve_restricted(self, gap: float, deadline: float) -> int:
        """Solve the changed neurons on their columns and rows; sets `point`, `witness`, `tau`; returns Newton steps.

        The others keep their weights, and their share of the ball.
        """
        columns, rows = (self.columns & self.changed[:, None]).cpu(), (self.rows & self.changed[:, None]).cpu()
        self._check_memory(columns, rows)
        buckets = [restrict_ball(self.problem, self.inputs, group, columns, rows, self.margin)
                   for group in buckets_of(columns, rows)]  # fmt: skip
        if not buckets:  # nothing is known to want a weight
            return 0
        unit, mu, ratio = _typical(self.point), _centre(buckets, self.point, gap), self._ratio()
        for bucket in buckets:
            u = torch.gather(self.point[bucket.neurons], 1, bucket.columns) * bucket.column_mask
            z = -torch.gather(self.witness.T[bucket.neurons], 1, bucket.rows) * bucket.row_mask
            bucket.begin(u, z.clamp(min=0), mu, ratio)
        spent = torch.where(self.active, self.inputs @ self.point.T - self.outputs, 0).square().sum(0)
        room = 0.5 * (self.radius**2 - float(spent.sum()))
        solved = torch.cat([bucket.neurons for bucket in buckets])
        spent[solved] = self.energies[solved]
        constant = 0.5 * (float(spent.sum()) - self.radius**2)
        coupling = Coupling(self.tau, constant, max(room, mu / self.tau))
        outcome = interior_point(buckets, coupling, eps_rel=INNER, max_iter=self.limits.max_iter, deadline=deadline)
        self.lost = outcome.gap > LOST
        if self.lost:
            self._find_pressed(buckets)
        else:
            self._adopt(buckets, coupling.tau, unit)
            # where some neurons alone cannot fill their share of the ball, their tau is 0 and no start for all of them
            if bool(self.changed.all()):
                self.tau = coupling.tau
        return outcome.iterations

    def _ratio(self) -> float:
        """Typical slack of a row divided by a typical multiplier; it makes the two comparable."""
        pushing = -self.witness[(self.witness < 0) & ~self.active]
        price = float(pushing.mean()) if len(pushing) else self.tau * self.scale
        return self.scale / max(price, 1e-300)

    def _adopt(self, buckets: list[Bucket], tau: float, unit: float) -> None:
        """The exactly sparse point, and the witness: -tau times the residual on the ball, -z on the rows."""
        interior = self.point.clone()
        for bucket in buckets:
            _put(interior, bucket, bucket.u)
            _put(self.point, bucket, bucket.sparse(unit))
        for bucket in buckets:
            which = bucket.neurons
            rows = torch.zeros(len(which), len(self.witness), dtype=torch.float64, device=self.device)
            pushing = -rows.scatter_add_(1, bucket.rows, bucket.z * bucket.row_mask).T
            residual = self.inputs @ interior[which].T - self.outputs[:, which]
            self.witness[:, which] = torch.where(self.active[:, which], -tau * residual, pushing)

    def grow(self) -> bool:
        """Add columns with |X^T Z| > 1 and rows above their ceiling; with none missed, everything is solved once more.

        False when everything was solved together and nothing was missed.
        """
        slope = self.witness.T @ self.inputs
        columns = self.columns | (slope.abs() > 1 + TIGHT)
        over = (self.inputs @ self.point.T > self.ceiling + 1e-12 * self.scale) & ~self.active
        # a neuron of zeros that may not be zero (a ceiling below 0) starts with everything
        columns |= (over.any(0) & ~columns.any(1))[:, None]
        woken = columns.any(1) & ~self.columns.any(1)
        over |= (self.witness < 0) & ~self.active & woken
        rows = self.rows | over.T
        together = bool(self.changed.all())
        self.changed = (columns != self.columns).any(1) | (rows != self.rows).any(1)
        self.columns, self.rows = columns, rows
        if bool(self.changed.any()):
            return True
        self.changed = torch.ones_like(self.changed)
        return not together

    def widen(self) -> bool:
        """After a restricted problem was lost: more columns for the neurons that cannot meet their rows with theirs.

        False where no multiplier has run away, so that this was not the reason, or no column is left.
        """
        slope = (self.witness.T @ self.inputs).abs().masked_fill(self.columns, -1)
        before = int(self.columns.sum())
        for neuron in self.pressed.nonzero()[:, 0].tolist():
            more = slope[neuron].topk(min(int(self.columns[neuron].sum()) + LEAST, slope.shape[1])).indices
            self.columns[neuron, more] = True
        return int(self.columns.sum()) > before

    def _find_pressed(self, buckets: list[Bucket]) -> None:
        """The neurons whose multipliers ran away: a sign that no point on their columns meets their rows."""
        limit = RUNAWAY * max(float(self.witness.abs().max()), self.tau * self.scale)
        self.pressed = torch.zeros_like(self.changed)
        for bucket in buckets:
            if bucket.z.shape[1]:
                self.pressed[bucket.neurons] = (bucket.z * bucket.row_mask).amax(1) > limit

    def _check_memory(self, columns: Tensor, rows: Tensor) -> None:
        wide, tall = columns.sum(1).double(), rows.sum(1).double()
        need = 8 * float((3 * wide * wide + 3 * wide * tall).sum())
        if need > self.limits.memory:
            raise MemoryError(
                f"the restricted problems need {need / 1e9:.1f} GB, more than memory={self.limits.memory / 1e9:.1f} "
                "GB; raise WorkingSet(memory=...), or stop at ADMM's own accuracy with ADMM(finish=None)"
            )


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
