"""Run a model, and leave it exactly as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.network.interrupts import deferred, interruptible

_LOCK: Final = threading.RLock()  # two threads that put one model back would leave it changed


class Enough(BaseException):  # no Exception: a model that catches those must not catch this
    """Raised by a hook to end a forward pass whose remaining part is not needed."""


def check_batches(batches: Any) -> None:
    """Raise TypeError for what does not iterate over batches: a lone tensor gives its rows, a Dataset its samples."""
    if isinstance(batches, (Tensor, Mapping, str, bytes)) or not hasattr(batches, "__iter__"):
        if hasattr(batches, "__getitem__") and not isinstance(batches, (Tensor, Mapping, str, bytes)):
            raise TypeError(f"a {type(batches).__name__} holds samples; give batches, such as a DataLoader of it")
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
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), interruptible():
        return model(**_copy({**first})) if isinstance(first, Mapping) else model(_copy(first))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(part) for key, part in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (tuple, list) else value


def copied(model: nn.Module) -> nn.Module:
    """A copy whose weights can be trained, whatever mode the caller is in.

    Raises ValueError naming what keeps the model from being copied.
    """
    try:
        with _LOCK, torch.inference_mode(False):  # while another thread runs the model, its hooks are on it
            return copy.deepcopy(model)
    except RuntimeError as error:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
                    place = ".".join(filter(None, (name, key)))
                    raise ValueError(
                        f"the model cannot be copied: {place} is a tensor that was computed (a pruning mask of "
                        "torch.nn.utils.prune, an old weight norm, a cached feature); make it permanent "
                        "(prune.remove, remove_weight_norm) or detach it first"
                    ) from error
        raise ValueError(f"the model cannot be copied: {error}") from error


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Put models in eval mode; afterwards their modes and buffers, and the random state, are as they were.

    One thread at a time. Interrupts reach a forward pass and wait elsewhere. The caller's autocast is off, and so is
    the fused path of nn.TransformerEncoder, which calls no layers.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with _LOCK, deferred(), _without_autocast():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with _as_it_was(*models):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _without_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def _as_it_was(*models: nn.Module) -> Iterator[None]:
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
                # an edit by .data or through another array is not counted
                if version is None or edits(buffer) != version or not torch.equal(buffer, value):
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
