"""The network's error from its layers' certificates, along the real graph: before the pruned network is run.

Every tensor that a forward pass made carries a bound e of || Yhat - Y ||_F over the calibration samples:

    a layer           parallel  e_out <= E + gain(What) e_in        E: its own error on the dense inputs
                      cascade   e_out <= E                          E: its error against the dense outputs
                      unjudged  e_out <= gain(W) e_in
    batch norm        e_out <= max |s| e_in
    a sum             e_out <= e_1 + e_2
    1-Lipschitz       e_out <= e_in       activations, reshapings, slices, padding
    a mean over P     e_out <= e_in / sqrt(P)

What is not in this list stops the chain, by name. Source: the triangle inequality; for a plain chain this is
`bounds.chain`, whose proofs hold link by link.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from convexprune.bounds.gains import convolution_gain, linear_gain, norm_gain, pooling_gain
from convexprune.network.trace import DROPOUT, RESHAPING, Record, Step
from convexprune.report.row import Row

# |f(a) - f(b)| <= |a - b|, entry by entry
LIPSCHITZ: Final = frozenset(
    ("relu", "relu6", "tanh", "sigmoid", "hardtanh", "hardsigmoid", "softplus", "softsign", "abs")
)
PASSING: Final = LIPSCHITZ | RESHAPING | DROPOUT | frozenset(("getitem", "pad", "narrow", "select", "chunk"))
SUMS: Final = frozenset(("add", "iadd", "sub", "isub"))


@dataclass(frozen=True)
class GraphBound:
    """The bound at the network's output, and at each layer's, in forward order; or why there is none."""

    total: float | None
    layers: Mapping[str, float]
    obstacle: str = ""


def graph_bound(pruned: nn.Module, record: Record, rows: Sequence[Row], mode: str) -> GraphBound:
    """Propagate the rows' errors through a recorded pass of the dense network; `pruned` gives the weights as stored."""
    if mode == "residual":
        return GraphBound(None, {}, "residual mode judges layers against repaired targets, not the dense network's")
    modules = dict(pruned.named_modules())
    errors: dict[int, float] = {}
    found: dict[str, float] = {}
    judged: dict[str, list[Row]] = {}
    for row in rows:
        judged.setdefault(row.name.partition("[")[0], []).append(row)
    for step in record.steps:
        reads = [errors[number] for number in step.reads if number in errors]
        if step.layer is None and not any(reads):
            for number in step.makes:
                errors[number] = 0.0
            continue
        try:
            if step.layer is not None:
                if step.layer in found:
                    raise _Uncovered(f"{step.place} is called more than once")
                made = _layer(modules[step.layer], step, max(reads, default=0.0), judged.get(step.layer, []), mode)
                found[step.layer] = made
            else:
                made = _step(modules, step, reads)
        except _Uncovered as error:
            return GraphBound(None, found, str(error))
        for number in step.makes:
            errors[number] = made
    if len(record.results) != 1:
        return GraphBound(None, found, "the model does not return one tensor")
    return GraphBound(errors.get(record.results[0], 0.0), found)


class _Uncovered(Exception):
    """A step for which no bound is known."""


def _layer(module: Any, step: Step, before: float, rows: Sequence[Row], mode: str) -> float:
    known = [row for row in rows if row.error is not None and not row.left_dense]
    own = math.sqrt(math.fsum((row.error or 0.0) ** 2 for row in known))
    if mode == "cascade" and known:
        if len(known) < getattr(module, "groups", 1) and before > 0:
            raise _Uncovered(f"{step.place}: some of its groups were judged on the pruned inputs and some were not")
        return own
    return own if before == 0 else own + _gain(module, step) * before


def _gain(module: Any, step: Step) -> float:
    if isinstance(module, nn.Linear):
        return linear_gain(module.weight)
    unpadded = isinstance(module.padding, tuple) and not any(module.padding)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and (module.padding_mode == "zeros" or unpadded):
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        # "same" pads by the dilated kernel less one in all
        room = [2 * p for p in module.padding] if isinstance(module.padding, tuple) else [r - 1 for r in reach]
        torus = [max(s + p, r) for s, p, r in zip(step.sizes[0][2:], room, reach, strict=True)]
        return convolution_gain(module.weight, torus, module.dilation, module.groups)
    raise _Uncovered(f"{step.place}: no gain is known of this layer")


def _step(modules: Mapping[str, nn.Module], step: Step, reads: Sequence[float]) -> float:
    name = step.operation
    if name in SUMS and len(step.reads) == 2:
        return math.fsum(reads)
    if sum(each > 0 for each in reads) > 1:
        raise _Uncovered(f"{step.place} reads two tensors that have changed, and is not covered")
    before = max(reads)
    if name in PASSING:
        return before
    module: Any = modules.get(step.place.split(" ")[0])
    if name == "batch_norm" and isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_var is not None:
        scale = (module.running_var.double() + module.eps).rsqrt()
        return norm_gain(scale if module.weight is None else scale * module.weight) * before
    if name in ("max_pool2d", "max_pool1d", "avg_pool2d", "avg_pool1d") and hasattr(module, "kernel_size"):
        planes = int(name[-2])
        kernel, stride = (value if isinstance(value, tuple) else (value,) * planes
                          for value in (module.kernel_size, module.stride))  # fmt: skip
        return pooling_gain(kernel, stride, name.startswith("avg")) * before
    if name in ("mean", "adaptive_avg_pool2d", "adaptive_avg_pool1d") and len(step.sizes) == 2:
        many, few = (math.prod(size) for size in step.sizes)
        if name == "mean" or math.prod(step.sizes[1][2:]) == 1:
            return before / math.sqrt(many / max(few, 1))
    raise _Uncovered(f"{step.place} is not covered by the bound")
