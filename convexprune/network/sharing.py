"""A copy of a model that has the model's own parameters until one of them is to be written."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from convexprune.network.forward import copied


def sharing(model: nn.Module) -> nn.Module:
    """A copy whose parameters are the model's; raises what `copied` raises."""
    return copied(model, {id(parameter): parameter for parameter in model.parameters()})


def owned(shared: nn.Module, model: nn.Module, parameters: Iterable[Tensor | None] | None = None) -> None:
    """Give a sharing copy its own of some parameters, or of all; those that are tied stay tied."""
    theirs = {id(parameter) for parameter in model.parameters()}
    wanted = theirs if parameters is None else {id(each) for each in parameters if each is not None} & theirs
    made: dict[int, nn.Parameter] = {}
    for module in shared.modules() if wanted else ():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                if id(parameter) not in made:
                    with torch.inference_mode(False):
                        made[id(parameter)] = copy.deepcopy(parameter)
                module._parameters[key] = made[id(parameter)]


def laid(model: nn.Module, parameter: Tensor, tensor: Tensor) -> None:
    """Let a parameter of a sharing copy have the memory of a tensor with the same numbers, as of a mapped file.

    Nothing happens where the parameter is the model's, or differs in shape, strides, dtype or device.
    """
    mine, theirs = ((each.shape, each.stride(), each.dtype, each.device) for each in (parameter, tensor))
    if mine == theirs and all(parameter is not each for each in model.parameters()):
        parameter.data = tensor
