"""How much the network's output moves with a layer: with each of its outputs, or with any change of its weights.

    a_m = E_sample sum_p sum_k (d f_k / d y_mp)^2,    E|f(y + e) - f(y)|^2 ~ sum_m a_m E e_m^2

over output positions p and network outputs k, if the errors e of different outputs and positions are uncorrelated.
With random probes v ~ N(0, I) the sum over k is E_v (d <v, f> / d y_mp)^2, one backward pass each.

A change D of the weights moves the outputs by E|f(W + D) - f(W)|^2 ~ E_v <D, grad_W <v, f>>^2, with all correlations.
Source: the Gauss-Newton form of Optimal Brain Damage, LeCun, Denker, Solla 1990; Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.network.calibration import Calibration
from convexprune.network.forward import tensors_in, undisturbed
from convexprune.network.matrices import Stack
from convexprune.network.names import choose


def sensitivities(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    names: Iterable[str] | str | None = None,
    probes: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """For each layer a (out,), float64, all >= 0: what a unit of error in each of its outputs does to the network's.

    As the `importance` of a Reconstruction, it makes the layer's problem speak of the network's output.

    names   as in `capture`; probes, seed   random directions of the output for each batch
    Raises ValueError where the model's output is not one floating tensor whose first axis are the samples.
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}; it must be at least 1")
    calibration = Calibration.of(batches, names)
    chosen = choose(model, calibration.names)
    pairs, stacks = chosen.pairs, chosen.stacks
    sums: dict[str, Tensor] = {}
    samples = 0
    generator = torch.Generator().manual_seed(seed)
    with undisturbed(model):
        for batch in calibration:
            outputs, calls = _graph(model, batch, stacks)
            samples += len(outputs)
            for _ in range(probes):
                probe = torch.randn(outputs.shape, generator=generator).to(outputs)
                grads = torch.autograd.grad(
                    (outputs * probe).sum(), [y for _, y in calls], retain_graph=True, allow_unused=True
                )
                for (name, _), grad in zip(calls, grads, strict=True):
                    if grad is not None:
                        rows = (
                            stacks[name].output_rows(grad.detach()).double().cpu()
                        )  # (items, positions, groups, width)
                        total = rows.square().sum((0, 1))
                        sums[name] = sums[name] + total if name in sums else total
    found: dict[str, Tensor] = {}
    for module, layer in pairs:
        if module in sums:
            each = stacks[module].names(module)
            found[layer] = sums[module][each.index(layer)] / (samples * probes)
    return found


def directions(
    model: nn.Module, batches: Sequence[Any], names: Iterable[str] | str | None = None, count: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """For each layer g (count or so, out, P), float32: E|f(W + D) - f(W)|^2 ~ sum_r <D, g_r>^2, to first order in f.

    Each g_r is the gradient of the outputs of some of the samples along a random direction: one backward pass over the
    data in all. The estimate's standard deviation is sqrt(2 / count) of it. P counts the bias.
    """
    chosen = choose(model, names)
    pairs, stacks = chosen.pairs, chosen.stacks
    total = sum(len(next(tensors_in(batch))) for batch in batches)
    if not total:
        raise ValueError("no batches; give at least one")
    found: dict[str, list[Tensor]] = {layer: [] for _, layer in pairs}
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for stack in stacks.values() for p in (stack.module.weight, stack.module.bias) if p is not None]
    asked = [parameter.requires_grad for parameter in parameters]
    with undisturbed(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for part in _parts(batches, max(1, -(-total // count))):
                outputs, _ = _graph(model, part, {})
                probe = torch.randn(outputs.shape, generator=generator).to(outputs)
                grads = torch.autograd.grad((outputs * probe).sum(), parameters, allow_unused=True)
                known = dict(zip(map(id, parameters), grads, strict=True))
                for module, layer in pairs:
                    stack = stacks[module]
                    found[layer].append(_gradient(stack, known, stack.names(module).index(layer)) / total**0.5)
        finally:
            for parameter, wanted in zip(parameters, asked, strict=True):
                parameter.requires_grad_(wanted)
    return {layer: torch.stack(parts) for layer, parts in found.items()}


def _gradient(stack: Stack, known: Mapping[int, Tensor | None], group: int) -> Tensor:
    """(out, P), float32 on the CPU; 0 where the outputs do not depend on the layer."""
    weight, bias = known[id(stack.module.weight)], stack.module.bias
    weight = torch.zeros_like(stack.module.weight) if weight is None else weight
    matrix = stack.pack(weight.detach())[group].float().cpu()
    if bias is None:
        return matrix
    shift = known[id(bias)]
    shift = torch.zeros_like(bias) if shift is None else shift
    return torch.cat([matrix, shift.detach().reshape(stack.groups, -1)[group].float().cpu()[:, None]], 1)


def _parts(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The batches in parts of at most `size` samples."""
    for batch in batches:
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if isinstance(first, Tensor):
            yield from torch.split(first, size)
            continue
        length = len(next(tensors_in(first)))
        for begin in range(0, length, size):
            yield {
                key: value[begin : begin + size] if isinstance(value, Tensor) and len(value) == length else value
                for key, value in first.items()
            }


def _graph(model: nn.Module, batch: Any, stacks: Mapping[str, Stack]) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The outputs with their graph, and the outputs of the layers in it, call by call."""
    calls: list[tuple[str, Tensor]] = []

    def keep(name: str, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        calls.append((name, output))
        return output.clone()  # what follows may overwrite it in place

    with ExitStack() as hooks, torch.inference_mode(False), torch.enable_grad():
        for name in stacks:
            hooks.callback(model.get_submodule(name).register_forward_hook(partial(keep, name)).remove)
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        outputs = model(first) if isinstance(first, Tensor) else model(**first)
    if not isinstance(outputs, Tensor):
        tensors = list(tensors_in(outputs))
        if len(tensors) != 1:
            raise ValueError(f"the model returned a {type(outputs).__name__}; sensitivities need one output tensor")
        (outputs,) = tensors
    if not outputs.is_floating_point() or outputs.ndim < 1:
        raise ValueError(f"the model's output is {outputs.dtype} {tuple(outputs.shape)}; it must be a batch of floats")
    return outputs, calls
