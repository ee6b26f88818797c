"""The parts of a model that torch.fx can trace, where it cannot trace the whole."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from convexprune.network.channels import ChannelGraph
from convexprune.network.matrices import stack_of


def traceable(model: nn.Module) -> tuple[str, ...]:
    """The largest submodules that can be traced and hold several layers; ("",) where the model itself can be."""
    return tuple(_traceable("", model, set()))


def check_part(model: nn.Module, name: str) -> None:
    """Raise ValueError where a part is not there, or shares a parameter with a module outside of it."""
    known = dict(model.named_modules())
    if name not in known:
        raise ValueError(f"parts: {name!r} is not in the model")
    inside = {id(module) for module in known[name].modules()}
    own = {id(parameter) for parameter in known[name].parameters()}
    for path, module in known.items():
        for key, parameter in module._parameters.items():
            if id(module) not in inside and id(parameter) in own:
                raise ValueError(f"parts: {name!r} shares a weight with {path}.{key}, which is outside of it")


def _traceable(path: str, module: nn.Module, seen: set[int]) -> Iterator[str]:
    if id(module) in seen or sum(stack_of(each) is not None for each in module.modules()) < 2:
        return
    seen.add(id(module))
    try:
        ChannelGraph(module)
    except ValueError:
        for name, child in module.named_children():
            yield from _traceable(".".join(filter(None, (path, name))), child, seen)
    else:
        yield path
