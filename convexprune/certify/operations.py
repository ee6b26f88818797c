"""What the operations of a forward pass do to the change of a tensor; one that is not known is refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from torch import Tensor

from convexprune.bounds.gains import pooling_gain
from convexprune.bounds.propagation import Rule, Spread
from convexprune.network.kinds import (
    AVERAGE_POOLS,
    BATCH_NORMS,
    DROPOUT,
    DUPLICATES,
    MEANS,
    NONEXPANSIVE,
    ORDERED,
    PARTS,
    POOLED_AXES,
    POOLS,
    RESHAPING,
    SUMS,
    batch_norm_scale,
    computes,
)
from convexprune.network.recording import Step
from convexprune.rounding import UNIT, up

COPIES: Final = DROPOUT | DUPLICATES
MOVES: Final = RESHAPING | DROPOUT | PARTS
_BASIC: Final = (int, slice, type(None), type(...))


class Uncovered(Exception):
    """A step for which no bound is known."""


def carried(step: Step, module: Any, reads: Sequence[Spread], rule: Rule) -> Spread:
    """The change of what an operation makes, from those of what it reads; unchanged tensors among them or left out.

    module  the one that it happened in
    """
    name = step.operation
    before = max(reads, key=lambda each: each.total)
    if name in SUMS:
        return _sum(reads)
    if sum(map(changed, reads)) > 1:
        raise Uncovered(f"{step.place} reads two tensors that have changed, and is not covered")
    if name in NONEXPANSIVE:
        return before.activated()
    if name in MOVES:
        return _moved(step, before)
    if name == "batch_norm":
        scale = norm_scale(module, step)
        return before.folded(scale) if before.folded else rule.scaled(scale, before)
    if name in POOLED_AXES and computes(module, POOLS):
        through = before.times(_pooling(module, step))
        return through if _batched(step) else through.plain()
    if name in MEANS and len(step.sizes) == 2:
        return _mean(step, before)
    raise Uncovered(f"{step.place} is not covered by the bound")


def changed(spread: Spread | None) -> bool:
    """Whether a tensor has changed at all."""
    return spread is not None and spread.total != 0


def norm_scale(module: Any, step: Step) -> Tensor:
    """The scale (C,) of a batch norm in evaluation mode."""
    scale = batch_norm_scale(module) if computes(module, BATCH_NORMS) else None
    if scale is None:
        raise Uncovered(f"{step.place} is not covered by the bound")
    return scale


def _batched(step: Step) -> bool:
    """Whether a pool has read (samples, channels, ...); torch takes a tensor of one axis less for a single image."""
    return len(step.sizes[0]) == POOLED_AXES[step.operation] + 2


def _pooling(module: Any, step: Step) -> float:
    """The gain of a pooling module."""
    planes = POOLED_AXES[step.operation]
    sizes = {key: getattr(module, key, 1) for key in ("kernel_size", "stride", "dilation")}
    kernel, stride, dilation = ((size,) * planes if isinstance(size, int) else size for size in sizes.values())
    if getattr(module, "divisor_override", None):
        raise Uncovered(f"{step.place} divides by its divisor_override, and is not covered")
    average = isinstance(module, AVERAGE_POOLS)
    # a window that hangs over the edge may divide by fewer entries than it has
    whole = not module.ceil_mode and (getattr(module, "count_include_pad", True) or not _any(module.padding))
    return pooling_gain(kernel, stride, dilation, average and whole)


def _any(padding: int | Sequence[int]) -> bool:
    return bool(padding) if isinstance(padding, int) else any(padding)


def _mean(step: Step, before: Spread) -> Spread:
    """An average over axes other than the samples'; the channels stay if their axis does."""
    many, few = (math.prod(size) for size in step.sizes)
    share = up(1 / math.sqrt(many / max(few, 1)), 4 * UNIT)
    if step.operation != "mean":
        maps = slice(-POOLED_AXES[step.operation], None)
        wide, narrow = (size[maps] for size in step.sizes)
        if 0 in narrow or any(a % b for a, b in zip(wide, narrow, strict=True)):
            raise Uncovered(f"{step.place} averages windows that overlap, and is not covered")
        return before.times(share) if _batched(step) else before.plain().times(share)
    planes = len(step.sizes[0])
    given = (step.detail,) if isinstance(step.detail, int) else step.detail
    axes = {axis % planes for axis in given} if isinstance(given, (tuple, list)) and given else {0}  # (): over all
    if 0 in axes:
        raise Uncovered(f"{step.place} averages over the samples, and is not covered")
    return before.plain().times(share) if 1 in axes else before.times(share)


def _sum(reads: Sequence[Spread]) -> Spread:
    """A sum of two tensors, or of a tensor and a constant."""
    total = Spread(0.0)
    for each in reads:
        total = total.plus(each)
    return total


def _moved(step: Step, before: Spread) -> Spread:
    """Entries that are copied, moved, left out, or joined by zeros: what the norms say stays, channels if they stay."""
    parts = step.detail if isinstance(step.detail, tuple) else (step.detail,)
    if step.operation == "getitem" and not all(isinstance(part, _BASIC) for part in parts):
        raise Uncovered(f"{step.place} takes entries by a list or a tensor, perhaps twice, and is not covered")
    if step.operation in COPIES:
        return before
    before = replace(before, folded=None)
    if step.even:
        return before if step.operation in ORDERED else before.plain()
    if before.channels is None or len(step.sizes) < 2:
        return before.plain()
    old, new = step.sizes
    if step.operation in ORDERED:
        flat = len(new) == 2 and len(old) >= 2 and old[0] == new[0]  # runs of columns now stand for channels
        together = len(old) >= 2 and old[:2] == new[:2]
        kept = before if math.prod(old[2:]) == math.prod(new[2:]) else replace(before, gram=None)
        return kept if (flat or together) and old[1] == len(before.channels) else before.plain()
    if step.operation == "getitem" and isinstance(step.detail, tuple):
        sliced = all(isinstance(part, slice) for part in step.detail)
        return before if sliced and step.detail[:2] == (slice(None), slice(None)) else before.plain()
    if step.operation == "pad" and isinstance(step.detail, (tuple, list)) and len(old) >= 2:
        amounts = [int(part) for part in step.detail] + [0] * (2 * len(old))
        left, right = amounts[2 * len(old) - 4 : 2 * len(old) - 2]
        if old[1] == len(before.channels) and min(amounts) >= 0 and not any(amounts[2 * len(old) - 2 :]):
            return before.padded(left, right)
    return before.plain()
