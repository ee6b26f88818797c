"""The network's error: guaranteed from its layers' certificates, by three rules, beside what is measured.

A bound is shown only where both networks were seen to do what the record says that it is computed from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.bounds.propagation import ByChannel, Frobenius, Repair, Rule, Spectral, Spread
from convexprune.certify.graph import Propagation
from convexprune.certify.side_by_side import SideBySide
from convexprune.network.calibration import Calibration
from convexprune.network.forward import numbered, run, undisturbed
from convexprune.network.outputs import Which, output_of
from convexprune.network.replay import distance
from convexprune.network.traversal import Traversal
from convexprune.report import Link, NetworkError
from convexprune.report.row import Row
from convexprune.rounding import gamma, norm_above, up

RULES: Final[Mapping[str, Rule]] = {"Frobenius": Frobenius(), "spectral": Spectral(), "by channel": ByChannel()}
SHARPEST: Final = "by channel"


def network_error(
    walk: Traversal,
    rows: Sequence[Row],
    tell: Callable[[int], None],
) -> NetworkError:
    """The bounds along the network's graph, or why there are none, beside what is measured: one pass over the batches.

    walk  that the rows were judged on
    tell  is called with the number of each batch that was measured
    """
    own = own_errors(rows, walk.mode != "parallel")
    network = Propagation(walk.pruned, walk.survey.record, walk.mode)
    refusal = _refusal(walk.calibration) or walk.survey.uneven or network.bound(own).obstacle
    if refusal:
        return unguaranteed(walk, refusal, tell)
    beside = SideBySide(walk.model, walk.pruned, network.record, own, walk.rectified, walk.mode == "parallel")
    found = _measured(walk, beside, tell)
    reason = found.reason or walk.calibration.unsteady
    if reason or found.measured is None:
        return replace(found, reason=reason or "the model returns no tensor")
    return _guaranteed(found, found.measured, network, beside)


def unguaranteed(walk: Traversal, reason: str, tell: Callable[[int], None]) -> NetworkError:
    """What is measured of the walk's two networks, and the reason why nothing is guaranteed."""
    return replace(_measured(walk, None, tell), reason=reason)


def _guaranteed(found: NetworkError, measured: float, network: Propagation, beside: SideBySide) -> NetworkError:
    """The bound by each rule, with what rounding adds, if nothing that was measured speaks against it."""
    seen = beside.seen()
    bounds = {name: network.bound(beside.own(name == SHARPEST), rule, seen) for name, rule in RULES.items()}
    best = bounds[SHARPEST]
    # a pass over other batches sums in another order: a unit of rounding for each network's outputs
    order = beside.unit * (2 * (found.scale or 0.0) + measured) if beside.judged else 0.0
    rounding = order + sum(beside.apart)
    # every bound is at least the change as it was, whose norm was summed in another order
    lost = gamma(beside.roundings + 4)
    totals = {name: _up(bound.total + rounding, lost) for name, bound in bounds.items() if bound.total is not None}
    reason = best.obstacle or beside.objection()
    if not reason and not measured <= totals[SHARPEST]:
        reason = f"the measured error is above the bound of {totals[SHARPEST]:.3g}, which is therefore not shown"
    if reason:
        return replace(found, reason=reason)
    links = tuple(
        Link(name, _up(best.layers[name], lost), seen[number].change.total if number in seen else 0.0)
        for name, number in network.record.layers.items()
        if name in best.layers
    )
    return replace(found, guaranteed=totals[SHARPEST], rules=totals, layers=links)


def _up(bound: float, lost: float) -> float:
    return up(bound, lost * bound) if bound else 0.0


def _measured(walk: Traversal, beside: SideBySide | None, tell: Callable[[int], None]) -> NetworkError:
    """Run both networks; the reason is what `beside`, who looks on, has against a bound."""
    change: float | None = 0.0
    size, reason = 0.0, ""
    with undisturbed(walk.model, walk.pruned):
        for index, batch in enumerate(walk.calibration):
            with numbered(index):
                which = walk.calibration.output
                theirs, ours = _output(walk.model, batch, which), _output(walk.pruned, batch, which)
                if theirs is None or ours is None or change is None:
                    change = None
                else:
                    change = math.hypot(change, distance(ours, theirs))
                    size = math.hypot(size, distance(theirs, torch.zeros_like(theirs)))
                    reason = reason or (beside.add(batch, theirs, ours) if beside else "")
            tell(index)
    return NetworkError(change, None, size, reason)


def _output(model: nn.Module, batch: Any, which: Which) -> Tensor | None:
    """A copy, as the next pass may write to the same memory; None where there is no tensor."""
    output = output_of(run(model, batch), which)
    return None if output is None else output.clone()


def _refusal(calibration: Calibration) -> str:
    """Why the layers' errors say nothing of the network's, or ""."""
    if calibration.mask is not None:
        return "a mask was given, and the samples it leaves out are in the network's output"
    if calibration.positions is not None:
        return "`positions` was given, and the positions it leaves out are in the network's output"
    if "relu" in calibration.activations.values():
        return "a ReLU was told by `activations`, not found in the network"
    return ""


def own_errors(rows: Sequence[Row], cascade: bool) -> dict[str, Spread]:
    """What the certificates say of each judged layer: module -> its own error, groups of a convolution together.

    A layer that stays dense has an error of its own in a cascade only: there it reads other inputs than its targets
    were made of.
    """
    judged: dict[str, list[Row]] = {}
    for row in rows:
        if row.error is not None and (cascade or not row.left_dense):
            judged.setdefault(row.module, []).append(row)
    found = {}
    for module, parts in judged.items():
        every = [part.errors for part in parts]
        channels = torch.cat([each for each in every if each is not None]) if None not in every else None
        repair = Repair(module) if any(part.repairs for part in parts) else None
        errors = torch.tensor([part.error for part in parts], dtype=torch.float64) if channels is None else channels
        found[module] = Spread(norm_above(errors), channels, repair=repair)
    return found
