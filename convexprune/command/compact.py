"""`convexprune compact` makes a pruned network smaller by the channels that carry nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convexprune.command.show import reported
from convexprune.command.source import SAMPLES, Source, of_one_model

if TYPE_CHECKING:
    from torch import nn


@click.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for the smaller model.")
@click.option("--calibration", help=f"{SAMPLES}: the smaller model is compared with MODEL on it.")
@click.option("--silent", is_flag=True, help="Also remove what a ReLU makes 0 on all of --calibration.")
@click.option(
    "--round-to", type=click.IntRange(min=1), default=1, show_default=True,
    help="Leave a multiple of this number of channels in each layer.",
)  # fmt: skip
@of_one_model
def compact(
    model: str, out: Path, calibration: str | None, silent: bool, round_to: int, kind: str | None,
    weights: Path | None, tokenizer: Path | None, windows: int, first: int, length: int, batch: int, device: str,
) -> None:  # fmt: skip
    """Remove the channels of MODEL that carry nothing, such as those a pruning left without a weight.

    The smaller model computes the same function. MODEL is a transformers folder or module:function.
    """
    from convexprune.command.samples import Windows
    from convexprune.command.smaller import check_new, written
    from convexprune.network import compact as compacted
    from convexprune.report.plain import to_plain

    with reported():
        check_new(out)
        if silent and calibration is None:
            raise ValueError("--silent needs --calibration: the data on which a ReLU is watched")
        source = Source(model, kind, weights, tokenizer)
        dense = source.on(device)
        batches = source.moved(calibration, dense, Windows(windows, first, length, batch), device)
        parts = _parts(dense, batches is not None, silent)
        small, found = compacted(dense, batches=batches if silent else None, round_to=round_to, parts=parts)
        click.echo(str(found))
        if not found.removed:
            click.echo("nothing was removed: each channel carries something (--pattern channels prunes whole channels)")
        if batches is not None:
            click.echo(
                f"its outputs are those of MODEL within rounding: {_change(dense, small, batches):.1e} of their norm"
            )
        click.echo(written(source, small, out, {"compaction.json": json.dumps(to_plain(found), indent=1)}))


def _parts(model: nn.Module, compared: bool, silent: bool) -> tuple[str, ...] | None:
    """The parts that torch.fx can trace; None where it can trace the model itself."""
    from convexprune.network.parts import traceable

    parts = traceable(model)
    if parts == ("",):
        return None
    if not parts:
        raise ValueError("torch.fx can trace no part of the model with two layers or more, so nothing can be removed")
    if silent or not compared:
        wanted = "leave --silent out" if silent else "give --calibration: the smaller model is compared with it there"
        raise ValueError(f"torch.fx cannot trace the model, only {len(parts)} parts of it such as {parts[0]}; {wanted}")
    return parts


def _change(model: nn.Module, small: nn.Module, batches: Iterable[Any]) -> float:
    """How far the outputs moved, relative to their norm; raises ValueError where that is more than rounding."""
    import torch

    from convexprune.network.compare import output_change

    change, size = output_change(model, small, batches)
    moved = math.sqrt(change / size) if size else math.sqrt(change)
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    if not moved <= max(math.sqrt(torch.finfo(dtype).eps) for dtype in dtypes):
        raise ValueError(
            f"the smaller model's outputs differ by {moved:.2g} of their norm, so something else reads what was "
            "removed; nothing was written"
        )
    return moved
