"""The answer of a solver, and the problem's verdict on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor


class Status(Enum):
    """Why a solver stopped; its certificate, not its status, says how good its point is.

    Example:
        >>> import convexprune as cp
        >>> cp.Status.TIME_LIMIT.value
        'the time limit was reached; try a larger time_limit'
    """

    CONVERGED = "the stopping rule was met"
    UNPROVEN = "the point is what an exact method gives, but its certificate does not show that it is optimal"
    MAX_ITER = "the iteration limit was reached; try a larger max_iter"
    TIME_LIMIT = "the time limit was reached; try a larger time_limit"
    INFEASIBLE = "no point satisfies the constraints; try a larger epsilon, or a larger slack"
    NUMERICAL = "the solver stalled or met non-finite numbers; check the layer's moments, or add damping"


@dataclass(frozen=True)
class Certificate:
    """The problem's own verdict on a point, in float64.

    Args:
        value: The objective at the point.
        bound: A lower bound of the objective over all feasible points; inf proves that there are none.
        violation: Relative distance of the point from feasibility, rounded up: 0 only when it is feasible.

    Example:
        >>> import convexprune as cp
        >>> verdict = cp.Certificate(value=2.0, bound=1.5, violation=0.0)
        >>> verdict.relative_gap, verdict.meets(eps_abs=1e-6, eps_rel=0.3)
        (0.25, True)
    """

    value: float
    bound: float
    violation: float

    @property
    def relative_gap(self) -> float:
        """(value - bound) / max(|value|, |bound|): how far above the optimum a feasible point can be, relative.

        0 where both are equal; at most 1 for an objective that is not negative; infinite where one of the two is.
        """
        apart = self.value - self.bound
        if self.value == self.bound or not math.isfinite(apart):
            return 0.0 if self.value == self.bound else apart
        return apart / max(abs(self.value), abs(self.bound))

    def meets(self, eps_abs: float, eps_rel: float) -> bool:
        """The stopping rule: violation <= eps_abs and relative gap <= eps_rel.

        A feasible point whose value is far below its bound does not meet it: rounding has hidden the value.
        """
        if self.violation == 0 and self.relative_gap < -eps_rel:
            return False
        return self.relative_gap <= eps_rel and self.violation <= eps_abs


@dataclass(frozen=True)
class TracePoint:
    """One look at a run: seconds since its start and the certificate of the point it then held."""

    seconds: float
    certificate: Certificate


@dataclass(frozen=True, eq=False)
class Attempt:
    """What a solver proposes; `solve` makes a certified `Solution` of it.

    Args:
        x: The point (M, P).
        witness: A dual witness in the form that the problem reads, or None.
        status: Why the solver stopped.
        iterations: Number of the solver's own steps.
        trace: Certificates on the way, if the solver looked at any.
        note: What the user should know besides the status, such as a change of precision.

    Example:
        >>> import torch, convexprune as cp
        >>> cp.Attempt(torch.zeros(2, 3), witness=None, status=cp.Status.CONVERGED, iterations=1).note
        ''
    """

    x: Tensor
    witness: Any
    status: Status
    iterations: int
    trace: tuple[TracePoint, ...] = ()
    note: str = ""  # what there is to say besides the status


@dataclass(frozen=True, eq=False)
class Solution:
    """A point with its certificate; `print` shows both in a few lines.

    Args:
        x: The point (M, P), float64 on the CPU: the layer's weights, the bias (if there is one) as the last column.
        witness: The solver's dual witness, or None.
        status: Why the solver stopped.
        certificate: The problem's verdict on the point.
        seconds: Duration of the solve.
        iterations: Number of the solver's own steps.
        solver: The solver that ran, with its options, as one would write it.
        trace: Certificates on the way, if the solver looked at any.
        note: What to know besides the status, or "".

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> cp.solve(cp.Reconstruction(layer, cp.PerRow(1)), cp.Magnitude()).solver
        'Magnitude()'
    """

    x: Tensor
    witness: Any = field(repr=False)
    status: Status
    certificate: Certificate
    seconds: float
    iterations: int
    solver: str
    trace: tuple[TracePoint, ...] = field(default=(), repr=False)
    note: str = ""

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.x.shape))
        return f"Solution({size}, {self.status.name}, {self.certificate}, solver={self.solver})"

    def __str__(self) -> str:
        """A few lines: the point, why the solver stopped, and the problem's verdict."""
        proof, size = self.certificate, " x ".join(map(str, self.x.shape))
        kept = int((self.x != 0).sum())
        feasible = "feasible" if proof.violation == 0 else f"violation {proof.violation:.1e}"
        return "\n".join([
            f"{size} point, {kept:,} of {self.x.numel():,} entries not zero, by {self.solver}",
            f"{self.status.name}: {self.status.value}" + (f"; {self.note}" if self.note else ""),
            f"value {proof.value:.6g}, bound {proof.bound:.6g}, relative gap {proof.relative_gap:.1e}, {feasible}",
            f"{self.iterations:,} iterations, {self.seconds:.2f} s",
        ])  # fmt: skip
