"""Is a network a plain chain of layers? Only then does an error pass from each layer to the next and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from convexprune.network.forward import undisturbed
from convexprune.network.trace import DROPOUT, RESHAPING, Record, Step, record

# |f(a) - f(b)| <= |a - b|, entry by entry
_LIPSCHITZ = frozenset(("relu", "relu6", "tanh", "sigmoid", "hardtanh", "hardsigmoid", "softplus", "softsign", "abs"))


@dataclass(frozen=True)
class Chain:
    """The layers in order (module names), and the first thing that a bound along the chain does not cover, if any."""

    layers: tuple[str, ...]
    obstacle: str | None


def chain(model: nn.Module, batch: Any) -> Chain:
    """Run the model on one batch and see whether it is layers one after another.

    Between the layers may stand 1-Lipschitz functions of each entry and reshapings. What happens before the first
    layer is the same in the pruned network, and is not looked at. The model is left as it was.
    """
    with undisturbed(model):
        done = record(model, batch)
    layers = tuple(step.layer for step in done.steps if step.layer is not None)
    return Chain(tuple(dict.fromkeys(layers)), _obstacle(done))


def _obstacle(done: Record) -> str | None:
    current: int | None = None  # the tensor that the chain has come to
    derived: set[int] = set()  # everything computed from a layer's output
    before, seen = "", set[str]()
    for step in done.steps:
        if step.layer is None and not derived & set(step.reads):
            continue
        if current is not None and current not in step.reads:
            return f"{step.place} does not read what {before} returned: the network branches"
        if step.layer in seen:
            return f"{step.place} is called more than once"
        if step.layer is None and not _covered(step, derived):
            return f"{step.place} is not covered by the chain bound"
        if step.layer is not None:
            seen.add(step.layer)
        if step.makes:
            current, before = step.makes[0], step.place
        derived |= set(step.makes)
    if current is None:
        return "no Linear, Conv1d or Conv2d was called"
    return None if done.results == (current,) else f"the model does not return just what {before} returned"


def _covered(step: Step, derived: set[int]) -> bool:
    alone = len(step.makes) == 1 and len(derived & set(step.reads)) == 1
    return alone and step.operation in _LIPSCHITZ | RESHAPING | DROPOUT
