"""Find the modules of a network that share a channel, by tracing its graph with torch.fx.

Every tensor has its channels in the second axis (the last one behind a Flatten or in a plain matrix). A Linear or a
convolution makes new channels; activations, norms, pooling, dropout and depthwise convolutions pass each channel on; a
sum or a product joins two sets of channels into one. Any other operation that reads channels freezes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from convexprune.network.kinds import (
    ADAPTIVE_POOLS,
    AVERAGE_POOLS,
    BATCH_NORMS,
    CONVOLUTIONS,
    DROPOUT_MODULES,
    ENTRYWISE,
    FX_ENTRYWISE,
    FX_ENTRYWISE_METHODS,
    FX_POOLS,
    FX_PRODUCTS,
    FX_SUMS,
    LINEARS,
    POOLS,
    altered,
    batch_norm_scale,
    computes,
)
from convexprune.network.matrices import stack_of
from convexprune.network.tracing import traced


@dataclass(eq=False)
class Channels:
    """A set of channels that several tensors share, and the modules that make, pass on and read them."""

    count: int
    frozen: str = ""  # why no channel may be removed; empty if channels may be removed
    makers: list[str] = field(default_factory=list)  # modules whose outputs are these channels
    passers: list[str] = field(default_factory=list)  # norms and depthwise convolutions
    readers: list[Reader] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Reader:
    """A Linear or convolution that reads channels, each channel by `repeat` consecutive inputs."""

    module: str
    node: fx.Node
    repeat: int


@dataclass(frozen=True, eq=False)
class Value:
    """The tensor at a node of the graph: its channels, how often each is repeated, and which are constant.

    constant  (C,) float64: the value of each channel that is the same at every position and for every input, else NaN
    """

    channels: Channels
    repeat: int
    constant: Tensor
    planes: int  # axes of positions behind the channels; 0 in a plain matrix


class ChannelGraph:
    """The channels of a traced model. Raises ValueError where the model cannot be traced.

    unfollowed  layer -> why nothing is known of its channels: it is of a kind that is not listed here
    """

    def __init__(self, model: nn.Module, silent: dict[str, Tensor] | None = None) -> None:
        self.graph = traced(model)
        self.modules = dict(model.named_modules())
        self.silent = silent or {}  # node name -> (C,) bool: a ReLU that never fires
        self.values: dict[fx.Node, Value | None] = {}
        self.unfollowed: dict[str, str] = {}
        self._groups: list[Channels] = []
        self._merged: dict[int, Channels] = {}
        called: dict[str, int] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                called[str(node.target)] = called.get(str(node.target), 0) + 1
        self.called = called
        owners: dict[int, int] = {}
        for module in self.modules.values():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        self._tied = {key for key, count in owners.items() if count > 1}
        named = dict(model.named_parameters(remove_duplicate=False))
        for node in self.graph.nodes:
            if node.op == "get_attr" and str(node.target) in named:  # forward reads it besides the module's own call
                self._tied.add(id(named[str(node.target)]))
        for node in self.graph.nodes:
            self.values[node] = self._value(node)

    @property
    def groups(self) -> list[Channels]:
        """All sets of channels."""
        return [group for group in self._groups if id(group) not in self._merged]

    def find(self, channels: Channels) -> Channels:
        """The set that contains these channels after all joins."""
        while id(channels) in self._merged:
            channels = self._merged[id(channels)]
        return channels

    def _value(self, node: fx.Node) -> Value | None:
        inputs = [self.values[parent] for parent in node.all_input_nodes]
        if node.op == "output":
            self._freeze(inputs, "the network returns them")
            return None
        if not any(value is not None for value in inputs) and node.op != "call_module":
            return None
        found = None
        if node.op == "call_module":
            found = self._module(node, inputs)
        elif _only_shape(node):
            return None
        elif node.op == "call_function":
            found = self._function(node, inputs)
        elif node.op == "call_method":
            found = self._method(node)
        if found is None:
            self._freeze(inputs, f"{node.name} reads them in a way that is not known")
            return None
        if node.name in self.silent:
            found = Value(
                found.channels, found.repeat, torch.where(self.silent[node.name], 0.0, found.constant), found.planes
            )
        return found

    def _module(self, node: fx.Node, inputs: list[Value | None]) -> Value | None:
        name = str(node.target)
        module = self.modules[name]
        value = inputs[0] if inputs else None
        if altered(module):
            reason = f"{name} has hooks, or a forward of its own"
            if stack_of(module) is not None:
                self.unfollowed[name] = reason
            self._freeze(inputs, reason)
            return None
        if computes(module, LINEARS):
            return self._made(node, module, value, module.out_features, 0)
        if computes(module, CONVOLUTIONS):
            planes = len(module.kernel_size)
            if module.groups == 1:
                return self._made(node, module, value, module.out_channels, planes)
            if value is not None and module.groups == module.in_channels == module.out_channels and value.repeat == 1:
                return self._depthwise(name, module, value)
            self._freeze([value], f"{name} has groups")
            return self._made(node, module, None, module.out_channels, planes, f"{name} has groups")
        if stack_of(module) is not None:
            self.unfollowed[name] = f"{name} is a {type(module).__name__}, a kind whose channels are not followed"
            self._freeze(inputs, self.unfollowed[name])
            return None
        if value is None:
            return None
        if isinstance(module, BATCH_NORMS) and value.repeat == 1 and module.running_var is not None:
            self._pass_on(name, module, value)
            return Value(value.channels, 1, _normed(module, value.constant), value.planes)
        if isinstance(module, (*ENTRYWISE, *DROPOUT_MODULES, nn.AlphaDropout)):
            same = isinstance(module, (*DROPOUT_MODULES, nn.AlphaDropout))
            return Value(
                value.channels, value.repeat, value.constant if same else _applied(module, value.constant), value.planes
            )
        if isinstance(module, (*POOLS, *ADAPTIVE_POOLS)) and value.repeat == 1:
            padded = getattr(module, "padding", 0)
            zeros = isinstance(module, AVERAGE_POOLS) and padded not in (0, (0,), (0, 0), (0, 0, 0))
            zeros |= getattr(module, "divisor_override", None) is not None  # no mean: a constant does not stay one
            kept = torch.where(value.constant == 0, 0.0, torch.nan) if zeros else value.constant
            return Value(value.channels, 1, kept, value.planes)
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            return Value(value.channels, 0 if value.planes else value.repeat, value.constant, 0)
        return None

    def _function(self, node: fx.Node, inputs: list[Value | None]) -> Value | None:
        function: Any = node.target
        if function in FX_SUMS and len(node.args) == 2 and not node.kwargs:
            return self._joined(inputs, torch.add) if len(inputs) == 2 else None
        if function in FX_PRODUCTS and len(node.args) == 2 and not node.kwargs:
            return self._joined(inputs, _product) if len(inputs) == 2 else None
        value = inputs[0] if len(inputs) == 1 else None
        if value is None:
            return None
        if function in FX_ENTRYWISE:
            apply = lambda x: function(x, *node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "inplace"})  # noqa: E731
            return Value(value.channels, value.repeat, _applied(apply, value.constant), value.planes)
        if function is torch.flatten and (*node.args[1:], *node.kwargs.values()) == (1,):
            return Value(value.channels, 0 if value.planes else value.repeat, value.constant, 0)
        if function is torch.mean:
            return self._averaged(value, node)
        if function in FX_POOLS and value.repeat == 1:
            return Value(value.channels, 1, value.constant, value.planes)
        return None

    def _method(self, node: fx.Node) -> Value | None:
        first = node.args[0]
        value = self.values.get(first) if isinstance(first, fx.Node) else None
        others = [parent for parent in node.all_input_nodes if parent is not first]
        if value is None or any(self.values[parent] is not None for parent in others):
            return None
        if node.target in FX_ENTRYWISE_METHODS:
            apply = getattr(torch, str(node.target).rstrip("_"))
            return Value(value.channels, value.repeat, _applied(apply, value.constant), value.planes)
        if node.target == "flatten" and (*node.args[1:], *node.kwargs.values()) == (1,):
            return Value(value.channels, 0 if value.planes else value.repeat, value.constant, 0)
        if node.target in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:  # (samples, -1)
            return Value(value.channels, 0 if value.planes else value.repeat, value.constant, 0)
        if node.target in ("mean", "amax"):
            return self._averaged(value, node)
        return None

    def _averaged(self, value: Value, node: fx.Node) -> Value | None:
        """A mean or maximum over all the positions of a convolution's output."""
        given: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        axes = tuple(given) if isinstance(given, Iterable) else (given,)
        if not value.planes or value.repeat != 1 or not all(isinstance(axis, int) for axis in axes):
            return None
        if sorted(axis % (value.planes + 2) for axis in axes) != [*range(2, value.planes + 2)]:
            return None
        spread = len(node.args) > 2 or bool(node.kwargs.get("keepdim"))
        return Value(value.channels, 1, value.constant, value.planes if spread else 0)

    def _made(
        self, node: fx.Node, module: Any, value: Value | None, count: int, planes: int, frozen: str = ""
    ) -> Value:
        name = str(node.target)
        if value is not None:
            group = self.find(value.channels)
            inputs = module.in_channels if planes else module.in_features
            repeat = value.repeat or inputs // group.count
            if repeat * group.count != inputs or value.planes != planes or (planes and repeat != 1):
                self._freeze([value], f"{name} reads {inputs} inputs of {group.count} channels")
            elif any(id(parameter) in self._tied for parameter in module.parameters(recurse=False)):
                self._freeze([value], f"{name} shares its weights with another module, or forward reads them")
            else:
                group.readers.append(Reader(name, node, repeat))
            self._once(name, value)
        made = Channels(count, frozen, [name])
        self._groups.append(made)
        if self.called[name] > 1:
            made.frozen = f"{name} is called more than once"
        if any(id(parameter) in self._tied for parameter in module.parameters(recurse=False)):
            made.frozen = f"{name} shares its weights with another module, or forward reads them"
        weight = module.weight.detach().double().flatten(1)
        bias = torch.zeros(count, dtype=torch.float64) if module.bias is None else module.bias.detach().double().cpu()
        constant = torch.where((weight == 0).all(1).cpu(), bias, torch.nan)
        return Value(made, 1, constant, planes)

    def _depthwise(self, name: str, module: Any, value: Value) -> Value:
        self._pass_on(name, module, value)
        silent = (module.weight.detach() == 0).flatten(1).all(1).cpu()
        bias = torch.zeros(module.out_channels, dtype=torch.float64)
        if module.bias is not None:
            bias = module.bias.detach().double().cpu()
        # a constant other than 0 meets the padding's zeros at the border
        kernel = module.weight.detach().double().flatten(1).sum(1).cpu()
        through = torch.where(
            (value.constant == 0) | torch.tensor(unpadded(module)), value.constant * kernel + bias, torch.nan
        )
        return Value(value.channels, 1, torch.where(silent, bias, through), value.planes)

    def _joined(self, inputs: list[Value | None], combine: Callable[[Tensor, Tensor], Tensor]) -> Value | None:
        """What combines two tensors entry by entry; they have the same channels from then on."""
        left, right = inputs
        if left is None or right is None or left.repeat != right.repeat or left.planes != right.planes:
            return None
        one, other = self.find(left.channels), self.find(right.channels)
        if one.count != other.count:
            return None
        if one is not other:
            one.frozen = one.frozen or other.frozen
            one.makers += other.makers
            one.passers += other.passers
            one.readers += other.readers
            self._merged[id(other)] = one
        return Value(one, left.repeat, combine(left.constant, right.constant), left.planes)

    def _pass_on(self, name: str, module: Any, value: Value) -> None:
        self.find(value.channels).passers.append(name)
        self._once(name, value)
        if any(id(parameter) in self._tied for parameter in module.parameters(recurse=False)):
            self._freeze([value], f"{name} shares its weights with another module, or forward reads them")

    def _once(self, name: str, value: Value) -> None:
        if self.called[name] > 1:
            self._freeze([value], f"{name} is called more than once")

    def _freeze(self, inputs: Iterable[Value | None], why: str) -> None:
        for value in inputs:
            if value is not None:
                group = self.find(value.channels)
                group.frozen = group.frozen or why


def _only_shape(node: fx.Node) -> bool:
    """True for x.size(0), x.shape, x.dim(): they read no channel."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype")
    )


def unpadded(module: Any) -> bool:
    """True if a convolution does not pad its input with zeros."""
    padding = module.padding
    none = padding == "valid" or (not isinstance(padding, str) and not any(padding))
    return bool(none or module.padding_mode != "zeros")


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Of constants: 0 where either is 0, whatever the other."""
    return torch.where((one == 0) | (other == 0), 0.0, one * other)


def _applied(function: Callable[[Tensor], Tensor], constant: Tensor) -> Tensor:
    with torch.no_grad():
        found = function(constant.nan_to_num().clone())
    return torch.where(constant.isnan(), torch.nan, found)


def _normed(module: Any, constant: Tensor) -> Tensor:
    found = batch_norm_scale(module)
    assert found is not None  # by _module
    scale = found.cpu()
    shift = torch.zeros_like(scale) if module.weight is None else module.bias.detach().double().cpu()
    normed = (constant - module.running_mean.double().cpu()) * scale + shift
    return torch.where(scale == 0, shift, normed)
