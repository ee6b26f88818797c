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
from convexprune.solvers.l1.restriction import buckets_of, heights, restrict_ball, restrict_lasso
from convexprune.solvers.l1.scaling import ScaledBall, ScaledLasso

SHARE = 0.05  # the gap of a restricted problem, of the gap that may be left
ROUGHEST = 1e-3  # no restricted problem is solved with a larger gap
PAID = 8  # the margin, of that gap: weights on their way to zero lift a row by some 5 times the gap
INNER = 1e-10  # the least gap of a restricted problem: at this accuracy zeros and nonzeros are told apart at sight
LOST = 1e-3  # a restricted problem that ended with a larger gap has broken down and is not taken over
RUNAWAY = 100  # a multiplier this many times the largest known one grows without limit
LEAST = 8  # columns that a neuron gets at least when it gets more
ROUGH = 1e-6  # how far |X^T z| may be from a price, relative, before z is corrected
FINEST = 1e-12  # the residual of a Newton direction where coarser ones have led nowhere
TIGHT = 1e-9  # how far a multiplier may pass its limit before its column counts as missed


@dataclass(frozen=True)
class Limits:
    """The limits of a run, and its margin inside the constraints; see `WorkingSet`."""

    eps_abs: float
    eps_rel: float
    max_iter: int
    margin: float
    memory: float
    device: torch.device


class LassoView:
    """The working sets of a lasso: columns only, the price of the quadratic fixed at 1 / lam."""

    def __init__(self, problem: LassoProblem, point: Tensor, limits: Limits) -> None:
        self.limits, self.device = limits, limits.device
        self.scaled = ScaledLasso.of(problem, self.device)
        self.v = self.scaled.units.inside(point.detach().to(self.device))
        self.limit = self.scaled.lam * self.scaled.prices
        self.columns = (self.v != 0) | (self._slope().abs() >= 0.9 * self.limit)
        self.changed = torch.ones(len(self.v), dtype=torch.bool, device=self.device)
        self.lost = False

    @property
    def point(self) -> Tensor:
        """(M, P), in the problem's units."""
        return self.scaled.units.outside(self.v)

    @property
    def witness(self) -> Tensor:
        """The point itself: its residual is the dual variable."""
        return self.point

    def _slope(self) -> Tensor:
        return self.scaled.cross - self.v @ self.scaled.gram

    def solve_restricted(self, gap: float, deadline: float) -> int:
        """Solve the changed neurons on their columns; sets `v`; returns the Newton steps."""
        columns = (self.columns & self.changed[:, None]).cpu()
        buckets = [restrict_lasso(self.scaled, group, columns) for group in buckets_of(columns, columns[:, :0])]
        if not buckets:  # nothing is known to want a weight
            return 0
        unit = _typical(self.v)
        mu = _centre(buckets, self.v * self.scaled.prices, gap)
        for bucket in buckets:
            u = torch.gather(self.v[bucket.neurons], 1, bucket.columns) * bucket.column_mask
            bucket.begin(u, bucket.ceiling, mu, 1.0)
        outcome = interior_point(
            buckets, Coupling(1 / self.scaled.lam), eps_rel=INNER, max_iter=self.limits.max_iter, deadline=deadline
        )
        self.lost = outcome.gap > LOST
        if not self.lost:
            for bucket in buckets:
                _put(self.v, bucket, bucket.sparse(unit))
        return outcome.iterations

    def grow(self) -> bool:
        """Add the columns whose slope exceeds lam; False when there is none."""
        wanted = self.columns | (self._slope().abs() > self.limit * (1 + TIGHT))
        self.changed = (wanted != self.columns).any(1)
        self.columns = wanted
        return bool(self.changed.any())

    def whole(self) -> bool:
        """False: a lasso has no rows, and starts as well from few columns as from all."""
        return False

    def tighten(self) -> bool:
        """False: a lasso is solved to the last digits."""
        return False

    def press(self) -> bool:
        """False: a lasso has no margin."""
        return False

    def widen(self) -> bool:
        """False: a lasso on any columns has a solution, so more columns would not help."""
        return False


