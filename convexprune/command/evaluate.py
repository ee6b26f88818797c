"""`convexprune evaluate` compares a pruned model with the dense one on data."""

from __future__ import annotations

from pathlib import Path

import click

from convexprune.command.show import reported
from convexprune.command.source import SAMPLES, Source, options


@click.command()
@click.argument("dense")
@click.argument("pruned")
@click.option("--data", required=True, help=f"{SAMPLES}. An npz file may hold the classes as `labels`.")
@options
@click.option("--class", "kind", help="Class of transformers to load both as; default: the config's.")
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="File of cp.save, such as smaller.safetensors, that goes into PRUNED.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of the tokenizer; default: DENSE.")
def evaluate(
    dense: str, pruned: str, data: str, windows: int, first: int, length: int, batch: int, kind: str | None,
    weights: Path | None, tokenizer: Path | None,
) -> None:  # fmt: skip
    """Compare PRUNED with DENSE: perplexity, next-token agreement and KL of language models, else output error.

    Each is a transformers folder or module:function. For a compacted or merged network, PRUNED is the dense one again,
    and --weights the file of the smaller.
    """
    from convexprune.command.samples import Windows
    from convexprune.evaluate import evaluate as compared

    with reported():
        one, other = Source(dense, kind, None, tokenizer), Source(pruned, kind, weights, tokenizer)
        model = one.model()
        batches, labels = one.labelled(data, model, Windows(windows, first, length, batch))
        click.echo(str(compared(model, other.model(), batches, labels)))
