"""What a forward pass did: its operations, in order, with the tensors that each reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from convexprune.network.forward import run, tensors_in
from convexprune.network.matrices import stack_of

# reshapings of a tensor that keep every entry, and copies of it
RESHAPING = frozenset(
    ("view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "permute",
     "transpose", "movedim", "swapaxes", "swapdims", "t", "contiguous", "clone", "detach", "alias")
)  # fmt: skip
DROPOUT = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"))


@dataclass(frozen=True)
class Step:
    """One operation. Tensors are numbers; one that is changed in place gets a new number.

    operation  "relu", "add", ...; a dropout that is active is "dropout in training", a padding by other than zeros
               "pad by reflect", a sum with a factor "add with alpha"
    layer      the module's name, where the step is a whole Linear or convolution
    place      where it happened, as "bn1 (BatchNorm2d)"
    sizes      the shapes of the first tensor that it read and of the first that it made, where there are both
    even       whether every tensor that it read has the shape of the one that it made
    detail     the index of a getitem, the amounts of a pad, the axes of a mean
    """

    operation: str
    layer: str | None
    place: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...] = ()
    even: bool = True
    detail: Any = None


class Recorder(TorchFunctionMode):
    """Record the steps of the forward passes run inside `with Recorder(model) as recorder`.

    No symbolic tracing: what is recorded is what ran. A Linear or a convolution is one step, and what its other
    forward hooks do is not recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.steps: list[Step] = []
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._made = 0
        self._inside: list[tuple[str, nn.Module]] = []
        self._quiet = 0
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; what it reads goes unseen
                    continue
                layer = stack_of(module) is not None
                hooks.callback(module.register_forward_pre_hook(partial(self._enter, name, layer)).remove)
                after = module.register_forward_hook(partial(self._leave, name, layer), with_kwargs=True)
                hooks.callback(after.remove)
            self._hooks = hooks.pop_all()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and write it down."""
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        reads = self.numbers((args, kwargs))
        sizes = _sizes((args, kwargs))
        result = func(*args, **kwargs)
        if reads and not _only_looks(func, result):
            changed = args[0] if result is None and args else result  # y[i] = z returns nothing and changes y
            self._add(_operation(func, kwargs), None, reads, changed, sizes, _detail(func, args, kwargs))
        return result

    def numbers(self, value: Any) -> tuple[int, ...]:
        """The numbers of the tensors in a value."""
        return tuple(self._number(tensor) for tensor in tensors_in(value))

    def _number(self, tensor: Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = self._made
            self._made += 1
        return int(self._numbers[tensor])

    def _add(
        self,
        operation: str,
        layer: str | None,
        reads: tuple[int, ...],
        result: Any,
        sizes: Sequence[tuple[int, ...]],
        detail: Any = None,
    ) -> None:
        for tensor in tensors_in(result):
            self._numbers.pop(tensor, None)  # type: ignore[no-untyped-call]
        name, module = self._inside[-1] if self._inside else ("", self.model)
        place = f"{name or 'the model'} ({type(module).__name__})"
        if list(module.children()):
            place = f"{operation} in {place}"
        made = _sizes(result)[:1]
        both = (sizes[0], made[0]) if sizes and made else ()
        even = all(size == each for size in sizes for each in made)
        self.steps.append(Step(operation, layer, place, reads, self.numbers(result), both, even, detail))

    def _enter(self, name: str, layer: bool, module: nn.Module, _args: Any) -> None:
        self._inside.append((name, module))
        self._quiet += layer

    def _leave(self, name: str, layer: bool, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if layer:
            with torch._C.DisableTorchFunction():
                self._add(type(module).__name__, name, self.numbers((args, kwargs)), output, _sizes((args, kwargs)))
        self._quiet -= layer
        self._inside.pop()


@dataclass(frozen=True)
class Record:
    """A recorded forward pass: its steps, and the numbers of the tensors that the model returned."""

    steps: tuple[Step, ...]
    results: tuple[int, ...]


def record(model: nn.Module, batch: Any) -> Record:
    """Run the model on a batch and say what it did."""
    with Recorder(model) as recorder:
        output = run(model, batch)
    return Record(tuple(recorder.steps), recorder.numbers(output))


def _sizes(value: Any) -> list[tuple[int, ...]]:
    with torch._C.DisableTorchFunction():
        return [tuple(tensor.shape) for tensor in tensors_in(value)]


def _operation(func: Callable[..., Any], kwargs: dict[str, Any]) -> str:
    name = getattr(func, "__name__", type(func).__name__).strip("_")
    if name == "pad" and kwargs.get("mode", "constant") != "constant":
        return f"pad by {kwargs['mode']}"
    if kwargs.get("alpha", 1) != 1:
        return f"{name} with alpha"
    return f"{name} in training" if name in DROPOUT and kwargs.get("training", True) else name


def _detail(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "").strip("_")
    if name == "pad":
        return kwargs.get("pad", args[1] if len(args) > 1 else None)
    if name == "mean":
        return kwargs.get("dim", args[1] if len(args) > 1 else None)
    return args[1] if name == "getitem" and len(args) > 1 else None


def _only_looks(func: Callable[..., Any], result: Any) -> bool:
    # y.shape, y.dim(), y.dtype: nothing of y's numbers goes on; y.item(), y.tolist(), y.numpy() carry them away
    if result is None:
        return getattr(func, "__name__", "") == "__get__"
    return not any(True for _ in tensors_in(result)) and not isinstance(result, (float, list, np.ndarray))
