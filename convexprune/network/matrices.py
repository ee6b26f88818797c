"""How a module is an (out, in) matrix: its weights as one, its inputs and outputs as rows.

A further kind of module is a subclass of `Stack` and a call of `register_kind`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from inspect import isabstract
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from convexprune.bounds.gains import ConvolutionOperator, LinearOperator, Operator


class Stack(ABC):
    """A module as a stack of matrices, one for each group: y = W_g x_g + b_g for every sample and group g.

    Samples are laid out as (items, positions): the images and the output positions of a convolution; the rows and
    a single position of a Linear.

    weight_name  of the module's parameter that holds the matrices
    bias_name    of the parameter (groups * out,) that holds b; None for a kind that never has one
    """

    weight_name: str = "weight"
    bias_name: str | None = "bias"

    def __init__(self, module: Any, groups: int = 1) -> None:
        self.module, self.groups = module, groups

    @abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """The module's weight as (groups, out, in)."""

    @abstractmethod
    def unpack(self, matrices: Tensor) -> Tensor:
        """The inverse of `pack`."""

    @property
    @abstractmethod
    def unfolding(self) -> Hashable:
        """Modules with the same unfolding see the same rows in the same tensor."""

    @abstractmethod
    def items(self, x: Tensor) -> Tensor:
        """The module's input as (items, ...), whatever leading dimensions it came with."""

    @abstractmethod
    def input_rows(self, items: Tensor) -> Tensor:
        """Some of the items as (items, positions, groups, in)."""

    @abstractmethod
    def output_rows(self, y: Tensor) -> Tensor:
        """The module's output as (items, positions, groups, out), in the order of `input_rows`."""

    @abstractmethod
    def channel_axis(self, dimensions: int) -> int:
        """Which axis of an input or output of so many dimensions holds the channels; the others count samples.

        0 is that of a single sample without a batch axis, 1 that of a batch (samples, channels, ...).
        """

    def operator(self, size: Sequence[int]) -> Operator | None:
        """The module without its bias, on inputs of this size; None where no bound of its norm is known."""
        return None

    def made(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """What the module makes of its arguments, as a function of its weight and bias: no hook, nothing set on it."""
        kind: Any = kind_of(self.module)
        stored: dict[str, Tensor | None] = {self.weight_name: weight}
        if self.bias_name is not None:
            stored[self.bias_name] = bias
        plain = kind.__new__(kind)
        for name, value in vars(self.module).items():
            if name not in stored and not callable(getattr(kind, name, None)):  # a method that was put on the instance
                vars(plain)[name] = value
        vars(plain)["_parameters"] = {**self.module._parameters, **stored}
        made: Tensor = kind.forward(plain, *args, **kwargs)
        return made

    @property
    def kernel(self) -> int:
        """How many inputs of a matrix belong to one channel: the kernel's positions, or 1."""
        return 1

    @property
    def owner(self) -> Any:
        """The module that has the parameters: the one that is called, but for a projection."""
        return self.module

    @property
    def routed(self) -> bool:
        """Whether only some of the samples come here, as to an expert."""
        return False

    @property
    def weight(self) -> Any:
        """The parameter that holds the matrices, or the part of it that does."""
        return self.weight_part(self.parameters[0])

    @property
    def bias(self) -> Any:
        """The parameter that holds the biases, or the part of it that does; None without biases."""
        bias = self.parameters[1]
        return None if bias is None else self.bias_part(bias)

    @property
    def parameters(self) -> tuple[Any, Any]:
        """The whole parameters: of the weights, and of the biases or None."""
        weight = getattr(self.owner, self.weight_name)
        return weight, None if self.bias_name is None else getattr(self.owner, self.bias_name)

    @property
    def places(self) -> set[tuple[int, str]]:
        """Where its numbers are: two layers with a place in common are tied."""
        return {(id(parameter), "") for parameter in self.module.parameters()}

    def weight_part(self, whole: Any) -> Any:
        """What of the parameter, or of a tensor of its shape, is this layer's."""
        return whole

    def bias_part(self, whole: Any) -> Any:
        """The same of the biases."""
        return whole

    def marked(self, mask: Tensor, y: Tensor) -> Tensor:
        """A mask of the network's tokens as one of the samples that made the output y."""
        return mask

    @property
    def outputs(self) -> int:
        """The number of outputs, of all groups together."""
        return math.prod(self.pack(self.weight.detach()).shape[:2])

    @property
    def width(self) -> int:
        """The number of inputs of one matrix, without the bias."""
        return self.pack(self.weight.detach()).shape[2]

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """The dimensions of the output y that count samples, such as (batch, tokens)."""
        channels = self.channel_axis(y.ndim)
        return tuple(size for axis, size in enumerate(y.shape) if axis != channels)

    def names(self, name: str) -> list[str]:
        """The layers' names: the module's own, or name[0], name[1], ... where there are groups."""
        return [name] if self.groups == 1 else [f"{name}[{g}]" for g in range(self.groups)]

    def weights(self) -> Tensor:
        """(groups, out, in), a copy of what is stored."""
        return self.pack(self.weight.detach()).clone()

    def biases(self) -> Tensor | None:
        """(groups, out), a copy of what is stored."""
        return None if self.bias is None else self.bias.detach().reshape(self.groups, -1).clone()


class LinearStack(Stack):
    """nn.Linear: one matrix; all leading dimensions of the input count samples."""

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) -> (1, out, in)."""
        return weight[None]

    def unpack(self, matrices: Tensor) -> Tensor:
        """(1, out, in) -> (out, in)."""
        return matrices[0]

    @property
    def unfolding(self) -> Hashable:
        """Every such module reads the rows as they are."""
        return LinearStack

    def items(self, x: Tensor) -> Tensor:
        """(..., in) -> (items, in)."""
        return x.reshape(-1, x.shape[-1])

    def input_rows(self, items: Tensor) -> Tensor:
        """(items, in) -> (items, 1, 1, in)."""
        return items[:, None, None]

    def output_rows(self, y: Tensor) -> Tensor:
        """(..., out) -> (items, 1, 1, out)."""
        return y.reshape(-1, 1, 1, y.shape[-1])

    def channel_axis(self, dimensions: int) -> int:
        """The last."""
        return dimensions - 1

    def operator(self, size: Sequence[int]) -> Operator:
        """D -> D W^T."""
        return LinearOperator(self.weights()[0])


class Conv1DStack(LinearStack):
    """transformers' Conv1D, y = x W + b with W (in, out): a Linear that stores its matrix the other way round."""

    def pack(self, weight: Tensor) -> Tensor:
        """(in, out) -> (1, out, in)."""
        return weight.T[None]

    def unpack(self, matrices: Tensor) -> Tensor:
        """(1, out, in) -> (in, out)."""
        return matrices[0].T


