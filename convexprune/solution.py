"""What a solver returns, and what the problem says of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor


class Status(Enum):
    """Why a solver stopped; never how good its point is (that is the certificate's business)."""

    CONVERGED = "the stopping rule was met"
    MAX_ITER = "the iteration limit was reached; try a larger max_iter"
    TIME_LIMIT = "the time limit was reached; try a larger time_limit"
    INFEASIBLE = "no point satisfies the constraints; try a larger epsilon, or a larger slack"
    NUMERICAL = "the solver stalled or met non-finite numbers; check the layer's moments, or add damping"


@dataclass(frozen=True)
class Certificate:
    """The problem's own verdict on a point, in float64.

    value      the objective at the point
    bound      a lower bound of the objective over all feasible points; inf proves that there are none
    violation  how far the point is from feasible, relative; rounded up, so 0 only when it is feasible
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
        """The stopping rule: violation <= eps_abs and relative gap <= eps_rel."""
        return self.relative_gap <= eps_rel and self.violation <= eps_abs


@dataclass(frozen=True)
class TracePoint:
    """One look at a run: seconds since its start and the certificate of the point it then held."""

    seconds: float
    certificate: Certificate


@dataclass(frozen=True, eq=False)
class Attempt:
    """What a solver proposes: a point, a dual witness where it has one, and why it stopped."""

    x: Tensor
    witness: Any
    status: Status
    iterations: int
    trace: tuple[TracePoint, ...] = ()
    note: str = ""  # what there is to say besides the status


@dataclass(frozen=True, eq=False)
class Solution:
    """A point with its certificate.

    x (M, P), float64 on the CPU: the layer's weights, the bias (if there is one) as the last column.
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
