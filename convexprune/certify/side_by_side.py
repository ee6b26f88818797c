"""The dense and the pruned network side by side, batch by batch: do they do what was recorded, and how far apart?

Both run the dense pass's record again. Of every tensor that they make differently this sums, channel by channel,

    change  yhat - y       behind the ReLU where a layer is judged there
    alone   fhat(x) - y    of a layer that was judged on the dense network's inputs, D^T D for this D

as the networks' own arithmetic makes them, in float64 and rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.bounds.propagation import Spread
from convexprune.certify.normalisations import normalisations
from convexprune.certify.operations import ARGUED
from convexprune.network.call import same
from convexprune.network.compare import behind, columns
from convexprune.network.recording import Record, Step, record
from convexprune.network.replay import (
    Replay,
    Unreplayable,
    departure,
    difference,
    distance,
    in_step,
    minus,
    near,
    tolerance,
)
from convexprune.rounding import up

MEMORY: Final = 1e9  # bytes of a layer's matrix D^T D; of a layer with more outputs only the diagonal is kept


@dataclass(frozen=True, eq=False)
class Seen:
    """Of one tensor: its change as it was, and how much of it may be rounding.

    sizes   of what a norm makes of rows u and v: the least s(u) + s(v), see `Normalisation`
    varies  whether it was made by other arguments in another batch
    """

    change: Spread
    tolerance: float
    sizes: float = 0.0
    varies: bool = False


class SideBySide:
    """Running sums over the batches.

    first      the record that the bound is computed from
    judged     module -> its own error by its certificates
    rectified  module -> whether a ReLU is all that reads it
    parallel   whether the layers were judged on the dense network's inputs
    """

    def __init__(
        self,
        model: nn.Module,
        pruned: nn.Module,
        first: Record,
        judged: Mapping[str, Spread],
        rectified: Mapping[str, bool],
        parallel: bool,
    ) -> None:
        self.model, self.pruned, self.first = model, pruned, first
        self.judged, self.rectified, self.parallel = judged, rectified, parallel
        self.apart = [0.0, 0.0]  # the dense and the pruned network's outputs from what their records make
        self.unit = 0.0  # to which the outputs are rounded, relative
        self.roundings = 0  # of a norm of the outputs
        self._sums: dict[int, _Sums] = {}
        self._alone: dict[str, _Sums] = {}
        self._behind = _behind(first, rectified)
        self._norms = normalisations(first, first.parameter_of(pruned))
        self._sizes: dict[int, float] = {}
        self._varying: set[int] = set()

    def add(self, batch: Any, theirs: Tensor, ours: Tensor) -> str:
        """A batch and what the dense and the pruned network made of it; why no bound can say it, or nothing."""
        which = self.first.which
        dense, pruned = record(self.model, batch, which), record(self.pruned, batch, which)
        if not self.first.like(dense):
            return "the model has not taken the same way as in the pass before"
        # batches may come in another order
        apart = difference(self.first, dense) if same(self.first.batch, dense.batch) else ""
        apart = apart or difference(dense, pruned)
        self._varying.update(self._called_otherwise(dense))
        if apart:
            return f"the model does not do the same in every pass: {apart}"
        try:
            return self._replayed(dense, batch, theirs, ours)
        except Unreplayable as error:
            return str(error)

    def _replayed(self, dense: Record, batch: Any, theirs: Tensor, ours: Tensor) -> str:
        one, two = Replay(dense, self.model), Replay(dense, self.pruned)
        for step in in_step(dense, one, two):
            for number in step.makes:
                if number in self._norms:
                    self._measure(number, one, two)
                if one[number] is not two[number]:
                    self._compare(step, number, one[number], two[number])
                    if self.parallel and step.layer in self.judged:
                        self._judge(step, one[number], one, two)
        networks = (("dense", self.model, theirs, one), ("pruned", self.pruned, ours, two))
        for index, (which, model, real, replay) in enumerate(networks):
            assert self.first.chosen is not None  # there is a bound
            made = replay[self.first.chosen]  # a pass like the first has its numbers
            if not near(real, made):
                place = departure(dense, model, batch)
                seen = f", seen in {place}" if place else ""
                return f"the {which} network does something that its recorded operations do not do{seen}"
            self.roundings = max(self.roundings, real.numel() + 8) + 1  # of the batches the largest, and their sum
            apart = math.hypot(self.apart[index], distance(real, made))
            self.apart[index] = up(apart) if apart else 0.0  # nothing was rounded
            self.unit = torch.finfo(real.dtype).eps / 2 if real.is_floating_point() else 0.0
        return ""

    def _called_otherwise(self, dense: Record) -> Iterator[int]:
        """What is made by other arguments than in the first pass, where a rule reads them."""
        norms = normalisations(dense, dense.parameter_of(self.pruned))
        for mine, its in zip(self.first.steps, dense.steps, strict=True):
            read = mine.operation in ARGUED and mine.call and its.call
            other = bool(read and mine.call and its.call and not mine.call.like(its.call))
            yield from (number for number in mine.makes if other or self._norms.get(number) != norms.get(number))

    def _measure(self, number: int, one: Replay, two: Replay) -> None:
        """The rows that a norm reads."""
        norm = self._norms[number]
        u, v = one[norm.source], two[norm.source]
        least = math.inf if u is v else norm.sizes(u, v)
        self._sizes[number] = min(self._sizes.get(number, math.inf), least)

    def _compare(self, step: Step, number: int, y: Tensor, yhat: Tensor) -> None:
        if y.is_nested or y.layout is not torch.strided:
            return  # no rule says anything of it
        if y.shape != yhat.shape:
            raise Unreplayable(f"{step.place} makes tensors of other shapes in the two networks")
        sums, relu = self._sums.setdefault(number, _Sums()), number in self._behind
        change = minus(behind(yhat, relu), behind(y, relu))
        sums.add(_squares(change), change.numel())
        sums.tolerance = math.hypot(sums.tolerance, max(tolerance(y), tolerance(yhat)))

    def _judge(self, step: Step, y: Tensor, one: Replay, two: Replay) -> None:
        """A layer on the dense network's inputs."""
        name, relu = step.layer or "", self.rectified.get(step.layer or "", False)
        change = columns(minus(behind(two.layer(step, one), relu), behind(y, relu)))
        narrow = 8 * change.shape[1] ** 2 <= MEMORY
        self._alone.setdefault(name, _Sums()).add(change.T @ change if narrow else change.square().sum(0), len(change))

    def own(self, sharpest: bool) -> dict[str, Spread]:
        """Each judged module's own error by its certificate; the sharpest of parallel mode is what it was."""
        if not self.parallel:
            return dict(self.judged)
        alone = self.alone()
        if sharpest:
            return alone
        return {name: each.widened(alone[name].plain().excess(each)) for name, each in self.judged.items()}

    def alone(self) -> dict[str, Spread]:
        """Each judged module's own error on the dense network's inputs; of parallel mode only."""
        found = {name: Spread(0.0) for name in self.judged}
        for name, sums in self._alone.items():
            found[name] = replace(sums.spread(), rectified=self.rectified.get(name, False))
        return found

    def objection(self) -> str:
        """Of parallel mode: which layer was judged by other data than these, or ""."""
        alone, seen = self.alone() if self.parallel else {}, self.seen()
        for name, number in self.first.layers.items():
            if name in alone and number in seen:
                found, certified = alone[name].total, self.judged[name].total
                if not found <= certified + seen[number].tolerance:
                    return f"{name} has an error of {found:.3g} on these data, by its certificate {certified:.3g}"
        return ""

    def seen(self) -> dict[int, Seen]:
        """By the numbers of the first record; a tensor that is the same in both networks has no change."""
        found = {number: Seen(sums.spread(), sums.tolerance) for number, sums in self._sums.items()}
        for number in (*self._sizes, *self._varying):
            sizes, varies = self._sizes.get(number, 0.0), number in self._varying
            found[number] = replace(found.get(number, Seen(Spread(0.0), 0.0)), sizes=sizes, varies=varies)
        return found


