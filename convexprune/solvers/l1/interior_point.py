"""A primal-dual interior-point method for many small L1 problems that share one quadratic constraint.

Over the neurons m of a layer, each restricted to some columns of X and some of its inequality rows,

    minimise sum_m <w_m, |u_m|>   subject to   sum_m (1/2 u_m^T H_m u_m - c_m^T u_m) + constant <= 0      multiplier tau
                                              R_m u_m <= v_m                                          multipliers z

or, with a fixed tau (a penalty), the same without the constraint. The neurons meet only in tau: every Newton system is
a batch of small Cholesky factors plus one scalar equation. u = p - q with p, q >= 0 and multipliers a = w + g,
b = w - g, where g = tau (H u - c) + R^T z. Mehrotra's predictor and corrector (SIAM J. Optim. 1992) choose the step.
Points and residuals are float64. While the gap is large the Newton matrices may be float32: an error in a direction is
in the residuals of the next step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

TRUST = 0.9  # how far down the shared multiplier goes in a step: the equations have products of it and the weights
REFINE = 2  # at most so many corrections of a Newton direction, up to `Bucket.exact`
BACKOFF = 0.99  # how much of the way to the boundary a step goes
DROPPED = tuple(4.0**-k for k in range(3, 11))  # thresholds for what is on its way to zero, of a typical weight
DUST = 1e-7  # a zero weight is p = mu / a, some 1e-11 of a typical weight, when the gap is 1e-10
RIDGE = {torch.float64: 1e-13, torch.float32: 3e-7}  # times the diagonal: for Cholesky on rank-deficient blocks
SINGLE = 3e-4  # the gap down to which float32 directions lead: a tight row outweighs the others by about its inverse
TOO_SHORT = 0.03  # a step of a float32 direction that is shorter is one to do again in float64


@dataclass(eq=False)
class Bucket:
    """Neurons of similar size, padded into one batch of B; w columns and r rows each."""

    neurons: Tensor  # (B,)
    columns: Tensor  # (B, w) indices into the P inputs; padding repeats index 0
    column_mask: Tensor  # (B, w) bool
    rows: Tensor  # (B, r) indices into the n samples
    row_mask: Tensor  # (B, r) bool
    hessian: Tensor  # (B, w, w), zero in the padding
    linear: Tensor  # (B, w)
    prices: Tensor  # (B, w), of a unit of each weight; 1 in the padding
    slopes: Tensor  # (B, r, w), R, its rows of height 1
    ceiling: Tensor  # (B, r), v; 1 in the padding
    heights: Tensor  # (B, r): what each row was divided by; 1 in the padding
    exact: float = 1e-10  # the relative residual of a Newton direction that is not corrected
    precision: torch.dtype = torch.float64  # of the Newton matrices
    p: Tensor = field(init=False)
    q: Tensor = field(init=False)
    curved: Tensor = field(init=False)  # the Hessian and the slopes as the Newton matrices see them
    faced: Tensor = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    s: Tensor = field(init=False)
    z: Tensor = field(init=False)
    dp: Tensor = field(init=False)
    dq: Tensor = field(init=False)
    da: Tensor = field(init=False)
    db: Tensor = field(init=False)
    ds: Tensor = field(init=False)
    dz: Tensor = field(init=False)

    @property
    def u(self) -> Tensor:
        """(B, w): the coefficients now."""
        return (self.p - self.q) * self.column_mask

    def begin(self, u: Tensor, z: Tensor, mu: float, ratio: float) -> None:
        """Start at u (B, w) and z (B, r), or as near as a point with every product equal to mu can be.

        p - q = u, p a = q b = mu and a + b = 2 w have one solution; s z = mu and s - ratio z = room - ratio z0 too,
        with `ratio` a typical room over a typical multiplier.
        """
        least = mu / self.prices
        hypotenuse = torch.hypot(u, least)
        self.p = torch.where(self.column_mask, (least + u + hypotenuse) / 2, 1.0)
        self.q = torch.where(self.column_mask, (least - u + hypotenuse) / 2, 1.0)
        self.a, self.b = mu / self.p, mu / self.q
        offset = self.ceiling - _times(self.slopes, u) - ratio * z
        s = (offset.abs() + (offset.square() + 4 * ratio * mu).sqrt()) / 2
        s = torch.where(offset > 0, s, ratio * mu / s)
        self.s = torch.where(self.row_mask, s, 1.0)
        self.z = torch.where(self.row_mask, mu / self.s, 1.0)

    def round_to(self, precision: torch.dtype) -> None:
        """Set the precision of the Newton matrices."""
        self.precision = precision
        self.curved, self.faced = self.hessian.to(precision), self.slopes.to(precision)

    def assemble(self, tau: float) -> None:
        """Residuals and the factored Newton matrix theta + tau H + R^T (z / s) R."""
        live, rows = self.column_mask, self.row_mask
        u = self.u
        self.pull = (_times(self.hessian, u) - self.linear) * live  # gradient of the quadratic
        slope = tau * self.pull + _times(self.slopes.mT, self.z * rows)
        self.dual_p, self.dual_q = (self.prices + slope - self.a) * live, (self.prices - slope - self.b) * live
        self.primal = (self.ceiling - _times(self.slopes, u) - self.s) * rows
        self.theta = 1 / (self.p / self.a + self.q / self.b)
        weights = self.z / self.s * rows
        weighted = self.faced * weights.to(self.precision)[..., None]
        matrix = torch.baddbmm(self.curved, weighted.mT, self.faced, beta=tau)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(torch.where(live, self.theta, 1.0))
        self.matrix, ridge = matrix, RIDGE[self.precision] * diagonal
        diagonal.add_(ridge)
        self.factor, failed = torch.linalg.cholesky_ex(matrix)
        diagonal.sub_(ridge)
        self.defined = not bool(failed.any())
        self.pulled = self._solved(self.pull)

    def _solved(self, right: Tensor) -> Tensor:
        """The Newton matrix's inverse times right (B, w), refined where the ridge or rounding has cost digits."""
        found = _solve(self.factor, right.to(self.precision)).double()
        if self.precision is not torch.float64:
            return found
        for _ in range(REFINE):
            rest = right - _times(self.matrix, found)
            if float(rest.abs().max()) <= self.exact * float(right.abs().max()):
                break
            found = found + _solve(self.factor, rest)
        return found

    def complementarity(self) -> float:
        """<p, a> + <q, b> + <s, z>."""
        pairs = ((self.p * self.a + self.q * self.b) * self.column_mask).sum()
        return float(pairs + (self.s * self.z * self.row_mask).sum())

    def count(self) -> int:
        """How many complementarity pairs there are."""
        return 2 * int(self.column_mask.sum()) + int(self.row_mask.sum())

    def respond(self, centre: float, correct: bool) -> float:
        """Solve for products equal to centre (less second-order terms if `correct`); returns <pull, du> at dtau = 0."""
        self.rp, self.rq, self.rz = centre - self.p * self.a, centre - self.q * self.b, centre - self.s * self.z
        if correct:
            self.rp = self.rp - self.dp * self.da
            self.rq = self.rq - self.dq * self.db
            self.rz = self.rz - self.ds * self.dz
        wish = self.rp / self.a - self.p / self.a * self.dual_p - self.rq / self.b + self.q / self.b * self.dual_q
        right = self.theta * wish * self.column_mask
        right -= _times(self.faced.mT, (self.rz - self.z * self.primal) / self.s * self.row_mask)
        self.du = self._solved(right)
        return float((self.pull * self.du).sum())

    def complete(self, tau: float, dtau: float) -> float:
        """The whole direction once dtau is known; returns <pull, du>."""
        du = (self.du - dtau * self.pulled) * self.column_mask
        self.ds = (self.primal - _times(self.faced, du)) * self.row_mask
        self.dz = (self.rz - self.z * self.ds) / self.s * self.row_mask
        rise = tau * _times(self.curved, du) + dtau * self.pull + _times(self.faced.mT, self.dz)
        da, db = rise + self.dual_p, self.dual_q - rise
        # Take the small one of p, q (and its large multiplier) from the dual equation and the large one from du:
        # the other way round divides the solve's rounding error by a vanishing multiplier.
        positive = self.p >= self.q
        dq = torch.where(positive, (self.rq - self.q * db) / self.b, (self.rp - self.p * da) / self.a - du)
        dp = du + dq
        self.da = torch.where(positive, (self.rp - self.a * dp) / self.p, da) * self.column_mask
        self.db = torch.where(positive, db, (self.rq - self.b * dq) / self.q) * self.column_mask
        self.dp, self.dq = dp * self.column_mask, dq * self.column_mask
        return float((self.pull * du).sum())

    def longest(self) -> float:
        """The largest step that keeps every variable nonnegative."""
        moves = ((self.p, self.dp), (self.q, self.dq), (self.s, self.ds),
                 (self.a, self.da), (self.b, self.db), (self.z, self.dz))  # fmt: skip
        return min(1 / max(float((-d / v).max()), 1e-30) for v, d in moves if v.numel())

    def product_after(self, step: float) -> float:
        """The complementarity after a step."""
        pairs = (self.p + step * self.dp) * (self.a + step * self.da) + (self.q + step * self.dq) * (
            self.b + step * self.db
        )
        rows = (self.s + step * self.ds) * (self.z + step * self.dz)
        return float((pairs * self.column_mask).sum() + (rows * self.row_mask).sum())

    def sparse(self, unit: float | Tensor) -> Tensor:
        """(B, w): u with what is below DUST times `unit`, a typical |u|, set to exactly zero.

        The test is on size alone: where a weight and its multiplier both vanish, dropping the weight for the
        multiplier's sake would cost feasibility.
        """
        u = self.u
        return torch.where(u.abs() > DUST * unit, u, 0.0)

    def sparser(self, unit: Tensor, rise: float, room: float) -> Tensor:
        """(B, w): `sparse` without the weights that are still on their way to zero, as many as the rows allow.

        On its way to zero is a weight that is smaller, in its unit, than its multiplier is in its price. Neuron by
        neuron the largest of some thresholds counts that lifts no row by more than `rise` above its ceiling, and the
        quadratic by no more than `room`.
        """
        u = self.u
        chosen, size = self.sparse(unit), u.abs() / unit
        vanishing = size < torch.minimum(self.a, self.b) / self.prices
        pull, undecided = _times(self.hessian, u) - self.linear, torch.ones(len(u), dtype=torch.bool, device=u.device)
        for threshold in DROPPED:
            tried = torch.where(vanishing & (size < threshold), 0.0, chosen)
            change = tried - u
            lifted = ((_times(self.slopes, tried) - self.ceiling) * self.row_mask <= rise).all(1)
            gained = (change * (pull + 0.5 * _times(self.hessian, change))).sum(1)
            fits = undecided & lifted & (gained <= room)
            chosen = torch.where(fits[:, None], tried, chosen)
            undecided &= ~fits
        return chosen

    def move(self, step: float) -> None:
        """Take the step."""
        for name in ("p", "q", "a", "b", "s", "z"):
            getattr(self, name).add_(getattr(self, "d" + name), alpha=step)

    def primal_residual(self) -> float:
        """max |v - R u - s|, in heights of a row."""
        return float(self.primal.abs().max()) if self.primal.numel() else 0.0

    def dual_residual(self) -> float:
        """max |w + g - a|, |w - g - b|."""
        return max(float(self.dual_p.abs().max()), float(self.dual_q.abs().max()))

    def quadratic(self) -> float:
        """sum 1/2 u^T H u - c^T u; needs `assemble`."""
        u = self.u
        return 0.5 * float((u * (self.pull - self.linear)).sum())


