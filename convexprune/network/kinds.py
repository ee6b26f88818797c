"""The kinds of operations in a network: what is a sum, a norm, a reshaping, a nonexpansive function. One list each.

An operation appears in three ways: in a recorded pass by the name of its function ("add"), as a module (nn.Dropout),
and as the target of a node of torch.fx (torch.relu).
"""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---- by the name in a recorded pass ----

ORDERED: Final = frozenset(("view", "view_as", "reshape", "reshape_as", "flatten", "ravel", "squeeze", "unsqueeze"))
"""Reshapings that keep the entries in their order."""
MOVED_AXES: Final = frozenset(("permute", "transpose", "movedim", "swapaxes", "swapdims", "t"))
DUPLICATES: Final = frozenset(("contiguous", "clone", "detach", "alias"))
RESHAPING: Final = ORDERED | MOVED_AXES | DUPLICATES | {"unflatten"}
"""Reshapings of a tensor that keep every entry, and copies of it."""
PARTS: Final = frozenset(
    ("getitem", "pad", "narrow", "select", "chunk", "split", "tensor_split", "unbind", "flip", "roll")
)
"""Some of the entries, or the entries and zeros, each once."""
CATS: Final = frozenset(("cat", "concat", "concatenate"))
JOINS: Final = CATS | {"stack", "hstack", "vstack", "dstack", "column_stack", "row_stack"}
"""All entries of several tensors, each once."""
CASTS: Final = frozenset(("to", "float", "double", "half", "bfloat16"))
DROPOUT: Final = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"))
"""Dropout that is off; one that is on is recorded as "dropout in training"."""
ADDITIONS: Final = frozenset(("add", "iadd", "radd"))
SUMS: Final = ADDITIONS | {"sub", "isub"}
PRODUCTS: Final = frozenset(("mul", "imul", "rmul", "multiply"))
QUOTIENTS: Final = frozenset(("div", "idiv", "truediv", "itruediv", "divide", "true_divide"))
POOLED_AXES: Final = {
    f"{pool}{axes}d": axes
    for pool in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for axes in (1, 2, 3)
}
"""Over how many of the last axes a pool works."""
MAXIMA: Final = frozenset(name for name in POOLED_AXES if "max" in name)
NONEXPANSIVE: Final = frozenset(
    ("relu", "relu6", "tanh", "hardtanh", "softplus", "softsign", "softshrink", "tanhshrink", "log_sigmoid", "abs",
     "neg", "negative", "clamp", "clip")
)  # fmt: skip
"""|f(a) - f(b)| <= |a - b|, entry by entry."""
COMMUTING_WITH_RELU: Final = (
    RESHAPING | DROPOUT | MAXIMA | {"dropout in training", "dropout1d in training", "dropout2d in training",
                                    "dropout3d in training"}
)  # fmt: skip
"""relu(f(y)) = f(relu(y)): reorderings, zeros and positive factors, maxima."""
LOOKS: Final = frozenset(
    ("get", "size", "dim", "ndimension", "numel", "nelement", "len", "stride", "storage_offset", "element_size",
     "get_device", "type", "is_tensor", "is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_same_size",
     "is_inference", "is_pinned", "is_shared", "is_conj", "is_neg", "result_type", "repr", "format", "hash")
)  # fmt: skip
"""Functions that say nothing of a tensor's numbers; so do properties such as its shape."""

# ---- by module ----

BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LINEARS: Final = (nn.Linear,)
EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DROPOUT_MODULES: Final = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
AVERAGE_POOLS: Final = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
POOLS: Final = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, *AVERAGE_POOLS)
ADAPTIVE_POOLS: Final = (
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)  # fmt: skip
MONOTONE_NONEXPANSIVE: Final = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Softplus, nn.Softsign,
    nn.Identity,
)  # fmt: skip
"""Nondecreasing with slope at most 1 (LeakyReLU where its slope is at most 1), as Lemma 1 of merging asks for."""
ENTRYWISE: Final = (
    *MONOTONE_NONEXPANSIVE, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.LogSigmoid,
)  # fmt: skip
"""Functions of each entry that do not depend on training."""

# ---- by the target of a torch.fx node ----

FX_SUMS: Final = frozenset((operator.add, operator.iadd, torch.add))
FX_PRODUCTS: Final = frozenset((operator.mul, operator.imul, torch.mul))
FX_POOLS: Final = frozenset(
    (F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
)
FX_ENTRYWISE: Final = frozenset(
    (F.relu, torch.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.relu6, F.hardswish, torch.sigmoid, torch.tanh,
     F.sigmoid, F.tanh, F.softplus)
)  # fmt: skip
FX_ENTRYWISE_METHODS: Final = frozenset(("relu", "relu_", "sigmoid", "tanh"))
FX_MONOTONE_NAMES: Final = frozenset(("relu", "relu_", "relu6", "leaky_relu", "tanh", "sigmoid", "softplus"))
"""Functions and methods, by name, that are nondecreasing with slope at most 1 (leaky_relu where its slope is)."""


def computes(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of these kinds, and no subclass with a forward of its own."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def altered(module: nn.Module) -> bool:
    """Whether a call of the module may do something else than its class's forward: by hooks, or a forward set on it."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


def batch_norm_scale(module: Any) -> Tensor | None:
    """The factor (C,), float64, of each channel of a batch norm in evaluation mode; None without running statistics."""
    if module.running_var is None:
        return None
    scale: Tensor = (module.running_var.double() + module.eps).rsqrt()
    return scale.detach() if module.weight is None else (scale * module.weight).detach()
