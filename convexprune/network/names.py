"""Which layers of a model a name, or a list of names and patterns, means."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Final

import torch
from torch import nn

from convexprune.network.forward import check_eager
from convexprune.network.kinds import EMBEDDINGS
from convexprune.network.matrices import Stack, kind_names
from convexprune.network.projections import layer_stack, named_layers, projection
from convexprune.network.weights import Place, check_stored

REGEX: Final = "re:"  # in front of a regular expression, where an fnmatch pattern could stand


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Every supported module and projection of the model by its (first) name."""
    found = {name: layer_stack(module) for name, module in named_layers(model)}
    return {name: stack for name, stack in found.items() if stack is not None}


def check_layers(model: nn.Module) -> None:
    """Raise ValueError or TypeError where a layer cannot be called by itself, or read as real numbers."""
    check_eager(model)
    for name, stack in stacks(model).items():
        check_stored(name, stack)


@dataclass(frozen=True)
class Chosen:
    """The layers that some names mean.

    requests  each name or fnmatch pattern -> the layers it means, as pairs (module name, layer name)
    stacks    module name -> its matrices
    """

    requests: Mapping[str, Sequence[tuple[str, str]]]
    stacks: Mapping[str, Stack]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(module name, layer name) of every layer, each once."""
        return list(dict.fromkeys(pair for pairs in self.requests.values() for pair in pairs))

    @cached_property
    def layers(self) -> frozenset[str]:
        """The names of the layers."""
        return frozenset(layer for _, layer in self.pairs)

    def check_called(self, modules: Collection[str]) -> None:
        """Raise ValueError for a request of which no layer is among the modules that were called."""
        for request, pairs in self.requests.items():
            if not any(module in modules for module, _ in pairs):
                raise ValueError(
                    f"{request!r}: no such layer was called in the forward pass (a module whose weights are used "
                    "directly cannot be captured)"
                )


def choose(model: nn.Module, names: Iterable[str] | str | None) -> Chosen:
    """The layers that the names and fnmatch patterns mean; without names there is one request, "*".

    A layer whose weight is an embedding table as well, such as a tied head, is meant by its name, or by a pattern that
    means no other layer.

    Raises ValueError for a name or pattern that means no layer, for a name that means two, for weights that hold NaN
    or inf and for a compiled model, TypeError for a layer whose weights are no dense real numbers.
    """
    check_eager(model)
    requests = ["*"] if names is None else [names] if isinstance(names, str) else list(names)
    for request in requests:
        check_regex("a name", request)
    if not requests:
        raise ValueError("names is empty; leave it out to capture every layer")
    known = stacks(model)
    layers = [(module, layer) for module, stack in known.items() for layer in stack.names(module)]
    tables = _embeddings(model)
    tied = {name for name, stack in known.items() if id(stack.owner._parameters.get(stack.weight_name)) in tables}
    meant = {request: _untied(request, _meant(model, request, layers), tied) for request in requests}
    if names is None and tied.issuperset(module for module, _ in meant["*"]):
        raise ValueError(f"{min(tied)!r}, the only layer, is tied to an embedding; prune both by naming it in `names`")
    modules = dict.fromkeys(module for pairs in meant.values() for module, _ in pairs)
    count = Counter(layer for _, layer in layers)
    for layer in {layer for pairs in meant.values() for _, layer in pairs}:
        if count[layer] > 1:
            raise ValueError(_twice(layer, [path for path, name in layers if name == layer]))
    for module in modules:
        check_stored(module, known[module])
    for module, owner in {id(known[module].owner): (module, known[module].owner) for module in modules}.values():
        _check_finite(module, owner)  # once, whatever the number of its experts
    return Chosen(meant, {module: known[module] for module in known if module in modules})


def _embeddings(model: nn.Module) -> set[int]:
    """The ids of the parameters that are embedding tables."""
    held = [module._parameters.get("weight") for module in model.modules() if isinstance(module, EMBEDDINGS)]
    return {id(parameter) for parameter in held if parameter is not None}


def _untied(request: str, meant: list[tuple[str, str]], tied: Collection[str]) -> list[tuple[str, str]]:
    """What a request means, without what is tied to an embedding where there is more."""
    if any(request in pair for pair in meant):
        return meant
    return [pair for pair in meant if pair[0] not in tied] or meant


def _check_finite(name: str, module: nn.Module) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.device.type == "meta":  # a plan's model has no numbers
            continue
        if not bool(torch.isfinite(parameter.detach()).all()):
            raise ValueError(
                f"layer {name!r}: its {key} holds NaN or inf; leave it out of `names`, or repair the model"
            )


def find(model: nn.Module, name: str) -> Place:
    """The place of the layer `name`, "conv[2]" being the third group of the module "conv".

    Raises ValueError for a name that is none, or that of two, TypeError for integer weights.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owner, _, part = name.rpartition(".")
    own = projection(modules[owner], part) if owner in modules else None
    modules |= {} if own is None else {name: own}
    owners = {path: layer_stack(modules[path]) for path in modules if name == path or name.startswith(f"{path}[")}
    meant = {path: stack for path, stack in owners.items() if stack is not None and name in stack.names(path)}
    if len(meant) > 1:
        raise ValueError(_twice(name, meant))
    if not meant:
        path = max(owners, key=len, default=name)
        stack = owners.get(path)
        if stack is not None:
            names = stack.names(path)
            raise ValueError(f"layer {name!r}: the layers of {path!r} are {names[0]!r} to {names[-1]!r}")
        kind = f"a {type(modules[path]).__name__}, not one of {kind_names()}" if path in modules else "not in the model"
        raise ValueError(f"layer {name!r}: {path!r} is {kind}")
    ((path, stack),) = meant.items()
    check_stored(name, stack)
    return Place(name, stack, stack.names(path).index(name))