@dataclass(eq=False)
class Coupling:
    """What the neurons share: the multiplier tau and, unless tau is fixed, the quadratic constraint and its slack.

    constant  the quadratic constraint's constant term; None fixes tau and drops the constraint
    """

    tau: float
    constant: float | None = None
    slack: float = 1.0
    residual: float = field(init=False, default=0.0)
    curvature: float = field(init=False, default=0.0)
    dtau: float = field(init=False, default=0.0)
    dslack: float = field(init=False, default=0.0)

    @property
    def free(self) -> bool:
        """Whether tau is an unknown."""
        return self.constant is not None

    def assemble(self, buckets: list[Bucket]) -> bool:
        """Assemble every bucket and the scalar equation; False where a Newton matrix is not positive definite."""
        for bucket in buckets:
            bucket.assemble(self.tau)
            if not bucket.defined and bucket.precision is not torch.float64:
                bucket.round_to(torch.float64)
                bucket.assemble(self.tau)
        if self.constant is not None:
            excess = self.constant + sum(bucket.quadratic() for bucket in buckets)
            self.residual = -excess - self.slack
            self.curvature = sum(float((bucket.pull * bucket.pulled).sum()) for bucket in buckets)
        return all(bucket.defined for bucket in buckets)

    def complementarity(self, buckets: list[Bucket]) -> float:
        """The sum of all products that the optimum makes zero."""
        return sum(bucket.complementarity() for bucket in buckets) + self.free * self.slack * self.tau

    def solve(self, buckets: list[Bucket], centre: float, correct: bool) -> None:
        """The Newton direction of every bucket, of tau and of the slack, towards products equal to `centre`."""
        pulled = sum(bucket.respond(centre, correct) for bucket in buckets)
        if self.free:
            product = centre - self.slack * self.tau - (self.dslack * self.dtau if correct else 0.0)
            ratio = self.tau / self.slack
            drive = product / self.slack - ratio * self.residual + ratio * pulled
            self.dtau = drive / (1 + ratio * self.curvature)
        moved = sum(bucket.complete(self.tau, self.dtau) for bucket in buckets)
        self.dslack = self.residual - moved

    def longest(self, buckets: list[Bucket]) -> float:
        """The largest step in [0, 1] that keeps every variable nonnegative."""
        steps = [bucket.longest() for bucket in buckets]
        if self.free:
            steps += [1 / max(-self.dslack / self.slack, 1e-30), 1 / max(-self.dtau / self.tau, 1e-30)]
        return min(1.0, *steps)

    def trusted(self) -> float:
        """The largest step in [0, 1] that leaves enough of tau."""
        return min(1.0, TRUST * self.tau / max(-self.dtau, 1e-300)) if self.free else 1.0

    def product_after(self, buckets: list[Bucket], step: float) -> float:
        """The complementarity after a step."""
        own = (self.slack + step * self.dslack) * (self.tau + step * self.dtau)
        return sum(bucket.product_after(step) for bucket in buckets) + self.free * own

    def move(self, buckets: list[Bucket], step: float) -> None:
        """Take the step."""
        for bucket in buckets:
            bucket.move(step)
        if self.free:
            self.slack += step * self.dslack
            self.tau += step * self.dtau


