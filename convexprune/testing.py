"""The laws of problems and solvers, as functions that the tests of a package of your own call.

Every function returns None, or raises AssertionError with the law that is broken and the figures that show it. A false
certificate would break `weak duality`: there is a feasible point below the bound. Laws are tried on points and
witnesses that are drawn at random, so a pass is strong evidence and no proof.

    check_problem      a problem judges any point, and its bound holds for any witness
    check_formulation  a problem's `to_cvxpy` is the same problem
    check_solver       a solver proposes a point, the same one each time, and changes nothing else
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from convexprune import problem as problems
from convexprune.forms import adapted
from convexprune.layer import Layer
from convexprune.options import positive, whole
from convexprune.problem import LayerProblem, Problem, Solver
from convexprune.solution import Status
from convexprune.solve import solve

STEPS: Final = (0.0, 1e-3, 1e-2, 0.1, 1.0)  # towards a random point
FACTORS: Final = (0.999, 0.99, 0.9, 0.5, 0.0)  # towards 0
NEAR: Final = 1e-6  # relative: how far CVXPY's solvers may be from the optimum


def check_problem(
    problem: Problem, *, points: Iterable[Tensor] = (), witness: Any = None, draws: int = 20, seed: int = 0
) -> None:
    """Check a problem by the laws that certificates rest on, at random points and witnesses.

    Args:
        problem: A small one, which has a feasible point.
        points: Points (M, P) to try beside those drawn between the dense layer, random points and 0. One of all
            these has to be feasible; name one where the dense layer is not.
        witness: A witness of the kind that the problem reads, such as a solution's; the draws are like it, and near
            it. None draws tensors (M, P).
        draws: Number of random directions, and of random witnesses.
        seed: Of the draws.

    Raises:
        AssertionError: Naming the law that the problem breaks.
        TypeError: For what is no problem.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.testing import check_problem
        >>> layer = cp.Layer.from_samples(torch.randn(3, 5), torch.randn(20, 5))
        >>> check_problem(cp.L1Reconstruction(layer, lam=0.1))
    """
    problems.check_problem(problem)
    whole(1)("draws", draws)
    generator = torch.Generator().manual_seed(seed)
    _check_dense(problem)
    found = [*points, *_drawn(problem, draws, generator)]
    for x in found:
        problems.check_point("a point", x, (problem.shape[0], problem.shape[1]))
        _check_figures(problem, x)
    _check_not_finite(problem)
    feasible = [x for x in found if problem.violation(x) == 0]
    _require(bool(feasible), "no point that was tried is feasible; give one that is: check_problem(..., points=[x])")
    like = torch.zeros(problem.shape, dtype=torch.float64) if witness is None else witness
    _check_weak_duality(problem, feasible, [None, *_useless(like), *_witnesses(like, draws, generator)])
    _check_other_shapes(problem, like)
    if isinstance(problem, LayerProblem):
        _check_output_errors(problem, found)


def check_formulation(problem: Problem, *, solver: str = "CLARABEL", tight: bool = True, seed: int = 0) -> None:
    """Check that `to_cvxpy` states the same problem, and that its dual is a witness; needs the extra cvxpy.

    Args:
        problem: A small one, which has a feasible point.
        solver: The solver of CVXPY that is the oracle.
        tight: Whether the dual of the optimum proves it, as it does for a convex problem; False asks only that the
            bound is not above the optimum.
        seed: Of the points at which the two objectives are compared.

    Raises:
        AssertionError: Naming the law that the problem breaks.
        TypeError: For what is no problem.
        ModuleNotFoundError: Without CVXPY.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.testing import check_formulation
        >>> layer = cp.Layer.from_samples(torch.randn(3, 5), torch.randn(20, 5))
        >>> check_formulation(cp.NetTrim(layer, epsilon=0.1))
    """
    problems.check_problem(problem)
    generator = torch.Generator().manual_seed(seed)
    formulation = problem.to_cvxpy()
    for x in _drawn(problem, 3, generator):
        formulation.x.value = x.numpy()
        stated, own = float(formulation.problem.objective.value), problem.value(x)
        _require(_close(stated, own), f"value is {own!r} where the objective of to_cvxpy is {stated!r}")
    formulation.problem.solve(solver=solver)
    optimum, x = float(formulation.problem.value), torch.from_numpy(formulation.x.value).double()
    _require(_close(problem.value(x), optimum), f"value is {problem.value(x)!r} at CVXPY's optimum {optimum!r}")
    missed = problem.violation(x)
    _require(missed <= 1e-4, f"violation is {missed!r} at the point that is optimal for to_cvxpy")
    _check_duals(problem, formulation.witness(), optimum, tight, generator)


def check_solver(solver: Solver, problem: Problem, *, gap: float | None = None) -> None:
    """Check a solver on a problem that it takes.

    It proposes one and the same point each time, without a change of its own fields, of the problem's data or of
    torch's global random numbers; a feasible point is not below its bound; and it begins from a start, or says that
    it cannot: `starts = False`.

    Args:
        solver: The solver, without a limit of time.
        problem: A small one that it can solve.
        gap: The largest relative gap and violation that it may call CONVERGED; None where it has no witness.

    Raises:
        AssertionError: Naming the law that the solver breaks.
        TypeError: For what is no solver or no problem, or does not take the problem.

    Example:
        >>> import torch, convexprune as cp
        >>> from convexprune.testing import check_solver
        >>> layer = cp.Layer.from_samples(torch.randn(3, 5), torch.randn(20, 5))
        >>> check_solver(cp.ADMM(), cp.NetTrim(layer, epsilon=0.1), gap=1e-4)
    """
    if gap is not None:
        positive("gap", gap)
    words, dense, state, name = repr(solver), problem.dense.clone(), torch.get_rng_state(), type(solver).__name__
    first = solve(problem, solver)
    _require(torch.equal(torch.get_rng_state(), state), f"{name} drew from torch's global random numbers")
    _require(repr(solver) == words, f"{name} changed its own fields: {words} is now {solver!r}")
    _require(torch.equal(problem.dense, dense), f"{name} changed the problem's dense weights")
    _require(
        first.status not in (Status.INFEASIBLE, Status.NUMERICAL),
        f"{name} ended with {first.status.name}; give a problem that it solves",
    )
    again = solve(problem, solver)
    _require(torch.equal(first.x, again.x), f"{name} proposed another point when it was called again")
    proof = first.certificate
    if proof.violation == 0:
        _check_weak_duality(problem, [first.x], [first.witness])
    if gap is not None and first.status is Status.CONVERGED:
        _require(proof.meets(gap, gap), f"{name} calls CONVERGED what has {proof}, a gap of {proof.relative_gap:.1e}")
    if problems.can_start(adapted(solver, problem)):
        start = first.x.clone()
        solve(problem, solver, start=start)
        _require(torch.equal(start, first.x), f"{name} changed the start that it was given")


@dataclass(frozen=True)
class _Figures:
    """What a problem says of a point."""

    value: float
    violation: float

    @classmethod
    def of(cls, problem: Problem, x: Tensor) -> _Figures:
        return cls(problem.value(x), problem.violation(x))


def _check_dense(problem: Problem) -> None:
    dense, shape = problem.dense, problem.shape
    _require(isinstance(shape, tuple) and len(shape) == 2, f"shape is {shape!r}, not a tuple (M, P)")
    good = isinstance(dense, Tensor) and dense.dtype == torch.float64 and dense.device.type == "cpu"
    _require(good, "dense is not a float64 tensor on the CPU")
    _require(tuple(dense.shape) == shape, f"dense has shape {tuple(dense.shape)}, and shape is {shape}")
    _require(bool(torch.isfinite(dense).all()), "dense holds NaN or inf")


def _check_figures(problem: Problem, x: Tensor) -> None:
    """A point has one value and one violation, as stored: in float32, as a parameter, and when it is asked again."""
    before, found = x.clone(), _Figures.of(problem, x)
    for name, figure in vars(found).items():
        _require(isinstance(figure, float), f"{name} is a {type(figure).__name__}, not a float")
        _require(not math.isnan(figure), f"{name} is NaN at a finite point")
    _require(found.violation >= 0, f"violation is {found.violation!r}; it is 0 where the point is feasible, else > 0")
    _require(torch.equal(x, before), "a judgement changed the point")
    again = _Figures.of(problem, x.clone().requires_grad_())
    _require(again == found, f"the same point was judged {found}, then {again}")
    stored = x.float()
    single, double = _Figures.of(problem, stored), _Figures.of(problem, stored.double())
    _require(single == double, f"a float32 point was judged {single}, the same numbers as float64 {double}")


def _check_not_finite(problem: Problem) -> None:
    for wrong in (math.nan, math.inf):
        x = problem.dense.clone()
        x[0, 0] = wrong
        found = _Figures.of(problem, x)
        _require(found == _Figures(math.inf, math.inf), f"a point that holds {wrong} was judged {found}, not inf")


def _check_weak_duality(problem: Problem, feasible: Iterable[Tensor], witnesses: Iterable[Any]) -> None:
    values = [problem.value(x) + _rounding(problem, x) for x in feasible]
    for witness in witnesses:
        bound = problem.lower_bound(witness)
        _require(isinstance(bound, float), f"lower_bound is a {type(bound).__name__}, not a float")
        _require(
            bound <= min(values),
            f"weak duality: the bound is {bound!r}, and a feasible point has the value {min(values)!r}, at the witness "
            f"{witness!r}",
        )


def _check_other_shapes(problem: Problem, like: Any) -> None:
    if isinstance(like, Tensor):
        other = torch.zeros(like.shape[0] + 1, *like.shape[1:], dtype=like.dtype)
        try:
            problem.lower_bound(other)
        except (TypeError, ValueError):
            return
        _require(False, f"a witness of shape {tuple(other.shape)} was read; it has to raise ValueError")


def _check_output_errors(problem: Any, points: Iterable[Tensor]) -> None:
    layer = getattr(problem, "layer", None)
    for x in points:
        errors = problem.output_errors(x)
        good = isinstance(errors, Tensor) and errors.dtype == torch.float64 and tuple(errors.shape) == (len(x),)
        _require(good, f"output_errors are not a float64 tensor of shape ({len(x)},)")
        _require(not bool(errors.isnan().any()) and bool((errors >= 0).all()), f"output_errors are {errors.tolist()}")
        if isinstance(layer, Layer) and layer.inputs is not None:
            below = errors < _changes(layer, x) * (1 - 1e-9) - 1e-12 * float(layer.targets_or_dense.norm())
            _require(
                not bool(below.any()),
                f"the outputs {below.nonzero().flatten().tolist()} change by more than output_errors say",
            )


def _changes(layer: Layer, x: Tensor) -> Tensor:
    """(M,): || act(X x_m) - act(Y_m) ||, computed directly."""
    now, then = layer.affine_inputs.double() @ x.double().T, layer.targets_or_dense.double()
    if layer.activation == "relu":
        now, then = now.relu(), then.relu()
    changes: Tensor = (now - then).norm(dim=0)
    return changes


def _check_duals(problem: Problem, witness: Any, optimum: float, tight: bool, generator: torch.Generator) -> None:
    """The optimal dual proves the optimum, and what lies near it, where an invalid bound would show, no more."""
    slack = NEAR * max(abs(optimum), 1e-9)
    bound = problem.lower_bound(witness)
    _require(
        not tight or bound >= optimum - max(slack, 1e-6),
        f"the dual of the optimum {optimum!r} gives the bound {bound!r}; if none is tight, check with tight=False",
    )
    for near in (witness, *_near(witness, 20, generator)):
        bound = problem.lower_bound(near)
        _require(bound <= optimum + slack, f"weak duality: the bound is {bound!r}, and the optimum {optimum!r}")


def _drawn(problem: Problem, draws: int, generator: torch.Generator) -> list[Tensor]:
    """Points between the dense layer and random ones of its size, and between it and 0."""
    dense = problem.dense
    size = float(dense.abs().max()) or 1.0
    points = [dense * factor for factor in FACTORS]
    for _ in range(draws):
        direction = size * _normal(dense, generator) - dense
        points += [dense + step * direction for step in STEPS]
    return points


def _witnesses(like: Any, draws: int, generator: torch.Generator) -> list[Any]:
    """Random witnesses of all sizes, and some near the one that is given."""
    sizes = [10.0**power for power in torch.linspace(-6, 6, draws).tolist()]
    return [
        *(_map(like, lambda t, s=size: s * _normal(t, generator)) for size in sizes),
        *_near(like, draws, generator),
    ]


def _near(witness: Any, draws: int, generator: torch.Generator) -> list[Any]:
    """The witness, with noise of all sizes, scaled."""
    found: list[Any] = []
    for power in torch.linspace(-12, 0, draws).tolist():
        noise = 10.0**power
        for scale in (1.0, 1.01, 1e3):
            found.append(_map(witness, lambda t, n=noise, s=scale: s * (t + n * _size(t) * _normal(t, generator))))
    return found


def _useless(like: Any) -> list[Any]:
    """Witnesses that say nothing."""
    return [_map(like, lambda t, value=value: torch.full_like(t, value)) for value in (0.0, math.nan, math.inf)]


def _map(witness: Any, change: Any) -> Any:
    """The witness with each of its arrays and numbers changed."""
    if isinstance(witness, tuple):
        return tuple(_map(part, change) for part in witness)
    if isinstance(witness, Tensor):
        return change(witness.detach().cpu().double())
    if isinstance(witness, (int, float)):
        return float(change(torch.tensor(float(witness), dtype=torch.float64)))
    return witness


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def _size(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _rounding(problem: Any, x: Tensor) -> float:
    """By how much the value may be off, where the problem says."""
    rounding = getattr(problem, "rounding", None)
    return float(rounding(x)) if callable(rounding) else 0.0


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=NEAR, abs_tol=1e-8)


def _require(law: bool, broken: str) -> None:
    """Raise AssertionError with a sentence; an assert statement would vanish under python -O."""
    if not law:
        raise AssertionError(broken)
