"""Prune to a goal: a given bound on the network's error (`Goal`), or on a risk on data not seen (`RiskGoal`).

For an error, the layers' errors are chosen by the bound, which then holds. The network's error is at most
sum_l g_l e_l  (`certify.graph`, by spectral norms), so `ErrorBudget` says how large each e_l may be. The bound of the
pruned network is sharper, since its weights are not the dense ones; it scales the budget of the next network, until a
bound is just within the goal. For a risk see `risk_goal`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from convexprune.bounds.propagation import Spectral, Spread
from convexprune.certify.graph import Propagation
from convexprune.layer import Layer
from convexprune.network import Calibration
from convexprune.network.compare import norms
from convexprune.network.forward import check_model
from convexprune.network.traversal import Traversal
from convexprune.options import between, function, optional, positive, whole
from convexprune.problem import LayerProblem, Solver, check_solver
from convexprune.problems import ErrorBudget, NetTrim
from convexprune.prune import walked
from convexprune.report import Report
from convexprune.report.progress import Teller, Watcher, checked, watched
from convexprune.risk_goal import RiskGoal, search_by_risk
from convexprune.solve import solve

STRIDE = 30.0  # the most that one network's bound may change the budget by


@dataclass(frozen=True)
class Goal:
    """The network's error || Yhat - Y ||_F, wanted at most `error` times ||Y||_F over the calibration samples.

    near    a bound within this share of the goal is good enough
    rounds  how many networks may be pruned on the way

    Raises ValueError for figures out of range, TypeError for what is no number.
    """

    error: float
    near: float = 0.9
    rounds: int = 6

    def __post_init__(self) -> None:
        positive("error", self.error)
        between(0, 1)("near", self.near)
        whole(1)("rounds", self.rounds)


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
@watched
def prune_within(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    goal: Goal | RiskGoal | float,
    build: Callable[[Layer, Any], LayerProblem | None] | None = None,
    solver: Solver | None = None,
    *,
    names: Sequence[str] | str | None = None,
    progress: Watcher = None,
) -> tuple[nn.Module, Report]:
    """Search for the sparsest network that is within the goal, an error or a risk; parallel mode.

    Args:
        model: the dense network; never changed.
        batches: as of `prune`. The layers are captured once for all the networks on the way.
        goal: a `Goal`, or its `error`; or a `RiskGoal`, which has the path of networks that are tested.
        build: states a layer's problem from the layer and a number. Of a `Goal` that is the relative error that the
            layer may have, ||.||_F over that of its outputs behind the activation; of a `RiskGoal` the number of the
            path, or the count that its allocation gives the layer; it is asked again for the report, and has to state
            the same. None: NetTrim, with an allocation Reconstruction.
        solver, names, progress: as of `prune`. Along a path a solver that can begin from a start begins at the layer's
            last point.

    Returns:
        The pruned copy that keeps least of those within the goal, or the last one of the path that is certified; and
        its report, with the `path` that was tested.

    Raises:
        ValueError: where the network has no bound, naming what is not covered, and where no network of the rounds was
            within the goal. Of a `RiskGoal`: for a held-out sample that was used or is there twice, where there are too
            few, where the first level of the path is not certified, and where `build` states another problem when it
            is asked again. Else what `prune` raises.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
        >>> pruned, report = cp.prune_within(model, [torch.rand(50, 8)], 0.2)
        >>> report.network.guaranteed <= report.network.wanted
        True
        >>> goal = cp.RiskGoal(cp.PredictionChanged(), 0.3, [torch.rand(500, 8)], path=(0.9, 0.7, 0.5, 0.3))
        >>> recipe = lambda layer, kept: cp.Reconstruction(layer, cp.Unstructured(kept))
        >>> pruned, report = cp.prune_within(model, [torch.rand(50, 8)], goal, recipe)
        >>> report.path.certified.bound <= 0.3
        True
    """
    check_model(model)
    if solver is not None:
        check_solver(solver)
    optional(function("a function from a layer and its relative error to a problem, such as NetTrim"))("build", build)
    told = checked(progress)
    calibration = Calibration.of(batches, names)
    tell = Teller(told, calibration)
    if isinstance(goal, RiskGoal):
        return search_by_risk(model, calibration, goal, build, solver, tell)
    goal = goal if isinstance(goal, Goal) else Goal(goal)
    return _search_by_error(model, calibration, goal, NetTrim if build is None else build, solver, tell)


def _search_by_error(
    model: nn.Module,
    calibration: Calibration,
    goal: Goal,
    build: Callable[[Layer, float], LayerProblem | None],
    solver: Solver | None,
    tell: Teller,
) -> tuple[nn.Module, Report]:
    walk = Traversal(model, calibration, "parallel", tell.captured)
    sizes, whole = norms(model, calibration, walk.rectified, calibration.output)
    if whole is None or whole == 0:
        raise ValueError("the network's output is no tensor, or is zero: a relative error of it means nothing")
    budget = _budget(walk, sizes, goal.error * whole)
    best: tuple[nn.Module, Report] | None = None
    allowed, bound = budget.goal, float("inf")
    for _ in range(goal.rounds):
        solution = solve(replace(budget, goal=allowed))
        shares = dict(zip(walk.modules, (solution.x[:, 0] / budget.caps).clamp(0, 1).tolist(), strict=True))
        report = walked(walk, lambda layer: build(layer, shares[layer.module]), lambda layer: solver, tell)  # noqa: B023
        if report.network.guaranteed is None:
            raise ValueError(f"the pruned network has no bound: {report.network.reason}")
        bound = report.network.guaranteed
        if bound <= budget.goal and (best is None or report.kept < best[1].kept):
            best = walk.pruned, replace(report, network=replace(report.network, wanted=budget.goal))
        if goal.near * budget.goal <= bound <= budget.goal or (bound <= budget.goal and min(shares.values()) == 1):
            break
        # aim between `near` and 1; the bound grows about as the errors do
        aim = budget.goal * (1 + goal.near) / 2
        allowed *= min(max(aim / max(bound, 1e-300), 1 / STRIDE), STRIDE)
        walk = walk.renewed()
    if best is None:
        raise ValueError(
            f"none of {goal.rounds} networks was within an error of {goal.error:g}: the last bound was "
            f"{bound / whole:.3g}; allow more rounds or a larger error"
        )
    return best


def _budget(walk: Traversal, sizes: Mapping[str, float], goal: float) -> ErrorBudget:
    """Each layer's gain to the output, one at a time: the bound by spectral norms is linear in the errors."""
    network = Propagation(walk.model, walk.survey.record, "parallel")
    gains = []
    for name in walk.modules:
        found = network.bound({name: Spread(1.0)}, Spectral())
        if found.total is None:
            raise ValueError(f"the network has no bound: {found.obstacle}")
        if not math.isfinite(found.total):
            raise ValueError("the network has no bound: it divides by a norm without an eps; give the norm an eps")
        gains.append(found.total)
    weights = [float(walk.chosen.stacks[name].weight.numel()) for name in walk.modules]
    caps = [max(sizes[name], 1e-30) for name in walk.modules]
    return ErrorBudget(torch.tensor(gains), torch.tensor(weights), torch.tensor(caps, dtype=torch.float64), goal)
