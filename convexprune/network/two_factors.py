"""A module as two: one that makes r inner channels without a bias, and one that mixes them.

    y = W x + b = A (B x) + b       nn.Linear          Linear(in, r, no bias),  Linear(r, out)
                                    nn.Conv1d, 2d, 3d  the convolution to r channels, a convolution of kernel 1

Both have the same output positions, so a weight of either costs as many multiplications as one of the module did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.network.forward import check_model, copied
from convexprune.network.kinds import altered

CONVOLUTIONS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class TwoFactors(nn.Sequential):
    """Two modules in a row that stand for one, whose matrix is the product of theirs; `multiply_out` makes it one.

    A `torch.nn.Sequential`, whose parameters are `0.weight`, `1.weight` and `1.bias`.
    """

    @classmethod
    def of(cls, module: Any, left: Tensor, right: Tensor, bias: Tensor | None) -> TwoFactors:
        """A (M, r), B (r, N) and b (M,) in the place of a module: with its dtype, device, mode and geometry.

        Inner channels that are not written or not read are left out.
        Raises ValueError where a number is not finite in that dtype.
        """
        used = left.any(0) & right.any(1)
        used[0] |= not bool(used.any())  # a module has a channel
        left, right = left[:, used], right[used]
        pair = cls.shaped(module, len(right))
        for key, value in (("0.weight", right), ("1.weight", left), ("1.bias", bias)):
            if value is not None:
                _fill(pair.get_parameter(key), value)
        return pair

    @classmethod
    def shaped(cls, module: Any, inner: int) -> TwoFactors:
        """In the place of a module, with so many inner channels; its numbers are still to be written."""
        with torch.random.fork_rng(devices=[]):  # the weights that modules begin with are drawn
            pair = cls(*_geometry(module, inner))
        pair.to(module.weight.device, module.weight.dtype).train(module.training)
        return pair.requires_grad_(module.weight.requires_grad)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (M, r), B (r, N) and b (M,) as they are stored, float64 on the CPU."""
        bias: Any = self[1].bias
        left, right = (self.get_parameter(f"{n}.weight").detach().cpu().double().flatten(1) for n in (1, 0))
        return left, right, None if bias is None else bias.detach().cpu().double()

    def whole(self) -> nn.Module:
        """One module of the matrix A B, rounded to the dtype."""
        first: Any = self[0]
        left, right, bias = self.factors()
        with torch.random.fork_rng(devices=[]):
            made: nn.Module = _like(first, len(left), bias is not None)
        made.to(first.weight.device, first.weight.dtype).train(self.training)
        for key, value in (("weight", left @ right), ("bias", bias)):
            if value is not None:
                _fill(made.get_parameter(key), value)
        return made


def check_divisible(model: nn.Module, modules: Iterable[str]) -> None:
    """Raise ValueError for a module that two cannot stand for: of another kind, hooked, tied, or all there is."""
    known = dict(model.named_modules())
    holders = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    for name in modules:
        module: Any = known.get(name)
        if module is None or not _divisible(module):
            what = "a part of another module" if module is None else f"a {type(module).__name__}"
            what += " with groups" if getattr(module, "groups", 1) != 1 else ""
            why = "only nn.Linear and nn.Conv1d to 3d without groups are made two factors"
        elif altered(module):
            what, why = "hooked, or has a forward of its own", "two modules would not do what it does"
        elif module is model:
            what, why = "the model itself", "wrap it in an nn.Sequential"
        elif any(holders[id(parameter)] > 1 for parameter in module.parameters()):
            what, why = "tied", "another module reads its parameters, which two factors do not have"
        else:
            continue
        raise ValueError(f"layer {name!r} is {what}: {why}; or leave it out of `names`")


def stored_pairs(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[nn.Module, TwoFactors]:
    """The modules of a model for which these tensors, by name, hold two factors; each with a pair of their shape."""
    found: dict[nn.Module, TwoFactors] = {}
    for name, module in model.named_modules():
        first = tensors.get(f"{name}.0.weight")
        if name and _divisible(module) and first is not None and f"{name}.weight" not in tensors:
            found[module] = TwoFactors.shaped(module, len(first))
    return found


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let `new` stand wherever `old` stands in the model."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def multiply_out(model: nn.Module) -> nn.Module:
    """A copy of a model in which every pair of factors is one module again, with the matrix A B.

    The matrix is rounded once to the model's dtype, and is dense as a rule: this is for tools that want the model's
    own structure, not for a smaller model. The model itself is not changed.

    Args:
        model: The network, such as `factorise` returns.

    Returns:
        The copy; its state has the names and shapes that it had before `factorise`.

    Raises:
        TypeError: For what is no network.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> two, report = cp.factorise(model, [torch.randn(40, 8)], keep=0.5)
        >>> [tuple(value.shape) for value in cp.multiply_out(two).state_dict().values()]
        [(4, 8), (4,)]
    """
    check_model(model)
    made = copied(model)
    for pair in [module for module in made.modules() if isinstance(module, TwoFactors)]:
        put_in_place(made, pair, pair.whole())
    return made


def _divisible(module: Any) -> bool:
    return type(module) in (nn.Linear, *CONVOLUTIONS) and getattr(module, "groups", 1) == 1


def _geometry(module: Any, inner: int) -> tuple[nn.Module, nn.Module]:
    """The two modules, for r inner channels."""
    first = _like(module, inner, bias=False)
    bias = module.bias is not None
    if isinstance(module, nn.Linear):
        return first, nn.Linear(inner, module.out_features, bias)
    return first, type(module)(inner, module.out_channels, 1, bias=bias)


def _like(module: Any, outputs: int, bias: bool) -> Any:
    """A module that reads what this one reads, with another number of outputs."""
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, outputs, bias)
    return type(module)(
        module.in_channels, outputs, module.kernel_size, module.stride, module.padding, module.dilation,
        bias=bias, padding_mode=module.padding_mode,
    )  # fmt: skip


def _fill(parameter: Tensor, value: Tensor) -> None:
    cast = value.detach().to(parameter.dtype)
    if not bool(torch.isfinite(cast).all()):
        raise ValueError(f"a factor holds a number that is not a finite {parameter.dtype}; nothing was written")
    with torch.no_grad():
        parameter.copy_(cast.reshape(parameter.shape))