class ConvolutionStack(Stack):
    """nn.Conv1d, 2d, 3d: in = in_channels / groups * kernel size, one row for each output position."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.groups)
        self.planes = len(module.kernel_size)

    @property
    def kernel(self) -> int:
        """The kernel's positions."""
        return math.prod(self.module.kernel_size)

    def pack(self, weight: Tensor) -> Tensor:
        """(out_channels, in_channels / groups, *kernel) -> (groups, out, in)."""
        return weight.reshape(self.groups, len(weight) // self.groups, -1)

    def unpack(self, matrices: Tensor) -> Tensor:
        """(groups, out, in) -> (out_channels, in_channels / groups, *kernel)."""
        return matrices.reshape(self.weight.shape)

    @property
    def unfolding(self) -> Hashable:
        """Everything that decides which pixels make a row."""
        m = self.module
        return (type(self), m.kernel_size, m.stride, m.padding, m.padding_mode, m.dilation, m.groups, m.output_padding)

    def items(self, x: Tensor) -> Tensor:
        """(batch, channels, *pixels), the batch dimension added where the input has none."""
        return x if x.ndim == self.planes + 2 else x[None]

    def input_rows(self, items: Tensor) -> Tensor:
        """(items, channels, *pixels) -> (items, positions, groups, in)."""
        m, image = self.module, self._padded(items)
        for axis, (size, step, stride) in enumerate(zip(m.kernel_size, m.dilation, self._stride(), strict=True), 2):
            image = image.unfold(axis, step * (size - 1) + 1, stride)[..., ::step]
        # so far a view: (items, groups, channels of a group, *positions, *kernel)
        image = image.reshape(len(items), self.groups, -1, *image.shape[2:])
        positions, kernel = range(3, 3 + self.planes), range(3 + self.planes, 3 + 2 * self.planes)
        # stored as (groups, in, items, positions): the long axis stays contiguous, and BLAS takes it transposed
        image = image.permute(1, 2, *kernel, 0, *positions)
        rows = image.reshape(self.groups, image.shape[1] * self.kernel, len(items), -1)
        return rows.permute(2, 3, 0, 1)

    def output_rows(self, y: Tensor) -> Tensor:
        """(items, out_channels, *pixels) -> (items, positions, groups, out)."""
        y = self.items(y).flatten(2)
        return y.reshape(len(y), self.groups, y.shape[1] // self.groups, -1).permute(0, 3, 1, 2)

    def channel_axis(self, dimensions: int) -> int:
        """In front of the pixels."""
        return dimensions - self.planes - 1

    def operator(self, size: Sequence[int]) -> Operator | None:
        """On a torus that holds every product of a pixel and a kernel position, whatever zeros are around the image."""
        m = self.module
        if m.padding_mode != "zeros" and any(self._padding()):
            return None  # the border repeats entries
        around = [
            pixels + step * (kernel - 1)
            for pixels, step, kernel in zip(self._spread(size[-self.planes :]), m.dilation, m.kernel_size, strict=True)
        ]
        kernels = self.weights().reshape(self.outputs, -1, *m.kernel_size)
        return ConvolutionOperator(kernels, around, m.dilation, self.groups)

    def _stride(self) -> tuple[int, ...]:
        """With which the kernel moves over the padded image."""
        stride: tuple[int, ...] = self.module.stride
        return stride

    def _spread(self, pixels: Sequence[int]) -> list[int]:
        """The size of an image that the kernel moves over, before padding."""
        return list(pixels)

    def _padded(self, items: Tensor) -> Tensor:
        m = self.module
        return F.pad(items, self._padding(), mode="constant" if m.padding_mode == "zeros" else m.padding_mode)

    def _padding(self) -> list[int]:
        # F.pad takes (before, after) pairs, the last dimension first; "same" puts an odd pixel after, as torch does
        m, pads = self.module, []
        for axis in reversed(range(self.planes)):
            if m.padding == "same":
                total = m.dilation[axis] * (m.kernel_size[axis] - 1)
                pads += [total // 2, total - total // 2]
            elif m.padding == "valid":
                pads += [0, 0]
            else:
                pads += [m.padding[axis]] * 2
        return pads


class TransposedStack(ConvolutionStack):
    """nn.ConvTranspose1d, 2d, 3d, as the convolution that they are.

    The input with stride - 1 zeros between its pixels, padded by dilation (kernel - 1) - padding, meets the kernel
    turned around: a row holds zeros where no pixel meets a kernel position. in = in_channels / groups * kernel size.
    """

    def pack(self, weight: Tensor) -> Tensor:
        """(in_channels, out_channels / groups, *kernel) -> (groups, out, in)."""
        turned = weight.flip(tuple(range(2, weight.ndim)))
        parts = turned.reshape(self.groups, -1, turned.shape[1], self.kernel)  # (groups, in, out, kernel)
        return parts.transpose(1, 2).reshape(self.groups, turned.shape[1], -1)

    def unpack(self, matrices: Tensor) -> Tensor:
        """(groups, out, in) -> (in_channels, out_channels / groups, *kernel)."""
        shape = self.weight.shape
        parts = matrices.reshape(self.groups, shape[1], -1, self.kernel).transpose(1, 2)
        return parts.reshape(shape).flip(tuple(range(2, len(shape))))

    def _stride(self) -> tuple[int, ...]:
        return (1,) * self.planes

    def _spread(self, pixels: Sequence[int]) -> list[int]:
        return [(size - 1) * stride + 1 for size, stride in zip(pixels, self.module.stride, strict=True)]

    def _padded(self, items: Tensor) -> Tensor:
        apart = items.new_zeros(*items.shape[:2], *self._spread(items.shape[2:]))
        pixels: tuple[slice, ...] = tuple(slice(None, None, stride) for stride in self.module.stride)
        apart[(slice(None), slice(None), *pixels)] = items
        return F.pad(apart, self._padding())

    def _padding(self) -> list[int]:
        m, pads = self.module, []
        for axis in reversed(range(self.planes)):
            before = m.dilation[axis] * (m.kernel_size[axis] - 1) - m.padding[axis]
            pads += [before, before + m.output_padding[axis]]
        return pads


KINDS: Final[dict[type[nn.Module] | str, type[Stack]]] = {
    nn.Linear: LinearStack,
    nn.Conv1d: ConvolutionStack,
    nn.Conv2d: ConvolutionStack,
    nn.Conv3d: ConvolutionStack,
    nn.ConvTranspose1d: TransposedStack,
    nn.ConvTranspose2d: TransposedStack,
    nn.ConvTranspose3d: TransposedStack,
    "transformers.pytorch_utils.Conv1D": Conv1DStack,  # by its path: nothing is imported for it
}


def register_kind(module_class: type[nn.Module] | str, stack_class: type[Stack]) -> None:
    """From now on modules of `module_class` are layers, and `stack_class(module)` says how each is a matrix.

    module_class  a class, or the path "package.module.Class" of one that may never be imported. Its subclasses count
                  while they compute what it does: one with a forward of its own is something else
    stack_class   a subclass of `Stack` that is called with the module alone

    Raises TypeError for what is no such class, ValueError for a kind that is registered already.
    """
    if isinstance(module_class, str):
        if not all(part.isidentifier() for part in module_class.split(".")) or "." not in module_class:
            raise ValueError(f"module_class is {module_class!r}; give a class, or its path as 'package.module.Class'")
    elif not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class is {module_class!r}; give a subclass of nn.Module, or the path of one")
    if not (isinstance(stack_class, type) and issubclass(stack_class, Stack)):
        raise TypeError(f"stack_class is {stack_class!r}; give a subclass of convexprune.network.Stack")
    if isabstract(stack_class):
        missing = ", ".join(sorted(stack_class.__abstractmethods__))
        raise TypeError(f"stack_class is {stack_class.__name__}, which lacks {missing}")
    for kind in KINDS:
        # a class is itself; a path is all that is known of a class that is given by it
        by_path = isinstance(kind, str) or isinstance(module_class, str)
        if _path(kind) == _path(module_class) if by_path else kind is module_class:
            raise ValueError(f"{_path(module_class)} is a kind of layer already, by {KINDS[kind].__name__}")
    KINDS[module_class] = stack_class


def kind_names() -> str:
    """The kinds of layers, as an error lists them."""
    return ", ".join(kind if isinstance(kind, str) else kind.__name__ for kind in KINDS)


def stack_of(module: nn.Module) -> Stack | None:
    """The module as matrices, or None where it is of no kind that is registered.

    A subclass counts only while it computes what its parent does: one with a forward of its own is something else.
    """
    kind = kind_of(module)
    stack: Any = None if kind is None else KINDS.get(kind) or KINDS.get(_path(kind))
    return None if stack is None else stack(module)


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The registered class whose function the module computes, or None."""
    for kind in type(module).__mro__:
        if (kind in KINDS or _path(kind) in KINDS) and all(
            getattr(type(module), method) is getattr(kind, method)
            for method in ("forward", "_conv_forward")
            if hasattr(kind, method)
        ):
            return kind
    return None


def _path(kind: type | str) -> str:
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
