"""Run a model, and leave it exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Enough(BaseException):  # no Exception: a model that catches those must not catch this
    """Raised by a hook to end a forward pass whose remaining part is not needed."""


def check_batches(batches: Any) -> None:
    """Raise TypeError for an object that iterates over something other than batches: a tensor gives its rows."""
    if isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(f"batches is a {type(batches).__name__}; give an iterable of batches, such as [x]")


def check_model(model: Any) -> None:
    """Raise TypeError for an object that is not a network, such as its class or its state_dict."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"the model is {what}; give an nn.Module that has its weights")


def run(model: nn.Module, batch: Any, gradients: bool = False) -> Any:
    """The model's output on a copy of a batch, since a model may change its input in place.

    A batch is a tensor, a tuple or list whose first element is the input, or a mapping of keyword arguments.
    Gradients are recorded only if `gradients` is True.
    """
    first = batch
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("a batch is an empty sequence; its first element should be the model's input")
        first = batch[0]
    elif not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(
            f"a batch is a {type(batch).__name__}; give a tensor, a tuple or list that begins with the input, or a "
            "dict of keyword arguments"
        )
    if isinstance(first, Tensor) and first.ndim and len(first) == 0:
        raise ValueError(f"a batch is empty: its input has shape {tuple(first.shape)}; leave it out")
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        return model(**_copy({**first})) if isinstance(first, Mapping) else model(_copy(first))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(part) for key, part in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (tuple, list) else value


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Put models in evaluation mode; restore their modes, their buffers and the random state at the end."""
    modules = [module for model in models for module in model.modules()]
    modes = [(module, module.training) for module in modules]
    buffers = [
        (module, key, buffer, edits(buffer), buffer.detach().clone())
        for module in modules
        for key, buffer in module._buffers.items()
        if buffer is not None
    ]
    gpus = {p.device.index for model in models for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(gpus)):
        try:
            for module in modules:
                module.training = False  # not .eval(), which a model may have overridden with side effects
            yield
        finally:
            for module, training in modes:
                module.training = training
            for module, key, buffer, version, value in buffers:
                module._buffers[key] = buffer
                if version is None or edits(buffer) != version:
                    with torch.no_grad():
                        buffer.copy_(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def edits(tensor: Tensor) -> int | None:
    """How often the tensor was changed in place; None for an inference tensor, which does not count changes."""
    return None if tensor.is_inference() else tensor._version
