"""
First prune: a convolutional network
====================================

A network is pruned in one call: the model, batches of what it reads, and a recipe, which states a problem for each
layer. Labels are not needed. This page prunes a small convolutional network on images of digits, reads the report, and
saves the result.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import convexprune as cp
from convexprune import datasets

torch.manual_seed(0)
data = datasets.digits()


def network():
    """Two convolutions and a classifier, for images of 8 x 8 pixels as rows."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def error(model):
    """Test error, %."""
    return 100 * datasets.error_rate(model, data.x_test, data.y_test)


model = datasets.train(network(), data.x_train, data.y_train)
print(f"test error {error(model):.2f}%")

# %%
# Prune
# -----
#
# The recipe is a function from a layer to a problem. This one keeps 20% of each layer's weights, those with which the
# layer's outputs change least, and gives the others new values. In a cascade every layer reads what the network pruned
# so far gives it, and makes good a part of what was lost before.


def build(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.2))


pruned, report = cp.prune(model, [data.x_train], build, mode="cascade")
print(report)

# %%
# The page :doc:`/report` explains every column. A gap of 100% does not mean that a layer is poor: these problems are
# not convex, and nothing is proven about how much better another choice of weights could be. The last lines say what
# is proven of the network, and what was measured.

print(f"test error {error(model):.2f}% dense, {error(pruned):.2f}% pruned")

# %%
# How far can one go?
# -------------------
#
# The same with fewer weights, beside removal by magnitude, which asks nobody what the weights are good for.

shares = (0.3, 0.2, 0.1, 0.05)
found = {"cp.Balanced(), the default": (cp.Balanced(), "#1f5f8b"), "cp.Magnitude()": (cp.Magnitude(), "#b5651d")}
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, (solver, colour) in found.items():
    errors = []
    for share in shares:
        network_now, _ = cp.prune(
            model,
            [data.x_train],
            lambda layer, s=share: cp.Reconstruction(layer, cp.Unstructured(s)),
            solver,
            "cascade",
        )
        errors.append(error(network_now))
    axes.plot([100 * share for share in shares], errors, "o-", color=colour, label=name, markersize=4)
axes.axhline(error(model), color="#999999", linewidth=0.8, linestyle=":")
axes.invert_xaxis()
axes.set_xlabel("weights kept, %")
axes.set_title("Test error, %, of two solvers, by the weights kept", loc="left", fontsize=10)
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# A smaller network
# -----------------
#
# Zeros in a dense tensor run no faster. ``Channels`` removes whole input channels, and ``compact`` then takes the
# channels that nobody reads out of the modules: the network has fewer parameters, and computes the same. The first
# layer reads the image itself, and ``None`` leaves it as it is.


def channels(layer):
    return cp.Reconstruction(layer, cp.Channels(0.6)) if layer.name != "1" else None


narrow, _ = cp.prune(model, [data.x_train], channels, mode="cascade")
small, removed = cp.compact(narrow)
print(removed)
print(f"test error {error(small):.2f}%")

# %%
# Save, and load
# --------------
#
# The weights go to one safetensors file, the report to a page and to JSON.

with tempfile.TemporaryDirectory() as folder:
    cp.save(pruned, Path(folder) / "pruned.safetensors")
    report.save_html(Path(folder) / "report.html")
    report.save_json(Path(folder) / "report.json")
    again = network()
    cp.load(again, Path(folder) / "pruned.safetensors")
print(f"test error {error(again):.2f}%")
