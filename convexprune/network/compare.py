"""Measure how much the layers change: each alone on the dense network's inputs, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.layer import Layer
from convexprune.network.forward import run, undisturbed

Rectified = Mapping[str, bool]  # module -> True if only a ReLU reads it: it is then judged behind the ReLU


def rectified_modules(layers: Iterable[Layer]) -> dict[str, bool]:
    """The modules of captured layers in forward order, and whether each is judged behind a ReLU."""
    return {layer.name.partition("[")[0]: layer.activation == "relu" for layer in layers}


def alone(model: nn.Module, pruned: nn.Module, batches: Iterable[Any], layers: Rectified) -> dict[str, Tensor]:
    """D^T D (out, out), float64, of each module; D is its change on the dense network's inputs.

    D has a row for each sample and position. This takes one pass of the dense network; the pruned one is not run.
    """
    twins = dict(pruned.named_modules())
    grams: dict[str, Tensor] = {}

    def take(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            change = _columns(behind(twins[name](*args, **kwargs), layers[name]) - behind(output, layers[name]))
            grams[name] = grams.get(name, 0) + change.T @ change

    with undisturbed(model, pruned), hooked(model, layers, take):
        for batch in batches:
            run(model, batch)
    return {name: gram.cpu() for name, gram in grams.items()}


def norms(model: nn.Module, batches: Iterable[Any], layers: Rectified) -> tuple[dict[str, float], float | None]:
    """||Y_l||_F of each layer, and ||Y||_F of the outputs, or None if they are not one tensor; in float64."""
    squares = dict.fromkeys(layers, 0.0)
    whole: float | None = 0.0

    def add(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        squares[name] += _square(behind(output, layers[name]).double())

    with undisturbed(model), hooked(model, layers, add):
        for batch in batches:
            output = run(model, batch)
            whole = whole + _square(output.double()) if whole is not None and isinstance(output, Tensor) else None
    return {name: each**0.5 for name, each in squares.items()}, None if whole is None else whole**0.5


def together(
    model: nn.Module, pruned: nn.Module, batches: Iterable[Any], layers: Rectified, tell: Callable[[int], None]
) -> tuple[dict[str, float], float | None, float]:
    """|| Yhat_l - Y_l ||_F of each layer, || Yhat - Y ||_F of the outputs, and ||Y||_F, summed in float64.

    layers  the layers to compare, may be empty; their dense outputs are kept for the length of a batch
    tell    called with the number of each batch

    The error of the outputs is None if they are not one tensor.
    """
    dense: dict[str, Tensor] = {}
    squares = dict.fromkeys(layers, 0.0)

    def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        dense[name] = behind(output, layers[name]).clone()  # the next operation may work in place

    def compare(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        squares[name] += _square(behind(output, layers[name]).double() - dense.pop(name))

    change: float | None = 0.0
    size = 0.0
    with undisturbed(model, pruned), hooked(model, layers, keep), hooked(pruned, layers, compare):
        for index, batch in enumerate(batches):
            theirs, ours = run(model, batch), run(pruned, batch)
            if isinstance(theirs, Tensor) and change is not None:
                change += _square(ours.double() - theirs.double())
                size += _square(theirs.double())
            else:
                change = None
            tell(index)
    return {name: each**0.5 for name, each in squares.items()}, None if change is None else change**0.5, size**0.5


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], function: Callable[..., None]) -> Iterator[None]:
    """Call `function(name, module, args, kwargs, output)` after the forward pass of each of these modules."""
    modules = dict(model.named_modules())
    with ExitStack() as hooks:
        for name in names:
            hook = modules[name].register_forward_hook(partial(function, name), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def behind(output: Tensor, rectified: bool) -> Tensor:
    """The output as the layer is judged: behind the ReLU if only a ReLU reads it."""
    return output.relu() if rectified else output


def _columns(change: Tensor) -> Tensor:
    """The change as a matrix (samples and positions, channels), float64."""
    channels = change if change.ndim < 3 else change.movedim(1, -1)
    return channels.reshape(-1, channels.shape[-1]).double()


def _square(change: Tensor) -> float:
    return float(change.square().sum())


def turns(sizes: Mapping[str, int], memory: float) -> Sequence[list[str]]:
    """Split the names into groups whose total size is at most `memory`; a larger one is a group of its own."""
    groups: list[list[str]] = []
    used = memory
    for name, size in sizes.items():
        if used + size > memory:
            groups.append([])
            used = 0.0
        groups[-1].append(name)
        used += size
    return groups
