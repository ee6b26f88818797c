"""A primal-dual interior-point method for many small L1 problems that share one quadratic constraint.

Over the neurons m of a layer, each restricted to some columns of X and some of its inequality rows,

    minimise sum_m ||u_m||_1   subject to   sum_m (1/2 u_m^T H_m u_m - c_m^T u_m) + constant <= 0      multiplier tau
                                            R_m u_m <= v_m                                            multipliers z

or, with a fixed tau (a penalty), the same without the constraint. The neurons meet only in tau: every Newton system is
a batch of small Cholesky factors plus one scalar equation. u = p - q with p, q >= 0 and multipliers a = 1 + g,
b = 1 - g, where g = tau (H u - c) + R^T z. Mehrotra's predictor and corrector (SIAM J. Optim. 1992) choose the step.
All in float64: these are the last digits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

BACKOFF = 0.99  # how much of the way to the boundary a step goes
RIDGE = 1e-13  # times the mean diagonal: keeps Cholesky defined on rank-deficient blocks, far below the tolerances


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
    slopes: Tensor  # (B, r, w), R
    ceiling: Tensor  # (B, r), v; 1 in the padding
    p: Tensor = field(init=False)
    q: Tensor = field(init=False)
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)
    s: Tensor = field(init=False)
    z: Tensor = field(init=False)

    @property
    def u(self) -> Tensor:
        """(B, w): the coefficients now."""
        return (self.p - self.q) * self.column_mask

    def begin(self, u: Tensor, z: Tensor, tau: float, unit: float, width: float) -> None:
        """Start around u (B, w), z (B, r), kept `width` units away from every bound."""
        gap = width * unit
        self.p = torch.where(self.column_mask, u.clamp(min=0) + gap, 1.0)
        self.q = torch.where(self.column_mask, (-u).clamp(min=0) + gap, 1.0)
        slope = tau * (_times(self.hessian, u) - self.linear) + _times(self.slopes.mT, z)
        self.a = torch.where(self.column_mask, (1 + slope).clamp(min=width), 1.0)
        self.b = torch.where(self.column_mask, (1 - slope).clamp(min=width), 1.0)
        room = self.ceiling - _times(self.slopes, u)
        typical = float(room.abs()[self.row_mask].mean()) if bool(self.row_mask.any()) else 1.0
        self.s = torch.where(self.row_mask, room.clamp(min=max(width * typical, 1e-12)), 1.0)
        self.z = torch.where(self.row_mask, torch.maximum(z, width * gap / self.s), 1.0)

    def assemble(self, tau: float) -> None:
        """Residuals and the factored Newton matrix theta + tau H + R^T (z / s) R."""
        live, rows = self.column_mask, self.row_mask
        u = self.u
        self.pull = (_times(self.hessian, u) - self.linear) * live  # gradient of the quadratic
        slope = tau * self.pull + _times(self.slopes.mT, self.z * rows)
        self.dual_p, self.dual_q = (1 + slope - self.a) * live, (1 - slope - self.b) * live
        self.primal = (self.ceiling - _times(self.slopes, u) - self.s) * rows
        self.theta = 1 / (self.p / self.a + self.q / self.b)
        weights = self.z / self.s * rows
        matrix = torch.baddbmm(self.hessian, (self.slopes * weights[..., None]).mT, self.slopes, beta=tau)
        ridge = RIDGE * float(matrix.diagonal(dim1=-2, dim2=-1).mean())
        matrix.diagonal(dim1=-2, dim2=-1).add_(torch.where(live, self.theta + ridge, 1.0))
        self.factor, failed = torch.linalg.cholesky_ex(matrix)
        self.defined = not bool(failed.any())
        self.pulled = torch.cholesky_solve(self.pull[..., None], self.factor)[..., 0]

    def complementarity(self) -> float:
        """<p, a> + <q, b> + <s, z>."""
        pairs = ((self.p * self.a + self.q * self.b) * self.column_mask).sum()
        return float(pairs + (self.s * self.z * self.row_mask).sum())

    def count(self) -> int:
        """How many complementarity pairs there are."""
        return 2 * int(self.column_mask.sum()) + int(self.row_mask.sum())

    def respond(self, centre: float, correct: bool) -> float:
        """Solve for the products' targets, centre - (second-order terms if `correct`); returns <pull, du> at dtau = 0."""
        self.rp, self.rq, self.rz = centre - self.p * self.a, centre - self.q * self.b, centre - self.s * self.z
        if correct:
            self.rp = self.rp - self.dp * self.da
            self.rq = self.rq - self.dq * self.db
            self.rz = self.rz - self.ds * self.dz
        wish = self.rp / self.a - self.p / self.a * self.dual_p - self.rq / self.b + self.q / self.b * self.dual_q
        right = self.theta * wish * self.column_mask
        right -= _times(self.slopes.mT, (self.rz - self.z * self.primal) / self.s * self.row_mask)
        self.du = torch.cholesky_solve(right[..., None], self.factor)[..., 0]
        return float((self.pull * self.du).sum())

    def complete(self, tau: float, dtau: float) -> float:
        """The whole direction once dtau is known; returns <pull, du>."""
        du = (self.du - dtau * self.pulled) * self.column_mask
        self.ds = (self.primal - _times(self.slopes, du)) * self.row_mask
        self.dz = (self.rz - self.z * self.ds) / self.s * self.row_mask
        rise = tau * _times(self.hessian, du) + dtau * self.pull + _times(self.slopes.mT, self.dz)
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

    def move(self, step: float) -> None:
        """Take the step."""
        for name in ("p", "q", "a", "b", "s", "z"):
            getattr(self, name).add_(getattr(self, "d" + name), alpha=step)

    def dual_residual(self) -> float:
        """max |1 + g - a|, |1 - g - b|."""
        return max(float(self.dual_p.abs().max()), float(self.dual_q.abs().max()))

    def quadratic(self) -> float:
        """sum 1/2 u^T H u - c^T u; needs `assemble`."""
        u = self.u
        return 0.5 * float((u * (self.pull - self.linear)).sum())


