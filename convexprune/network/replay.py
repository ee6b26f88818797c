"""A recorded pass run again, step by step, with the weights of any network of the same structure.

What a step reads and makes are values: it gets copies, so that nothing it does in place, through a view or past torch's
notice can reach another step. What a pass did beside its record is therefore not done again, and shows in the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.network.call import Call, as_then, same
from convexprune.network.forward import run, tensors_in
from convexprune.network.matrices import Stack
from convexprune.network.names import stacks
from convexprune.network.recording import CHANGED, Record, Recorder, Step


class Unreplayable(Exception):
    """A step that cannot be run again."""


class Replay:
    """The numbers of a record and their values, as far as its steps have been run, with one network's weights.

    A layer is the function of its stored weight and bias, whatever its module does when it is called. A change in place
    that no function made is no step to run: its value is the recorded one. Raises Unreplayable where a step cannot run.
    """

    def __init__(self, record: Record, model: nn.Module) -> None:
        self.stacks = stacks(model)
        self.weights = {layer: _weights(self.stacks[layer]) for layer in record.layers}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.values: dict[int, Tensor] = {}
        for number, leaf in record.leaves.items():
            value = parameters.get(leaf) if isinstance(leaf, str) else leaf
            if value is None:
                raise Unreplayable("a step reads a tensor of a kind that takes no copies, or a parameter that is gone")
            self.values[number] = value.detach()

    def __getitem__(self, number: int) -> Tensor:
        return self.values[number]

    def run(self, step: Step) -> None:
        """Make what the step made."""
        if step.operation == CHANGED or not step.makes:
            return
        try:
            made = self._made(step)
        except Exception as error:  # whatever a function of the model's choice may raise
            reason = str(error).partition("\n")[0]
            raise Unreplayable(f"{step.place} cannot be run again: {type(error).__name__}: {reason}") from error
        if len(made) != len(step.makes):
            raise Unreplayable(f"{step.place} has made {len(step.makes)} tensors, and {len(made)} when run again")
        self.values.update(zip(step.makes, made, strict=True))

    def layer(self, step: Step, read: Replay | None = None) -> Tensor:
        """What a layer makes of what it has read in `read`, here unless given."""
        weight, bias = self.weights[step.layer or ""]
        args, kwargs = _call(step).arguments((read or self).values.__getitem__)
        with torch.no_grad(), as_then(_call(step).autocast):
            return self.stacks[step.layer or ""].made(weight, bias, *args, **kwargs)

    def _made(self, step: Step) -> tuple[Tensor, ...]:
        if step.layer is not None:
            return (self.layer(step),)
        with torch.no_grad():
            return _call(step).run(lambda number: self.values[number].clone())


def _weights(stack: Stack) -> tuple[Tensor, Tensor | None]:
    """As stored."""
    return stack.weight.detach(), None if stack.bias is None else stack.bias.detach()


def _call(step: Step) -> Call:
    assert step.call is not None  # of all steps but a change in place
    return step.call


def in_step(record: Record, one: Replay, two: Replay) -> Iterator[Step]:
    """Run both, and give each step once it is done in both; what no later step reads is gone after its turn.

    Where both have read the same, the value is the same tensor in both. Raises Unreplayable.
    """
    for number, value in one.values.items():
        if same(value, two[number]):
            two.values[number] = value
    last = {number: index for index, step in enumerate(record.steps) for number in (*step.makes, *step.reads)}
    for index, step in enumerate(record.steps):
        one.run(step)
        if _alike(step, one, two):
            two.values.update({number: one[number] for number in step.makes})
        else:
            two.run(step)
        yield step
        for number in {*step.makes, *step.reads}.difference(record.results):
            if last[number] == index:
                del one.values[number], two.values[number]


def _alike(step: Step, one: Replay, two: Replay) -> bool:
    if step.layer is not None and not same(one.weights[step.layer], two.weights[step.layer]):
        return False
    return all(one[number] is two[number] for number in step.reads)


def difference(one: Record, other: Record) -> str:
    """The first place where two passes on the same batch did not do the same, or nothing."""
    for mine, its in zip(one.steps, other.steps, strict=False):
        if mine != its or (mine.call and its.call and not mine.call.like(its.call)):
            return f"{mine.place} is not called in the same way"
        for number in (*mine.reads, *mine.makes):
            if not same(one.leaves.get(number), other.leaves.get(number)):
                return f"{mine.place} reads a tensor that no step has made, and it holds other numbers"
    if len(one.steps) != len(other.steps) or one.results != other.results:
        return "one goes on where the other has ended"
    if any(not same(one.leaves.get(number), other.leaves.get(number)) for number in one.results):
        return "what is returned was made by no step, and holds other numbers"
    return ""


def departure(record: Record, model: nn.Module, batch: Any) -> str:
    """The first step whose result, when the model is run once more, is not the replay's."""
    watch = _Watch(record, model)
    with watch:
        run(model, batch)
    return watch.place


class _Watch(Recorder):
    """Runs the steps of a record beside those of the pass."""

    def __init__(self, record: Record, model: nn.Module) -> None:
        super().__init__(model)
        self.replay, self.left, self.place = Replay(record, model), iter(record.steps), ""

    def added(self, step: Step, result: Any) -> None:
        """Compare what the pass has made with what its record makes."""
        if not self.place and not self.quietly(lambda: self._agrees(step, next(self.left, None), result)):
            self.place = step.place

    def _agrees(self, step: Step, recorded: Step | None, result: Any) -> bool:
        if step != recorded:
            return False
        self.replay.run(recorded)
        made = [self.replay[number] for number in recorded.makes]
        return all(map(near, made, tensors_in(result)))


def near(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same but for rounding: within the root of the dtype's rounding unit, in norm."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return same(one, other) or (one.is_floating_point() and distance(one, other) <= tolerance(one))


def distance(one: Tensor, other: Tensor) -> float:
    """|| one - other ||_F in float64."""
    return float(torch.linalg.vector_norm(minus(one, other)))


def minus(one: Tensor, other: Tensor) -> Tensor:
    """The difference in float64."""
    if one.is_complex():
        one, other = torch.view_as_real(one), torch.view_as_real(other)
    return one.to(torch.float64, copy=True).sub_(other if other.is_floating_point() else other.double())


def tolerance(value: Tensor) -> float:
    """The most that is taken for rounding: the root of the dtype's rounding unit, times the norm."""
    if not value.is_floating_point():
        return 0.0
    wide = value.dtype if value.dtype.itemsize >= 4 else torch.float32
    return math.sqrt(torch.finfo(value.dtype).eps) * float(torch.linalg.vector_norm(value, dtype=wide))
