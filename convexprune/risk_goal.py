"""Prune to a given risk on data not seen: a path of networks from dense to sparse, tested in this order.

    for k = 1, 2, ...   R_k = upper bound, at confidence 1 - delta, of the expected loss of network k
                        stop at the first R_k > level; the answer is the network before

The path is settled before a held-out sample is looked at: network k depends on the calibration data alone. So the first
network that is too risky is certified with probability at most delta, and with it any: fixed-sequence testing, which
needs no further delta for the length of the path. docs/theory.md has the proof.
Source: Angelopoulos, Bates, Candes, Jordan, Lei, arXiv 2110.01052 (Learn then Test); Alvarez, arXiv 2408.04759.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from convexprune.allocate import Allocation
from convexprune.bounds.mean_loss import Binomial, MeanBound
from convexprune.certify.held_out_risk import HeldOut, bounded, default_bound
from convexprune.certify.risks import Risk, check_risk
from convexprune.layer import Layer
from convexprune.network import Calibration
from convexprune.network.forward import check_batches
from convexprune.network.outputs import Which, check_which
from convexprune.network.traversal import Traversal
from convexprune.options import between, check_options, having, number, optional
from convexprune.patterns import Unstructured
from convexprune.problem import LayerProblem, Solver
from convexprune.problems import NetTrim, Reconstruction
from convexprune.prune import walked
from convexprune.pruning.execution import Execution
from convexprune.pruning.level import Known, Level
from convexprune.pruning.stated import State
from convexprune.report import Report
from convexprune.report.progress import Teller
from convexprune.report.risk_path import PathLevel, RiskPath
from convexprune.report.shares import Shares
from convexprune.solvers.warm_start import WarmStart

PathBuild = Callable[[Layer, Any], LayerProblem | None]


@dataclass(frozen=True, eq=False)
class RiskGoal:
    """The expected loss on data not seen, wanted at most `level` with this confidence.

    Args:
        risk: What counts as a loss, such as `PredictionChanged()` or `ExcessLogLoss(clip=1.0)`.
        level: The largest expected loss, in the unit of the risk.
        held_out: Independent draws of what is to come, as a `Calibration` or batches, each sample once. Not used to
            train the network, to prune it, or to choose any option here. One set is for one search: of several
            searches on the same samples each keeps its confidence alone, the best of them does not.
        path: The numbers that `build` gets, one after the other, from dense to sparse: epsilons, say, or fractions
            kept. With an `allocation` they are budgets.
        confidence: 1 - delta: the probability, over the draw of the held-out samples, that no network whose expected
            loss exceeds `level` is certified.
        allocation: Divides each budget of the path; its own budget is not used. The curves are measured once.
        output: Which output of the model is meant, where there are several: a key such as "logits", a position, or a
            function of what the model returns.
        bound: How the expected loss is bounded; None: `bounds.Binomial` for losses of 0 and 1, `bounds.Betting` for
            others.

    Raises:
        ValueError: For numbers out of range and for an empty path; TypeError for fields of another kind.
    """

    risk: Risk
    level: float
    held_out: Calibration | Iterable[Any]
    path: Sequence[float]
    confidence: float = 0.99
    allocation: Allocation | None = None
    output: Which = None
    bound: MeanBound | None = None

    def __post_init__(self) -> None:
        check_risk(self.risk)
        limits = between(self.risk.low, self.risk.high)
        check_options(
            self, level=limits, confidence=between(0, 1), bound=optional(having("upper_bound", "bounds.Betting()"))
        )
        if isinstance(self.bound, Binomial) and not self.risk.zero_one:
            raise ValueError(
                f"bound is Binomial(), for losses of 0 and 1; those of {self.risk.name} are others: Betting()"
            )
        check_batches(self.held_out)
        check_which("output", self.output)
        if self.allocation is not None and not isinstance(self.allocation, Allocation):
            raise TypeError(f"allocation is {self.allocation!r}; give an Allocation, such as Allocation(0.2)")
        if isinstance(self.measured_on, Iterator) and self.allocation is not None:  # read twice
            object.__setattr__(self, "allocation", replace(self.allocation, batches=list(self.measured_on)))
        if not isinstance(self.path, Sequence) or isinstance(self.path, (str, bytes)):
            raise TypeError(f"path is {self.path!r}; give numbers from dense to sparse, such as (0.5, 0.3, 0.2)")
        if not self.path:
            raise ValueError("path is empty; give at least one number")
        check = number() if self.allocation is None else number(0, 1, least_open=True)
        for place, each in enumerate(self.path):
            check(f"path[{place}]", each)

    @property
    def measured_on(self) -> Iterable[Any]:
        """The batches of the allocation's own, which are used too."""
        return () if self.allocation is None or self.allocation.batches is None else self.allocation.batches

    @property
    def rule(self) -> MeanBound:
        """The bound that is used."""
        return default_bound(self.risk) if self.bound is None else self.bound