class BallView:
    """The working sets of a ball problem: columns and inequality rows of each neuron."""

    def __init__(self, problem: BallProblem, point: Tensor, witness: Tensor | None, limits: Limits) -> None:
        self.limits, self.device = limits, limits.device
        self.scaled = ScaledBall.of(problem, self.device)
        self.inputs, self.outputs, self.active = self.scaled.inputs, self.scaled.outputs, self.scaled.active
        self.v = self.scaled.units.inside(point.detach().to(self.device))
        self.z = torch.zeros_like(self.outputs)
        if witness is not None:
            self.z = self.scaled.multiplier(witness.detach().to(self.device))
        self.energies = torch.where(self.active, self.outputs, 0).square().sum(0)
        self.scale = math.sqrt(float(self.energies.sum()) / max(int(self.active.sum()), 1)) or 1.0
        self.sizes = self._sizes(self.scaled.units.inside(problem.dense.to(self.device)))
        self.heights = heights(self.inputs, self.sizes)[:, None]
        # the weight whose share of an inequality may be as large as what is typical
        self.dust = 1 / (self.inputs / self.heights).abs().amax(0)
        # a ball narrower than the tolerance is enlarged to half of it, so that the method has an interior
        self.least = 0.5 * limits.eps_abs * math.sqrt(float(self.energies.sum()))
        self.changed = torch.ones(len(self.v), dtype=torch.bool, device=self.device)
        self.lost, self.pressed = False, torch.zeros_like(self.changed)
        # most of the gap that may be left pays for the margin, and that for weights dropped before they are zero
        self.inner = min(max(SHARE * limits.eps_rel / max(1.0, self._margin_price()), INNER), ROUGHEST)
        self.margin = max(limits.margin, 0.5 * limits.margin + PAID * self.inner) if limits.margin else 0.0
        self.begun, self.exact = self.v.clone(), Bucket.exact
        self.tau = self._first_tau()
        self._first_sets(witness is not None)

    @property
    def point(self) -> Tensor:
        """(M, P), in the problem's units."""
        return self.scaled.units.outside(self.v)

    @property
    def witness(self) -> Tensor:
        """(n, M), in the problem's units."""
        return self.scaled.witness(self.z)

    @property
    def radius(self) -> float:
        """The ball's, less the margin."""
        return max(self.scaled.radius * (1 - self.margin), self.least)

    def _sizes(self, dense: Tensor) -> Tensor:
        """(P,): the typical size of a weight, as of the dense layer, or of one that gives the outputs."""
        sizes = dense.square().mean(0).sqrt()
        if not bool(sizes.any()):
            return torch.full_like(sizes, self.scale / max(float(self.inputs.norm(dim=1).mean()), 1e-300))
        return torch.where(sizes > 0, sizes, sizes[sizes > 0].min())

    def _margin_price(self) -> float:
        """The relative gap that a margin of 1 would cost, by the multipliers that are known."""
        pushing = -torch.where(self.active, 0, self.z.clamp(max=0)) * self.heights
        force = self.scaled.radius * float(torch.where(self.active, self.z, 0).norm())
        return (float(pushing.sum()) + force) / max(float((self.scaled.prices * self.v.abs()).sum()), 1e-300)

    def _first_tau(self) -> float:
        force = float(torch.where(self.active, self.z, 0).norm())
        if force > 0 and self.radius > 0:
            return force / self.radius
        # at the optimum Z = -tau r with <Z, Y> about ||x||_1, and r is at most the radius
        size = self.radius * float(self.energies.sum().sqrt())
        return float((self.scaled.prices * self.v.abs()).sum()) / size if size > 0 else 1.0

    def _first_sets(self, informed: bool) -> None:
        produced = self.inputs @ self.v.T
        alive = (self.v != 0).any(1)
        self.columns = self.v != 0
        height = (produced - self.scaled.ceiling) / self.heights
        near = (height > -0.005 * (produced / self.heights).abs().amax(0)) & (produced != 0)
        if informed:
            slope = self.z.T @ self.inputs
            self.columns |= (slope.abs() > 0.75 * self.scaled.prices) & alive[:, None]
            pushing = torch.where(self.active, 0, self.z.clamp(max=0)) * self.heights
            typical = -pushing.sum() / (pushing < 0).sum().clamp(min=1)
            near |= pushing < -0.01 * typical
        self.rows = (near & ~self.active & alive).T

    def solve_restricted(self, gap: float, deadline: float) -> int:
        """Solve the changed neurons on their columns and rows; sets `point`, `witness`, `tau`; returns Newton steps.

        The others keep their weights, and their share of the ball.
        """
        columns, rows = (self.columns & self.changed[:, None]).cpu(), (self.rows & self.changed[:, None]).cpu()
        self._check_memory(columns, rows)
        buckets = [restrict_ball(self.scaled, group, columns, rows, self.sizes, self.margin)
                   for group in buckets_of(columns, rows)]  # fmt: skip
        if not buckets:  # nothing is known to want a weight
            return 0
        unit, mu, ratio = _typical(self.v), _centre(buckets, self.v * self.scaled.prices, gap), self._ratio()
        for bucket in buckets:
            bucket.exact = self.exact
            u = torch.gather(self.v[bucket.neurons], 1, bucket.columns) * bucket.column_mask
            z = -torch.gather(self.z.T[bucket.neurons], 1, bucket.rows) * bucket.row_mask * bucket.heights
            bucket.begin(u, z.clamp(min=0), mu, ratio)
        spent = torch.where(self.active, self.inputs @ self.v.T - self.outputs, 0).square().sum(0)
        room = 0.5 * (self.radius**2 - float(spent.sum()))
        solved = torch.cat([bucket.neurons for bucket in buckets])
        spent[solved] = self.energies[solved]
        constant = 0.5 * (float(spent.sum()) - self.radius**2)
        coupling = Coupling(self.tau, constant, max(room, mu / self.tau))
        outcome = interior_point(
            buckets, coupling, eps_rel=self.inner, max_iter=self.limits.max_iter, deadline=deadline,
            precision=torch.float64 if self.inner == INNER else torch.float32,
        )  # fmt: skip
        self.lost = outcome.gap > max(LOST, 3 * self.inner)
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
        pushing = -(self.z * self.heights)[(self.z < 0) & ~self.active]
        price = float(pushing.mean()) if len(pushing) else self.tau * self.scale**2
        return 1 / max(price, 1e-300)

    def _adopt(self, buckets: list[Bucket], tau: float, unit: float) -> None:
        """The exactly sparse point, and the witness: -tau times the residual on the ball, -z on the rows."""
        interior = self.v.clone()
        for bucket in buckets:
            _put(interior, bucket, bucket.u)
            _put(self.v, bucket, self._sparse(bucket, self.dust.clamp(max=unit)[bucket.columns]))
        for bucket in buckets:
            which = bucket.neurons
            rows = torch.zeros(len(which), len(self.z), dtype=torch.float64, device=self.device)
            pushing = -rows.scatter_add_(1, bucket.rows, bucket.z / bucket.heights * bucket.row_mask).T
            residual = self.inputs @ interior[which].T - self.outputs[:, which]
            self.z[:, which] = torch.where(self.active[:, which], -tau * residual, pushing)
        if self.inner == INNER:  # before the last digits X^T z is not the price where a weight is small
            self._polish(torch.cat([bucket.neurons for bucket in buckets]))

    def _sparse(self, bucket: Bucket, unit: Tensor) -> Tensor:
        """(B, w): the exactly sparse weights; the margin pays for what is dropped and for rounding."""
        if self.inner == INNER:
            return bucket.sparse(unit)
        spare = self.margin - 0.5 * self.limits.margin
        return bucket.sparser(unit, spare, spare * self.scaled.radius**2 / len(self.v))

    def _polish(self, neurons: Tensor) -> None:
        """Where a neuron's X^T z is not the price to the last digits, at its weights and where it is more, scale the
        entries of its z, as little as can be, so that it is: a low price leaves few digits to the Newton steps.
        """
        slope = self.inputs.T @ self.z[:, neurons]
        weights, prices = self.v[neurons].T, self.scaled.prices[:, None]
        wanted = torch.where(weights != 0, weights.sign(), slope.sign()) * prices
        held = self.columns[neurons].T & ((weights != 0) | (slope.abs() > prices))
        missed = torch.where(held, (wanted - slope) / prices, 0)
        for turn in (missed.abs() > ROUGH).any(0).nonzero()[:, 0].tolist():
            columns, z = held[:, turn], self.z[:, neurons[turn]]
            rates = (self.inputs[:, columns] * z[:, None] / self.scaled.prices[columns]).T
            change = torch.linalg.lstsq(rates.cpu(), missed[columns, turn, None].cpu(), driver="gelsd").solution[:, 0]
            if float(change.abs().max()) < 0.5:
                self.z[:, neurons[turn]] = z * (1 + change.to(z))

    def grow(self) -> bool:
        """Add columns with |X^T Z| > 1 and rows above their ceiling; with none missed, everything is solved once more.

        False when everything was solved together and nothing was missed.
        """
        slope = self.z.T @ self.inputs
        columns = self.columns | (slope.abs() > self.scaled.prices * (1 + max(TIGHT, self.inner)))
        above = (self.inputs @ self.v.T - self.scaled.ceiling) / self.heights
        over = (above > 1e-12) & ~self.active
        # a neuron of zeros that may not be zero (a ceiling below 0) starts with everything
        columns |= (over.any(0) & ~columns.any(1))[:, None]
        woken = columns.any(1) & ~self.columns.any(1)
        over |= (self.z < 0) & ~self.active & woken
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
        slope = ((self.z.T @ self.inputs).abs() / self.scaled.prices).masked_fill(self.columns, -1)
        before = int(self.columns.sum())
        for neuron in self.pressed.nonzero()[:, 0].tolist():
            more = slope[neuron].topk(min(int(self.columns[neuron].sum()) + LEAST, slope.shape[1])).indices
            self.columns[neuron, more] = True
        return int(self.columns.sum()) > before

    def whole(self) -> bool:
        """Begin anew with every column and row of every neuron: where few of them lead nowhere, all may.

        False where that needs too much memory.
        """
        columns, rows = torch.ones_like(self.columns), ~self.active.T
        if self._memory(columns, rows) > self.limits.memory:
            return False
        self.columns, self.rows, self.margin = columns, rows, self.limits.margin
        self.exact = FINEST
        self.changed = torch.ones_like(self.changed)
        self.v, self.z = self.begun.clone(), torch.zeros_like(self.z)
        self.tau = self._first_tau()
        return True

    def tighten(self) -> bool:
        """Solve once more to the last digits; False where that was done."""
        if self.inner == INNER:
            return False
        self.inner, self.margin = INNER, self.limits.margin
        self.changed = torch.ones_like(self.changed)
        return True

    def press(self) -> bool:
        """Solve once more without the margin; False where there was none, or no point to begin from."""
        if self.lost or not self.margin:
            return False
        self.margin = 0.0
        self.changed = torch.ones_like(self.changed)
        return True

    def _find_pressed(self, buckets: list[Bucket]) -> None:
        """The neurons whose multipliers ran away: a sign that no point on their columns meets their rows."""
        limit = RUNAWAY * max(float((self.z * self.heights).abs().max()), self.tau * self.scale**2)
        self.pressed = torch.zeros_like(self.changed)
        for bucket in buckets:
            if bucket.z.shape[1]:
                self.pressed[bucket.neurons] = (bucket.z * bucket.row_mask).amax(1) > limit

    def _memory(self, columns: Tensor, rows: Tensor) -> float:
        """Bytes."""
        wide, tall = columns.sum(1).double(), rows.sum(1).double()
        return 8 * float((3 * wide * wide + 3 * wide * tall).sum())

    def _check_memory(self, columns: Tensor, rows: Tensor) -> None:
        need = self._memory(columns, rows)
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
