"""A reconstruction problem in coordinates where every input has second moment 1.

    w_i = W_i sqrt(G_ii) / unit,   H_ij = G_ij / sqrt(G_ii G_jj),   value = unit^2 delta H delta^T + constant

with delta = w - optimum. The unit is a power of two near the largest of these weights: float32 squares neither overflow
nor vanish.

Inputs that are constantly zero cannot change the value: they are taken out (H = identity there, weight 0).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares, SparseLeastSquares
from convexprune.rounding import gamma
from convexprune.solution import Attempt, Status
from convexprune.solvers.least_squares.grams import Grams
from convexprune.solvers.least_squares.on_support import improved_on_support, refitted, ridge_of
from convexprune.solvers.least_squares.spd_inverse import NotDefinite, spd_inverse

# of the unit diagonal, for a regular and for a nearly singular H: the Cholesky factors of its parts exist, and choices
# hardly change (measured: up to 1e-4 the errors agree to three digits, 1e-3 moves them by half a percent)
RIDGES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-9, 1e-6)}
# of the dense weights, that float32's inverse may lose (measured on inputs with a common mean: at 3% the errors are
# 0.3% above float64's, at 17% up to 13%; below 1% on most trained layers)
LOST = 0.03
# conjugate-gradient steps between two slopes in float64 (measured: after two passes of them the value is within 5e-5 of
# the least on trained layers); where the second still gains this fraction, the least squares want a factorisation
STEPS, SETTLED = 8, 1e-4
EXACT = 20  # kept^3 summed, over M N^2: from there on the passes are cheaper than factorisations


@dataclass(frozen=True, eq=False)
class Scaled:
    """The moments in float64 on the CPU, and in `dtype` on the device the solver works on.

    Every group has a scale of its own: `grams.rows` expands a group's figures to its neurons.

    Raises torch.linalg.LinAlgError where the Gram matrix is not positive semidefinite.
    """

    grams64: Grams
    optimum64: Tensor  # (M, N): least squares with all weights
    unit: float
    scale: Tensor  # (G, N)
    live: Tensor  # (G, N) bool, on the working device
    ridge: Tensor  # (G, 1), on it: added to the diagonal of parts of H before they are inverted
    grams: Grams
    optimum: Tensor
    cross: Tensor  # optimum H
    dense: Tensor  # the dense weights

    @classmethod
    def of(cls, problem: GroupedLeastSquares, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Scaled:
        """Scale a problem."""
        each = [_Group.of(part) for part in problem.parts]
        gram, scale, live, optimum, cross, dense = (
            _below([getattr(group, name) for group in each])
            for name in ("gram", "scale", "live", "optimum", "cross", "dense")
        )
        grams = Grams.of(gram, len(dense))
        ridges = [max(RIDGES[dtype][group.ridge > 0], 4 * group.ridge) for group in each]
        ridge = torch.tensor(ridges, dtype=dtype, device=device)[:, None]
        unit = _unit(optimum, dense)
        optimum = optimum / unit
        work = [optimum.to(device, dtype), *((tensor / unit).to(device, dtype) for tensor in (cross, dense))]
        return cls(grams, optimum, unit, scale, live.to(device), ridge, grams.to(device, dtype), *work)

    def restored(self, weights: Tensor) -> Tensor:
        """(M, N), float64: the problem's own weights."""
        return weights.detach().cpu().double() * self.unit / self.grams64.rows(self.scale)

    def taken(self, weights: Tensor) -> Tensor:
        """(M, N): a problem's own weights in these coordinates, in the working dtype; the inverse of `restored`."""
        return (weights.detach().cpu().double() * self.grams64.rows(self.scale) / self.unit).to(self.dense)

    @property
    def note(self) -> str:
        """What inputs of deficient rank call for; "" where there are none."""
        ridge = float(self.ridge.max())
        if ridge <= RIDGES[self.ridge.dtype][False]:
            return ""
        return f"the Gram matrix is nearly singular: the support was chosen with a ridge of {ridge:g} of its diagonal"

    def check_inverses(self) -> None:
        """Raise torch.linalg.LinAlgError where float32's inverse of H loses too much of the dense weights.

        W (H + ridge I) is formed in float64, and the inverse in float32 should give W back. It does not where inputs
        share a mean that is large beside what they vary by; float64 is as fine as it gets, and is not checked.
        """
        if self.grams.matrices.dtype is torch.float64:
            return
        inverse = spd_inverse(self.grams.matrices + torch.diag_embed(self.ridge.expand(-1, self.dense.shape[1])))
        wanted = self.dense.cpu().double()
        image = self.grams64.product(wanted) + self.grams64.rows(self.ridge.cpu().double()) * wanted
        found = Grams(inverse, self.grams.owner).product(image.to(self.dense)).cpu().double()
        if not float((found - wanted).norm()) <= LOST * float(wanted.norm()):
            raise NotDefinite("float32's inverses of the Gram matrix are lost in rounding")

    def refined(self, weights: Tensor, mask: Tensor, steps: int = STEPS) -> Tensor:
        """(M, N), float64, on the CPU: scaled weights nearer to least squares on a support (M, N) bool.

        Conjugate gradients for what is left to do, whose slope is formed in float64: it is a small difference, and with
        a common mean float32 would lose it.
        """
        weights = weights.detach().cpu().double() * mask.cpu()
        slope = self.grams64.product(self.optimum64 - weights).to(self.dense)
        step = improved_on_support(self.grams, slope, torch.zeros_like(slope), mask.to(slope.device), steps)
        return weights + step.cpu().double()

    def fitted(self, problem: GroupedLeastSquares, weights: Tensor, mask: Tensor) -> Tensor:
        """(M, N), float64: a problem's own weights, least squares on a support from scaled weights near it.

        By passes of conjugate gradients where they are cheaper and settle, else exactly.
        """
        if float(mask.sum(1).double().pow(3).sum()) > EXACT * mask.numel() * mask.shape[1]:
            once = self.refined(weights, mask)
            twice = self.refined(once, mask)
            value = self.value(twice)
            if self.value(once) - value <= SETTLED * value:
                return self.restored(twice)
        return refitted(problem, mask.cpu())

    def value(self, weights: Tensor) -> float:
        """The value less that of the optimum, over unit^2, of scaled weights (M, N)."""
        delta = weights.detach().cpu().double() - self.optimum64
        return float((self.grams64.product(delta) * delta).sum())


