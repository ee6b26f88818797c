"""A layer's matrix where it is stored: reading it, and writing it back in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from convexprune.network.matrices import Stack


def check_stored(name: str, stack: Stack) -> None:
    """Raise where the weights cannot be read and written as real numbers: integers, sparse, parametrized, not made."""
    module = stack.owner
    for key in (stack.weight_name, stack.bias_name):
        if key is None:
            continue
        if not hasattr(module, key):
            raise ValueError(
                f"layer {name!r}: a {type(module).__name__} has no {key!r}; set weight_name or bias_name of "
                f"{type(stack).__name__}"
            )
        if key not in module._parameters:
            raise ValueError(
                f"layer {name!r}: its {key} is computed from other parameters (weight norm, a parametrization, a "
                "mask); make it permanent first, e.g. with torch.nn.utils.parametrize.remove_parametrizations"
            )
        value = module._parameters[key]
        if value is None:
            continue
        if is_lazy(value):
            raise ValueError(f"layer {name!r}: its {key} has no shape yet; run the model once first")
        if value.layout != torch.strided:
            raise TypeError(f"layer {name!r}: its {key} is {value.layout}; make it dense first, with .to_dense()")
        if value.is_complex():
            raise TypeError(f"layer {name!r}: its {key} is {value.dtype}; only real weights are covered")
        if not value.is_floating_point() or value.element_size() < 2:
            raise TypeError(f"layer {name!r}: its {key} is {value.dtype}; dequantise it to a float dtype first")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a layer's matrix lives: one group of one module."""

    name: str
    stack: Stack
    group: int

    def read(self) -> Tensor:
        """(M, P), float64 on the CPU: a copy of what is stored, the bias as the last column."""
        weight, biases = self.stack.weights()[self.group], self.stack.biases()
        if biases is not None:
            weight = torch.cat([weight, biases[self.group][:, None].to(weight.device)], 1)
        return weight.cpu().double()

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """(M, N) and (M,), or None without biases: a copy of what is stored, in its dtype."""
        weights, biases = self.stack.weights(), self.stack.biases()
        return weights[self.group], None if biases is None else biases[self.group]

    def write(self, x: Tensor) -> None:
        """Store x (M, P) in the parameters' own dtype and place; nothing is touched unless all of it fits.

        Raises ValueError for another shape, and for numbers that are not finite once cast.
        """
        weights, biases = self.stack.weights(), self.stack.biases()
        out, width = weights.shape[1:]
        shape = (out, width + (biases is not None))
        if tuple(x.shape) != shape:
            raise ValueError(f"layer {self.name!r}: x has shape {tuple(x.shape)}, expected {shape}")
        weights[self.group] = self._cast(x[:, :width], weights)
        if biases is not None:
            biases[self.group] = self._cast(x[:, width], biases)
        with torch.no_grad():
            self.stack.weight.copy_(self.stack.unpack(weights))
            if biases is not None:
                self.stack.bias.copy_(biases.reshape(-1))

    def _cast(self, value: Tensor, like: Tensor) -> Tensor:
        cast = value.detach().to(like)
        bad = ~torch.isfinite(cast)
        if bool(bad.any()):
            worst = float(value.detach().to(like.device)[bad][0])
            raise ValueError(f"layer {self.name!r}: {worst:g} is not a finite {like.dtype}; nothing was written")
        return cast
