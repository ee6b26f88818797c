"""The forms that problems take: what a solver may ask of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from convexprune.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convexprune.curve import Curve
    from convexprune.patterns import Pattern


@runtime_checkable
class BallProblem(Protocol):
    """Minimise ||x||_1 over || (X x^T - Y)_active ||_F <= radius and X x^T <= ceiling elsewhere."""

    @property
    def inputs(self) -> Tensor:
        """X (n, P)."""

    @property
    def outputs(self) -> Tensor:
        """Y (n, M), float64; zero where inactive."""

    @property
    def active(self) -> Tensor:
        """(n, M) bool: the entries that the ball covers."""

    @property
    def ceiling(self) -> Tensor:
        """V, float64, (n, M) or broadcastable to it; read only where inactive."""

    @property
    def radius(self) -> float:
        """The ball's radius."""


@runtime_checkable
class LassoProblem(Protocol):
    """Minimise 1/2 tr(x G x^T) - <C, x> + lam ||x||_1 + constant."""

    @property
    def gram(self) -> Tensor:
        """G (P, P), float64."""

    @property
    def cross(self) -> Tensor:
        """C (M, P), float64."""

    @property
    def lam(self) -> float:
        """The weight of the L1 norm."""


@runtime_checkable
class SparseLeastSquares(Problem, Protocol):
    """Minimise tr(W G W^T) - 2 <C, W> + sum(energies) over W (M, N) with a support in the pattern.

    A solver works on W; `completed` makes the problem's point of it.
    """

    @property
    def gram(self) -> Tensor:
        """G (N, N), float64."""

    @property
    def cross(self) -> Tensor:
        """C (M, N), float64."""

    @property
    def energies(self) -> Tensor:
        """(M,), float64: the value at W = 0, one for each neuron."""

    @property
    def target(self) -> Tensor:
        """(M, N), float64: the dense weights."""

    @property
    def pattern(self) -> Pattern:
        """Which supports are allowed."""

    @property
    def kernel(self) -> int:
        """The number of kernel positions behind each input channel; 1 if linear."""

    @property
    def always(self) -> Tensor | None:
        """(M, N) bool: weights that must stay in the support."""

    def select(self, scores: Tensor, grow: float = 1.0) -> Tensor:
        """(M, N) bool: the allowed support with the largest sum of scores (M, N) >= 0, or one `grow` times larger."""

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: the weights with the best bias as the last column, if the layer has one."""


@runtime_checkable
class PerspectiveProblem(SparseLeastSquares, Protocol):
    """Sparse least squares whose `lower_bound` takes a witness (v, d) of the perspective bound: v (M, N), d (N,)."""

    @property
    def diagonal(self) -> Tensor:
        """(N,): a d >= 0 with G - diag(d) positive semidefinite, from which to look for a better one."""


class LeastSquares(NamedTuple):
    """Minimise tr(W G W^T) - 2 <C, W> over the weights of some neurons, zero where `removed`."""

    neurons: Tensor  # (M,) bool
    gram: Tensor  # (N, N)
    cross: Tensor  # (neurons, N)
    removed: Tensor  # (neurons, N) bool
    dense: Tensor  # (neurons, N)


@runtime_checkable
class EqualityQuadratic(Problem, Protocol):
    """Minimise tr(x G x^T) - 2 <C, x> + energy over x (M, P) that is zero where `removed`."""

    @property
    def gram(self) -> Tensor:
        """G (P, P), float64."""

    @property
    def cross(self) -> Tensor:
        """C (M, P), float64."""

    @property
    def removed(self) -> Tensor:
        """(M, P) bool."""

    def pieces(self) -> Iterable[LeastSquares]:
        """The same without the bias, which is put at its best: for a large mean that is far better conditioned."""

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: the weights (M, N) of all pieces with the bias that belongs to them."""


@runtime_checkable
class KnapsackProblem(Problem, Protocol):
    """Choose one level for each of G groups: least summed distortion at a summed cost within the budget."""

    @property
    def curves(self) -> tuple[Curve, ...]:
        """One for each layer."""

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The curves that choose together, by their numbers."""

    @property
    def budget(self) -> float:
        """In the unit of the costs."""

    @property
    def room(self) -> float:
        """The budget, with what rounding may add to a sum of costs that are no integers: what solvers compare with."""

    @property
    def cheapest(self) -> float:
        """What the cheapest choice costs."""

    @property
    def table(self) -> tuple[Any, Any]:
        """Cost and distortion (G, K) of the undominated levels by rising cost, padded with inf."""

    def point(self, choice: Any) -> Tensor:
        """(L, 1): the point of a choice (G,) among those levels."""


@runtime_checkable
class BudgetProblem(Problem, Protocol):
    """Share a goal among L layers: minimise sum_l n_l log(cap_l / e_l) with sum_l g_l e_l <= goal and e_l <= cap_l."""

    @property
    def gains(self) -> Tensor:
        """(L,) >= 0, float64: g."""

    @property
    def sizes(self) -> Tensor:
        """(L,) > 0, float64: n."""

    @property
    def caps(self) -> Tensor:
        """(L,) > 0, float64."""

    @property
    def goal(self) -> float:
        """> 0."""


class MergingProblem(Problem, Protocol):
    """Choose survivors among n neurons, and whom each other joins; see NeuronMerging."""

    @property
    def features(self) -> Tensor:
        """(n, d), float64: rows whose squared distances are those of the neurons."""

    @property
    def importance(self) -> Tensor:
        """(n,): <a_j^2>."""

    @property
    def outgoing(self) -> Tensor:
        """(out, n), float64."""

    @property
    def keep(self) -> int | None:
        """At most so many survivors, or"""

    @property
    def max_saliency(self) -> float | None:
        """the largest sum of saliencies, with as few survivors as can be."""