def in_float64_if_lost(solver: Any, run: Callable[[Any], Attempt]) -> Attempt:
    """What `run` proposes with the solver; where float32 ended NUMERICAL, with the same solver in float64.

    The note then says so. Inputs with a common mean, for instance, have Gram matrices beyond float32.
    Raises torch.linalg.LinAlgError where float64 finds a matrix that is not positive definite, too.
    """
    begun = time.perf_counter()
    try:
        attempt = run(solver)
    except NotDefinite:
        if solver.dtype is torch.float64:
            raise
    else:
        if solver.dtype is torch.float64 or attempt.status is not Status.NUMERICAL:
            return attempt
    finer = replace(solver, dtype=torch.float64)
    if getattr(solver, "time_limit", None) is not None:
        finer = replace(finer, time_limit=max(solver.time_limit - (time.perf_counter() - begun), 1e-9))
    note = "float32 ended NUMERICAL, float64 began anew"
    attempt = run(finer)
    return replace(attempt, note=f"{note}; {attempt.note}" if attempt.note else note)


class _Group(NamedTuple):
    """One group in float64; figures of the whole group have a leading dimension of 1."""

    gram: Tensor
    scale: Tensor
    live: Tensor
    optimum: Tensor
    cross: Tensor
    dense: Tensor
    ridge: float

    @classmethod
    def of(cls, part: SparseLeastSquares) -> _Group:
        diagonal = part.gram.diagonal()
        live = diagonal > 0
        scale = torch.where(live, diagonal, 1.0).sqrt()
        gram = torch.where(live[:, None] & live, part.gram / (scale[:, None] * scale), 0.0)
        gram.diagonal().fill_(1.0)
        dense = torch.where(live, part.target * scale, 0.0)
        cross = torch.where(live, part.cross / scale, 0.0)
        ridge = ridge_of(gram)
        optimum, image = _least_squares(gram, cross, dense, ridge)
        return cls(gram[None], scale[None], live[None], optimum, image, dense, ridge)


def _unit(*weights: Tensor) -> float:
    largest = max(float(each.abs().max()) for each in weights)
    return 2.0 ** math.floor(math.log2(largest)) if 0 < largest < math.inf else 1.0


def _below(tensors: list[Tensor]) -> Tensor:
    """One below the other; a large layer is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _least_squares(gram: Tensor, cross: Tensor, dense: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The optimum w (M, N), and w H."""
    image = dense @ gram
    # no entry of H is beyond 1, so a row of dense H is known to that many roundings of the sum of its weights
    settled = (image - cross).abs().amax(1) <= gamma(4 * len(gram) + 16) * dense.abs().sum(1)
    if bool(settled.all()):
        return dense, image
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    found = torch.where(settled[:, None], dense, torch.cholesky_solve((cross + ridge * dense).T, factor).T)
    return found, found @ gram
