"""`convexprune merge` makes a network smaller by merging similar neurons."""

from __future__ import annotations

from pathlib import Path

import click

from convexprune.command.show import reported
from convexprune.command.source import SAMPLES, Source, of_one_model


def _kept(context: click.Context, parameter: click.Parameter, value: str | None) -> float | int | None:
    """A number with a point is a share, one without a count."""
    if value is None:
        return None
    try:
        return int(value) if value.isdecimal() else float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no number; give a share such as 0.5, or a count such as 30") from None


@click.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for the smaller model.")
@click.option("--keep", callback=_kept, help="Neurons of a layer that stay: a share (0.5), or a count (30).")
@click.option("--max-saliency", type=float, help="Instead: the largest total saliency of a layer.")
@click.option("--only", multiple=True, help="Layers whose neurons merge; several times for several. Default: all.")
@click.option("--calibration", help=f"{SAMPLES}. With it the inputs' Gram matrices count, and the change is measured.")
@click.option("--refit", is_flag=True, help="Fit the weights behind merged neurons to --calibration.")
@of_one_model
def merge(
    model: str, out: Path, keep: float | int | None, max_saliency: float | None, only: tuple[str, ...],
    calibration: str | None, refit: bool, kind: str | None, weights: Path | None, tokenizer: Path | None, windows: int,
    first: int, length: int, batch: int, device: str,
) -> None:  # fmt: skip
    """Merge similar neurons of MODEL's Linear layers: those that only Linear layers read, through a ReLU or the like.

    Without --keep and --max-saliency each layer stops at the published cut-off. MODEL is a module:function, or a
    transformers folder that torch.fx can trace.
    """
    from convexprune.command.samples import Windows
    from convexprune.command.smaller import check_new, written
    from convexprune.merge import merge as merged

    with reported():
        check_new(out)
        if refit and calibration is None:
            raise ValueError("--refit needs --calibration: the data that the weights are fitted to")
        source = Source(model, kind, weights, tokenizer)
        dense = source.on(device)
        batches = source.moved(calibration, dense, Windows(windows, first, length, batch), device)
        names = list(only) or None
        small, report = merged(dense, keep, max_saliency=max_saliency, names=names, batches=batches, refit=refit)
        click.echo(str(report))
        sentence = written(source, small, out, {"merges.json": report.to_json()})
        report.save_html(out / "merges.html")
        click.echo(sentence)
