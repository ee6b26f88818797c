"""How much the network's output changes when a layer's outputs, or its weights, change.

    a_m = E_sample sum_p sum_k (d f_k / d y_mp)^2,    E|f(y + e) - f(y)|^2 ~ sum_m a_m E e_m^2

over output positions p and network outputs k, if the errors e of different outputs and positions are uncorrelated.
With random probes v ~ N(0, I) the sum over k is E_v (d <v, f> / d y_mp)^2: one backward pass for each probe.

A change D of the weights changes the outputs by E|f(W + D) - f(W)|^2 ~ E_v <D, grad_W <v, f>>^2, correlations included.
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
from convexprune.network.expansion import expanded
from convexprune.network.forward import (
    check_model,
    check_untransformed,
    differentiable,
    numbered,
    run,
    tensors_in,
    undisturbed,
)
from convexprune.network.matrices import Stack
from convexprune.network.names import choose
from convexprune.network.outputs import Which, sure_output
from convexprune.options import seed as check_seed
from convexprune.options import whole


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def sensitivities(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    names: Iterable[str] | str | None = None,
    probes: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Estimate how much the network's output changes with each output of each layer.

    $$ a_m = E \sum_p |\partial f / \partial y_{mp}|^2, \qquad E|f(y + e) - f(y)|^2 \approx \sum_m a_m E e_m^2 $$

    for uncorrelated errors $e$; $m$ runs over the outputs of the layer and $p$ over its output positions. Pass $a$ as
    the `importance` of a `Reconstruction`: the problem then weighs each output by its effect on the network's output.

    Args:
        model: The network; its output (`Calibration.output`) must be of floating-point numbers, with the samples along
            the first axis.
        batches: Calibration data.
        names: Layers, as in `capture`; None takes all.
        probes: Number of random directions of the output for each batch, one backward pass each.
        seed: Seed of the directions.

    Returns:
        A tensor (out,), float64 and >= 0, for each layer name.

    Raises:
        ValueError: If there is no batch, `probes` is below 1, or the output is no floating-point tensor of finite
            numbers.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
        >>> model[1].weight.data = torch.tensor([[3.0, 0.0]])
        >>> a = cp.sensitivities(model, [torch.ones(5, 3)], names="0", probes=200)["0"]
        >>> bool(abs(a[0] / 9 - 1) < 0.2), float(a[1])  # the squared column of the weights that follow
        (True, 0.0)
    """
    check_model(model)
    whole(1)("probes", probes)
    check_seed("seed", seed)
    calibration = Calibration.of(batches, names)
    model = differentiable(model)
    chosen = choose(model, calibration.names)
    pairs, stacks = chosen.pairs, chosen.stacks
    sums: dict[str, Tensor] = {}
    samples = 0
    generator = torch.Generator().manual_seed(seed)
    with undisturbed(model), torch.enable_grad():
        for index, batch in enumerate(calibration):
            with numbered(index):
                outputs, calls = _graph(model, batch, stacks, calibration.output)
            if not bool(outputs.isfinite().all()):
                raise ValueError(f"batch {index}: the model makes NaN or inf of it; check the calibration data")
            samples += len(outputs)
            for _ in range(probes):
                probe = torch.randn(outputs.shape, generator=generator).to(outputs)
                grads = torch.autograd.grad(
                    (outputs * probe).sum(), [y for _, y in calls], retain_graph=True, allow_unused=True
                )
                for (name, _), grad in zip(calls, grads, strict=True):
                    if grad is not None:
                        # (items, positions, groups, out)
                        rows = stacks[name].output_rows(grad.detach()).double().cpu()
                        total = rows.square().sum((0, 1))
                        sums[name] = sums[name] + total if name in sums else total
    found: dict[str, Tensor] = {}
    for module, layer in pairs:
        if module in sums:
            group = stacks[module].names(module).index(layer)
            found[layer] = sums[module][group] / (samples * probes)
    return found


def directions(
    model: nn.Module,
    batches: Calibration | Sequence[Any],
    names: Iterable[str] | str | None = None,
    count: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """For each layer g (about `count`, out, P), float32: E|f(W + D) - f(W)|^2 ~ sum_r <D, g_r>^2, to first order in f.

    Each g_r is the gradient along a random direction of the outputs of one part of the samples. Together they cost one
    backward pass over the data. The relative standard deviation of the estimate is sqrt(2 / count). P counts the bias.
    """
    model = differentiable(model)
    chosen = choose(model, names)
    pairs, stacks = chosen.pairs, chosen.stacks
    which = batches.output if isinstance(batches, Calibration) else None
    total = sum(len(next(tensors_in(batch))) for batch in batches)
    if not total:
        raise ValueError("no batches; give at least one")
    found: dict[str, list[Tensor]] = {layer: [] for _, layer in pairs}
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for stack in stacks.values() for p in stack.parameters if p is not None]
    parameters = list({id(parameter): parameter for parameter in parameters}.values())
    asked = [parameter.requires_grad for parameter in parameters]
    with undisturbed(model), torch.enable_grad():
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for part in _parts(batches, max(1, -(-total // count))):
                outputs, _ = _graph(model, part, {}, which)
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
    whole, biases = stack.parameters
    weight = known[id(whole)]
    weight = torch.zeros_like(whole) if weight is None else weight
    matrix = stack.pack(stack.weight_part(weight.detach()))[group].float().cpu()
    if biases is None:
        return matrix
    shift = known[id(biases)]
    shift = stack.bias_part(torch.zeros_like(biases) if shift is None else shift)
    return torch.cat([matrix, shift.detach().reshape(stack.groups, -1)[group].float().cpu()[:, None]], 1)


def _parts(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Split the batches into parts of at most `size` samples."""
    for batch in batches:
        first = batch[0] if isinstance(batch, (tuple, list)) else batch
        if isinstance(first, Tensor):
            yield from torch.split(first, size)
            continue
        if not isinstance(first, Mapping):
            yield batch
            continue
        length = len(next(tensors_in(first)))
        for begin in range(0, length, size):
            yield {
                key: value[begin : begin + size] if isinstance(value, Tensor) and len(value) == length else value
                for key, value in first.items()
            }


def _graph(
    model: nn.Module, batch: Any, layers: Mapping[str, Stack], which: Which
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """The outputs with their graph, and the outputs of the layers in it, call by call."""
    calls: list[tuple[str, Tensor]] = []

    def keep(name: str, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        check_untransformed(name, output)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        calls.append((name, output))
        return output.clone()  # later modules may overwrite it in place

    with ExitStack() as hooks:
        hooks.enter_context(expanded(model))
        for name, stack in layers.items():
            hooks.callback(stack.module.register_forward_hook(partial(keep, name)).remove)
        outputs = sure_output(run(model, batch, gradients=True), which)
    if not outputs.is_floating_point() or outputs.ndim < 1:
        raise ValueError(f"the model's output is {outputs.dtype} {tuple(outputs.shape)}; it must be a batch of floats")
    return outputs, calls
