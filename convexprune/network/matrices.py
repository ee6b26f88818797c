"""How a module is an (out, in) matrix: its weights as one, its inputs and outputs as rows.

A further kind of module is one more small subclass of `Stack` and one more line of `_KINDS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Stack(ABC):
    """A module as a stack of matrices, one for each group: y = W_g x_g + b_g for every sample and group g.

    Samples are laid out as (items, positions): the images and the output positions of a convolution; the rows and
    a single position of a Linear.
    """

    groups: int
    module: Any  # the nn.Module itself

    @property
    @abstractmethod
    def width(self) -> int:
        """The number of inputs of one matrix, without the bias."""

    @property
    def kernel(self) -> int:
        """How many inputs of a matrix belong to one channel: the kernel's positions, or 1."""
        return 1

    @property
    @abstractmethod
    def unfolding(self) -> Hashable:
        """Modules with the same unfolding see the same rows in the same tensor."""

    @abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """The module's weight as (groups, out, in)."""

    @abstractmethod
    def unpack(self, matrices: Tensor) -> Tensor:
        """The inverse of `pack`."""

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
    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """The dimensions of the output y that count samples, such as (batch, tokens)."""

    def names(self, name: str) -> list[str]:
        """The layers' names: the module's own, or name[0], name[1], ... where there are groups."""
        return [name] if self.groups == 1 else [f"{name}[{g}]" for g in range(self.groups)]

    def weights(self) -> Tensor:
        """(groups, out, in), as stored."""
        return self.pack(self.module.weight.detach())

    def biases(self) -> Tensor | None:
        """(groups, out), as stored."""
        return None if self.module.bias is None else self.module.bias.detach().reshape(self.groups, -1)


