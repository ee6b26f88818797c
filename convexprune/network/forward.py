"""Run a model, and leave it exactly as it was."""

from __future__ import annotations

import copy
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convexprune.network.interrupts import deferred, interruptible

_BETWEEN: Final = ("convexprune.network.recording", "convexprune.network.residual")  # they see what torch calls
_LOCK: Final = threading.RLock()  # two threads that put one model back would leave it changed


class Enough(BaseException):  # no Exception: a model that catches those must not catch this
    """Raised by a hook to end a forward pass whose remaining part is not needed."""


def check_batches(batches: Any) -> None:
    """Raise TypeError for what does not iterate over batches: a lone tensor gives its rows, a Dataset its samples."""
    lone = isinstance(batches, (Tensor, np.ndarray, Mapping, str, bytes))
    if isinstance(batches, type):
        raise TypeError(f"batches is the class {batches.__name__}; give an iterable of batches, such as [x]")
    if lone or not hasattr(batches, "__iter__"):
        if hasattr(batches, "__getitem__") and not lone:
            raise TypeError(f"a {type(batches).__name__} holds samples; give batches, such as a DataLoader of it")
        raise TypeError(f"batches is a {type(batches).__name__}; give an iterable of batches, such as [x]")


def check_batch(batch: Any, name: str = "a batch") -> None:
    """Raise TypeError or ValueError, naming the batch, for what no model can be run on."""
    if not isinstance(batch, (Tensor, Mapping, tuple, list)):
        hint = "; torch.from_numpy makes a tensor of it" if isinstance(batch, np.ndarray) else ""
        raise TypeError(
            f"{name} is a {type(batch).__name__}; give a tensor, a tuple or list that begins with the input, or a "
            f"dict of keyword arguments{hint}"
        )
    if isinstance(batch, (tuple, list)) and not batch:
        raise ValueError(f"{name} is an empty sequence; its first element should be the model's input")
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    tensors = list(tensors_in(first))
    if not tensors:
        kind = type(first).__name__
        raise TypeError(f"{name} holds no tensor: its input is a {kind}; convert it with torch.as_tensor first")
    if isinstance(first, Tensor) and first.ndim == 0:
        raise ValueError(f"{name} is a single number; its first axis should be that of the samples")
    for tensor in tensors:
        _check_dense(tensor, name, "the batches")
        if tensor.ndim and len(tensor) == 0:
            raise ValueError(f"{name} is empty: its input has shape {tuple(tensor.shape)}; leave it out")


def _check_dense(tensor: Tensor, name: str, what: str) -> None:
    if tensor.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: it has a shape and no numbers; load {what} first")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a tensor of layout {kind}; make it dense first, with .to_dense() or a padding")
    if tensor.is_complex():
        raise TypeError(f"{name} is {tensor.dtype}; only real numbers are covered: give real and imaginary parts")
    if tensor.is_quantized:
        raise TypeError(f"{name} is {tensor.dtype}; dequantise it to a float dtype first")


def check_model(model: Any, name: str = "the model") -> None:
    """Raise for what is no network that can be run: its class or state_dict, or parameters that hold no numbers.

    TypeError where it is another kind of thing, ValueError for lazy parameters, for those on the meta device, and for a
    default device or dtype of torch under which nothing here can be computed.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"{name} is {what}; give an nn.Module that has its weights")
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f"{name}: its {key} has no shape yet; run the model once first")
        if tensor.device.type == "meta":
            _check_dense(tensor, f"{name}: its {key}", "the weights")
    found = torch.get_default_device()
    if found.type != "cpu":
        raise ValueError(
            f"torch's default device is {found}, on which new tensors would be made; call "
            "torch.set_default_device('cpu') first (the model may stay where it is)"
        )
    if torch.get_default_dtype() not in (torch.float32, torch.float64):
        raise ValueError(
            f"torch's default dtype is {torch.get_default_dtype()}, which is too coarse to compute in; call "
            "torch.set_default_dtype(torch.float32) first (the model may stay as it is)"
        )


def check_eager(model: nn.Module) -> None:
    """Raise ValueError for a model whose modules torch has compiled or scripted: no layer of it is called."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("the model is a script, whose layers cannot be watched; give the module that was scripted")
    for path, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise ValueError(
                f"{path or 'the model'} is compiled, so its layers cannot be watched; give the module that was "
                "compiled (its _orig_mod), and compile the result"
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{path or 'the model'} was compiled in place, so its layers cannot be watched; give a model without "
                ".compile(), and compile the result"
            )


def check_untransformed(name: str, *values: Any) -> None:
    """Raise ValueError for a layer whose tensors stand for others: under torch.vmap nothing can be read from them."""
    if any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors_in(values)):
        raise ValueError(
            f"layer {name!r} is called inside torch.vmap, or another transform of torch.func, where its numbers cannot "
            "be read; leave it out of `names`, or call it on the whole batch"
        )


class BatchError(ValueError, RuntimeError):  # a RuntimeError too, as most of what torch raises
    """A batch on which the model's forward failed."""


@contextmanager
def numbered(index: int) -> Iterator[None]:
    """Say in a `BatchError` which batch it was."""
    try:
        yield
    except BatchError as error:
        raise BatchError(f"batch {index}: {error}") from error.__cause__


def run(model: nn.Module, batch: Any, gradients: bool = False) -> Any:
    """The model's output on a copy of a batch, since a model may change its input in place.

    A batch is a tensor, a tuple or list whose first element is the input, or a mapping of keyword arguments.
    Gradients are recorded only if `gradients` is True.

    Raises BatchError, with the words of what the model's forward raised.
    """
    check_batch(batch)
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), interruptible():
        try:
            return model(**_copy({**first})) if isinstance(first, Mapping) else model(_copy(first))
        except Exception as error:
            if _is_ours(error) or isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
                raise
            words = str(error).strip().split("\n")[0] or type(error).__name__
            raise BatchError(f"the model's forward failed: {words} ({_described(model, first)})") from error


def _is_ours(error: Exception) -> bool:
    """Whether a hook of this package says what is wrong; what runs the model only hands on what torch says."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = frame.f_globals.get("__name__", "")
    between = frame.f_code is run.__code__ or name in _BETWEEN
    return isinstance(error, BatchError) or (name.startswith("convexprune.") and not between)


def _described(model: nn.Module, given: Any) -> str:
    """What the model was given, and the dtype of its weights where they differ."""
    tensors = list(tensors_in(given))
    shapes = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)
    own = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    odd = own and not any(tensor.dtype in own for tensor in tensors)
    weights = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in own))
    return f"the batch is {shapes}{f', the weights are {weights}' if odd else ''}"


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {key: _copy(part) for key, part in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (tuple, list) else value


def differentiable(model: nn.Module) -> nn.Module:
    """The model, or a copy where it was made in inference mode: autograd cannot use such tensors."""
    made = any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    return copied(model) if made else model


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy whose weights can be trained, whatever mode the caller is in; `memo` is deepcopy's.

    Raises ValueError naming what keeps the model from being copied.
    """
    try:
        with _LOCK, torch.inference_mode(False):  # while another thread runs the model, its hooks are on it
            return copy.deepcopy(model, memo)
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
