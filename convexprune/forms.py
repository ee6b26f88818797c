"""The forms of problems, the properties that a solver may read of each form, and the rule for which solver takes which.

A problem declares its form by name, among its own bases: `class L1Reconstruction(LassoProblem)`. It promises to be
that minimisation, all of it and nothing more; `takes` of a solver names the forms that it solves, or classes of
problems, or `Problem` for any.

    declared(problem) = the forms among type(problem).__bases__, and those that they refine

A parent's declaration does not count: a subclass may have added a term or a constraint, which a solver of the form
would not see. A subclass that is still of the form names it again, as in `class Mine(L1Reconstruction, LassoProblem)`.
A form, in turn, is a class with `Form` among its own bases.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from convexprune.problem import Problem, Solver, check_problem, check_solver, stated

if TYPE_CHECKING:
    from collections.abc import Iterable

    from convexprune.curve import Curve
    from convexprune.patterns import Pattern


class Form(Problem):
    """The marker of forms: a class is a form if this stands among its own bases."""


def declared(problem: object) -> tuple[type, ...]:
    """The forms of a problem by the rule above, each before those that it refines."""
    return _declared(type(problem))


def taken(solver: Any) -> tuple[type, ...]:
    """The forms, or classes of problems, that a solver says it takes; `Problem` if it takes any."""
    takes = getattr(solver, "takes", Problem)
    return takes if isinstance(takes, tuple) else (takes,)


def adapted(solver: Any, problem: Problem) -> Solver:
    """The solver as it runs on a problem.

    Raises TypeError for what is no solver or does not take the problem, and what the solver raises of it.
    """
    check_solver(solver)
    takes = taken(solver)
    fitting = [kind for kind in (type(problem), *declared(problem), Problem) if kind in takes]
    if not fitting:
        names = " or ".join(form.__name__ for form in takes)
        raise TypeError(f"{type(solver).__name__} takes {names} problems; {undeclared(problem, takes[0])}")
    for kind in fitting:
        check_problem(problem, kind)
    return solver.adapted(problem) if hasattr(solver, "adapted") else solver  # type: ignore[no-any-return]


def undeclared(problem: object, wanted: type) -> str:
    """Why a problem is not of the wanted form, and how it would say that it is: a clause for an error."""
    name, own = type(problem).__name__, declared(problem)
    if own:
        return f"{name} is of the form {own[0].__name__}"
    for parent in type(problem).__mro__[1:]:
        forms = () if Form in parent.__bases__ else _declared(parent)
        if forms:
            return (
                f"{name} declares no form. Its parent {parent.__name__} is of the form {forms[0].__name__}, but a "
                f"subclass may minimise something else; if {name} does not, name the form among its own bases: "
                f"class {name}({parent.__name__}, {forms[0].__name__})"
            )
    return f"{name} declares no form; if it is of one, name it among its bases, as in class {name}({wanted.__name__})"


def _declared(kind: type) -> tuple[type, ...]:
    own = (base for base in kind.__bases__ if Form in base.__bases__)
    return tuple(dict.fromkeys(form for base in own for form in base.__mro__ if Form in form.__bases__))


class BallProblem(Form):
    """Minimise ||x||_1 over || (X x^T - Y)_active ||_F <= radius and X x^T <= ceiling elsewhere."""

    @stated
    def inputs(self) -> Tensor:
        """X (n, P)."""

    @stated
    def outputs(self) -> Tensor:
        """Y (n, M), float64; zero where inactive."""

    @stated
    def active(self) -> Tensor:
        """(n, M) bool: the entries that the ball covers."""

    @stated
    def ceiling(self) -> Tensor:
        """V, float64, (n, M) or broadcastable to it; read only where inactive."""

    @stated
    def radius(self) -> float:
        """The ball's radius."""


class LassoProblem(Form):
    """Minimise 1/2 tr(x G x^T) - <C, x> + lam ||x||_1 + constant."""

    @stated
    def gram(self) -> Tensor:
        """G (P, P), float64."""

    @stated
    def cross(self) -> Tensor:
        """C (M, P), float64."""

    @stated
    def lam(self) -> float:
        """The weight of the L1 norm."""


class StackedProblem(Form):
    """A module's groups, each with a problem of its own; a point is their points, one below the other."""

    @stated
    def parts(self) -> tuple[Problem, ...]:
        """Each group by itself."""


