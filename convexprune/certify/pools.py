"""The gain of a pool as it was called: arguments by torch's names, windows counted from the shapes it read and made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convexprune.bounds.pooling import Windows, average_pool_gain, max_pool_gain
from convexprune.network.kinds import MAXIMA, POOLED_AXES
from convexprune.network.recording import Step


def pool_gain(step: Step, arguments: Callable[[Callable[..., Any]], dict[str, Any]]) -> float:
    """By how much it enlarges a change; `arguments` gives those of the call by a function's names for them.

    Raises TypeError, ValueError for arguments that are not covered.
    """
    axes = POOLED_AXES[step.operation]
    if len(step.makes) != 1:
        raise ValueError("it makes indices as well")
    wide, narrow = (size[-axes:] for size in step.sizes)
    if 0 in (*wide, *narrow):
        raise ValueError("there is nothing in its windows")
    maximum = step.operation in MAXIMA
    if step.operation.startswith("adaptive"):
        arguments(_adaptive_pool)
        windows = [Windows.adaptive(*each) for each in zip(wide, narrow, strict=True)]
        return max_pool_gain(windows) if maximum else average_pool_gain(windows)
    given = arguments(_max_pool if maximum else _avg_pool)
    kernel = _each(given["kernel_size"], axes)
    stride = _each(given["stride"], axes) if given["stride"] not in (None, (), []) else kernel
    padding = _each(given["padding"], axes)
    sizes = zip(wide, narrow, kernel, stride, padding, strict=True)
    if maximum:
        dilation = _each(given["dilation"], axes)
        return max_pool_gain([Windows.sliding(*each, apart) for each, apart in zip(sizes, dilation, strict=True)])
    windows = [Windows.sliding(*each, pad=bool(given["count_include_pad"])) for each in sizes]
    divisor = given["divisor_override"]
    if not (divisor is None or (isinstance(divisor, int) and divisor)):
        raise ValueError(f"divisor_override is {divisor!r}")
    return average_pool_gain(windows, divisor)


def _each(value: Any, axes: int) -> list[int]:
    """A number for each axis; torch takes one for all of them, by itself or alone in a list."""
    given = list(value) if isinstance(value, (tuple, list)) else [value]
    given = given * axes if len(given) == 1 else given
    if len(given) != axes or not all(isinstance(each, int) and each >= 0 for each in given):
        raise ValueError(f"{value!r} is no whole number for each of {axes} axes")
    return given


def _max_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> None: ...


def _avg_pool(
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> None: ...


def _adaptive_pool(input: Any, output_size: Any, return_indices: bool = False) -> None: ...
