"""A call of a function that can be made again: its arguments, with numbers in the places of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.network.forward import tensors_in

Autocast = tuple[tuple[str, torch.dtype], ...]  # the devices on which it was on, and what it cast to


@dataclass(frozen=True)
class Reference:
    """Stands for the tensor of this number."""

    number: int


@dataclass(frozen=True, eq=False)
class Call:
    """What was called; None for a layer, whose module says it."""

    function: Callable[..., Any] | None
    args: Any
    kwargs: Any
    autocast: Autocast

    @classmethod
    def of(cls, function: Callable[..., Any] | None, args: Any, kwargs: Any, number: Callable[[Tensor], int]) -> Call:
        """Of arguments whose tensors have these numbers."""
        args, kwargs = replaced((args, kwargs), Tensor, lambda tensor: Reference(number(tensor)))
        return cls(function, args, kwargs, _autocast())

    def arguments(self, tensor: Callable[[int], Tensor]) -> tuple[Any, Any]:
        """`args` and `kwargs` with tensors again."""
        found: tuple[Any, Any] = replaced((self.args, self.kwargs), Reference, lambda each: tensor(each.number))
        return found

    def run(self, tensor: Callable[[int], Tensor]) -> tuple[Tensor, ...]:
        """The tensors that it makes of these; whoever changes its arguments in place has made those."""
        assert self.function is not None
        args, kwargs = self.arguments(tensor)
        with as_then(self.autocast):
            result = self.function(*args, **kwargs)
        return tuple(tensors_in(args[0] if result is None and args else result))

    def like(self, other: Call) -> bool:
        """Whether the same function was called with the same arguments."""
        mine, its = (self.args, self.kwargs, self.autocast), (other.args, other.kwargs, other.autocast)
        return self.function == other.function and same(mine, its)


def replaced(value: Any, kind: type[Any], by: Callable[[Any], Any]) -> Any:
    """A nest of tuples, lists and mappings with everything of a kind replaced."""
    if isinstance(value, kind):
        return by(value)
    if isinstance(value, Mapping):
        return {key: replaced(part, kind, by) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [replaced(part, kind, by) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same bit for bit; what cannot be compared is not."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return _same_tensor(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(part, other[key]) for key, part in one.items())
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, slice):
        return same((one.start, one.stop, one.step), (other.start, other.stop, other.step))
    return one is other or bool(one == other)


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    try:
        if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
            return False
        return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN is the same as NaN
    except (NotImplementedError, RuntimeError):  # a kind of tensor that takes no comparison
        return False


def _autocast() -> Autocast:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return tuple((each, torch.get_autocast_dtype(each)) for each in devices if torch.is_autocast_enabled(each))


@contextmanager
def as_then(autocast: Autocast) -> Iterator[None]:
    """Cast as it was done then, whatever is done now."""
    wanted = dict(autocast)
    with ExitStack() as contexts:
        for device, dtype in {**dict(_autocast()), **wanted}.items():
            contexts.enter_context(torch.autocast(device, dtype=dtype, enabled=device in wanted))
        yield
