"""How much the network's output moves with each output of a layer: the weights of a second-order estimate.

    a_m = E_sample sum_p sum_k (d f_k / d y_mp)^2,    E|f(y + e) - f(y)|^2 ~ sum_m a_m E e_m^2

over output positions p and network outputs k, if the errors e of different outputs and positions are uncorrelated.
With random probes v ~ N(0, I) the sum over k is E_v (d <v, f> / d y_mp)^2, one backward pass each.
Source: the Gauss-Newton form of Optimal Brain Damage, LeCun, Denker, Solla 1990; Hutchinson 1990.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.network.forward import tensors_in, undisturbed
from convexprune.network.matrices import Stack, stack_of
from convexprune.network.names import choose


def sensitivities(
    model: nn.Module, batches: Iterable[Any], names: Iterable[str] | str | None = None, probes: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """For each layer a (out,), float64, all >= 0: what a unit of error in each of its outputs does to the network's.

    As the `importance` of a Reconstruction, it makes the layer's problem speak of the network's output.

    names   as in `capture`; probes, seed   random directions of the output for each batch
    Raises ValueError where the model's output is not one floating tensor whose first axis are the samples.
    """
    if probes < 1:
        raise ValueError(f"probes is {probes}; it must be at least 1")
    pairs = dict.fromkeys(pair for chosen in choose(model, names).values() for pair in chosen)
    stacks = {module: stack_of(model.get_submodule(module)) for module, _ in pairs}
    sums: dict[str, Tensor] = {}
    samples = 0
    generator = torch.Generator().manual_seed(seed)
    with undisturbed(model):
        for batch in batches:
            outputs, calls = _graph(model, batch, stacks)
            samples += len(outputs)
            for _ in range(probes):
                probe = torch.randn(outputs.shape, generator=generator).to(outputs)
                grads = torch.autograd.grad(
                    (outputs * probe).sum(), [y for _, y in calls], retain_graph=True, allow_unused=True
                )
                for (name, _), grad in zip(calls, grads, strict=True):
                    if grad is not None:
                        stack = stacks[name]
                        assert stack is not None
                        rows = stack.output_rows(grad.detach()).double().cpu()  # (items, positions, groups, width)
                        total = rows.square().sum((0, 1))
                        sums[name] = sums[name] + total if name in sums else total
    if not samples:
        raise ValueError("no batches; give at least one")
    found: dict[str, Tensor] = {}
    for module, layer in pairs:
        if module in sums:
            each = stacks[module].names(module)  # type: ignore[union-attr]
            found[layer] = sums[module][each.index(layer)] / (samples * probes)
    return found


def _graph(model: nn.Module, batch: Any, stacks: dict[str, Stack | None]) -> tuple[Tensor, list[tuple[str, Tensor]]]:
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
