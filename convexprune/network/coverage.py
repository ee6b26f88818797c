"""Every weight of a model accounted for: in a layer that can be pruned, left out by choice, or not covered, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from convexprune.network.kinds import EMBEDDINGS
from convexprune.network.matrices import Stack, kind_names, stack_of
from convexprune.network.names import stacks

COVERED: Final = ""
SHOWN: Final = 4  # tensors that a sentence names of each reason


@dataclass(frozen=True)
class Held:
    """A parameter of two or more dimensions.

    why  "" where a layer that is walked has it; else why it is left as it was
    """

    name: str
    kind: str  # of the module that holds it
    weights: int
    why: str = COVERED


@dataclass(frozen=True)
class Coverage:
    """The parameters of two or more dimensions of a model, each once."""

    tensors: tuple[Held, ...]

    @property
    def total(self) -> int:
        """Weights of the model."""
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def covered(self) -> int:
        """Weights of the layers that are walked."""
        return sum(tensor.weights for tensor in self.tensors if not tensor.why)

    def lines(self) -> tuple[str, ...]:
        """What share of the model the layers have, and what is left as it was, by reason."""
        share = self.covered / self.total if self.total else 0.0
        head = f"the layers have {self.covered} of the model's {self.total} weights ({share:.1%})"
        reasons: dict[str, list[Held]] = {}
        for tensor in self.tensors:
            if tensor.why:
                reasons.setdefault(tensor.why, []).append(tensor)
        return (head, *(f"left as it was, {why}: {_listed(each)}" for why, each in reasons.items()))


def coverage(
    model: nn.Module, walked: Collection[str], chosen: Collection[str], read: Collection[str] = ()
) -> Coverage:
    """What becomes of each parameter of two or more dimensions.

    A parameter that several layers have a part of, such as the stacked weights of experts, is told part by part.

    walked  the modules that are called and chosen
    chosen  the modules that the names mean
    read    the names of parameters that are read where no layer is called (`Record.parameters`)
    """
    parts: dict[tuple[int, str], list[tuple[str, Stack]]] = {}
    for name, stack in stacks(model).items():
        if stack.owner is not stack.module:
            parts.setdefault((id(stack.owner), stack.weight_name), []).append((name, stack))
    held: dict[int, list[tuple[str, str, nn.Module]]] = {}
    parameters = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                held.setdefault(id(parameter), []).append((path, key, module))
                parameters[id(parameter)] = parameter
    found: list[Held] = []
    for number, places in held.items():
        path, key, module = places[0]
        kind, own = type(module).__name__, parts.get((id(module), key))
        if own is None:
            name, weights = ".".join(filter(None, (path, key))), parameters[number].numel()
            found.append(Held(name, kind, weights, _why(places, walked, chosen, read)))
        else:
            for name, stack in own:
                direct = not stack.routed and f"{path}.{key}".lstrip(".") in read
                found.append(Held(name, kind, stack.weight.numel(), _of_layers([name], walked, chosen, direct)))
    return Coverage(tuple(found))


def check_counted(counts: Mapping[str, int], pruned: Iterable[str]) -> None:
    """Raise ValueError where a budget has counted a layer that is not pruned: it would be missed in silence."""
    missed = sorted(set(counts) - set(pruned))
    if missed:
        raise ValueError(
            f"the allocation gives layer {missed[0]!r} a share of the budget, and it is not pruned; leave it out of "
            "`names`, or let the recipe state a problem for it"
        )


def _why(
    places: list[tuple[str, str, nn.Module]], walked: Collection[str], chosen: Collection[str], read: Collection[str]
) -> str:
    found = [(path, key, stack_of(module)) for path, key, module in places]
    layers = [path for path, key, stack in found if stack is not None and key == stack.weight_name]
    if any(path in chosen for path in layers):
        direct = any(f"{path}.{key}".lstrip(".") in read for path, key, _ in places)
        return _of_layers(layers, walked, chosen, direct)
    embedded = any(isinstance(module, EMBEDDINGS) for _, _, module in places)
    if layers:
        return f"tied to an embedding (name {layers[0]!r} to prune both)" if embedded else "not among the names"
    path, key, module = places[0]
    if embedded:
        return "an embedding table"
    if is_parametrized(module) or path.rpartition(".")[0].endswith("parametrizations") or key.endswith("_orig"):
        return "computed by a parametrization"
    if any(kind.__name__ in kind_names().split(", ") for kind in type(module).__mro__):
        return "in a layer with a forward of its own"
    return f"no layer kind for the {key} of a {type(module).__name__}"


def _of_layers(layers: list[str], walked: Collection[str], chosen: Collection[str], direct: bool) -> str:
    """What becomes of a weight that these layers have; whether it is read without them."""
    if any(path in walked for path in layers):
        return COVERED
    if not any(path in chosen for path in layers):
        return "not among the names"
    return "read by the model without calling its module" if direct else "never called on the calibration data"


def _listed(tensors: list[Held]) -> str:
    names = [f"{tensor.name} ({tensor.weights})" for tensor in tensors[:SHOWN]]
    more = len(tensors) - SHOWN
    return ", ".join(names) + (f" and {more} more, {sum(t.weights for t in tensors)} in all" if more > 0 else "")
