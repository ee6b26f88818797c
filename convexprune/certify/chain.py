"""The chain of Linear and ReLU that a network computes, read from the functions of torch that it calls.

No module is trusted: a layer is what its forward does when it is called, with whichever hooks and weights. Every
function that reads what has become of the input must be linear with numbers that do not depend on it, a ReLU, or keep
each sample's entries in their order. The chain runs beside the pass in float64. A network whose outputs are further
from it than rounding explains does something unseen. It is refused, as is one that has other numbers in another pass.

A layer that reads y with an error of at most d, and adds up k products, has one of at most

    |W| d + gamma_{k+2} (|W| (|y| + d) + |b|)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from convexprune.network.call import same
from convexprune.network.forward import differentiable, run
from convexprune.network.kinds import DROPOUT, MOVED_AXES, RESHAPING
from convexprune.network.recording import Recorder, Step
from convexprune.network.replay import Replay, Unreplayable
from convexprune.rounding import affine_doubt, raised

# operations that leave a sample's entries in their order
PASSING: Final = DROPOUT | RESHAPING - MOVED_AXES
LINEAR: Final = frozenset(("linear", "addmm"))
COVERED: Final = (
    "worst_case covers chains of Linear and ReLU, with flattenings, identities and dropout that is off between them"
)
ELSE: Final = "does something that its recorded operations do not do, or something else in another pass"


class Affine(NamedTuple):
    """y -> W y + b, W (out, in) and b (out,) in float64, and by how much the entries of each may be off."""

    weight: Tensor
    bias: Tensor
    doubts: tuple[Tensor, Tensor]

    @classmethod
    def exactly(cls, weight: Tensor, bias: Tensor) -> Affine:
        """Of numbers as they are stored."""
        return cls(weight, bias, (torch.zeros_like(weight), torch.zeros_like(bias)))

    @classmethod
    def identity(cls, width: int) -> Affine:
        """y -> y."""
        return cls.exactly(torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64))

    def after(self, first: Affine) -> Affine:
        """Both in a row, multiplied out."""
        (weight, bias, _), (off, shift) = first, first.doubts
        doubts = affine_doubt(weight.T, off.T, self.weight).T, affine_doubt(bias[None], shift[None], *self[:2])[0]
        more, further = self.doubts
        size, height = weight.abs() + off, bias.abs() + shift
        doubts = (
            raised(doubts[0] + more @ size, len(size) + 4),
            raised(doubts[1] + more @ height + further, len(size) + 4),
        )
        return Affine(self.weight @ weight, self.weight @ bias + self.bias, doubts)


def chain_of(model: nn.Module, inputs: Sequence[Tensor], whose: str) -> list[Affine]:
    """The layers of a model in evaluation mode, with a ReLU between each two, as it is called at each of these inputs.

    Raises ValueError, saying whose model it is, where it is no chain, or not one and the same.
    """
    found = _read(model, inputs[0], whose)
    if not all(same(_read(model, x, whose), found) for x in inputs[1:]):
        raise ValueError(f"{whose} {ELSE}; {COVERED}")
    return found


class _Open(Recorder):
    """Sees what the layers do when they are called."""

    def whole(self, module: nn.Module) -> bool:
        """No module is a step."""
        return False


def _read(model: nn.Module, x: Tensor, whose: str) -> list[Affine]:
    x = x.detach().clone()  # a model that works in place must not change the caller's
    values = x.cpu().double().flatten(1)
    with _Open(model) as recorder:
        (number,) = recorder.numbers(x)
        output = run(model, x)
    record = recorder.record(output)
    if record.transformed:
        raise ValueError(f"{whose} uses torch.func, whose transforms are not covered; {COVERED}")
    try:
        walk = _Walk(Replay(record, model), number, values, torch.finfo(x.dtype))
        for step in record.steps:
            walk.take(step)
    except (_Uncovered, Unreplayable) as error:
        raise ValueError(f"{whose}: {error}; {COVERED}") from error
    if not isinstance(output, Tensor) or output.ndim != 2 or record.results != (walk.current,) or not walk.layers:
        raise ValueError(f"{whose} does not return one tensor (samples, outputs) of its layers; {COVERED}")
    if output.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{whose} computes in {output.dtype}, whose rounding is too coarse; {COVERED} in float32")
    # as it is called when nobody looks on
    if not (walk.makes(output) and walk.makes(run(differentiable(model), x, gradients=True))):
        raise ValueError(f"{whose} {ELSE}; {COVERED}")
    return [*walk.layers, Affine.identity(output.shape[1])] if walk.bent else walk.layers


class _Uncovered(Exception):
    """A step that no chain has."""


class _Walk:
    """Along the steps of a pass.

    current  the number of what has become of the input
    y, off   its values (samples, width) in float64, and by how much those of the pass may be away
    bent     whether a ReLU came after the last of the layers
    """

    def __init__(self, replay: Replay, current: int, y: Tensor, dtype: torch.finfo) -> None:
        self.replay, self.current, self.y, self.dtype = replay, current, y, dtype
        self.off, self.ours = torch.zeros_like(y), {current}
        self.layers: list[Affine] = []
        self.bent = False

    def take(self, step: Step) -> None:
        """Follow one step; what does not depend on the input is computed."""
        if self.ours.isdisjoint(step.reads):
            self.replay.run(step)
            return
        place = step.place if step.place.startswith(f"{step.operation} in ") else f"{step.operation} in {step.place}"
        if self.ours.intersection(step.reads) != {self.current} or len(step.makes) != 1:
            raise _Uncovered(f"{place} joins or splits tensors")
        if step.operation in LINEAR:
            self._linear(step, place)
        elif step.operation == "relu":
            self._relu()
        elif not _passes(step):
            raise _Uncovered(f"{place} is not covered")
        (self.current,) = step.makes
        self.ours.add(self.current)

    def makes(self, output: Any) -> bool:
        """Whether a pass that returned this has done what the steps do, as far as its rounding tells."""
        if not isinstance(output, Tensor) or output.shape != self.y.shape:
            return False
        return bool(((output.detach().cpu().double() - self.y).abs() <= self.off).all())

    def _linear(self, step: Step, place: str) -> None:
        layer = self._layer(step)
        if layer is None or len(step.sizes[-1]) != 2:
            raise _Uncovered(f"{place} is not covered")
        # twice the unit: float64 rounds beside it
        self.off = affine_doubt(self.y, self.off, *layer[:2], self.dtype.eps) + layer.weight.shape[1] * self.dtype.tiny
        self.y = self.y @ layer.weight.T + layer.bias
        follows = bool(self.layers) and not self.bent
        self.layers = [*self.layers[:-1], layer.after(self.layers[-1])] if follows else [*self.layers, layer]
        self.bent = False

    def _layer(self, step: Step) -> Affine | None:
        """Its weight and bias; None for other ways to call these functions."""
        assert step.call is not None  # of all steps but a change in place
        named, given = set(step.call.kwargs), len(step.call.args)
        if step.operation == "linear" and named <= {"bias"}:
            read, factor, *added = step.reads
        elif step.operation == "addmm" and given == 3 and not named:
            *added, read, factor = step.reads
        else:
            return None
        if read != self.current or step.reads.count(read) > 1:
            return None
        weight, *biases = (self.replay[each].cpu().double() for each in (factor, *added))
        weight = weight.T if step.operation == "addmm" else weight
        bias = biases[0] if biases else weight.new_zeros(len(weight))
        return Affine.exactly(weight, bias) if weight.ndim == 2 and bias.shape == weight.shape[:1] else None

    def _relu(self) -> None:
        self.layers = self.layers or [Affine.identity(self.y.shape[1])]
        self.y, self.bent = self.y.clamp(min=0), True


def _passes(step: Step) -> bool:
    """Whether an operation keeps every sample's entries, in their order."""
    if step.operation not in PASSING or not step.sizes:
        return False
    before, after = step.sizes
    return bool(after) and before[0] == after[0] and math.prod(before) == math.prod(after)