@dataclass(frozen=True)
class Outcome:
    """Where the iterations ended: tau, the relative complementarity gap, and whether the rule was met."""

    tau: float
    gap: float
    iterations: int
    converged: bool


def interior_point(
    buckets: list[Bucket],
    tau: float,
    constant: float | None,
    *,
    slack: float = 0.0,
    eps_rel: float = 1e-8,
    max_iter: int = 60,
    deadline: float = float("inf"),
) -> Outcome:
    """Iterate from `Bucket.begin`'s points until the relative gap is below `eps_rel`.

    constant  the quadratic constraint's constant term; None fixes tau and drops the constraint
    slack     the constraint's slack to start with
    """
    free = constant is not None
    pairs = sum(bucket.count() for bucket in buckets) + free
    gap, stalls, t = float("inf"), 0, max(slack, 1e-300)
    for iteration in range(max_iter):
        for bucket in buckets:
            bucket.assemble(tau)
        if not all(bucket.defined for bucket in buckets):
            return Outcome(tau, gap, iteration, False)
        excess = constant + sum(bucket.quadratic() for bucket in buckets) if constant is not None else 0.0
        residual = -excess - t if free else 0.0
        complementarity = sum(bucket.complementarity() for bucket in buckets) + (t * tau if free else 0.0)
        objective = sum(float(bucket.u.abs().sum()) for bucket in buckets)
        gap = complementarity / max(objective, 1e-300)
        dual = max(bucket.dual_residual() for bucket in buckets)
        if gap < eps_rel and dual < 1e3 * eps_rel and tau * abs(residual) < eps_rel * objective:
            return Outcome(tau, gap, iteration, True)
        if stalls >= 3 or time.perf_counter() > deadline:
            return Outcome(tau, gap, iteration, False)
        mu = complementarity / pairs
        curvature = sum(float((bucket.pull * bucket.pulled).sum()) for bucket in buckets)

        def direction(centre: float, correct: bool, product: float) -> tuple[float, float]:
            """Solve every bucket and the scalar equation for dtau; returns (dt, dtau)."""
            pulled = sum(bucket.respond(centre, correct) for bucket in buckets)
            dtau = 0.0
            if free:
                wanted = centre - t * tau - product  # noqa: B023   used within this iteration only
                dtau = ((wanted - tau * residual) / t + tau / t * pulled) / (1 + tau / t * curvature)  # noqa: B023
            moved = sum(bucket.complete(tau, dtau) for bucket in buckets)
            return residual - moved, dtau  # noqa: B023

        def longest(dt: float, dtau: float) -> float:
            bounds = [bucket.longest() for bucket in buckets]
            if free:
                bounds += [1 / max(-dt / t, 1e-30), 1 / max(-dtau / tau, 1e-30)]  # noqa: B023
            return min(1.0, *bounds)

        dt, dtau = direction(0.0, False, 0.0)
        step = longest(dt, dtau)
        after = sum(bucket.product_after(step) for bucket in buckets)
        after += (t + step * dt) * (tau + step * dtau) if free else 0.0
        sigma = max(after / complementarity, 1e-4) ** 3
        dt, dtau = direction(sigma * mu, True, dt * dtau)
        step = min(1.0, BACKOFF * longest(dt, dtau))
        for bucket in buckets:
            bucket.move(step)
        if free:
            t, tau = t + step * dt, tau + step * dtau
        stalls = stalls + 1 if step < 1e-3 else 0
    return Outcome(tau, gap, max_iter, False)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return torch.matmul(matrices, vectors[..., None])[..., 0]
