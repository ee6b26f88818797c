"""Divide a budget for the whole network into a count for each module: a knapsack over rate-distortion curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from convexprune.allocate.rate_distortion import LEVELS, Measure, checked_levels, rate_distortion
from convexprune.curve import Curve
from convexprune.network import Calibration, capture
from convexprune.network.forward import check_batch, check_batches, tensors_in
from convexprune.options import Check, having, number, optional, text
from convexprune.options import path as check_path
from convexprune.problem import Solver, check_solver
from convexprune.problems import SparsityAllocation
from convexprune.report.progress import Progress
from convexprune.report.shares import Share, Shares
from convexprune.solution import Status
from convexprune.solve import solve


@dataclass(frozen=True, eq=False)
class Allocation:
    """How `prune` divides a budget among the modules; the groups of a convolution compete for their module's count.

    Args:
        budget: A fraction (a float in (0, 1]) of the cost of keeping everything, or a cost (an int).
        measure: How the distortion of a level is measured, as in `rate_distortion`.
        levels: Fractions of a layer's weights at which its distortion is measured.
        inner: Solver that prunes a layer to each level; None takes the default of `Reconstruction`.
        damping: As in `Layer.damped`.
        solver: Solver that divides the budget; None takes `MinimalCore()`. A rule such as `ErdosRenyiKernel` does not
            look at the distortions; they are measured all the same, so that the report can compare the rule with the
            optimum.
        least: Smallest fraction of a layer that may be kept; a mapping sets it by layer name.
        most: Largest fraction of a layer that may be kept; a mapping sets it by layer name.
        price: Cost of one kept weight by module name, such as `macs_per_weight` gives; a layer without one costs 1.
        tie: Label by module name; modules with the same label keep the same fraction.
        cache: Folder for the measured curves, as in `rate_distortion`.
        batches: Calibration data for the curves; None takes the batches of the pruning.
        curves: Curves that are known already; then nothing is measured.

    Raises:
        ValueError: For a budget that is neither a fraction nor a cost, and for other numbers out of range.
        TypeError: For fields of another kind.

    Example:
        >>> import convexprune as cp
        >>> from torch import tensor
        >>> steep = cp.Curve("steep", kept=tensor([10, 50, 100]), distortion=tensor([90.0, 10.0, 0.0]))
        >>> flat = cp.Curve("flat", kept=tensor([10, 50, 100]), distortion=tensor([3.0, 1.0, 0.0]))
        >>> shares = cp.Allocation(0.6, curves=[steep, flat]).shares(model=None, calibration=[])
        >>> shares.counts, shares.certificate.value  # of 200 weights 120 may stay
        ({'steep': 100, 'flat': 10}, 3.0)
    """

    budget: float | int
    measure: Measure | None = None
    levels: Sequence[float] = LEVELS
    inner: Solver | None = None
    damping: float = 0.0
    solver: Solver | None = None
    least: float | Mapping[str, float] = 0.0
    most: float | Mapping[str, float] = 1.0
    price: Mapping[str, float] | None = None
    tie: Mapping[str, str] | None = None
    cache: str | None = None
    batches: Iterable[Any] | None = None
    curves: Sequence[Curve] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        whole = isinstance(self.budget, int) and not isinstance(self.budget, bool)
        if not whole and not (isinstance(self.budget, float) and 0 < self.budget <= 1):
            raise ValueError(f"budget is {self.budget!r}; it must be a fraction in (0, 1] (a float) or a cost (an int)")
        checked_levels(self.levels)
        optional(having("prepared", "SecondOrder()"))("measure", self.measure)
        number(0)("damping", self.damping)
        optional(check_path)("cache", self.cache)
        for key, check in (("least", number(0, 1)), ("most", number(0, 1)), ("price", number(0)), ("tie", text)):
            self._check_by_name(key, check)
        for solver in (self.inner, self.solver):
            if solver is not None:
                check_solver(solver)
        if self.batches is not None:
            check_batches(self.batches)
        if self.curves is not None:
            _check_curves(self.curves)

    def _check_by_name(self, key: str, check: Check) -> None:
        """A mapping from names; `least` and `most` may be one value for all."""
        value = getattr(self, key)
        if isinstance(value, Mapping):
            for name, each in value.items():
                check(f"{key}[{name!r}]", each)
        elif key in ("least", "most"):
            check(key, value)
        elif value is not None:
            raise TypeError(f"{key} is {value!r}; give a mapping from module names")

    @torch.inference_mode(False)
    def shares(
        self,
        model: nn.Module,
        calibration: Calibration | Iterable[Any],
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> Shares:
        """Measure the curves, and choose how much each layer keeps; arguments as in `prune`.

        Raises ValueError, with the smallest budget that can be met, if even the cheapest levels exceed the budget.
        """
        problem = self.problem(self.measured(model, calibration, progress=progress).curves or ())
        solution = solve(problem, self.solver)
        if solution.status is Status.INFEASIBLE or solution.certificate.violation > 0:
            raise ValueError(f"no allocation: {solution.note or 'the solver exceeded the budget'}")
        chosen = [round(float(level)) for level in solution.x[:, 0]]
        shares = tuple(
            Share(
                curve.name, int(curve.kept[k]), int(curve.total or 0), float(curve.distortion[k]),
                tuple(curve.fraction.tolist()), tuple(curve.distortion.tolist()),
            )
            for curve, k in zip(problem.curves, chosen, strict=True)
        )  # fmt: skip
        return Shares(
            shares, problem.budget, problem.cost(solution.x), solution.certificate, solution.solver, problem.dominated
        )

    def measured(
        self,
        model: nn.Module,
        calibration: Calibration | Iterable[Any],
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> Allocation:
        """The same with its curves measured, so that several budgets can be divided; arguments as in `prune`."""
        if self.curves is not None:
            return self
        calibration = Calibration.of(calibration)
        curves = rate_distortion(
            model, calibration if self.batches is None else replace(calibration, batches=self.batches),
            levels=self.levels, measure=self.measure, solver=self.inner, damping=self.damping, cache=self.cache,
            progress=progress,
        )  # fmt: skip
        return replace(self, curves=curves)

    def problem(self, curves: Sequence[Curve]) -> SparsityAllocation:
        """The knapsack of these curves, with the prices, ties and limits of this allocation."""
        _check_curves(curves)
        known = {curve.name for curve in curves}
        for key in ("least", "most", "price", "tie"):
            given = getattr(self, key)
            unknown = sorted(set(given) - known) if isinstance(given, Mapping) else []
            if unknown:
                raise ValueError(f"{key} names {unknown[0]!r}, which is no layer of the curves")
        ready = [self._limited(curve) for curve in curves]
        top = math.fsum(float(curve.costs.max()) for curve in ready)
        budget = self.budget if isinstance(self.budget, int) else self.budget * top
        return SparsityAllocation(ready, math.floor(budget + 1e-9) if self.price is None else budget)

    def _limited(self, curve: Curve) -> Curve:
        least, most = (
            limit.get(curve.name, default) if isinstance(limit, Mapping) else limit
            for limit, default in ((self.least, 0.0), (self.most, 1.0))
        )
        curve = curve.between(least, most)
        if self.price is not None:
            curve = curve.priced(self.price.get(curve.name, 1.0))
        return replace(curve, tie=(self.tie or {}).get(curve.name))


def _check_curves(curves: Any) -> None:
    if not isinstance(curves, Sequence) or not all(isinstance(curve, Curve) for curve in curves):
        raise TypeError(f"curves is {curves!r:.80}; give a list of Curves")
    if not curves:
        raise ValueError("curves is empty; give one for each layer, or leave it out to measure them")


def macs_per_weight(model: nn.Module, batch: Any, names: Sequence[str] | str | None = None) -> dict[str, float]:
    """Number of multiplications by each weight of a module for one example: 1 if linear, else its output positions.

    batch   a tensor, or a tuple or list that begins with one; the examples are along its first axis
    """
    check_batch(batch)
    first = next(tensors_in(batch))
    return {layer.module: layer.samples / len(first) for layer in capture(model, [batch], names)}
