"""`convexprune demo` trains a ReLU network, prunes it by Net-Trim, and says what is proven."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convexprune.command.show import check_writable, reported, show
from convexprune.report.progress import drawn

if TYPE_CHECKING:
    from torch import nn

    from convexprune.datasets import Images
    from convexprune.layer import Layer
    from convexprune.problem import LayerProblem
    from convexprune.report import Report


def _finite(context: click.Context, parameter: click.Parameter, value: float) -> float:
    """NaN and inf pass every FloatRange."""
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is not a finite number")
    return value


FILE = click.Path(dir_okay=False, path_type=Path)
RESULTS = ("report.html", "report.json", "pruned.safetensors")  # in the folder of --out


@click.command()
@click.option("--data", type=FILE, help="MNIST as npz: x_train, y_train, x_test, y_test. Default: the bundled digits.")
@click.option("--weights", type=FILE, help="A network as npz: fc1.weight, fc1.bias, ... fc3.bias. Needs --data.")
@click.option(
    "--epsilon",
    type=click.FloatRange(min=0),
    callback=_finite,
    default=0.05,
    show_default=True,
    help="How far a layer's outputs may move, relative to their norm.",
)
@click.option(
    "--mode",
    type=click.Choice(["parallel", "cascade"]),
    default="parallel",
    show_default=True,
    help="Layers read what the dense network gives them, or what the network pruned so far does.",
)
@click.option(
    "--gamma",
    type=click.FloatRange(min=1),
    callback=_finite,
    default=1.1,
    show_default=True,
    help="Slack of the cascade's later layers.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Calibration images, the first of the training set.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    show_default=True,
    help="Where report.html, report.json and pruned.safetensors go.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the split and of the training."
)
def demo(
    data: Path | None,
    weights: Path | None,
    epsilon: float,
    mode: str,
    gamma: float,
    samples: int,
    out: Path,
    seed: int,
) -> None:
    """Train (or load) a 300-100 ReLU network, prune it by Net-Trim, and report what is proven about it."""
    from convexprune import datasets
    from convexprune.network import Calibration
    from convexprune.problems import NetTrim
    from convexprune.prune import prune
    from convexprune.solvers import ADMM

    if weights is not None and data is None:
        raise click.UsageError("--weights needs --data: the images that the network was trained on")

    def build(layer: Layer) -> LayerProblem:
        return NetTrim(layer, epsilon) if mode == "parallel" else NetTrim.cascade(layer, epsilon, gamma)

    with reported():
        check_writable(out, RESULTS)
        images = datasets.digits(seed) if data is None else datasets.mnist(data)
        model = _network(images, weights, seed)
        out.mkdir(parents=True, exist_ok=True)
        chosen = images.x_train[:samples]
        calibration = [chosen[start : start + 1000] for start in range(0, len(chosen), 1000)]
        with drawn() as progress:
            pruned, report = prune(model, Calibration(calibration, seed=seed), build, ADMM(), mode, progress=progress)
        show(report)
        for name, network in (("dense", model), ("pruned", pruned)):
            rate = datasets.error_rate(network, images.x_test, images.y_test)
            click.echo(f"test error, {name + ':':<8}{rate:6.2%}")
        _save(report, pruned, out)


def _network(images: Images, weights: Path | None, seed: int) -> nn.Module:
    """The network of a file, or one trained here."""
    import torch

    from convexprune import datasets

    pixels = images.x_train.shape[1]
    if weights is not None:
        model = datasets.trained_lenet300(weights)
        expected = model.get_submodule("fc1").in_features
        if expected != pixels:
            raise ValueError(f"{weights}: fc1 reads {expected} numbers and the images have {pixels} pixels")
        return model
    epochs = 20 if len(images.x_train) < 10_000 else 3
    click.echo(f"training a {pixels}-300-100-10 ReLU network on {len(images.x_train)} images", err=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return datasets.train(datasets.lenet300(pixels), images.x_train, images.y_train, epochs, seed)


def _save(report: Report, pruned: nn.Module, out: Path) -> None:
    from convexprune.network import save

    page, numbers, network = (out / name for name in RESULTS)
    report.save_html(page)
    report.save_json(numbers)
    save(pruned, network, {"report": "report.json", "kept": f"{report.kept_fraction:.6f}"})
    click.echo(f"written: {page}, {numbers.name}, {network.name}")
