"""What `compact` and `merge` share: the folder that a smaller network goes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from torch import nn

from convexprune.command.folder import CONFIG
from convexprune.command.prune import RESULTS
from convexprune.command.show import check_writable
from convexprune.command.source import Source
from convexprune.network import save
from convexprune.network.sizes import changes
from convexprune.whole_file import write_whole

NETWORK: Final = "smaller.safetensors"


def check_new(out: Path) -> None:
    """Raise OSError or ValueError where nothing can be written, or where something is already."""
    check_writable(out)
    if not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        raise ValueError(f"{out} is no empty folder; give a new one with --out")


def written(source: Source, small: nn.Module, out: Path, beside: Mapping[str, str]) -> str:
    """Write the network, and files beside it by name and content; returns a sentence about what was written.

    A transformers folder becomes one where some config describes the new shapes; else `cp.load` takes the file.
    """
    small = small.to("cpu")
    out.mkdir(parents=True, exist_ok=True)
    config = None if source.folder is None else source.folder.config_of(small)
    if source.folder is not None and config is not None:
        small.config = config
        source.folder.save(small, out, without=RESULTS)  # a report is about the weights that it was made of
    else:
        save(small, out / NETWORK)
    for name, content in beside.items():
        write_whole(out / name, content)
    what = NETWORK if config is None else "the model"
    return "; ".join([f"written: {out}: {', '.join([what, *beside])}", *([] if config else _how(source, small, out))])


def _how(source: Source, small: nn.Module, out: Path) -> Iterator[str]:
    """How the file of a network is loaded."""
    if source.folder is not None:
        yield f"transformers cannot load it, since no number of a {CONFIG} says that {_widths(small)}"
    yield f'cp.load(model, "{out / NETWORK}") puts it into the dense model'


def _widths(small: nn.Module) -> str:
    """What became of each width: "172 is now 100 to 130"."""
    found: dict[int, set[int]] = {}
    for change in changes(small).values():
        for key, before in change["dense"].items():
            if change["now"][key] != before:
                found.setdefault(before, set()).add(change["now"][key])
    told = [(before, min(now), max(now)) for before, now in found.items()]
    return ", ".join(f"{before} is now {low if low == high else f'{low} to {high}'}" for before, low, high in told)
