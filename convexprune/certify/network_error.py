"""The network's error: guaranteed from its layers' certificates, by three rules, beside what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from convexprune.bounds.propagation import ByChannel, Frobenius, Repair, Rule, Spectral, Spread
from convexprune.certify.graph import GraphBound, Propagation
from convexprune.network.calibration import Calibration
from convexprune.network.compare import changes, turns
from convexprune.network.traversal import Traversal
from convexprune.report import Link, NetworkError
from convexprune.report.row import Row

RULES: Final[Mapping[str, Rule]] = {"Frobenius": Frobenius(), "spectral": Spectral(), "by channel": ByChannel()}
SHARPEST: Final = "by channel"
MEMORY: Final = 1e9  # bytes of dense outputs that are held to compare layers with, more layers taking more passes;
# and of a layer's matrix of changes, output by output


def network_error(
    walk: Traversal,
    rows: Sequence[Row],
    tell: Callable[[int], None],
) -> NetworkError:
    """The bounds along the network's graph, or why there are none, beside what is measured: a pass of each network.

    walk  that the rows were judged on
    tell  is called with the number of each batch that was measured
    """
    model, pruned, calibration, survey, mode = walk.model, walk.pruned, walk.calibration, walk.survey, walk.mode
    own = own_errors(rows)
    network = Propagation(pruned, survey.record, mode)
    refusal = _refusal(calibration) or survey.uneven
    bounds = {name: network.bound(own, rule) for name, rule in RULES.items()} if not refusal else {}
    best = bounds[SHARPEST] if bounds else GraphBound(None, {}, refusal)
    reached = best.layers if best.total is not None else {}
    rectified = {name: walk.rectified.get(name, False) for name in reached}
    lone = {name: rectified[name] for name in own if name in rectified} if mode == "parallel" else {}
    outputs = {name: walk.chosen.stacks[name].outputs for name in lone}  # a layer of more keeps its certificate's error
    lone = {name: each for name, each in lone.items() if 8 * outputs[name] ** 2 <= MEMORY}
    sizes = {step.layer: 8 * math.prod(step.sizes[-1]) for step in survey.record.steps if step.layer in reached}
    groups = turns({name: size for name, size in sizes.items() if name}, MEMORY) or [[]]
    found = changes(model, pruned, calibration, {name: rectified[name] for name in groups[0]}, lone, tell)
    layers = dict(found.layers)
    for group in groups[1:]:  # their dense outputs do not fit beside the others'
        layers |= changes(model, pruned, calibration, {name: rectified[name] for name in group}, {}, tell).layers
    if lone:
        own |= {name: Spread.of(found.alone[name], lone[name]) for name in lone}
        bounds[SHARPEST] = best = network.bound(own, RULES[SHARPEST])
    if calibration.unsteady:
        best, bounds, layers = GraphBound(None, {}, calibration.unsteady), {}, {}
    totals = {name: bound.total for name, bound in bounds.items() if bound.total is not None}
    links = tuple(Link(name, best.layers[name], layers[name]) for name in sizes if name in layers)
    return NetworkError(found.output, best.total, found.size, best.obstacle, totals, links)


def _refusal(calibration: Calibration) -> str:
    """Why the layers' errors say nothing of the network's, or ""."""
    if calibration.mask is not None:
        return "a mask was given, and the samples it leaves out are in the network's output"
    if calibration.positions is not None:
        return "`positions` was given, and the positions it leaves out are in the network's output"
    if "relu" in calibration.activations.values():
        return "a ReLU was told by `activations`, not found in the network"
    return ""


def own_errors(rows: Sequence[Row]) -> dict[str, Spread]:
    """What the certificates say of each judged layer: module -> its own error, groups of a convolution together."""
    judged: dict[str, list[Row]] = {}
    for row in rows:
        if row.error is not None and not row.left_dense:
            judged.setdefault(row.module, []).append(row)
    found = {}
    for module, parts in judged.items():
        every = [part.errors for part in parts]
        channels = torch.cat([each for each in every if each is not None]) if None not in every else None
        repair = Repair(module) if any(part.repairs for part in parts) else None
        found[module] = Spread(math.hypot(*(part.error or 0.0 for part in parts)), channels, repair=repair)
    return found
