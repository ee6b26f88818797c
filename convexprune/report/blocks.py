"""The rows of a large report by blocks: one line for the layers of each block of the network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from convexprune.report.row import Row, missed_by, small

MANY: Final = 40  # rows beyond which a reader wants the blocks first
HEADINGS: Final = ("block", "layers", "kept", "largest gap", "constraints", "left dense", "time")
WORDS: Final = ("block", "constraints")  # columns set to the left
_NUMBERED: Final = re.compile(r"(.*?\.\d+)\.")  # model.layers.3 of model.layers.3.mlp.up_proj


@dataclass(frozen=True)
class Block:
    """The rows of one block, in their order."""

    name: str
    rows: tuple[Row, ...]

    def cells(self) -> tuple[str, ...]:
        """The block as text, in the order of HEADINGS: sums, and the worst of its rows."""
        kept, total = sum(row.kept for row in self.rows), sum(row.total for row in self.rows)
        gaps = [row.gap for row in self.rows if row.gap is not None]
        violations = [row.certificate.violation for row in self.rows if row.certificate is not None]
        return (
            self.name, str(len(self.rows)), f"{kept / total:.1%}" if total else "-", small(max(gaps)) if gaps else "-",
            missed_by(max(violations)) if violations else "-", str(sum(row.left_dense for row in self.rows)),
            f"{sum(row.seconds for row in self.rows):.1f} s",
        )  # fmt: skip


def blocks(rows: Sequence[Row]) -> tuple[Block, ...]:
    """The blocks in the order of their first rows: by the name as far as its first number, else by its first part."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        numbered = _NUMBERED.match(row.name)
        found.setdefault(numbered[1] if numbered else row.name.partition(".")[0], []).append(row)
    return tuple(Block(name, tuple(inside)) for name, inside in found.items())