class GroupedLeastSquares(StackedProblem, Form):
    """Sparse least squares of the M neurons of a module, in groups that have each a Gram matrix of its own.

    A solver works on W (M, N), the groups one below the other; `completed` makes the problem's point of it. With one
    Gram matrix for all neurons it is `SparseLeastSquares`.
    """

    @stated
    def parts(self) -> tuple[SparseLeastSquares, ...]:
        """Each group by itself; only the problem itself where all neurons are one group."""

    @stated
    def target(self) -> Tensor:
        """(M, N), float64: the dense weights."""

    @stated
    def pattern(self) -> Pattern:
        """Which supports are allowed."""

    @stated
    def kernel(self) -> int:
        """The number of kernel positions behind each input channel; 1 if linear."""

    @stated
    def always(self) -> Tensor | None:
        """(M, N) bool: weights that must stay in the support."""

    @abstractmethod
    def select(self, scores: Tensor, grow: float = 1.0) -> Tensor:
        """(M, N) bool: the allowed support with the largest sum of scores (M, N) >= 0, or one `grow` times larger."""

    @abstractmethod
    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: the weights with the best bias as the last column, if the layer has one."""


class SparseLeastSquares(GroupedLeastSquares, Form):
    """Minimise tr(W G W^T) - 2 <C, W> + sum(energies) over W (M, N) with a support in the pattern."""

    @property
    def parts(self) -> tuple[SparseLeastSquares, ...]:
        """Itself: all neurons share one Gram matrix."""
        return (self,)

    @stated
    def gram(self) -> Tensor:
        """G (N, N), float64."""

    @stated
    def cross(self) -> Tensor:
        """C (M, N), float64."""

    @stated
    def energies(self) -> Tensor:
        """(M,), float64: the value at W = 0, one for each neuron."""


class SharedPattern(GroupedLeastSquares, Form):
    """Sparse least squares whose groups share a pattern."""

    @stated
    def spans(self) -> bool:
        """Whether the groups compete for one count; otherwise each of the `parts` has its full pattern."""

    @abstractmethod
    def divided(self, mask: Tensor) -> tuple[SparseLeastSquares, ...]:
        """The groups, each with the share of the count that a support (M, N) bool of the module gives it."""


class PerspectiveProblem(SparseLeastSquares, Form):
    """Sparse least squares whose `lower_bound` takes a witness (v, d) of the perspective bound: v (M, N), d (N,)."""

    @stated
    def diagonal(self) -> Tensor:
        """(N,): a d >= 0 with G - diag(d) positive semidefinite, from which to look for a better one."""


class FactoredLeastSquares(Form):
    """Minimise tr(W G W^T) - 2 <C, W> + sum(energies), W = A B, over A (M, r) and B (r, N) with few nonzeros together.

    Not convex, but in each factor alone it is a `SparseLeastSquares`. A solver works on A and B; `joined` makes the
    problem's point of them.
    """

    @stated
    def gram(self) -> Tensor:
        """G (N, N), float64."""

    @stated
    def cross(self) -> Tensor:
        """C (M, N), float64."""

    @stated
    def target(self) -> Tensor:
        """(M, N), float64: the dense weights."""

    @stated
    def width(self) -> int:
        """r."""

    @stated
    def count(self) -> int:
        """The largest number of nonzeros of A and B together."""

    @abstractmethod
    def left(self, right: Tensor, count: int) -> SparseLeastSquares:
        """What A minimises beside a B (r, N), with so many nonzeros of its own: Gram matrix B G B^T, cross C B^T."""

    @abstractmethod
    def single(self, count: int) -> SparseLeastSquares:
        """What B minimises beside A = I, or A beside B = I: one sparse matrix of so many nonzeros."""

    @abstractmethod
    def joined(self, left: Tensor, right: Tensor) -> Tensor:
        """The point of A (M, r) and B (r, N), float64, with the best bias, if the layer has one."""


class LeastSquares(NamedTuple):
    """Minimise tr(W G W^T) - 2 <C, W> over the weights of some neurons, zero where `removed`."""

    neurons: Tensor  # (M,) bool
    gram: Tensor  # (N, N)
    cross: Tensor  # (neurons, N)
    removed: Tensor  # (neurons, N) bool
    dense: Tensor  # (neurons, N)


class EqualityQuadratic(Form):
    """Minimise tr(x G x^T) - 2 <C, x> + energy over x (M, P) that is zero where `removed`."""

    @stated
    def gram(self) -> Tensor:
        """G (P, P), float64."""

    @stated
    def cross(self) -> Tensor:
        """C (M, P), float64."""

    @stated
    def removed(self) -> Tensor:
        """(M, P) bool."""

    def pieces(self) -> Iterable[LeastSquares]:
        """The same as it stands; or without a bias, which is put at its best: with a large mean better conditioned."""
        yield LeastSquares(self.removed.new_ones(len(self.removed)), self.gram, self.cross, self.removed, self.dense)

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: the weights of all pieces, with the bias that belongs to them where the pieces have none."""
        return weight


class KnapsackProblem(Form):
    """Choose one level for each of G groups: least summed distortion at a summed cost within the budget."""

    @stated
    def curves(self) -> tuple[Curve, ...]:
        """One for each layer."""

    @stated
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Groups of curve indices that must take the same level."""

    @stated
    def budget(self) -> float:
        """In the unit of the costs."""

    @stated
    def room(self) -> float:
        """The budget plus the rounding error of a sum of costs; solvers compare costs with this."""

    @stated
    def cheapest(self) -> float:
        """The cost of the cheapest choice."""

    @stated
    def table(self) -> tuple[Any, Any]:
        """Cost and distortion (G, K) of the undominated levels by rising cost, padded with inf."""

    @abstractmethod
    def point(self, choice: Any) -> Tensor:
        """(L, 1): the point of a choice (G,) among those levels."""


class BudgetProblem(Form):
    """Share a goal among L layers: minimise sum_l n_l log(cap_l / e_l) with sum_l g_l e_l <= goal and e_l <= cap_l."""

    @stated
    def gains(self) -> Tensor:
        """(L,) >= 0, float64: g."""

    @stated
    def sizes(self) -> Tensor:
        """(L,) > 0, float64: n."""

    @stated
    def caps(self) -> Tensor:
        """(L,) > 0, float64."""

    @stated
    def goal(self) -> float:
        """> 0."""


class MergingProblem(Form):
    """Choose survivors among n neurons, and the survivor that each other neuron joins; see NeuronMerging."""

    @stated
    def features(self) -> Tensor:
        """(n, d), float64: rows whose squared distances are those of the neurons."""

    @stated
    def importance(self) -> Tensor:
        """(n,): <a_j^2>."""

    @stated
    def outgoing(self) -> Tensor:
        """(out, n), float64."""

    @stated
    def keep(self) -> int | None:
        """Maximum number of surviving neurons; None if `max_saliency` is set."""

    @stated
    def max_saliency(self) -> float | None:
        """Maximum total saliency, at which survivors are minimised; None if `keep` is set."""