def search_by_risk(
    model: nn.Module,
    calibration: Calibration,
    goal: RiskGoal,
    build: PathBuild | None,
    solver: Solver | None,
    tell: Teller,
) -> tuple[nn.Module, Report]:
    """The last network of the path that is certified, and its report; arguments and errors as of `prune_within`."""
    used = itertools.chain(calibration, goal.measured_on)
    held = HeldOut(goal.held_out, used, goal.output)
    _check_enough(goal, held.samples)
    walk = Traversal(model, calibration, "parallel", tell.captured)
    stating = _Stating(walk, goal, build, tell)
    continued = None if solver is None else WarmStart.of(solver)
    best: Level | None = None
    levels: list[PathLevel] = []
    for setting in goal.path:
        state, shares = stating.of(setting)
        level = Level(walk, state, lambda layer: continued, shares)
        level.write(tell)
        if calibration.unsteady:
            raise ValueError(f"{calibration.unsteady}, and so that no held-out sample can be among those drawn later")
        losses = held.losses(model, walk.pruned, goal.risk)
        found = held.statement(losses, goal.risk, goal.confidence, goal.level, goal.rule)
        certified = found.applies and found.guaranteed <= goal.level
        levels.append(PathLevel(float(setting), level.kept, level.total, found.measured, found.guaranteed, certified))
        if not certified:
            break
        best = level
        walk = walk.renewed()
    path = RiskPath(
        goal.risk.name, float(goal.level), float(goal.confidence), held.samples, type(goal.rule).__name__,
        len(goal.path), tuple(levels),
    )  # fmt: skip
    if best is None:
        first = levels[0]
        raise ValueError(
            f"the first level of the path, {first.setting:g}, is not certified: {goal.risk.name} {first.measured:.3g} "
            f"over {held.samples} held-out samples, at most {first.bound:.3g}, wanted {goal.level:g}; begin with a "
            "denser one, or hold out more samples, for another search on samples not seen yet"
        )
    walk = best.walk.renewed()
    report = walked(walk, best.state, best.choose, tell, best.shares, Execution(backend=Known(best.proposals)))
    best.check_same(walk.pruned)
    return walk.pruned, replace(report, path=path)


@dataclass
class _Stating:
    """The recipe of a level."""

    walk: Traversal
    goal: RiskGoal
    build: PathBuild | None
    tell: Teller
    allocation: Allocation | None = None

    def of(self, setting: float) -> tuple[State, Shares | None]:
        """What is stated of each layer at this number of the path, and the shares of the budget if there is one."""
        if self.goal.allocation is None:
            build = NetTrim if self.build is None else self.build
            return lambda layer: build(layer, setting), None
        model, calibration = self.walk.model, self.walk.calibration
        if self.allocation is None:
            self.allocation = self.goal.allocation.measured(model, calibration, progress=self.tell.progress)
        shares = replace(self.allocation, budget=float(setting)).shares(model, calibration)
        counts = shares.by_layer(self.walk.names)
        counted = _reconstruction if self.build is None else self.build
        return lambda layer: counted(layer, _count(counts, layer.name)), shares


def _reconstruction(layer: Layer, count: int) -> LayerProblem:
    return Reconstruction(layer, Unstructured(count))


def _count(counts: dict[str, int], name: str) -> int:
    if name not in counts:
        raise ValueError(f"the allocation's curves have no layer {name!r}; leave it out of `names`")
    return counts[name]


def _check_enough(goal: RiskGoal, samples: int) -> None:
    """Raise ValueError where not even the least loss of every sample could be certified."""
    least = torch.full((samples,), float(goal.risk.low), dtype=torch.float64)
    found = bounded(least, goal.risk, goal.confidence, goal.level, goal.rule)
    if found > goal.level:
        raise ValueError(
            f"{samples} held-out samples can certify nothing: at the least loss of all, the bound of {goal.risk.name} "
            f"would be {found:.3g}, and {goal.level:g} is wanted; hold out more, or want less"
        )
