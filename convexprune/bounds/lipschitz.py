"""Lipschitz constants of activations: sup |f'|, rounded up. docs/theory has the proofs.

A function here has the name and the arguments of torch's; it returns the constant. One that is called with arguments of
other names or kinds raises TypeError, with arguments for which there is no constant ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from convexprune.rounding import up


def sigmoid(input: Any) -> float:
    """f' = s (1 - s)."""
    return 0.25


def hardsigmoid(input: Any, inplace: bool = False) -> float:
    """min(max(x + 3, 0), 6) / 6."""
    return up(1 / 6)


def gelu(input: Any, *, approximate: str = "none") -> float:
    """x Phi(x); x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 where approximate is "tanh"."""
    constants = {"none": 1.12891, "tanh": 1.129}
    if approximate not in constants:
        raise ValueError(f"approximate is {approximate!r}")
    return constants[approximate]


def silu(input: Any, inplace: bool = False) -> float:
    """x sigmoid(x)."""
    return 1.09984


def mish(input: Any, inplace: bool = False) -> float:
    """x tanh(log(1 + e^x))."""
    return 1.09


def hardswish(input: Any, inplace: bool = False) -> float:
    """x min(max(x + 3, 0), 6) / 6: its slope is (2 x + 3) / 6 where |x| < 3."""
    return 1.5


def elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> float:
    """x, and alpha (e^x - 1) below 0."""
    _flag(inplace)
    return max(1.0, abs(_number(alpha)))


def celu(input: Any, alpha: float = 1.0, inplace: bool = False) -> float:
    """x, and alpha (e^(x / alpha) - 1) below 0; its slope has no bound where alpha is negative."""
    _flag(inplace)
    if not _number(alpha) > 0:
        raise ValueError(f"alpha is {alpha}")
    return 1.0


def selu(input: Any, inplace: bool = False) -> float:
    """ELU of alpha = 1.67326..., times 1.05070...: the slope below 0 is at most their product."""
    return 1.7580994


def leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> float:
    """x, and negative_slope x below 0."""
    _flag(inplace)
    return max(1.0, abs(_number(negative_slope)))


def rrelu(
    input: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> float:
    """In evaluation x, and (lower + upper) / 2 x below 0."""
    _flag(inplace)
    if _flag(training):
        raise ValueError("training is True")
    return max(1.0, up(abs((_number(lower) + _number(upper)) / 2)))


def prelu(input: Any, weight: Any) -> float:
    """x, and weight x below 0, a weight for each channel."""
    if not isinstance(weight, Tensor):
        raise ValueError("its weight is no parameter of the model")
    return max(1.0, _number(float(weight.detach().double().abs().max())))


def softmax(input: Any, dim: Any = None, _stacklevel: Any = 3, dtype: Any = None) -> float:
    """Of each row the Jacobian is diag(p) - p p^T, whose norm is at most max 2 p (1 - p) by Gershgorin."""
    return 0.5


LIPSCHITZ: Final[Mapping[str, Callable[..., float]]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            sigmoid, hardsigmoid, gelu, silu, mish, hardswish, elu, celu, selu, leaky_relu, rrelu, prelu, softmax,
        )
    }
)  # fmt: skip


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is no bool")
    return value
