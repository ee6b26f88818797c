"""Dataclasses as plain values that JSON can hold, and back; what is missing or of another kind is named.

A field that takes no part in comparison is not written. A number that JSON has no word for is a string ("inf"), a
member of an enum is its name. A field that has a default may be missing; entries that are no field are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from typing import Any, Final, get_args, get_origin, get_type_hints

LARGEST: Final = 2**63  # a larger whole number is no count of anything, and may be too large for a float
_NOT_FINITE: Final = ("inf", "-inf", "nan")
_WORDS: Final = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def to_plain(value: Any) -> Any:
    """The value in dicts, lists, strings, numbers and None."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if is_dataclass(value):
        return {entry.name: to_plain(getattr(value, entry.name)) for entry in fields(value) if entry.compare}
    if isinstance(value, Mapping):
        return {key: to_plain(part) for key, part in value.items()}
    return [to_plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def from_plain(kind: Any, value: Any, where: str = "") -> Any:
    """The value of type `kind` that `to_plain` wrote.

    where  the place of the value in the whole, for the error: "rows[0].kept"

    Raises ValueError naming the place of what is missing, or of another type.
    """
    parts = get_args(kind)
    if type(None) in parts:  # X | None
        return None if value is None else from_plain(parts[0], value, where)
    if is_dataclass(kind):
        return _object(kind, value, where)
    if get_origin(kind) is tuple:
        return _tuple(parts, value, where)
    if get_origin(kind) is Mapping:
        _expect(isinstance(value, dict), "an object", value, where)
        return {key: from_plain(parts[1], part, f"{where}[{key!r}]") for key, part in value.items()}
    if issubclass(kind, Enum):
        names = [member.name for member in kind]
        _expect(value in names, f"one of {', '.join(names)}", value, where)
        return kind[value]
    return _scalar(kind, value, where)


def _object(kind: Any, value: Any, where: str) -> Any:
    _expect(isinstance(value, dict), "an object", value, where)
    types, found = get_type_hints(kind), {}
    for entry in fields(kind):
        place = f"{where}.{entry.name}".lstrip(".")
        if entry.compare and entry.name in value:
            found[entry.name] = from_plain(types[entry.name], value[entry.name], place)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise ValueError(f"{place} is missing")
    return kind(**found)


def _tuple(parts: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _expect(isinstance(value, list), "a list", value, where)
    kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
    _expect(len(value) == len(kinds), f"a list of {len(kinds)}", value, where)
    return tuple(from_plain(each, value[i], f"{where}[{i}]") for i, each in enumerate(kinds))


def _scalar(kind: Any, value: Any, where: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind is float:
        _expect(whole or isinstance(value, float) or value in _NOT_FINITE, _WORDS[float], value, where)
        return float(value)
    _expect(whole if kind is int else isinstance(value, kind), _WORDS[kind], value, where)
    return value


def _expect(fits: bool, words: str, value: Any, where: str) -> None:
    if not fits:
        shown = repr(value) if not isinstance(value, int) or abs(value) <= LARGEST else "a very large number"
        shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
        raise ValueError(f"{where or 'it'} is {shown}, expected {words}")
