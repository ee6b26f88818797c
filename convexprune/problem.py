"""What a problem is, what a solver is, and the verdict of the one on the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from convexprune.solution import Attempt, Certificate

if TYPE_CHECKING:
    from collections.abc import Callable

    import cvxpy as cp


@runtime_checkable
class Problem(Protocol):
    """A minimisation that can judge any point. It trusts no solver: every figure is recomputed in float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """(M, P) of a point x."""

    @property
    def dense(self) -> Tensor:
        """(M, P), float64: the dense layer as a point."""

    def value(self, x: Tensor) -> float:
        """The objective at x; inf for an x that is not finite."""

    def violation(self, x: Tensor) -> float:
        """How far x is from feasible, relative, rounded up: 0 only when it is feasible; inf for an x not finite."""

    def lower_bound(self, witness: Any) -> float:
        """A number <= value(x) for every feasible x, for any witness at all; None gives the trivial bound.

        inf where the witness proves that no x is feasible: that is what keeps a solver's Status.INFEASIBLE.
        """

    def to_cvxpy(self) -> Formulation:
        """The same problem, readable, for CVXPY."""


@runtime_checkable
class LayerProblem(Problem, Protocol):
    """A problem over the weights of a layer, which `prune` can write back."""

    def output_errors(self, x: Tensor) -> Tensor:
        """(M,), float64: upper bounds of || act(X x_m) - act(Y_m) || for each output m over the calibration samples."""


@dataclass(frozen=True, eq=False)
class Formulation:
    """A problem written in CVXPY: `problem` over `x` (M, P); after a solve, `witness()` is its dual witness."""

    problem: cp.Problem
    x: cp.Variable
    witness: Callable[[], Any]


class Solver(Protocol):
    """A small frozen object whose options are its fields.

    One that takes only some problems says so in a class attribute `takes`, one of `convexprune.forms`.
    """

    def solve(self, problem: Any, start: Tensor | None = None) -> Attempt:
        """Propose a point; `start` (M, P) is where to begin, if the algorithm can use it."""


def judge(problem: Problem, x: Tensor, witness: Any = None) -> Certificate:
    """The problem's verdict on x, whoever proposed it."""
    return Certificate(problem.value(x), problem.lower_bound(witness), problem.violation(x))
