"""What the LeNet-300-100 scripts share: where the data is, the layers, a markdown table."""

import os
import pathlib
import sys

import numpy as np
import torch

import convexprune as cp


def data_folder(given=None):
    """The folder with mnist.npz and lenet300.npz: the argument, or $CONVEXPRUNE_DATA."""
    folder = given or os.environ.get("CONVEXPRUNE_DATA")
    if not folder:
        sys.exit("no data: give --data DIR or set CONVEXPRUNE_DATA to a folder with mnist.npz and lenet300.npz")
    return pathlib.Path(folder)


def images(folder, count, split="train"):
    """(count, 784) float32 pixels / 255."""
    pixels = np.load(folder / "mnist.npz")[f"x_{split}"][:count]
    return torch.from_numpy(pixels.astype(np.float32) / 255).flatten(1)


def parameters(folder, name):
    """(weight, bias) of a layer of the published network."""
    arrays = np.load(folder / "lenet300.npz")
    return torch.from_numpy(arrays[f"{name}.weight"]), torch.from_numpy(arrays[f"{name}.bias"])


def fc1_layer(folder, count):
    """fc1 on the first training images."""
    weight, bias = parameters(folder, "fc1")
    return cp.Layer.from_samples(weight, images(folder, count), bias, name="fc1")


def fc2_layer(folder, count=4000, neurons=100):
    """fc2's first neurons; its inputs are relu(fc1)."""
    weight, bias = parameters(folder, "fc1")
    hidden = torch.relu(images(folder, count) @ weight.T + bias)
    weight, bias = parameters(folder, "fc2")
    return cp.Layer.from_samples(weight[:neurons], hidden, bias[:neurons], name="fc2")


def table(head, rows):
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
