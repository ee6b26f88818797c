"""One rule for each kind of option: which values a solver's fields may have.

Options of one name mean the same everywhere, so one table checks them; a solver gives the checks of its own:

    def __post_init__(self) -> None:
        check_options(self, alpha=between(0, 2))
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Final

import torch

Check = Callable[[str, Any], None]  # of an option's name and value; raises ValueError or TypeError


def number(least: float = -math.inf, most: float = math.inf, *, least_open: bool = False, most_open: bool = False,
           infinite: bool = False) -> Check:  # fmt: skip
    """A real number from `least` to `most`, the ends included unless they are open; finite unless `infinite`."""
    low, high = ("(" if least_open else "["), (")" if most_open else "]")
    if most == math.inf:
        range_ = f"> {least:g}" if least_open else f">= {least:g}"
    else:
        range_ = f"in {low}{least:g}, {most:g}{high}"
    wanted = f"a {'' if infinite else 'finite '}number {range_}" if least > -math.inf else "a finite number"

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}; it must be {wanted}")
        try:
            figure = float(value)
        except OverflowError:  # a whole number beyond all floats
            figure = math.copysign(math.inf, value)
        low_enough = figure < most or (figure == most and not most_open)
        high_enough = figure > least or (figure == least and not least_open)
        if not (low_enough and high_enough) or (math.isinf(figure) and not infinite):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")

    return check


def whole(least: int, most: int | None = None) -> Check:
    """A whole number, at least `least` and, where there is one, at most `most`."""
    wanted = f"a whole number >= {least}" if most is None else f"a whole number from {least} to {most}"

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} is {value!r}; it must be {wanted}")
        if int(value) < least or (most is not None and int(value) > most):
            raise ValueError(f"{name} is {value!r}; it must be {wanted}")

    return check


def optional(check: Check) -> Check:
    """None, or what `check` takes."""
    return lambda name, value: None if value is None else check(name, value)


def positive(name: str, value: Any) -> None:
    """A finite number > 0."""
    number(0, least_open=True)(name, value)


def several(count: int, check: Check) -> Check:
    """A tuple or list of `count` values, each of which `check` takes."""

    def each(name: str, value: Any) -> None:
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name} is {value!r}; it must be a tuple of {count} numbers")
        if len(value) != count:
            raise ValueError(f"{name} is {value!r}; it must have {count} entries, not {len(value)}")
        for at, entry in enumerate(value):
            check(f"{name}[{at}]", entry)

    return each


def between(least: float, most: float) -> Check:
    """A number strictly between the two."""
    return number(least, most, least_open=True, most_open=True)


def device(name: str, value: Any) -> None:
    """The name of a device that is there."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name} is {value!r}; give the name of a device, such as 'cpu' or 'cuda'")
    try:
        found = torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"{name} is {value!r}, which is no device; give one such as 'cpu' or 'cuda'") from error
    if found.type == "cpu":
        return
    if found.type == "meta":
        raise ValueError(f"{name} is {value!r}, on which nothing can be computed; give one such as 'cpu' or 'cuda'")
    there = torch.cuda.device_count() if found.type == "cuda" else int(torch.get_device_module(found).is_available())
    if (found.index or 0) >= there:
        raise ValueError(f"{name} is {value!r}, and torch finds {there} devices of that kind here; give 'cpu'")


def dtype(name: str, value: Any) -> None:
    """float32 or float64."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} is {value!r}; it must be torch.float32 or torch.float64")
    if value not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {value}; it must be torch.float32 or torch.float64")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be True or False")


def text(name: str, value: Any) -> None:
    """A string."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}; it must be a string")


def numbers(name: str, value: Any) -> None:
    """A dense tensor of real numbers, on a device that holds them."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; give a torch tensor")
    if value.is_complex() or value.is_quantized or value.layout != torch.strided or value.device.type == "meta":
        kind = f"{str(value.layout).removeprefix('torch.')} {value.dtype} on {value.device}"
        raise TypeError(f"{name} is {kind}; give a dense tensor of real numbers")


def having(method: str, example: str) -> Check:
    """An object with this method, such as `example`: no class, and no name of one."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, type) or not callable(getattr(value, method, None)):
            raise TypeError(f"{name} is {value!r}; give an object with a method {method}(...), such as {example}")

    return check


def function(example: str) -> Check:
    """Something to call, such as `example`."""

    def check(name: str, value: Any) -> None:
        if not callable(value):
            raise TypeError(f"{name} is {value!r}; give {example}")

    return check


def path(name: str, value: Any) -> None:
    """The path of a file or folder."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} is {value!r}; give a string or a pathlib.Path")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name} is {value!r}, which names no file")


seed: Final = whole(0, 2**63 - 1)

NAMED: Final[dict[str, Check]] = {
    "eps_abs": positive, "eps_rel": positive, "max_iter": whole(1), "time_limit": optional(number(0, least_open=True,
    infinite=True)), "memory": number(0, least_open=True, infinite=True), "device": device, "dtype": dtype,
    "seed": seed,
}  # fmt: skip


def check_options(solver: Any, **checks: Check) -> None:
    """Raise ValueError or TypeError for an option out of its range, naming it and the values that it may have.

    checks  of the options that the table does not know, and of those that mean something else here
    """
    for entry in fields(solver):
        check = checks.get(entry.name, NAMED.get(entry.name))
        if check is not None:
            check(entry.name, getattr(solver, entry.name))