@dataclass
class _Sums:
    """Of squares, channel by channel, or of D^T D; a tensor of one axis has one channel.

    A batch's sum of n products of differences, each of which rounds, takes no more than n + 8 roundings of its terms'
    sizes, n + 8 + b the sum over b batches of at most n.
    """

    sums: Tensor | None = None
    most: int = 0
    batches: int = 0
    tolerance: float = 0.0

    def add(self, sums: Tensor, terms: int) -> None:
        """Those of a batch, each of so many terms at most."""
        self.sums = sums if self.sums is None else self.sums + sums
        self.most, self.batches = max(self.most, terms), self.batches + 1

    def spread(self) -> Spread:
        """The bounds of the change that they give."""
        assert self.sums is not None  # of a tensor that was seen
        of = Spread.of if self.sums.ndim == 2 else Spread.of_squares
        return of(self.sums.cpu(), self.most + self.batches + 8)


def _behind(record: Record, rectified: Mapping[str, bool]) -> set[int]:
    """The numbers between a layer that is judged behind its ReLU and that ReLU."""
    found: set[int] = set()
    for step in record.steps:
        passes = step.operation != "relu" and not found.isdisjoint(step.reads)
        if rectified.get(step.layer, False) if step.layer is not None else passes:
            found.update(step.makes)
    return found


def _squares(change: Tensor) -> Tensor:
    axes = [axis for axis in range(change.ndim) if axis != 1 or change.ndim < 2]
    norms: Tensor = torch.linalg.vector_norm(change, dim=axes)
    return norms.square().reshape(-1)
