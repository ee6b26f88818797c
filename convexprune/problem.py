"""What a problem is, what a solver is, and the verdict of the one on the other."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from convexprune.solution import Attempt, Certificate

if TYPE_CHECKING:
    from abc import abstractproperty
    from collections.abc import Callable

    import cvxpy as cp

    stated = abstractproperty
else:

    class stated:
        """What a problem has to state: as a field, a property or a cached property.

        An abstract property would be found by @dataclass and taken for the field's default; this one is not found.
        """

        def __init__(self, describe: Callable[[Any], Any]) -> None:
            self.__doc__, self.name = describe.__doc__, describe.__name__

        def __get__(self, problem: Any, kind: type) -> Any:
            raise AttributeError(f"{kind.__name__} does not state its {self.name}")


@runtime_checkable
class Problem(Protocol):
    """A minimisation that can judge any point. It trusts no solver: every figure is recomputed in float64."""

    @stated
    def shape(self) -> tuple[int, int]:
        """(M, P) of a point x."""

    @stated
    def dense(self) -> Tensor:
        """(M, P), float64: the dense layer as a point."""

    @abstractmethod
    def value(self, x: Tensor) -> float:
        """The objective at x; inf for an x that is not finite."""

    @abstractmethod
    def violation(self, x: Tensor) -> float:
        """How far x is from feasible, relative, rounded up: 0 only when it is feasible; inf for an x not finite."""

    @abstractmethod
    def lower_bound(self, witness: Any) -> float:
        """A number <= value(x) for every feasible x, for any witness at all; None gives the trivial bound.

        inf where the witness proves that no x is feasible: that is what keeps a solver's Status.INFEASIBLE.
        """

    @abstractmethod
    def to_cvxpy(self) -> Formulation:
        """The same problem, readable, for CVXPY."""


@runtime_checkable
class LayerProblem(Problem, Protocol):
    """A problem over the weights of a layer, which `prune` can write back."""

    @abstractmethod
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

    Three attributes are read where a solver has them; without them it takes any problem, may use a start, and runs
    as it is:

    takes             the forms of the problems that it solves: one of `convexprune.forms`, or a tuple of them; a
                      problem's own class for that alone, `Problem` for any
    starts            False: it cannot begin from a start, and `solve` refuses to give it one
    adapted(problem)  the solver that runs on this problem, itself or another; raises ValueError or TypeError for what
                      it cannot take, before the work begins
    """

    def solve(self, problem: Any, start: Tensor | None = None) -> Attempt:
        """Propose a point; `start` (M, P) is where to begin."""


class Misfit(ValueError):
    """What a problem is stated with does not fit the layer's shape, whatever the layer reads.

    `prune` raises it before the work begins.
    """


def judge(problem: Problem, x: Tensor, witness: Any = None) -> Certificate:
    """Judge a point, whoever proposed it: its value, its violation, and a lower bound of all feasible points.

    Args:
        problem: The problem that judges.
        x: The point (M, P). A point that is not finite has value and violation inf.
        witness: A dual witness, as a solution holds it; any witness gives a valid bound, None the trivial one.

    Returns:
        The verdict, computed in float64.

    Raises:
        TypeError: For what is no problem, no tensor of real numbers, or no witness that the problem can read.
        ValueError: For a point of another shape.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[5.0, 2.0, 0.0], [1.0, -4.0, 3.0]]), torch.eye(3))
        >>> cp.judge(cp.NetTrim(layer, epsilon=0.1), layer.weight)
        Certificate(value=15.0, bound=0.0, violation=0.0)
    """
    check_problem(problem)
    check_point("x", x, (problem.shape[0], problem.shape[1]))
    bound = _bound(problem, witness)
    if not bool(torch.isfinite(x).all()):
        return Certificate(math.inf, bound, math.inf)
    return Certificate(problem.value(x), bound, problem.violation(x))


def check_point(name: str, x: Any, shape: tuple[int, int]) -> None:
    """Raises TypeError for what is no tensor of real numbers, ValueError for one of another shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; give a tensor of shape {shape}")
    if x.is_complex() or x.is_quantized or x.layout != torch.strided or x.device.type == "meta":
        kind = f"{str(x.layout).removeprefix('torch.')} {x.dtype} on {x.device}"
        raise TypeError(f"{name} is {kind}; give a dense tensor of real numbers on the CPU")
    if tuple(x.shape) != shape:
        bias = tuple(x.shape) == (shape[0], shape[1] - 1)
        hint = " (the last column is the bias)" if bias else ""
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape}{hint}")


def _bound(problem: Problem, witness: Any) -> float:
    try:
        return problem.lower_bound(witness)
    except (AttributeError, TypeError, IndexError) as error:
        kind = f"the class {witness.__name__}" if isinstance(witness, type) else f"a {type(witness).__name__}"
        raise TypeError(
            f"the witness is {kind}, which {type(problem).__name__} cannot read ({error}); give the witness of a "
            "solution, or None"
        ) from error


def check_problem(problem: Any, kind: type = Problem) -> None:
    """Raises TypeError for what is no problem of a kind (`Problem`, `LayerProblem`, a form), naming what it lacks.

    Nothing of the problem is evaluated: a property may be dear.
    """
    if isinstance(problem, type):
        raise TypeError(f"the problem is the class {problem.__name__}; give an object of it: {problem.__name__}(...)")
    lacking = [name for name in _members(kind) if not _has(problem, name)]
    if lacking:
        name = type(problem).__name__
        known: dict[type, str] = {Problem: "a problem", LayerProblem: "a problem over the weights of a layer"}
        what = known.get(kind, f"a {kind.__name__}")
        hint = "; state one of it, such as Reconstruction(layer, Unstructured(0.5))" if name == "Layer" else ""
        raise TypeError(f"{name} is not {what}: it lacks {', '.join(lacking)}{hint}")


def check_solver(solver: Any) -> Solver:
    """The solver; raises TypeError for what is none: a name, a class."""
    if isinstance(solver, type):
        raise TypeError(f"the solver is the class {solver.__name__}; give an object of it: {solver.__name__}()")
    if not callable(getattr(solver, "solve", None)):
        raise TypeError(
            f"{solver!r} is not a solver, which has a method solve(problem, start); give one such as ADMM()"
        )
    return solver  # type: ignore[no-any-return]


def can_start(solver: Any) -> bool:
    """Whether a solver can begin from a start, as far as it says."""
    return bool(getattr(solver, "starts", True))


def _members(kind: type) -> list[str]:
    """What a problem of a kind has to have, by name."""
    return [name for each in reversed(kind.__mro__) for name, value in vars(each).items() if _open(value)]


def _has(problem: Any, name: str) -> bool:
    missing = object()
    found = inspect.getattr_static(problem, name, missing)
    # what is not found may still come of a __getattr__
    return hasattr(problem, name) if found is missing else not _open(found)


def _open(value: Any) -> bool:
    """Whether it only says that something has to be there."""
    return isinstance(value, stated) or getattr(value, "__isabstractmethod__", False)
