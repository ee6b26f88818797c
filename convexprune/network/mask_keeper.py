"""Retraining with masks: pruned weights are set to zero again after every step of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from convexprune.network.forward import check_model
from convexprune.network.names import stacks
from convexprune.network.projections import weight_name


class MaskKeeper:
    """Keep pruned weights at zero while an optimizer trains the model.

    Momentum and weight decay may move a pruned weight during a step; the keeper sets it back to zero when the step
    ends. This works with every optimizer that calls its step hooks, as all of torch's do. Parameters keep their names,
    and nothing stays in the model after `close`.

    Args:
        model: The network.
        optimizer: The optimizer that trains it.
        masks: Boolean tensor for each parameter name, True where a weight may be nonzero.
        dense: The network before it was pruned: pruned are the weights that are zero now and were not in its layer of
            the same name. Layers that it does not have, such as those of an adapter, train freely.

    Without `masks` and `dense` the zeros of all prunable layers count as pruned.

    Raises:
        ValueError: For an unknown name, a mask of another shape, if the optimizer trains no masked parameter, and where
            a layer that it trains is all zero and neither `masks` nor `dense` says that it was pruned.
        TypeError: For what is no model, no optimizer, no mapping or no mask.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Linear(2, 1)
        >>> model.weight.data = torch.tensor([[1.0, 0.0]])
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> with cp.MaskKeeper(model, optimizer):
        ...     model(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight[0, 1].item()
        0.0
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        masks: Mapping[str, Tensor] | None = None,
        *,
        dense: nn.Module | None = None,
    ) -> None:
        check_model(model)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer is {optimizer!r}; give the torch.optim.Optimizer that trains the model")
        if masks is not None and dense is not None:
            raise ValueError("give masks or dense, not both")
        if masks is not None and not isinstance(masks, Mapping):
            raise TypeError(
                f"masks is a {type(masks).__name__}; give a mapping from parameter names to boolean tensors"
            )
        parameters = dict(model.named_parameters(remove_duplicate=False))
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if masks is None:
            masks = _nonzeros(model, parameters, trained) if dense is None else _survivors(model, dense, parameters)
        self._gone: list[tuple[nn.Parameter, Tensor]] = []
        for name, mask in masks.items():
            if name not in parameters:
                raise ValueError(f"{name!r} is no parameter of the model; its parameters are {', '.join(parameters)}")
            parameter = parameters[name]
            if not isinstance(mask, Tensor):
                raise TypeError(f"the mask of {name!r} is a {type(mask).__name__}; give a boolean tensor")
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise ValueError(
                    f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected a boolean mask "
                    f"{tuple(parameter.shape)}"
                )
            if mask.layout != torch.strided or mask.device.type == "meta":
                raise ValueError(f"the mask of {name!r} is sparse, or on the meta device; give a dense one")
            if id(parameter) in trained:
                self._gone.append((parameter, ~mask.to(parameter.device)))
        if not self._gone:
            raise ValueError("the optimizer trains none of the masked parameters: make it from this model's parameters")
        self._apply()
        self._hook: Any = optimizer.register_step_post_hook(lambda *_: self._apply())

    def close(self) -> None:
        """Stop watching the optimizer's steps."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def __enter__(self) -> MaskKeeper:
        """The keeper itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @torch.no_grad()
    def _apply(self) -> None:
        for parameter, gone in self._gone:
            parameter.masked_fill_(gone, 0.0)


def _masked(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of the weights of all prunable layers."""
    names = dict.fromkeys(weight_name(name, stack) for name, stack in stacks(model).items())
    found = [name for name in names if name in parameters]
    for name in found:
        if parameters[name].layout != torch.strided:
            raise ValueError(f"{name!r} is {parameters[name].layout}; make it dense first, with .to_dense()")
    return found


def _nonzeros(model: nn.Module, parameters: Mapping[str, nn.Parameter], trained: set[int]) -> dict[str, Tensor]:
    masks = {name: parameters[name].detach() != 0 for name in _masked(model, parameters)}
    for name, mask in masks.items():
        if id(parameters[name]) in trained and not bool(mask.any()):
            raise ValueError(
                f"{name!r} is all zero, and would never train: was it pruned, or has it yet to learn, as in an "
                "adapter? Say so by `dense`, the network before it was pruned, or by `masks`"
            )
    return masks


def _survivors(model: nn.Module, dense: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    check_model(dense, "the dense network")
    before = dict(dense.named_parameters(remove_duplicate=False))
    masks = {}
    for name in _masked(model, parameters):
        if name in before:
            now, then = parameters[name].detach(), before[name].detach()
            if now.shape != then.shape:
                shapes = tuple(now.shape), tuple(then.shape)
                raise ValueError(f"{name!r} has shape {shapes[0]} in the model, {shapes[1]} in the dense network")
            masks[name] = (now != 0) | (then == 0).to(now.device)
    return masks
