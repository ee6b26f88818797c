"""What the operations of a forward pass do to the change of a tensor; one that is not known is refused by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from convexprune.bounds.lipschitz import LIPSCHITZ, softmax
from convexprune.bounds.propagation import Rule, Spread
from convexprune.certify.pools import pool_gain
from convexprune.network.call import Reference, replaced
from convexprune.network.kinds import (
    BATCH_NORMS,
    CASTS,
    CATS,
    DROPOUT,
    DUPLICATES,
    JOINS,
    NONEXPANSIVE,
    ORDERED,
    PARTS,
    POOLED_AXES,
    PRODUCTS,
    QUOTIENTS,
    RESHAPING,
    SUMS,
    batch_norm_scale,
    computes,
)
from convexprune.network.recording import Step
from convexprune.rounding import UNIT, up

COPIES: Final = DROPOUT | DUPLICATES
MOVES: Final = RESHAPING | DROPOUT | PARTS
FACTORS: Final = PRODUCTS | QUOTIENTS
EVEN: Final = SUMS | NONEXPANSIVE | FACTORS | LIPSCHITZ.keys()
"""A tensor that one of these stretches over another is read several times."""
ARGUED: Final = FACTORS | LIPSCHITZ.keys() | POOLED_AXES.keys() | CASTS | {"log_softmax"}
"""Of these the bound depends on arguments that a `Step` does not tell."""
_BASIC: Final = (int, slice, type(None), type(...))

Known = Callable[[int], Tensor | None]
"""The parameter of this number, if the tensor is one."""


class Uncovered(Exception):
    """A step for which no bound is known."""


def carried(step: Step, module: Any, reads: Sequence[Spread], rule: Rule, known: Known) -> Spread:
    """The change of what an operation makes, from those of what it reads, one for each number; 0 where none is known.

    module  the one that it happened in
    """
    name = step.operation
    before = max(reads, key=lambda each: each.total)
    if not step.makes:  # float(y), say: what has changed leaves all tensors
        raise Uncovered(f"{step.place} is not covered by the bound")
    if name in SUMS:
        return _sum(reads)
    if name in JOINS:
        return _joined(step, reads)
    if sum(map(changed, reads)) > 1:
        raise Uncovered(f"{step.place} reads two tensors that have changed, and is not covered")
    if name in NONEXPANSIVE:
        return before.activated()
    if name in MOVES:
        return _moved(step, before)
    if name == "batch_norm":
        scale = norm_scale(module, step)
        return before.folded(scale) if before.folded else rule.scaled(scale, before)
    if name == "mean" and len(step.sizes) == 2:
        return _mean(step, before)
    number = step.reads[list(map(changed, reads)).index(True)]
    try:
        return _by_arguments(step, before, number, known)
    except (TypeError, ValueError) as error:
        raise Uncovered(f"{step.place} is called with arguments that are not covered: {error}") from error


def changed(spread: Spread | None) -> bool:
    """Whether a tensor has changed at all."""
    return spread is not None and spread.total != 0


def norm_scale(module: Any, step: Step) -> Tensor:
    """The scale (C,) of a batch norm in evaluation mode."""
    scale = batch_norm_scale(module) if computes(module, BATCH_NORMS) else None
    if scale is None:
        raise Uncovered(f"{step.place} is not covered by the bound")
    return scale


def arguments(step: Step, function: Callable[..., Any], known: Known) -> dict[str, Any]:
    """The arguments of a call by their names in a function of the same signature, parameters in their places.

    Raises TypeError where the function takes no such arguments.
    """
    assert step.call is not None  # of all steps but a change in place
    given = replaced((step.call.args, step.call.kwargs), Reference, lambda each: _or(known(each.number), each))
    found = inspect.signature(function).bind(*given[0], **given[1])
    found.apply_defaults()
    return dict(found.arguments)


def _or(value: Tensor | None, other: Reference) -> Any:
    return other if value is None else value


def _by_arguments(step: Step, before: Spread, number: int, known: Known) -> Spread:
    """An operation whose gain depends on how it was called. Raises TypeError, ValueError for arguments not covered."""
    name = step.operation
    if name in LIPSCHITZ:
        given = arguments(step, LIPSCHITZ[name], known)
        _only(given["input"], number)
        gain = LIPSCHITZ[name](**given)
        through = before.activated() if gain == 1 else before.times(gain)
        return through.plain() if name == "softmax" else through
    if name == "log_softmax":
        return before.plain().times(_row_root(step, arguments(step, softmax, known)["dim"]))
    if name in FACTORS:
        return _multiplied(step, before, number, known)
    if name in CASTS and casts(step):
        return before
    if name in POOLED_AXES:
        through = before.times(pool_gain(step, lambda function: arguments(step, function, known)))
        # torch takes a tensor of one axis less for a single image
        return through if len(step.sizes[0]) == POOLED_AXES[name] + 2 else through.plain()
    raise Uncovered(f"{step.place} is not covered by the bound")


def _only(given: Any, number: int) -> None:
    if not (isinstance(given, Reference) and given.number == number):
        raise ValueError("what has changed is not its input")


def _row_root(step: Step, axis: Any) -> float:
    """sqrt(N) for rows of N entries: the Jacobian of log_softmax is the projection I - 1 p^T, of norm sqrt(N) |p|."""
    size = step.sizes[0]
    return up(math.sqrt(size[axis] if isinstance(axis, int) else max(size, default=1)))


def _multiplied(step: Step, before: Spread, number: int, known: Known) -> Spread:
    """A product with a number or a parameter, or a quotient of them."""
    quotient = step.operation in QUOTIENTS
    given = arguments(step, _quotient if quotient else _product, known)
    if given.get("rounding_mode") is not None:
        raise ValueError(f"rounding_mode is {given['rounding_mode']!r}")
    ours, other = given["input"], given["other"]
    if not quotient and isinstance(other, Reference) and other.number == number:
        ours, other = other, ours
    _only(ours, number)
    if isinstance(other, Tensor) and other.is_floating_point():
        sizes = other.detach().double().abs()
        least, most = float(sizes.min()), float(sizes.max())
    elif isinstance(other, (int, float)):
        least = most = abs(float(other))
    else:
        raise ValueError("its other factor is no number and no parameter of the model")
    if not (math.isfinite(most) and (least > 0 or not quotient)):
        raise ValueError("its other factor is not finite, or is zero")
    made = before.times(up(1 / least) if quotient else most)
    if isinstance(other, Tensor) and other.ndim == 1 and len(other) == step.sizes[1][-1] and not quotient:
        return replace(made, factor=(before.plain(), other))
    return made


def _product(input: Any, other: Any) -> None: ...


def _quotient(input: Any, other: Any, *, rounding_mode: Any = None) -> None: ...


def casts(step: Step) -> bool:
    """Whether it makes floating-point numbers of the same values, but for rounding."""
    assert step.call is not None
    given = (*step.call.args[1:], *step.call.kwargs.values())
    if any(isinstance(each, Reference) for each in given):
        return False
    return all(each.is_floating_point for each in given if isinstance(each, torch.dtype))


def _mean(step: Step, before: Spread) -> Spread:
    """An average over axes other than the samples'; the channels stay if their axis does."""
    many, few = (math.prod(size) for size in step.sizes)
    share = up(1 / math.sqrt(many / max(few, 1)), 4 * UNIT)
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


