"""Retraining with masks kept: after every step of the optimizer, what was pruned is zero again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from convexprune.network.names import stacks


class MaskKeeper:
    """Keeps zeros zero while `optimizer` trains `model`; parameters keep their names, and nothing stays behind.

        with MaskKeeper(model, optimizer):
            ...  # the usual loop

    masks  parameter name -> boolean tensor, True where a weight may live; by default what is nonzero now in the weights
           of all prunable layers

    Works with any optimizer that calls its step hooks (torch's all do): momentum and weight decay may move a pruned
    weight, and it is put back before anyone reads it.

    Raises ValueError for an unknown name, a mask of another shape, or a parameter that the optimizer does not train.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor] | None = None) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        if masks is None:
            names = [f"{name}.weight".lstrip(".") for name in stacks(model)]  # a model may be a layer itself
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
        """Let go: later steps are no longer watched."""
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