def check_untied(model: nn.Module, modules: Iterable[str]) -> None:
    """Raise ValueError for two layers with one parameter: writing the second would undo what the first is judged by."""
    known = stacks(model)
    owners: dict[tuple[int, str], str] = {}
    for name in modules:
        for place in known[name].places:
            owner = owners.setdefault(place, name)
            if owner != name:
                raise ValueError(
                    f"layers {owner!r} and {name!r} are tied: they share a parameter, which only one of them can be "
                    "pruned by; leave the other out of `names`"
                )


def suggestion(name: str, known: Iterable[str]) -> str:
    """A clause that lists the names close to a wrong one."""
    known = list(known)
    close = get_close_matches(name, known, n=3, cutoff=0.5) or known[:3]
    return "did you mean " + ", ".join(repr(c) for c in close) + "?" if close else "the model has no such layers"


def _meant(model: nn.Module, request: str, layers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    exact = [pair for pair in layers if request in pair]
    if exact:
        return exact
    modules = dict(model.named_modules(remove_duplicate=False))
    if request in modules:
        # a module known under another name as well is captured under its first
        first = next(name for name, module in model.named_modules() if module is modules[request])
        exact = [pair for pair in layers if first == pair[0]]
        if not exact:
            kind = type(modules[request]).__name__
            hint = f"; for the layers inside it use '{request}.*'" if list(modules[request].children()) else ""
            raise ValueError(f"{request!r} is a {kind}, not one of {kind_names()}{hint}")
        return exact
    matched = [pair for pair in layers if any(matches(name, request) for name in pair)]
    if not matched:
        kind = "pattern matches" if request.startswith(REGEX) or any(c in request for c in "*?[") else "name is that of"
        names = [name for pair in layers for name in dict.fromkeys(pair)]
        raise ValueError(f"{request!r}: this {kind} no {kind_names()} of the model; {suggestion(request, names)}")
    return matched


def matches(name: str, request: str) -> bool:
    """Whether an fnmatch pattern, or a regular expression behind "re:", is about a name; it has to match all of it."""
    if request.startswith(REGEX):
        return re.fullmatch(request.removeprefix(REGEX), name) is not None
    return fnmatchcase(name, request)


def check_regex(name: str, request: str) -> None:
    """Raise ValueError for a regular expression that is none."""
    if request.startswith(REGEX):
        try:
            re.compile(request.removeprefix(REGEX))
        except re.error as error:
            raise ValueError(f"{name} is {request!r}, which is no regular expression: {error}") from error


def _twice(layer: str, paths: Iterable[str]) -> str:
    return f"{layer!r} is the name of a layer of {' and of '.join(map(repr, paths))}; rename one of these modules"
