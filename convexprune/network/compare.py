"""Measure how much the layers change: each alone on the dense network's inputs, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.layer import Layer
from convexprune.network.forward import check_untransformed, numbered, run, undisturbed

Rectified = Mapping[str, bool]  # module -> True if only a ReLU reads it: it is then judged behind the ReLU


def rectified_modules(layers: Iterable[Layer]) -> dict[str, bool]:
    """The modules of captured layers, in forward order."""
    return {layer.module: layer.activation == "relu" for layer in layers}


@dataclass(frozen=True, eq=False)
class Changes:
    """How far the pruned network is from the dense one over the calibration samples.

    layers   module -> || Yhat_l - Y_l ||_F, where both networks run
    alone    module -> D^T D (out, out), float64: D its change on the dense network's inputs, a row each sample and
             position
    output   || Yhat - Y ||_F; None where the outputs are not one tensor
    size     || Y ||_F
    """

    layers: Mapping[str, float]
    alone: Mapping[str, Tensor]
    output: float | None
    size: float


def changes(
    model: nn.Module,
    pruned: nn.Module,
    batches: Iterable[Any],
    layers: Rectified,
    lone: Rectified,
    tell: Callable[[int], None] = lambda index: None,
) -> Changes:
    """One pass of each network over the batches; sums in float64.

    layers  are compared where both networks run; their dense outputs are held for a batch
    lone    are compared on the dense network's inputs
    tell    is called with each batch's number
    """
    comparison = _Comparison(model, pruned, layers, lone)
    with undisturbed(model, pruned):
        for index, batch in enumerate(batches):
            with numbered(index):
                comparison.take(batch)
            tell(index)
    return comparison.changes()


class _Comparison:
    """The sums of `changes`."""

    def __init__(self, model: nn.Module, pruned: nn.Module, layers: Rectified, lone: Rectified) -> None:
        self.model, self.pruned, self.rectified, self.lone = model, pruned, {**layers, **lone}, lone
        self.twins = dict(pruned.named_modules())
        self.dense: dict[str, list[Tensor]] = {}
        self.squares = dict.fromkeys(layers, 0.0)
        self.grams: dict[str, Tensor] = {}
        self.output: float | None = 0.0
        self.size = 0.0

    def take(self, batch: Any) -> None:
        """A batch through the dense network, then through the pruned one."""
        self.dense.clear()
        with hooked(self.model, self.rectified, self._keep):
            theirs = run(self.model, batch)
        with hooked(self.pruned, self.squares, self._compare):
            ours = run(self.pruned, batch)
        if isinstance(theirs, Tensor) and self.output is not None:
            self.output += _square(ours.double() - theirs.double())
            self.size += _square(theirs.double())
        else:
            self.output = None

    def changes(self) -> Changes:
        """The norms of what was summed."""
        output = None if self.output is None else self.output**0.5
        layers = {name: each**0.5 for name, each in self.squares.items()}
        return Changes(layers, {name: gram.cpu() for name, gram in self.grams.items()}, output, self.size**0.5)

    def _keep(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if name in self.lone:
            # the twin is called with what the dense layer has read; no hook of ours is on it yet
            with torch.inference_mode(False), torch.no_grad():
                change = behind(self.twins[name](*args, **kwargs), self.lone[name]) - behind(output, self.lone[name])
                rows = columns(change)
                self.grams[name] = self.grams.get(name, 0) + rows.T @ rows
        if name in self.squares:
            # a copy: what comes next may be in place
            self.dense.setdefault(name, []).append(behind(output, self.rectified[name]).clone())

    def _compare(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        self.squares[name] += _square(behind(output, self.rectified[name]).double() - self.dense[name].pop(0))


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


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], function: Callable[..., None]) -> Iterator[None]:
    """Call `function(name, module, args, kwargs, output)` after the forward pass of each of these modules."""
    modules = dict(model.named_modules())

    def checked(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        check_untransformed(name, args, kwargs, output)
        function(name, module, args, kwargs, output)

    with ExitStack() as hooks:
        for name in names:
            hook = modules[name].register_forward_hook(partial(checked, name), with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def behind(output: Tensor, rectified: bool) -> Tensor:
    """The output as the layer is judged: behind the ReLU if only a ReLU reads it."""
    return output.relu() if rectified else output


def columns(change: Tensor) -> Tensor:
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
