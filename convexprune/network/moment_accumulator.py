"""Moments of what the layers read, added up while the batches pass through the model."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from convexprune.moments import InputMoments, Moments, TargetMoments
from convexprune.network.matrices import Stack
from convexprune.products import Products, products_on

_CHUNK = 2**22  # numbers of unfolded input that are held in float64 at once
CHECKED = 64  # samples on which a module is compared with its matrices
OFF = 1e-2  # of |x| |w|: more than what half precision rounds


@dataclass(eq=False)
class Stream:
    """The rows that one call of one or several layers reads: the same tensor, unfolded alike, in every batch."""

    born: int  # the batch of its first rows; layers can join only then
    made: Products
    moments: list[InputMoments]  # one for each group
    kept: list[Tensor] = field(default_factory=list)  # (samples, groups, in) in the model's dtype
    filled: int = -1  # the last batch whose rows are in
    readers: list[Slot] = field(default_factory=list)


@dataclass(eq=False)
class Slot:
    """The n-th call of a layer in a forward pass."""

    name: str
    stream: Stream
    generator: torch.Generator
    kept: list[Tensor] = field(default_factory=list)  # targets (samples, groups, out)
    used: int = -1  # the last batch in which the call happened


@dataclass(frozen=True, eq=False)
class Totals:
    """What one module gathered: for each group the finished moments, and the rows kept, call by call."""

    read: list[Moments]
    aimed: list[TargetMoments] | None
    inputs: list[Tensor] | None
    targets: list[Tensor] | None


class Account:
    """Running moments of every layer, each tensor that several layers read being counted once.

    `keep` names the layers whose rows are kept; of layers that share a tensor all or none. `positions` bounds the
    output positions taken from each image, drawn by a generator of each call's own, so that they depend on the seed,
    the image and the size of the output only.
    """

    def __init__(self, keep: Collection[str], positions: int | None, seed: int) -> None:
        self.keep, self.positions, self.seed = keep, positions, seed
        self.slots: dict[str, list[Slot]] = {}
        self.aimed: dict[str, list[TargetMoments]] = {}
        self._batch = -1
        self._calls: dict[str, int] = {}
        self._read: dict[Hashable, tuple[weakref.ref[Tensor], Stream]] = {}
        self._merged: dict[tuple[int, ...], tuple[list[Moments], list[Tensor] | None]] = {}

    def begin(self) -> None:
        """A new batch."""
        self._batch += 1
        self._calls.clear()
        self._read.clear()

    def calls(self, name: str) -> int:
        """How often a layer has been called in this batch."""
        return self._calls.get(name, 0)

    def add(self, name: str, stack: Stack, x: Tensor, y: Tensor, dense: Tensor | None, mask: Tensor | None) -> None:
        """A call of layer `name`: it read x and made y, while the dense network's output there was `dense`."""
        if mask is not None:
            mask = stack.marked(mask, y)
        if mask is not None and tuple(mask.shape) != stack.sample_shape(y):
            raise ValueError(
                f"layer {name!r}: the mask has shape {tuple(mask.shape)}, but the layer's samples have shape "
                f"{stack.sample_shape(y)}; leave the layer out, or give a mask of that shape"
            )
        if dense is not None and dense.shape != y.shape:
            raise ValueError(
                f"layer {name!r}: its output has shape {tuple(dense.shape)} in the dense network, {tuple(y.shape)} in "
                "the model"
            )
        slot, fresh = self._slot(name, stack, x, y)
        if not fresh and dense is None:
            return
        for rows, wanted, part in self._chunks(slot, stack, x, mask):
            if fresh:
                self._read_rows(name, slot.stream, rows, x.dtype)
            if dense is not None:
                self._aim(name, stack, slot, rows, _take(stack.output_rows(dense)[part], wanted), dense.dtype)

    def end(self) -> None:
        """Check that layers which share their inputs did so in this batch too."""
        for slot in (slot for slots in self.slots.values() for slot in slots):
            if slot.stream.filled == self._batch != slot.used:
                self._conflict(slot)

    def totals(self, name: str) -> Totals:
        """The sums of a layer over all its calls; layers with the same inputs get the same arrays.

        What a layer aims at is given once: it is not held here beside what is made of it.
        """
        slots = self.slots[name]
        key = tuple(id(slot.stream) for slot in slots)
        if key not in self._merged:
            streams = [slot.stream for slot in slots]
            groups = zip(*(stream.moments for stream in streams), strict=True)
            read = [functools.reduce(operator.add, parts).finished() for parts in groups]
            self._merged[key] = read, _by_group([rows for s in streams for rows in s.kept])
            if all(len(self.slots[reader.name]) == 1 for stream in streams for reader in stream.readers):
                for stream in streams:  # whoever reads it finds the moments: the sums are not asked for again
                    stream.moments, stream.kept = [], []
        read, inputs = self._merged[key]
        aimed = self.aimed.pop(name, None)
        kept = _by_group([rows for slot in slots for rows in slot.kept])
        return Totals(read, aimed, inputs, kept)

    def _slot(self, name: str, stack: Stack, x: Tensor, y: Tensor) -> tuple[Slot, bool]:
        # the slot of this call, and whether its stream still wants the rows of this batch
        call = self._calls.get(name, 0)
        self._calls[name] = call + 1
        # an inference tensor does not say when it was changed in place, so it is never taken for one already read
        key = (id(x), object() if x.is_inference() else x._version, stack.unfolding, stack.sample_shape(y))
        holder, stream = self._read.get(key, (None, None))
        if holder is None or holder() is not x:
            stream = None
        slots = self.slots.setdefault(name, [])
        if call == len(slots):
            _check_computed(name, stack, x.detach(), y.detach())
            joined = stream if stream is not None and stream.born == self._batch else self._new_stream(stack, x)
            slots.append(Slot(name, joined, torch.Generator().manual_seed(self.seed)))
            joined.readers.append(slots[-1])
        slot = slots[call]
        slot.used = self._batch
        fresh = slot.stream.filled != self._batch
        if not fresh and slot.stream is not stream:
            self._conflict(slot)
        slot.stream.filled = self._batch
        if stream is None:
            self._read[key] = (weakref.ref(x), slot.stream)
        return slot, fresh

    def _new_stream(self, stack: Stack, x: Tensor) -> Stream:
        made = products_on(x.device)
        return Stream(self._batch, made, [InputMoments(stack.width, made) for _ in range(stack.groups)])

    def _chunks(
        self, slot: Slot, stack: Stack, x: Tensor, mask: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None, slice]]:
        # (samples, groups, in) rows in float64, chunk by chunk, with the positions taken and the items they are from
        items = stack.items(x.detach())
        if len(items) == 0:
            return
        made = slot.stream.made
        one = stack.input_rows(made.moved(items[:1]))
        size = max(1, _CHUNK // max(one.numel(), 1))
        samples = None if mask is None else mask.cpu().reshape(len(items), -1)
        for start in range(0, len(items), size):
            part = slice(start, start + size)
            rows = stack.input_rows(made.moved(items[part]))
            wanted = self._wanted(len(rows), rows.shape[1], None if samples is None else samples[part], slot.generator)
            yield _take(rows, wanted), wanted, part

    def _wanted(self, items: int, length: int, mask: Tensor | None, generator: torch.Generator) -> Tensor | None:
        # (items, positions) bool, None for all of them
        if self.positions is None or self.positions >= length:
            return mask
        score = torch.rand(items, length, generator=generator)
        if mask is not None:
            score.masked_fill_(~mask, -1)
        drawn = torch.zeros(items, length, dtype=torch.bool)
        drawn.scatter_(1, score.topk(self.positions).indices, True)
        return drawn if mask is None else drawn & mask

    def _read_rows(self, name: str, stream: Stream, rows: Tensor, dtype: torch.dtype) -> None:
        for group, moments in enumerate(stream.moments):
            moments.add(rows[:, group])
            # one NaN or inf among the rows stays in their sum
            if not bool(torch.isfinite(moments.entries.sums).all()):
                raise ValueError(
                    f"layer {name!r} reads NaN or inf in batch {self._batch}; check the calibration data, and the "
                    "weights of the layers before it"
                )
        if name in self.keep:
            stream.kept.append(rows.to("cpu", dtype, copy=True))

    def _aim(self, name: str, stack: Stack, slot: Slot, rows: Tensor, y: Tensor, dtype: torch.dtype) -> None:
        made = slot.stream.made
        y, shape = made.moved(y), (y.shape[2], stack.width)
        if name not in self.aimed:
            self.aimed[name] = [TargetMoments(*shape, made) for _ in range(stack.groups)]
        sums = self.aimed[name]
        for group, moments in enumerate(sums):
            moments.add(rows[:, group], y[:, group])
            if not bool(torch.isfinite(moments.targets.sums).all()):
                raise ValueError(f"layer {name!r} makes NaN or inf in the dense network; check the calibration data")
        if name in self.keep:
            slot.kept.append(y.to("cpu", dtype, copy=True))

    def _conflict(self, slot: Slot) -> None:
        names = list(dict.fromkeys(reader.name for reader in slot.stream.readers))
        raise ValueError(
            f"layers {', '.join(map(repr, names))} read the same tensor in one batch and not in another; capture each "
            "of them in a call of its own"
        )


def _check_computed(name: str, stack: Stack, x: Tensor, y: Tensor) -> None:
    """Raise where a module does not compute W x + b on the rows that its stack says it reads."""
    kind = f"layer {name!r}, a {type(stack.module).__name__},"
    why = "leave it out of `names` (a hook, a forward of this instance, an output_size in the call, a wrong Stack?)"
    made = stack.output_rows(y)
    items = max(1, CHECKED // max(made.shape[1], 1))
    place = products_on(x.device)
    rows = stack.input_rows(place.moved(stack.items(x)[:items])).flatten(0, 1)
    made = place.moved(made[:items]).flatten(0, 1)
    if len(rows) != len(made):
        raise ValueError(f"{kind} makes {len(made)} samples of outputs from {len(rows)} rows of inputs; {why}")
    some = slice(None, None, max(1, len(rows) // CHECKED))
    rows, made, weights, biases = rows[some], made[some], place.moved(stack.weights()), stack.biases()
    shift = rows.new_zeros(()) if biases is None else place.moved(biases)
    away = (torch.einsum("sgi,goi->sgo", rows, weights) + shift - made).abs()
    size = rows.norm(dim=2)[:, :, None] * weights.norm(dim=2) + shift.abs()
    if bool((made.isfinite() & (away > OFF * size)).any()):  # what is not finite is refused where it is read
        raise ValueError(f"{kind} does not compute W x + b; {why}")


def _take(rows: Tensor, wanted: Tensor | None) -> Tensor:
    # (items, positions, groups, width) -> (samples, groups, width)
    return rows.flatten(0, 1) if wanted is None else rows[wanted.to(rows.device)]


def _by_group(rows: list[Tensor]) -> list[Tensor] | None:
    if not rows:
        return None
    together = torch.cat(rows)
    return [together[:, group].contiguous() for group in range(together.shape[1])]