@dataclass(frozen=True)
class Outcome:
    """How the iterations ended: the relative complementarity gap, and whether the rule was met."""

    gap: float
    iterations: int
    converged: bool


def interior_point(
    buckets: list[Bucket], coupling: Coupling, *, eps_rel: float, max_iter: int, deadline: float = float("inf"),
    precision: torch.dtype = torch.float64,
) -> Outcome:  # fmt: skip
    """Iterate from `Bucket.begin`'s points until the relative complementarity gap is below `eps_rel`.

    The Newton matrices begin in `precision`; float32 gives way to float64 near the optimum, after a short step, and
    where a matrix cannot be factored. Leaves the point and the multipliers in the buckets and tau in the coupling.
    Stops early, unconverged, when the steps vanish, when a float64 matrix cannot be factored, or at the deadline (a
    time.perf_counter value).
    """
    pairs = sum(bucket.count() for bucket in buckets) + coupling.free
    gap, best, short = float("inf"), float("inf"), 0
    for bucket in buckets:
        bucket.round_to(precision)
    for iteration in range(max_iter):
        if not coupling.assemble(buckets):
            return Outcome(float("inf"), iteration, False)
        objective = max(sum(float((bucket.prices * bucket.u.abs()).sum()) for bucket in buckets), 1e-300)
        total = coupling.complementarity(buckets)
        gap = total / objective
        dual = max(bucket.dual_residual() for bucket in buckets)
        miss = coupling.tau * abs(coupling.residual) / objective
        short_of = max(bucket.primal_residual() for bucket in buckets)
        met = miss < max(eps_rel, 1e-7) and short_of < max(0.1 * eps_rel, 1e-7)
        if gap < eps_rel and dual < max(10 * eps_rel, 1e-5) and met:
            return Outcome(gap, iteration, True)
        best = min(best, gap)
        if short >= 3 or gap > 1e3 * best or time.perf_counter() > deadline:
            return Outcome(gap, iteration, False)
        coupling.solve(buckets, 0.0, correct=False)
        after = coupling.product_after(buckets, coupling.longest(buckets))
        sigma = max(after / total, 1e-4) ** 3
        coupling.solve(buckets, sigma * total / pairs, correct=True)
        step = min(1.0, BACKOFF * coupling.longest(buckets))
        coupling.move(buckets, min(step, coupling.trusted()))
        short = short + 1 if step < 1e-3 else 0
        if gap < SINGLE or step < TOO_SHORT:
            for bucket in buckets:
                bucket.round_to(torch.float64)
    return Outcome(gap, max_iter, False)


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """(L L^T)^-1 right; two triangular solves are ten times faster on a CPU batch than torch.cholesky_solve."""
    half = torch.linalg.solve_triangular(factor, right[..., None], upper=False)
    whole: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return whole[..., 0]


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products in the matrices' precision, as float64."""
    return torch.matmul(matrices, vectors.to(matrices.dtype)[..., None])[..., 0].double()
