"""Matrices that a module reads by a function of torch, without calling a module: attention and mixtures of experts.

Each is a `Projection`, y = W x + b with W and b parts of parameters of its owner. While layers are watched
(`network.expansion`) the owner calls it, so that hooks, records and gradients see it as they see a Linear.

    nn.MultiheadAttention   q_proj, k_proj, v_proj: rows of in_proj_weight, or a weight each. out_proj is a Linear,
                            whose weight is read in the same way
    experts of transformers gate_up_proj[e], down_proj[e], ...: stacked as (experts, out, in), or (experts, in, out)
                            where `use_experts_implementation` says so. Their biases are added by the mixture, as they
                            are
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn
from torch.nn import functional as F

from convexprune.network.matrices import LinearStack, Stack, stack_of

Part = slice | int | None  # of a parameter along its first axis; None: all of it
Place = tuple[str, Part]  # a parameter's name, and which part of it
Places = dict[str, tuple[Place, Place | None]]  # of a projection's weight, and of its bias
HEADS: Final = ("q_proj", "k_proj", "v_proj")
LAST: Final = "down_proj"
EXPERTS: Final = ("gate_up_proj", "gate_proj", "up_proj", LAST)


class Projection(nn.Module):
    """y = W x + b, with parts of two parameters of another module.

    tokens  of an expert: which of the mixture's tokens the rows of the last call are, where that is known
    among   how many tokens the mixture had
    """

    def __init__(
        self,
        owner: nn.Module,
        weight: Place,
        bias: Place | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.transposed = transposed  # stored as (in, out)
        vars(self)["owner"] = owner  # no child: the owner has this, not this the owner
        self.weight_name, self.weight_part = weight
        self.bias_name: str | None = None if bias is None else bias[0]
        self.bias_part: Part = None if bias is None else bias[1]
        self.tokens: Tensor | None = None
        self.among = 0
        self.agreed = False  # whether its owner was seen to do with it what it does without it

    @property
    def weight(self) -> Tensor:
        """(out, in), or (in, out), as stored now."""
        weight: Tensor = _taken(getattr(self.owner, self.weight_name), self.weight_part)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """(out,), as stored now."""
        return None if self.bias_name is None else _taken(getattr(self.owner, self.bias_name), self.bias_part)

    def forward(self, x: Tensor) -> Tensor:
        """W x + b."""
        return self.made(x, self.weight, self.bias)

    def made(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The same of these."""
        return F.linear(x, weight.T if self.transposed else weight, bias)


def _taken(whole: Any, part: Part) -> Any:
    return whole if part is None else whole[part]


class ProjectionStack(LinearStack):
    """A projection: a Linear, stored in its owner."""

    def __init__(self, module: Projection) -> None:
        super().__init__(module)
        self.weight_name, self.bias_name = module.weight_name, module.bias_name

    @property
    def owner(self) -> Any:
        """The module that has the parameters."""
        return self.module.owner

    def pack(self, weight: Tensor) -> Tensor:
        """(out, in), or (in, out), -> (1, out, in)."""
        return super().pack(weight.T if self.module.transposed else weight)

    def unpack(self, matrices: Tensor) -> Tensor:
        """The inverse."""
        weight = super().unpack(matrices)
        return weight.T if self.module.transposed else weight

    @property
    def routed(self) -> bool:
        """Whether it is an expert."""
        return isinstance(self.module.weight_part, int)

    @property
    def places(self) -> set[tuple[int, str]]:
        """Its part of its owner's parameters."""
        parts = zip(self.parameters, (self.module.weight_part, self.module.bias_part), strict=True)
        return {(id(whole), repr(part)) for whole, part in parts if whole is not None}

    def weight_part(self, whole: Any) -> Any:
        """Its rows, or its expert's matrix."""
        return _taken(whole, self.module.weight_part)

    def bias_part(self, whole: Any) -> Any:
        """Its entries."""
        return _taken(whole, self.module.bias_part)

    def marked(self, mask: Tensor, y: Tensor) -> Tensor:
        """An expert's rows are some of the tokens."""
        tokens = self.module.tokens
        known = tokens is not None and len(tokens) == len(y) and mask.numel() == self.module.among
        return mask.reshape(-1)[tokens.to(mask.device)] if known else mask

    def made(self, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """W x + b."""
        (x,) = args
        made: Tensor = self.module.made(x, weight, bias)
        return made


_ALIVE: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, Projection]] = WeakKeyDictionary()


def projections(module: nn.Module) -> dict[str, Projection]:
    """Those of a module by name; the same objects as long as someone holds them, so that all hooks meet."""
    return {name: _made(module, name, *place) for name, place in _places(module).items()}


def projection(module: nn.Module, name: str) -> Projection | None:
    """The one of this name, if there is one."""
    place = _places(module).get(name)
    return None if place is None else _made(module, name, *place)


def _made(module: nn.Module, name: str, weight: Place, bias: Place | None) -> Projection:
    known = _ALIVE.setdefault(module, WeakValueDictionary())
    found = known.get(name) or Projection(module, weight, bias, vars(module).get("is_transposed") is True)
    known[name] = found
    return found


def _places(module: nn.Module) -> Places:
    return _attention(module) if isinstance(module, nn.MultiheadAttention) else _experts(module)


def _attention(module: nn.MultiheadAttention) -> Places:
    if type(module).forward is not nn.MultiheadAttention.forward:
        return {}
    packed = module._parameters.get("in_proj_weight") is not None
    found: Places = {}
    for number, name in enumerate(HEADS):
        rows = slice(number * module.embed_dim, (number + 1) * module.embed_dim)
        weight: Place = ("in_proj_weight", rows) if packed else (f"{name}_weight", None)
        bias = ("in_proj_bias", rows) if module._parameters.get("in_proj_bias") is not None else None
        if module._parameters.get(weight[0]) is not None:  # not computed by a parametrization
            found[name] = weight, bias
    return found if len(found) == len(HEADS) else {}


def _experts(module: Any) -> Places:
    if not isinstance(vars(module).get("is_transposed"), bool) or not hasattr(type(module).forward, "__wrapped__"):
        return {}
    held = {name: module._parameters.get(name) for name in EXPERTS}
    stacked = {name: weight for name, weight in held.items() if weight is not None and weight.ndim == 3}
    return {
        f"{name}[{expert}]": ((name, expert), None) for name, weight in stacked.items() for expert in range(len(weight))
    }


def named_layers(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The modules by name, as `named_modules` gives them, each with its projections behind it."""
    for path, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield path, module
        for name, projection in projections(module).items():
            yield f"{path}.{name}".lstrip("."), projection


def layer_stack(module: nn.Module) -> Stack | None:
    """The module, or projection, as matrices; None where it is no layer."""
    return ProjectionStack(module) if isinstance(module, Projection) else stack_of(module)


def weight_name(layer: str, stack: Stack) -> str:
    """The name of the parameter that holds a layer's weights."""
    return f"{owner_path(layer, stack)}.{stack.weight_name}".lstrip(".")


def owner_path(layer: str, stack: Stack) -> str:
    """The name of the module that has a layer's parameters."""
    return layer if stack.owner is stack.module else layer.rpartition(".")[0]
