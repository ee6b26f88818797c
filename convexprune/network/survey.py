"""A survey of a network: one pass over all batches tells its layers in order, and what each reads and is read by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from convexprune.network.activation import activation
from convexprune.network.blocks import Blocks
from convexprune.network.calibration import Calibration
from convexprune.network.forward import numbered, tensors_in, undisturbed
from convexprune.network.matrices import Stack
from convexprune.network.recording import Record, record


@dataclass(eq=False)
class Survey:
    """The layers that a network calls, from the records of all batches.

    stacks  module name -> its matrices, of the layers that are looked for
    """

    stacks: Mapping[str, Stack]
    order: list[str] = field(default_factory=list)  # modules, in the order in which they are first called
    calls: dict[str, int] | None = None  # module -> how often a batch calls it; None where batches differ
    rectified: dict[str, bool] = field(default_factory=dict)  # module -> whether a ReLU is all that ever reads it
    rows: dict[str, int] = field(default_factory=dict)  # module -> how many rows it reads in all batches
    uneven: str = ""  # why the first record does not stand for all, or nothing
    _records: list[Record] = field(default_factory=list)  # the first
    _shapes: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)  # of a sample
    _partners: dict[str, set[str]] = field(default_factory=dict)  # module -> those that read the same tensor as it

    @property
    def record(self) -> Record:
        """What the first batch did."""
        return self._records[0]

    @property
    def activations(self) -> dict[str, str | None]:
        """module -> the activation behind it."""
        return {name: "relu" if self.rectified[name] else None for name in self.order}

    @property
    def groups(self) -> list[list[str]]:
        """The modules in order; neighbours that read one tensor in every batch are together, and so are experts."""
        groups: list[list[str]] = []
        for name in self.order:
            if groups and name in self._partners[groups[-1][0]]:
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups

    def partners(self, name: str) -> set[str]:
        """The modules that read the same tensor as this one in every batch, or its fellow experts, and itself."""
        return self._partners[name]

    def add(self, steps: Record, batch: Any) -> None:
        """Take in what a batch did."""
        for step in steps.steps:
            if step.layer in self.stacks:
                assert step.layer is not None
                made = math.prod(step.sizes[-1]) // self.stacks[step.layer].outputs
                self.rows[step.layer] = self.rows.get(step.layer, 0) + made
        self._shapes.add(tuple(tuple(tensor.shape[1:]) for tensor in tensors_in(batch)))
        if len(self._shapes) > 1:
            self.uneven = "the batches have samples of several shapes, and the bound knows those of the first"
        if not self._records:
            self._records.append(steps)
        elif self.record.like(steps):
            return  # nothing new
        elif not self.uneven:
            self.uneven = (
                "the batches do not all take the same way through the model, and the bound knows that of the first"
            )
        self._take(steps)

    def _take(self, steps: Record) -> None:
        """The layers of a batch that went another way than those before."""
        counts: dict[str, int] = {}
        reads: dict[str, list[Any]] = {}
        for step in steps.steps:
            if step.layer in self.stacks:
                assert step.layer is not None
                counts[step.layer] = counts.get(step.layer, 0) + 1
                reads.setdefault(step.layer, []).append((step.reads[:1], self.stacks[step.layer].unfolding))
        self._put_in_order(sorted(counts, key=self._turn(list(counts))))
        self.calls = counts if steps is self.record or self.calls == counts else None
        for name in counts:
            if self.stacks[name].routed:
                self._partners[name] = self._mates[self._mixture(name)]
            else:
                partners = {other for other in counts if reads[other] == reads[name]}
                self._partners[name] = partners & self._partners.get(name, partners)
            self.rectified[name] = self.rectified.get(name, True) and activation(steps, name) == "relu"

    def _turn(self, called: list[str]) -> Callable[[str], tuple[int, ...]]:
        """When a module comes: in the order of the calls, but of a mixture's experts first all of their first matrices.

        No expert reads what another has made.
        """
        first: dict[Any, int] = {}
        for place, name in enumerate(called):
            if self.stacks[name].routed:
                owner, _ = mixture = self._mixture(name)
                first.setdefault(owner, place)
                first.setdefault(mixture, place)
        at = {name: place for place, name in enumerate(called)}

        def turn(name: str) -> tuple[int, ...]:
            if not self.stacks[name].routed:
                return (at[name],)
            owner, _ = mixture = self._mixture(name)
            return first[owner], first[mixture], at[name]

        return turn

    def _mixture(self, name: str) -> tuple[int, str]:
        """Of an expert: its mixture, and which of its matrices it is."""
        return id(self.stacks[name].owner), self.stacks[name].weight_name

    @cached_property
    def _mates(self) -> dict[tuple[int, str], set[str]]:
        """The same matrices of all experts of a mixture: they go together as if they read one tensor."""
        found: dict[tuple[int, str], set[str]] = {}
        for name, stack in self.stacks.items():
            if stack.routed:
                found.setdefault(self._mixture(name), set()).add(name)
        return found

    def _put_in_order(self, called: list[str]) -> None:
        """A module that no batch before has called comes behind the one that is called before it."""
        place = 0
        for name in called:
            if name in self.order:
                place = self.order.index(name) + 1
            else:
                self.order.insert(place, name)
                place += 1


def survey(
    model: nn.Module, calibration: Calibration, stacks: Mapping[str, Stack], blocks: Blocks, tell: Callable[[int], None]
) -> Survey:
    """One pass of the model over all batches.

    blocks  looks on
    tell    is called with each batch's number
    """
    found = Survey(stacks)
    with undisturbed(model):
        for index, batch in enumerate(calibration):
            with numbered(index), blocks.watched():
                found.add(record(model, batch, calibration.output), batch)
            tell(index)
    return found
