"""A tensor without numbers: it has a shape, a dtype and a device, and what is computed from it is hollow too.

Whoever asks for a number, or would write one into a real tensor, raises `Seen`. So nothing that a hollow tensor stands
for is ever taken for something else: a comparison, an argmax or a cast to integers is as hollow as a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Seen(BaseException):  # no Exception: a model that catches those must not catch this
    """A number was asked of a hollow tensor."""


class Hollow(Tensor):
    """The shape, the dtype and the device of a tensor, without its numbers."""

    shaped: Tensor  # on the meta device

    @staticmethod
    def __new__(cls, shaped: Tensor, device: torch.device) -> Hollow:
        """Of a meta tensor that stands for one of a device."""
        made: Hollow = Tensor._make_wrapper_subclass(
            cls, shaped.shape, strides=shaped.stride(), dtype=shaped.dtype, device=device
        )
        made.shaped = shaped
        return made

    @classmethod
    def like(cls, tensor: Tensor) -> Hollow:
        """In the place of a tensor."""
        return cls(torch.empty_like(tensor.detach(), device="meta"), tensor.device)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute the shape of what an operation makes."""
        given = (args, dict(kwargs or {}))
        device = given[1].get("device") or next(each for each in tree_leaves(given) if isinstance(each, cls)).device
        target = _target(func, *given)
        if target is not None and not isinstance(target, cls):
            raise Seen(func)
        args, kwargs = tree_map(_shaped, given)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        try:
            made = func(*args, **kwargs)
        except Exception as error:
            raise Seen(func) from error
        if target is not None:
            if target.shaped.shape != target.shape:
                raise Seen(func)
            return target
        if not all(isinstance(each, Tensor) for each in tree_leaves(made)):
            raise Seen(func)
        return tree_map(lambda each: cls(each, torch.device(device)), made)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Hollow({tuple(self.shape)}, {self.dtype})"


def _shaped(value: Any) -> Any:
    if isinstance(value, Hollow):
        return value.shaped
    return torch.empty_like(value, device="meta") if isinstance(value, Tensor) else value


def _target(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation writes to, if anything."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[place] if place < len(args) else kwargs.get(argument.name)
    return None
