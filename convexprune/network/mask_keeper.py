"""Retraining with masks: pruned weights are set to zero again after every step of the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from convexprune.network.names import stacks


class MaskKeeper:
    """Keep pruned weights at zero while an optimizer trains the model.

    Momentum and weight decay may move a pruned weight during a step; the keeper sets it back to zero when the step
    ends. This works with every optimizer that calls its step hooks, as all of torch's do. Parameters keep their names,
    and nothing stays in the model after `close`.

    Args:
        model: The network.
        optimizer: The optimizer that trains it.
        masks: Boolean tensor for each parameter name, True where a weight may be nonzero. None takes the current
            nonzeros of all prunable layers.

    Raises:
        ValueError: For an unknown name, a mask of another shape, or if the optimizer trains no masked parameter.

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

    def __init__(self, model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor] | None = None) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if masks is None:
            names = [f"{name}.{stack.weight_name}".lstrip(".") for name, stack in stacks(model).items()]
            masks = {name: parameters[name].detach() != 0 for name in names if name in parameters}
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._gone: list[tuple[nn.Parameter, Tensor]] = []
        for name, mask in masks.items():
            if name not in parameters:
                raise ValueError(f"{name!r} is no parameter of the model; its parameters are {', '.join(parameters)}")
            parameter = parameters[name]
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise ValueError(
                    f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected a boolean mask "
                    f"{tuple(parameter.shape)}"
                )
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
