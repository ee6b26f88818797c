"""Draw the picture of the README: python docs/picture.py. It takes a minute on one core.

The demo's network is pruned by Net-Trim at five tolerances: what the certificates guarantee for the network's outputs,
and what both networks, run side by side, show.
"""

from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("agg")

import matplotlib.pyplot as plt

import convexprune as cp
from convexprune import datasets

EPSILONS = (0.01, 0.02, 0.05, 0.1, 0.2)
INK, GUARANTEED, MEASURED = "#444444", "#b5651d", "#1f5f8b"


def levels():
    """Kept share, guaranteed and measured error relative to the outputs' norm, of each tolerance."""
    torch.manual_seed(0)
    data = datasets.digits()
    model = datasets.train(datasets.lenet300(64), data.x_train, data.y_train, 20)
    for epsilon in EPSILONS:
        _, report = cp.prune(model, [data.x_train[:600]], lambda layer, e=epsilon: cp.NetTrim(layer, e), cp.ADMM())
        network = report.network
        yield report.kept_fraction, network.relative(network.guaranteed), network.relative(network.measured)


def draw(found, path):
    """Two lines over the share of weights kept."""
    kept, guaranteed, measured = (100 * torch.tensor(column) for column in zip(*found, strict=True))
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for values, colour, words, place in (
        (guaranteed, GUARANTEED, "guaranteed, from the layers' certificates", (8, 6)),
        (measured, MEASURED, "measured, on the same samples", (-8, -14)),
    ):
        axes.plot(kept, values, "o-", color=colour, markersize=5)
        right = place[0] < 0
        axes.annotate(words, (kept[2], values[2]), place, textcoords="offset points", color=colour,
                      ha="right" if right else "left")  # fmt: skip
    axes.fill_between(kept, measured, guaranteed, color="#eeeeee", zorder=0)
    axes.set_yscale("log")
    axes.set_yticks([2, 5, 10, 20, 50], ["2%", "5%", "10%", "20%", "50%"])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.set_xlabel("weights kept", color=INK)
    axes.set_title("Change of the network's outputs, relative to their norm", loc="left", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(list(levels()), Path(__file__).parent / "_static" / "guaranteed.png")
