"""The JSON Schema of a report, from the types of its fields: python -m convexprune.report.schema writes schema.json.

Source: JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, get_args, get_origin, get_type_hints

from convexprune.report.report import SCHEMA, Report

FILE: Final = Path(__file__).with_name("schema.json")
_NUMBER: Final = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf", "nan"]}]}
_SCALARS: Final[dict[type, dict[str, Any]]] = {
    float: _NUMBER, int: {"type": "integer"}, str: {"type": "string"}, bool: {"type": "boolean"},
}  # fmt: skip


def json_schema() -> dict[str, Any]:
    """Of what `Report.to_dict` gives."""
    found = _of(Report)
    _add(found, schema={"const": SCHEMA}, kept={"type": "integer"}, total={"type": "integer"})
    row = found["properties"]["rows"]["items"]
    _add(row, total={"type": "integer"}, kept_fraction=_NUMBER)
    _add(row["properties"]["certificate"]["anyOf"][0], relative_gap=_NUMBER)
    point = row["properties"]["trace"]["items"]  # the numbers of its certificate stand beside the seconds
    certificate = point["properties"].pop("certificate")
    point["required"].remove("certificate")
    _add(point, **certificate["properties"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A report of convexprune", **found}


def text() -> str:
    """The file."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _of(kind: Any) -> dict[str, Any]:
    """The schema of a value that `to_plain` makes of this type."""
    parts = get_args(kind)
    if type(None) in parts:
        return {"anyOf": [_of(parts[0]), {"type": "null"}]}
    if is_dataclass(kind):
        types = get_type_hints(kind)
        written = {entry.name: _of(types[entry.name]) for entry in fields(kind) if entry.compare}
        return {"type": "object", "properties": written, "required": [*written]}
    if get_origin(kind) is tuple:
        if parts[-1] is Ellipsis:
            return {"type": "array", "items": _of(parts[0])}
        return {"type": "array", "prefixItems": [_of(part) for part in parts], "minItems": len(parts), "items": False}
    if get_origin(kind) is Mapping:
        return {"type": "object", "additionalProperties": _of(parts[1])}
    if issubclass(kind, Enum):
        return {"enum": [member.name for member in kind]}
    return dict(_SCALARS[kind])


def _add(found: dict[str, Any], **entries: dict[str, Any]) -> None:
    """Entries of an object that are always written."""
    found["properties"] |= entries
    found["required"] += entries


if __name__ == "__main__":
    FILE.write_text(text())
