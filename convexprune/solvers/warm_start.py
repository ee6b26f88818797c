"""A solver that begins each layer where it ended the layer's last problem, for a path of problems."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from convexprune.forms import adapted, taken
from convexprune.problem import Problem, Solver, can_start, check_solver
from convexprune.solution import Attempt, Status


@dataclass(frozen=True)
class WarmStart:
    """Another solver, whose points are kept by the layer's name; a problem without a layer begins as it would.

    Source: Friedman, Hastie, Tibshirani, Journal of Statistical Software 2010, section 2.5 (paths by warm starts).
    """

    inner: Solver
    _points: dict[tuple[str, ...], Tensor] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_solver(self.inner)

    @classmethod
    def of(cls, solver: Solver) -> Solver:
        """With warm starts, where the solver can begin from a start."""
        return cls(solver) if can_start(check_solver(solver)) else solver

    @property
    def takes(self) -> tuple[type, ...]:
        """As the inner solver."""
        return taken(self.inner)

    def adapted(self, problem: Problem) -> Solver:
        """With the inner solver as it will run, and the same points."""
        fitting = adapted(self.inner, problem)
        return WarmStart(fitting, self._points) if can_start(fitting) else fitting

    def solve(self, problem: Any, start: Tensor | None = None) -> Attempt:
        """The inner solver's proposal, from `start` if it is given, else from the layer's last point."""
        layers = [getattr(part, "layer", None) for part in getattr(problem, "parts", (problem,))]
        key = tuple(getattr(layer, "name", "") for layer in layers)
        known = self._points.get(key) if all(key) else None
        if start is None and known is not None and known.shape == problem.dense.shape:
            start = known
        found = self.inner.solve(problem, start)
        if all(key) and found.status not in (Status.INFEASIBLE, Status.NUMERICAL):
            self._points[key] = found.x.detach()
        return found
