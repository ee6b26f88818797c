"""Measure how much the layers change: each alone on the dense network's inputs, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from convexprune.layer import Layer
from convexprune.network.expansion import expanded
from convexprune.network.forward import check_untransformed, numbered, run, undisturbed
from convexprune.network.outputs import Which, output_of
from convexprune.network.projections import named_layers

Rectified = Mapping[str, bool]  # module -> True if only a ReLU reads it: it is then judged behind the ReLU


def rectified_modules(layers: Iterable[Layer]) -> dict[str, bool]:
    """The modules of captured layers, in forward order."""
    return {layer.module: layer.activation == "relu" for layer in layers}


def norms(
    model: nn.Module, batches: Iterable[Any], layers: Rectified, which: Which = None
) -> tuple[dict[str, float], float | None]:
    """||Y_l||_F of each layer, and ||Y||_F of the outputs, or None if there are none; in float64."""
    squares = dict.fromkeys(layers, 0.0)
    whole: float | None = 0.0

    def add(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        squares[name] += _square(behind(output, layers[name]).double())

    with undisturbed(model), hooked(model, layers, add):
        for batch in batches:
            output = output_of(run(model, batch), which)
            whole = whole + _square(output.double()) if whole is not None and output is not None else None
    return {name: each**0.5 for name, each in squares.items()}, None if whole is None else whole**0.5


def output_change(model: nn.Module, other: nn.Module, batches: Iterable[Any]) -> tuple[float, float]:
    """Mean square difference of two models' outputs, and the mean square of the first's, over samples and outputs."""
    change = size = 0.0
    count = 0
    with undisturbed(model, other):
        for index, batch in enumerate(batches):
            with numbered(index):
                found = [output_of(run(each, batch)) for each in (model, other)]
            if any(output is None for output in found):
                raise ValueError("the model returns no tensor; leave `batches` out, or let it return its outputs")
            one, two = (output.double() for output in found if output is not None)
            change += float((one - two).square().sum())
            size += float(one.square().sum())
            count += one.numel()
    return change / count, size / count


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], function: Callable[..., None]) -> Iterator[None]:
    """Call `function(name, module, args, kwargs, output)` after the forward pass of each of these modules."""
    modules = dict(named_layers(model))

    def checked(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        check_untransformed(name, args, kwargs, output)
        function(name, module, args, kwargs, output)

    with ExitStack() as hooks:
        hooks.enter_context(expanded(model))
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
