"""What the layers need at the least, against the memory that there is: said before the work begins."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from convexprune.network.matrices import Stack

COPIES: Final = 2  # of a Gram matrix that are there at once: the sums, and the moments that are made of them


def available() -> int | None:
    """Bytes that a process can still have, by Linux; None where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {line.split(":")[0]: line.split()[1] for line in lines}
        return int(sizes["MemAvailable"]) * 1024
    except (OSError, KeyError, IndexError, ValueError):
        return None


def resident() -> int:
    """Bytes of this process that are in memory, by Linux; 0 where it does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def highest() -> int:
    """Bytes that this process has had in memory at the most, by Linux; 0 where it does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except (OSError, IndexError, ValueError, StopIteration):
        return 0


def check_grams(stacks: Mapping[str, Stack]) -> None:
    """Raise MemoryError naming a layer whose Gram matrices do not fit."""
    there = available()
    for name, stack in stacks.items():
        need = 8 * COPIES * stack.groups * stack.width**2
        _check(name, f"the Gram matrices of its {stack.width} inputs", need, there)


def check_rows(name: str, rows: int, stack: Stack) -> None:
    """Raise MemoryError where the rows that a layer reads cannot be kept."""
    need = rows * stack.groups * stack.width * stack.weight.element_size()
    _check(name, f"keeping the {rows} rows that it reads", need, available())


def _check(name: str, what: str, need: int, there: int | None) -> None:
    if there is not None and need > there:
        raise MemoryError(
            f"layer {name!r}: {what} takes {need / 1e9:.3g} GB, and {there / 1e9:.3g} GB are free; leave it out of "
            "`names`, or give fewer samples or `positions` where rows are kept"
        )