def _joined(step: Step, reads: Sequence[Spread]) -> Spread:
    """The entries of several tensors, each once: the squares of their changes add."""
    if step.operation in CATS and step.detail and len(step.sizes[0]) > 1:
        axis, *widths = step.detail
        if axis != 1:
            return Spread.below(reads)
        if len(widths) == len(reads):
            return Spread.beside(reads, widths)
    return Spread.below([each.plain() for each in reads])


def _moved(step: Step, before: Spread) -> Spread:
    """Entries that are copied, moved, left out, or joined by zeros: what the norms say stays, channels if they stay."""
    parts = step.detail if isinstance(step.detail, tuple) else (step.detail,)
    if step.operation == "getitem" and not all(isinstance(part, _BASIC) for part in parts):
        raise Uncovered(f"{step.place} takes entries by a list or a tensor, perhaps twice, and is not covered")
    if step.operation in COPIES:
        return before
    made = _placed(step, replace(before, folded=None, factor=None))
    return replace(made, factor=before.factor) if _keeps_rows(step, parts) else made


def _keeps_rows(step: Step, parts: tuple[Any, ...]) -> bool:
    """Whether the last axis is as it was: of whole rows, some."""
    if len(step.sizes) < 2 or not all(step.sizes) or step.sizes[0][-1] != step.sizes[1][-1]:
        return False
    sliced = step.operation == "getitem" and all(isinstance(part, slice) for part in parts)
    return sliced or step.operation in ORDERED


def _placed(step: Step, before: Spread) -> Spread:
    """Where the channels are after a move."""
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
