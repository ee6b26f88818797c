"""What a forward pass did: its operations, in order, with the tensors that each reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from convexprune.network.call import Call
from convexprune.network.expansion import expanded
from convexprune.network.forward import BatchError, edits, run, tensors_in
from convexprune.network.kinds import CATS, DROPOUT, LOOKS
from convexprune.network.outputs import Which, output_of
from convexprune.network.projections import layer_stack, named_layers

CHANGED = "a change in place"


@dataclass(frozen=True)
class Step:
    """One operation. Tensors are numbers; one that is changed in place gets a new number.

    operation  "relu", "add", ...; a dropout that is active is "dropout in training", a padding by other than zeros
               "pad by reflect", a sum with a factor "add with alpha"; what ran in no function of torch, in a script
               say, "aten.relu", and what became of a tensor when a view of it was written to "a change in place"
    layer      the module's name, where the step is a whole Linear or convolution
    place      where it happened, as "bn1 (BatchNorm2d)"
    sizes      the shapes of the first tensor that it read and of the first that it made, where there are both
    shaped     of each tensor that it read, whether it has the shape of the first that it made
    detail     the index of a getitem, the amounts of a pad, the axes of a mean; of a cat its axis and,
               where that is the channels', how many each tensor has
    module     the name of the module that it happened in
    call       what it takes to do it again; None of a change in place
    """

    operation: str
    layer: str | None
    place: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    sizes: tuple[tuple[int, ...], ...] = ()
    shaped: tuple[bool, ...] = ()
    detail: Any = None
    module: str = ""
    call: Call | None = field(default=None, compare=False, repr=False)

    @property
    def even(self) -> bool:
        """Whether every tensor that it read has the shape of the one that it made."""
        return all(self.shaped)


class Recorder(TorchFunctionMode):
    """Record the steps of the forward passes run inside `with Recorder(model) as recorder`.

    No symbolic tracing: what is recorded is what ran, functions of torch under their names and the rest as operations
    of aten. A Linear or a convolution is one step, and what its other forward hooks do is not recorded.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.steps: list[Step] = []
        self._numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> its number, and its edits by then
        self._written: dict[int, int] = {}  # storage -> the number of who was written to it last
        self._names: dict[int, str] = {}  # parameter -> its name
        self._leaves: dict[int, str | Tensor | None] = {}
        self._made = 0
        self._transformed = False
        self._inside: list[tuple[str, nn.Module]] = []
        self._quiet = 0
        self._hooks = ExitStack()

    def __enter__(self) -> Recorder:
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        with ExitStack() as hooks:
            hooks.enter_context(expanded(self.model))
            for name, module in named_layers(self.model):
                if isinstance(module, torch.jit.ScriptModule):  # takes no hooks; what it reads goes unseen
                    continue
                layer = self.whole(module)
                hooks.callback(module.register_forward_pre_hook(partial(self._enter, name, layer)).remove)
                after = module.register_forward_hook(partial(self._leave, name, layer), with_kwargs=True)
                hooks.callback(after.remove)
            hooks.enter_context(_Below(self))
            self._hooks = hooks.pop_all()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        """A module that is copied during a pass is watched by the same."""
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and write it down."""
        kwargs = kwargs or {}
        if self._quiet:
            return func(*args, **kwargs)
        reads = self.numbers((args, kwargs))
        sizes, call = _sizes((args, kwargs)), self._call(func, args, kwargs)
        result = self.quietly(lambda: func(*args, **kwargs))
        if reads and not _only_looks(func, result):
            changed = args[0] if result is None and args else result  # y[i] = z returns nothing and changes y
            self._add(_operation(func, args, kwargs), None, reads, changed, sizes, _detail(func, args, kwargs), call)
        return result

    def below(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation of aten, and write it down where no function of torch has called it."""
        if self._quiet:
            return func(*args, **kwargs)
        reads, sizes = self.numbers((args, kwargs)), _sizes((args, kwargs))
        call = self._call(func, args, kwargs)
        result = self.quietly(lambda: func(*args, **kwargs))
        if reads:
            self._add(f"aten.{func.overloadpacket.__name__}", None, reads, result, sizes, call=call)
        return result

    def _call(self, func: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """With the numbers that the tensors have now."""
        with torch._C.DisableTorchFunction():
            return Call.of(func, args, kwargs, lambda tensor: int(self._numbers[tensor][0]))

    def quietly(self, call: Callable[[], Any]) -> Any:
        """What this calls is not written down."""
        self._quiet += 1
        try:
            return call()
        finally:
            self._quiet -= 1

    def numbers(self, value: Any) -> tuple[int, ...]:
        """The numbers of the tensors in a value."""
        return tuple(self._number(tensor) for tensor in tensors_in(value))

    def record(self, returned: Any, which: Which = None) -> Record:
        """What the passes did that returned this; `which` names the output among it."""
        results, output = self.numbers(returned), output_of(returned, which)
        parameters = self.model.named_parameters(remove_duplicate=False)
        read = {name: self._numbers[each][0] for name, each in parameters if each in self._numbers}
        with torch._C.DisableTorchFunction():  # one that was computed after the pass has no number, and no bound
            chosen = None if output is None or output not in self._numbers else int(self._numbers[output][0])
        if chosen is not None and chosen not in results:
            results = (*results, chosen)
        return Record(
            tuple(self.steps), results, read, self._leaves, transformed=self._transformed, chosen=chosen, which=which
        )

    def _number(self, tensor: Tensor) -> int:
        with torch._C.DisableTorchFunction():
            number, seen = self._numbers.get(tensor, (None, None))  # type: ignore[no-untyped-call]
            if number is None:
                number = self._name(tensor)
                self._leaves[number] = self._names.get(id(tensor)) or self._copy(tensor)
            elif edits(tensor) != seen:  # through a view of it, or of which it is one
                writer = self._written.get(_storage(tensor), number)
                size = tuple(tensor.shape)
                self._add(CHANGED, None, (number, writer), tensor, (size, size))
                number = self._numbers[tensor][0]
                self._leaves[number] = self._copy(tensor)
            return int(number)

    def _copy(self, tensor: Tensor) -> Tensor | None:
        try:
            copied: Tensor = self.quietly(lambda: tensor.detach().clone())
            return copied
        except (NotImplementedError, RuntimeError):  # a kind of tensor that takes no copies
            return None

    def _name(self, tensor: Tensor) -> int:
        """A new number."""
        self._transformed |= torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        self._numbers[tensor] = self._made, edits(tensor)
        self._written[_storage(tensor)] = self._made
        self._made += 1
        return self._made - 1

    def _add(
        self,
        operation: str,
        layer: str | None,
        reads: tuple[int, ...],
        result: Any,
        sizes: Sequence[tuple[int, ...]],
        detail: Any = None,
        call: Call | None = None,
    ) -> None:
        name, module = self._inside[-1] if self._inside else ("", self.model)
        place = f"{name or 'the model'} ({type(module).__name__})"
        if list(module.children()) or operation == CHANGED:
            place = f"{operation} in {place}"
        with torch._C.DisableTorchFunction():
            makes = tuple(self._name(tensor) for tensor in tensors_in(result))
        made = _sizes(result)[:1]
        both = (sizes[0], made[0]) if sizes and made else ()
        shaped = tuple(size == each for size in sizes for each in made)
        self.steps.append(Step(operation, layer, place, reads, makes, both, shaped, detail, name, call))
        self.added(self.steps[-1], result)

    def whole(self, module: nn.Module) -> bool:
        """Whether all that a module does is one step."""
        return layer_stack(module) is not None

    def added(self, step: Step, result: Any) -> None:
        """For those who look on: a step was written down, and this is what it made."""

    def _enter(self, name: str, layer: bool, module: nn.Module, _args: Any) -> None:
        self._inside.append((name, module))
        self._quiet += layer

    def _leave(self, name: str, layer: bool, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if layer:
            with torch._C.DisableTorchFunction():
                reads, sizes = self.numbers((args, kwargs)), _sizes((args, kwargs))
                call = self._call(None, args, kwargs)
                self._add(type(module).__name__, name, reads, output, sizes, call=call)
        self._quiet -= layer
        self._inside.pop()


class _Below(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations of aten, whoever calls them: scripts, transforms and extensions are no functions of torch."""

    supports_higher_order_operators = True  # to refuse them by name

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run the operation; the recorder decides whether it is one to write down."""
        if isinstance(func, HigherOrderOperator):
            raise BatchError(
                f"the model uses torch's {func._name}, whose branches cannot be recorded; write it as an `if`, a loop "
                "or a torch.where"
            )
        return self.recorder.below(func, args, kwargs or {})


@dataclass(frozen=True)
class Record:
    """A recorded forward pass: its steps, and the numbers of the tensors that the model returned.

    parameters  the numbers of those parameters of the model that a step reads, by all their names; a layer reads its
                own unseen
    leaves      number -> the tensor that a step reads and none has made, as it was then: a parameter's name, or a copy
                (None of a tensor that takes none)
    inputs      of those the batch's own
    random      whether the pass has drawn random numbers
    transformed  whether torch.func was at work, whose tensors stand for others that nobody sees
    chosen      the number of the output among what was returned (`network.outputs`), named by `which`; None where
                there is none, and where it was computed after the pass
    """

    steps: tuple[Step, ...]
    results: tuple[int, ...]
    parameters: Mapping[str, int] = field(default_factory=dict)
    leaves: Mapping[int, str | Tensor | None] = field(default_factory=dict, compare=False, repr=False)
    inputs: tuple[int, ...] = ()
    random: bool = False
    transformed: bool = False
    chosen: int | None = None
    which: Which = field(default=None, compare=False, repr=False)

    def like(self, other: Record) -> bool:
        """Whether two batches were computed alike, but for how many samples they hold."""
        return _whatever_the_batch(self) == _whatever_the_batch(other)

    @property
    def layers(self) -> dict[str, int]:
        """The modules that are whole steps, with the number that each of them made last."""
        return {step.layer: step.makes[0] for step in self.steps if step.layer is not None}

    def parameter_of(self, model: nn.Module) -> Callable[[int], Tensor | None]:
        """The model's parameter of a number; None where the tensor is none."""
        held = dict(model.named_parameters(remove_duplicate=False))
        names = {number: leaf for number, leaf in self.leaves.items() if isinstance(leaf, str)}
        return lambda number: held.get(names.get(number, ""))

    @property
    def batch(self) -> list[str | Tensor | None]:
        """A copy of the batch's tensors."""
        return [self.leaves.get(number) for number in self.inputs]


def record(model: nn.Module, batch: Any, which: Which = None) -> Record:
    """Run the model on a batch and say what it did; `which` names its output among what it returns."""
    before = _random_state(model)
    with Recorder(model) as recorder:
        output = run(model, batch)
    drawn = any(not torch.equal(*each) for each in zip(before, _random_state(model), strict=True))
    return replace(recorder.record(output, which), random=drawn, inputs=recorder.numbers(batch))


def _random_state(model: nn.Module) -> list[Tensor]:
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in sorted(gpus))]


def _whatever_the_batch(record: Record) -> tuple[Any, ...]:
    """A record without the first axes of its shapes."""
    steps = [(replace(step, sizes=()), [size[1:] for size in step.sizes]) for step in record.steps]
    return steps, record.results, record.chosen, record.random


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, or a wrapper: it has none
        return id(tensor)


def _sizes(value: Any) -> list[tuple[int, ...]]:
    with torch._C.DisableTorchFunction():
        # a nested tensor has no shape
        return [(-1,) * each.dim() if each.is_nested else tuple(each.shape) for each in tensors_in(value)]


def _operation(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    name = getattr(func, "__name__", type(func).__name__).strip("_")
    origin = getattr(func, "__module__", None) or "torch"
    if isinstance(func, OpOverloadPacket) or origin.partition(".")[0] != "torch":  # not torch's own of that name
        return str(func) if isinstance(func, OpOverloadPacket) else f"{origin}.{name}"
    mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
    if name == "pad" and mode != "constant":
        return f"pad by {mode}"
    factor = kwargs.get("alpha", 1) != 1 and name not in ("elu", "celu")
    if factor or (name in ("add", "sub") and len(args) > 2):  # torch.add(x, alpha, y)
        return f"{name} with alpha"
    if name == "view" and any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values())):
        return "view as another dtype"
    threshold = args[2] if len(args) > 2 else kwargs.get("threshold", 20)
    if name == "softplus" and threshold < 20:  # it jumps there, by log(1 + exp(-threshold)) / beta
        return f"softplus with a threshold of {threshold}"
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return f"{name} in training" if name in DROPOUT and training else name


