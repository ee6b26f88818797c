"""The network's error: guaranteed from its layers' certificates, by three rules, beside what is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from convexprune.bounds.propagation import ByChannel, Frobenius, Repair, Rule, Spectral, Spread
from convexprune.certify.graph import GraphBound, Propagation
from convexprune.network.compare import alone, together, turns
from convexprune.network.forward import tensors_in, undisturbed
from convexprune.network.recording import Record, record
from convexprune.report import Link, NetworkError
from convexprune.report.row import Row

RULES: Final[Mapping[str, Rule]] = {"Frobenius": Frobenius(), "spectral": Spectral(), "by channel": ByChannel()}
SHARPEST: Final = "by channel"
MEMORY: Final = 1e9  # bytes of dense outputs that are held to compare layers with; more layers take more passes


def network_error(
    model: nn.Module,
    pruned: nn.Module,
    batches: Iterable[Any],
    rows: Sequence[Row],
    *,
    rectified: Mapping[str, bool],
    mode: str,
    refusal: str = "",
    tell: Callable[[int], None],
) -> NetworkError:
    """The bounds along the network's graph, or why there are none, beside what is measured.

    rectified  module -> whether a ReLU is all that reads it
    refusal    why the rows say nothing of the network's output, if so
    tell       is called with the number of each batch that was measured
    """
    if refusal:
        return _measured(model, pruned, batches, GraphBound(None, {}, refusal), {}, {}, tell)
    with undisturbed(model):
        steps = record(model, next(iter(batches)))
    own = own_errors(rows)
    network = Propagation(pruned, steps, mode)
    bounds = {name: network.bound(own, rule) for name, rule in RULES.items()}
    obstacle = bounds[SHARPEST].obstacle or _uneven(model, batches, steps)
    if obstacle:
        return _measured(model, pruned, batches, GraphBound(None, {}, obstacle), {}, {}, tell)
    if mode == "parallel":
        grams = alone(model, pruned, batches, {name: rectified[name] for name in own})
        own = {name: Spread.of(gram, rectified[name]) for name, gram in grams.items()}
        bounds[SHARPEST] = network.bound(own, RULES[SHARPEST])
    best = bounds[SHARPEST]
    held = {step.layer: 8 * math.prod(step.sizes[-1]) for step in steps.steps if step.layer in best.layers}
    layers = {name: (rectified.get(name, False), size) for name, size in held.items() if name}
    totals = {name: bound.total for name, bound in bounds.items() if bound.total is not None}
    return _measured(model, pruned, batches, best, totals, layers, tell)


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


def _uneven(model: nn.Module, batches: Iterable[Any], first: Record) -> str:
    """Why the first batch does not stand for all, or nothing."""
    shapes = {tuple(tensor.shape[1:] for tensor in tensors_in(batch)) for batch in batches}
    if len(shapes) > 1:
        return "the batches have samples of several shapes, and the bound knows those of the first"
    with undisturbed(model):
        if all(first.like(record(model, batch)) for batch in batches):
            return ""
    return "the batches do not all take the same way through the model, and the bound knows that of the first"


def _measured(
    model: nn.Module,
    pruned: nn.Module,
    batches: Iterable[Any],
    best: GraphBound,
    totals: Mapping[str, float],
    layers: Mapping[str, tuple[bool, int]],
    tell: Callable[[int], None],
) -> NetworkError:
    """Run both networks; layers are module -> whether it is rectified, and how many bytes its outputs take."""
    found: dict[str, float] = {}
    measured = scale = None
    for group in turns({name: size for name, (_, size) in layers.items()}, MEMORY) or [[]]:
        changes, measured, scale = together(model, pruned, batches, {name: layers[name][0] for name in group}, tell)
        found |= changes
    links = tuple(Link(name, best.layers[name], found[name]) for name in layers)
    return NetworkError(measured, best.total, scale, best.obstacle, totals, links)
