"""Networks and data for the demo: LeNet-300-100, small digits, and MNIST from a file."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

CLASSES: Final = 10


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images as rows: x (samples, pixels) float32 in [0, 1], y (samples,) int64."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def lenet300(inputs: int = 784, hidden: Sequence[int] = (300, 100), classes: int = CLASSES) -> nn.Sequential:
    """The ReLU network inputs-300-100-classes with layers fc1, fc2, fc3, on images of any shape."""
    widths = (inputs, *hidden, classes)
    parts: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for index in range(1, len(widths)):
        parts.append((f"fc{index}", nn.Linear(widths[index - 1], widths[index])))
        if index < len(widths) - 1:
            parts.append((f"relu{index}", nn.ReLU()))
    return nn.Sequential(OrderedDict(parts))


def digits(seed: int = 0) -> Images:
    """1,797 digits of 8 x 8 pixels, bundled; a quarter, drawn with the seed, is the test set.

    Source: Alpaydin, Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998 (its
    test set; CC BY 4.0); the same as scikit-learn's `load_digits`.
    """
    arrays = _arrays(Path(__file__).with_name("digits.npz"), ("x", "y"))
    x = torch.from_numpy(arrays["x"]).flatten(1).float() / 16
    y = torch.from_numpy(arrays["y"]).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    return Images(x[train], y[train], x[test], y[test])


def mnist(path: str | os.PathLike[str]) -> Images:
    """Images from an npz with x_train, x_test (n, height, width) uint8 and y_train, y_test (n,).

    Raises ValueError naming missing arrays, OSError if the file cannot be read.
    """
    arrays = _arrays(path, ("x_train", "y_train", "x_test", "y_test"))
    parts = []
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim < 2 or y.shape != (len(x),) or len(x) == 0:
            raise ValueError(
                f"{path}: x_{split} is {x.dtype} {x.shape} and y_{split} {y.shape}; "
                "expected uint8 images (n, height, width) and n labels"
            )
        if y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= CLASSES:
            raise ValueError(
                f"{path}: y_{split} is {y.dtype} from {y.min()} to {y.max()}; expected whole numbers from 0 to "
                f"{CLASSES - 1}"
            )
        parts += [torch.from_numpy(x).flatten(1).float() / 255, torch.from_numpy(y).long()]
    return Images(*parts)


def trained_lenet300(path: str | os.PathLike[str]) -> nn.Sequential:
    """The LeNet-300-100 whose weights are in an npz as fc1.weight (out, in), fc1.bias, ... fc3.bias.

    Raises ValueError naming missing arrays, OSError if the file cannot be read.
    """
    keys = tuple(f"fc{index}.{part}" for index in (1, 2, 3) for part in ("weight", "bias"))
    arrays = _arrays(path, keys)
    shapes = [arrays[f"fc{index}.weight"].shape for index in (1, 2, 3)]
    if any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"{path}: the weights have shapes {shapes}; expected (out, in) for each")
    model = lenet300(shapes[0][1], (shapes[0][0], shapes[1][0]), shapes[2][0])
    try:
        model.load_state_dict({key: torch.from_numpy(arrays[key]).float() for key in keys})
    except RuntimeError as error:
        raise ValueError(f"{path}: the layers do not fit together: {error}") from error
    return model.eval()


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int = 20, seed: int = 0) -> nn.Module:
    """Train a classifier in place with Adam on batches of 128; returns it in evaluation mode. Seeded."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for start in range(0, len(x), 128):
            rows = order[start : start + 128]
            optimiser.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(x[rows]), y[rows]))
            optimiser.step()
    return model.eval()


@torch.no_grad()
def error_rate(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The fraction of wrongly classified rows."""
    wrong = 0
    for start in range(0, len(x), 4096):
        rows = slice(start, start + 4096)
        wrong += int((model(x[rows]).argmax(1) != y[rows]).sum())
    return wrong / len(x)


def _arrays(path: str | os.PathLike[str], keys: Sequence[str]) -> dict[str, np.ndarray]:
    """The named arrays of an npz file; nothing is unpickled."""
    expected = f"expected an npz file with {', '.join(keys)}"
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in keys if key in archive}
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {expected}", str(path)) from error
    except (zipfile.BadZipFile, EOFError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable npz file; {expected}") from error
    missing = [key for key in keys if key not in arrays]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} not in it; {expected}")
    return arrays