def _detail(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "").strip("_")
    if name == "pad":
        return kwargs.get("pad", args[1] if len(args) > 1 else None)
    if name == "mean":
        return kwargs.get("dim", args[1] if len(args) > 1 else None)
    if name in CATS:
        return _joint(args, kwargs)
    if name != "getitem":
        return None
    if isinstance(args[1], tuple):
        return tuple(map(_basic, args[1]))
    return _basic(args[1])


def _joint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Along which axis tensors are joined, from the front, and if it is the channels' how many each has."""
    axis = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    sizes = _sizes(args[:1] or list(kwargs.values()))
    dimensions = max(map(len, sizes), default=0)
    if not isinstance(axis, int) or not dimensions:
        return None
    axis %= dimensions
    return (axis, *(size[1] if len(size) == dimensions else 0 for size in sizes)) if axis == 1 else (axis,)


def _basic(index: Any) -> Any:
    """A tensor or a list as a word: what it holds is not the same in every batch."""
    return index if isinstance(index, (int, slice, type(None), type(...))) else type(index).__name__


def _only_looks(func: Callable[..., Any], result: Any) -> bool:
    # y.shape, y.dim(), y.dtype: nothing of y's numbers goes on; y.item(), bool(y), y.numpy() carry them away
    name = getattr(func, "__name__", "").strip("_")
    return name in LOOKS and not any(True for _ in tensors_in(result))