class LinearStack(Stack):
    """nn.Linear: one matrix; all leading dimensions of the input count samples."""

    def __init__(self, module: nn.Linear) -> None:
        self.module, self.groups = module, 1

    @property
    def width(self) -> int:
        """in_features."""
        return int(self.module.weight.shape[1])

    @property
    def unfolding(self) -> Hashable:
        """Every Linear reads the rows as they are."""
        return nn.Linear

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in) -> (1, out, in)."""
        return weight[None]

    def unpack(self, matrices: Tensor) -> Tensor:
        """(1, out, in) -> (out, in)."""
        return matrices[0]

    def items(self, x: Tensor) -> Tensor:
        """(..., in) -> (items, in)."""
        return x.reshape(-1, x.shape[-1])

    def input_rows(self, items: Tensor) -> Tensor:
        """(items, in) -> (items, 1, 1, in)."""
        return items[:, None, None]

    def output_rows(self, y: Tensor) -> Tensor:
        """(..., out) -> (items, 1, 1, out)."""
        return y.reshape(-1, 1, 1, y.shape[-1])

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """All dimensions but the last."""
        return tuple(y.shape[:-1])


class ConvolutionStack(Stack):
    """nn.Conv1d and nn.Conv2d: in = in_channels / groups * kernel size, one row for each output position."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d) -> None:
        self.module, self.groups = module, module.groups
        self.planes = len(module.kernel_size)  # 1 or 2

    @property
    def width(self) -> int:
        """in_channels / groups * kernel size."""
        return int(self.module.weight[0].numel())

    @property
    def kernel(self) -> int:
        """The kernel's positions."""
        return math.prod(self.module.kernel_size)

    @property
    def unfolding(self) -> Hashable:
        """Everything that decides which pixels make a row."""
        m = self.module
        return (self.planes, m.kernel_size, m.stride, m.padding, m.padding_mode, m.dilation, m.groups)

    def pack(self, weight: Tensor) -> Tensor:
        """(out_channels, in_channels / groups, *kernel) -> (groups, out, in)."""
        return weight.reshape(self.groups, len(weight) // self.groups, -1)

    def unpack(self, matrices: Tensor) -> Tensor:
        """(groups, out, in) -> (out_channels, in_channels / groups, *kernel)."""
        return matrices.reshape(self.module.weight.shape)

    def items(self, x: Tensor) -> Tensor:
        """(batch, channels, *pixels), the batch dimension added where the input has none."""
        return x if x.ndim == self.planes + 2 else x[None]

    def input_rows(self, items: Tensor) -> Tensor:
        """(items, channels, *pixels) -> (items, positions, groups, in), by torch's unfold."""
        m = self.module
        x, stride = self._spread(items)
        kernel, dilation = m.kernel_size, m.dilation
        if self.planes == 1:  # an image one pixel high
            x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
        columns = F.unfold(x, kernel, dilation=dilation, stride=stride)  # (items, channels * kernel, positions)
        # stored as (groups, in, items, positions): the long axis stays contiguous, and BLAS takes it transposed
        columns = columns.reshape(len(items), self.groups, self.width, -1).permute(1, 2, 0, 3).contiguous()
        return columns.permute(2, 3, 0, 1)

    def output_rows(self, y: Tensor) -> Tensor:
        """(items, out_channels, *pixels) -> (items, positions, groups, out)."""
        y = self.items(y).flatten(2)
        return y.reshape(len(y), self.groups, y.shape[1] // self.groups, -1).permute(0, 3, 1, 2)

    def sample_shape(self, y: Tensor) -> tuple[int, ...]:
        """(batch, *output pixels)."""
        y = self.items(y)
        return (len(y), *y.shape[2:])

    def _spread(self, items: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The padded images, and the stride with which the kernel moves over them."""
        m = self.module
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        return F.pad(items, self._padding(), mode=mode), m.stride

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
    """nn.ConvTranspose1d and nn.ConvTranspose2d, as the convolution that they are.

    The input with stride - 1 zeros between its pixels, padded by dilation (kernel - 1) - padding, meets the kernel
    turned around: a row holds zeros where no pixel meets a kernel position. in = in_channels / groups * kernel size.
    """

    @property
    def width(self) -> int:
        """in_channels / groups * kernel size."""
        return int(self.module.in_channels // self.groups) * self.kernel

    @property
    def unfolding(self) -> Hashable:
        """Everything that decides which pixels make a row."""
        return ("transposed", *super().unfolding, self.module.output_padding)  # type: ignore[misc]

    def pack(self, weight: Tensor) -> Tensor:
        """(in_channels, out_channels / groups, *kernel) -> (groups, out, in)."""
        turned = weight.flip(tuple(range(2, weight.ndim)))
        parts = turned.reshape(self.groups, -1, turned.shape[1], self.kernel)  # (groups, in, out, kernel)
        return parts.transpose(1, 2).reshape(self.groups, turned.shape[1], -1)

    def unpack(self, matrices: Tensor) -> Tensor:
        """(groups, out, in) -> (in_channels, out_channels / groups, *kernel)."""
        shape = self.module.weight.shape
        parts = matrices.reshape(self.groups, shape[1], -1, self.kernel).transpose(1, 2)
        return parts.reshape(shape).flip(tuple(range(2, len(shape))))

    def _spread(self, items: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        m = self.module
        size = [(pixels - 1) * stride + 1 for pixels, stride in zip(items.shape[2:], m.stride, strict=True)]
        apart = items.new_zeros(*items.shape[:2], *size)
        pixels_of: tuple[slice, ...] = tuple(slice(None, None, stride) for stride in m.stride)
        apart[(slice(None), slice(None), *pixels_of)] = items
        pads: list[int] = []
        for axis in reversed(range(self.planes)):
            before = m.dilation[axis] * (m.kernel_size[axis] - 1) - m.padding[axis]
            pads += [before, before + m.output_padding[axis]]
        return F.pad(apart, pads), (1,) * self.planes


_KINDS: dict[type[nn.Module], type[Any]] = {
    nn.Linear: LinearStack,
    nn.Conv1d: ConvolutionStack,
    nn.Conv2d: ConvolutionStack,
    nn.ConvTranspose1d: TransposedStack,
    nn.ConvTranspose2d: TransposedStack,
}
KIND_NAMES = ", ".join(kind.__name__ for kind in _KINDS)


def stack_of(module: nn.Module) -> Stack | None:
    """The module as matrices, or None where it is no Linear or convolution.

    A subclass counts only while it computes what its parent does: one with a forward of its own is something else.
    """
    for kind, stack in _KINDS.items():
        methods = [name for name in ("forward", "_conv_forward") if hasattr(kind, name)]
        if isinstance(module, kind) and all(getattr(type(module), m) is getattr(kind, m) for m in methods):
            return stack(module)  # type: ignore[no-any-return]
    return None
