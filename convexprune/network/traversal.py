"""The layers of a network in forward order, each with what it reads and aims at, as a mode wants it.

    parallel   every layer reads what the dense network gives it       survey, then one pass for all layers
    cascade    a layer reads what the network pruned so far gives it,  survey, then a pass of both networks for each
               and aims at the dense network's outputs                 layer, as far as that layer; layers that read
    residual   the same, and a layer whose output goes into a          the same tensor go together
               residual sum repairs what the other branch has lost

Names, kinds, order, calls and activations come from one survey of the dense network over all batches. Where a network
is a chain of blocks, a cascade's pass begins behind the blocks that are finished (`network.blocks`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

from torch import Tensor, nn

from convexprune.layer import Layer
from convexprune.network.blocks import Blocks, Chain, Stash, Stream, streamed
from convexprune.network.calibration import Calibration
from convexprune.network.capture import Gathering, layers_of, told_activations
from convexprune.network.hollow import Seen
from convexprune.network.matrices import Stack
from convexprune.network.memory import available, check_grams, check_rows
from convexprune.network.moment_accumulator import Account
from convexprune.network.names import choose, stacks
from convexprune.network.residual import summed
from convexprune.network.sharing import laid, owned, sharing
from convexprune.network.survey import Survey, survey

MODES: Final = ("parallel", "cascade", "residual")
Tell = Callable[[str | None, int], None]  # of a module that is captured (None: all) the number of the batch


@dataclass(frozen=True)
class Way:
    """How a cascade goes through the blocks of a network; the weights are the same whichever way.

    by_block  whether finished blocks are left out of later passes, where the network is a chain of blocks and what they
              make of the batches can be kept
    scratch   folder in which that is kept; None: in memory, as long as it takes less than half of what is free
    """

    by_block: bool = True
    scratch: Path | None = None


@dataclass(frozen=True)
class Passes:
    """How often each batch goes through each network; in a cascade only as far as the layer that is captured.

    Where a cascade goes block by block, a pass begins behind the finished blocks, and there is one more for each block.
    """

    dense: int
    pruned: int


WHOLE: Final = Way(by_block=False)


class Traversal:
    """The way through a network, layer by layer.

    model   a copy of the dense network that has its parameters: the walk's hooks and stubs are in nobody's way
    pruned  another one, whose layers are written while it is walked: in a cascade the next reads what it makes.
            It has the model's parameters until it is given its own (`own`)

    Raises ValueError for an unknown mode and for names that mean no layer that is called.
    """

    def __init__(
        self, model: nn.Module, calibration: Calibration, mode: str, tell: Tell | None = None, way: Way = WHOLE
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
        choose(model, calibration.names)  # refuses what a copy would hide, such as compiled modules
        self.model = model = sharing(model)
        self.calibration, self.mode, self.way = calibration, mode, way
        self.chosen = choose(model, calibration.names)
        check_grams(self.chosen.stacks)
        self.told = told_activations(model, calibration)
        self.pruned = sharing(model)
        self._tell = tell or (lambda module, batch: None)
        self._gathered: list[Account] = []  # of a parallel walk
        self._blocks = Blocks(model)

    @cached_property
    def survey(self) -> Survey:
        """One pass of the dense network over all batches."""
        found = survey(
            self.model, self.calibration, self.chosen.stacks, self._blocks, lambda index: self._tell(None, index)
        )
        self.chosen.check_called(found.order)
        return found

    @property
    def passes(self) -> Passes:
        """What the walk takes, the survey included."""
        if self.mode == "parallel":
            return Passes(dense=2, pruned=0)
        groups = len(self.survey.groups)
        return Passes(dense=1 + groups, pruned=groups)

    @property
    def modules(self) -> list[str]:
        """The modules that are walked, in order."""
        return self.survey.order

    @cached_property
    def names(self) -> Mapping[str, list[str]]:
        """module -> the names of its layers that are wanted, one for each group."""
        return {
            module: [name for name in self.chosen.stacks[module].names(module) if name in self.chosen.layers]
            for module in self.modules
        }

    @cached_property
    def rectified(self) -> Mapping[str, bool]:
        """module -> whether its layers are judged behind a ReLU."""
        return {
            module: all(self._behind.get(name, self._behind[module]) == "relu" for name in names)
            for module, names in self.names.items()
        }

    def outlines(self) -> Iterator[tuple[str, list[Layer]]]:
        """Each module with its layers, before anything is known of what they read."""
        for module in self.modules:
            stack = self.chosen.stacks[module]
            weights, biases = stack.weights(), stack.biases()
            yield module, [
                Layer.outline(
                    name, weights[group], None if biases is None else biases[group],
                    self._behind.get(name, self._behind[module]), stack.kernel,
                )
                for group, name in enumerate(stack.names(module)) if name in self.chosen.layers
            ]  # fmt: skip

    def groups(self, keep: Collection[str], done: Collection[str] = ()) -> Iterator[Iterator[tuple[str, list[Layer]]]]:
        """Modules that do not depend on each other, each with its layers, one for each of its groups.

        The modules of one round are to be written before the next round is asked for.

        keep  the modules whose rows are kept: their problems need samples
        done  the modules that are written already, and left out
        """
        if self.calibration.positions is None and self.calibration.mask is None:
            for name in filter(keep.__contains__, self.modules):
                check_rows(name, self.survey.rows[name], self.chosen.stacks[name])
        groups = [self.modules] if self.mode == "parallel" else self.survey.groups
        for number, group in enumerate(groups):
            left = [name for name in group if name not in done]
            if left:
                self._advance(number)
                yield self._captured(left, keep, alone=len(group) == 1)

    @cached_property
    def chains(self) -> list[Chain]:
        """The chains of blocks that a cascade goes through block by block."""
        if self.mode == "parallel" or not self.way.by_block:
            return []
        chains = self._blocks.chains(self.survey.groups)
        there = available()
        if self.way.scratch is None and there is not None and 2 * self._blocks.held(chains) > there / 2:
            return []
        return streamed(self.model, chains, self.calibration) if chains else []

    def _advance(self, number: int) -> None:
        """Finish the blocks that are behind when the walk comes to this group; leave the chains where that fails."""
        try:
            for chain in reversed(self.chains):  # the inner before the outer that they are in
                for stream in self._streams:
                    stream.finish(chain, chain.count(self.survey.groups, number), self.calibration)
        except (Seen, ValueError):
            self.chains = []

    @cached_property
    def _streams(self) -> list[Stream]:
        stash = Stash(self.way.scratch)
        networks = {"dense": self.model, "pruned": self.pruned}
        return [Stream(network, self.chains, name, stash) for name, network in networks.items()]

    def own(self, modules: Collection[str] | None = None) -> None:
        """Give the copy its own parameters of these modules before they are written; of all of it in the end."""
        if modules is None:
            owned(self.pruned, self.model)
        else:
            known = stacks(self.pruned)
            owned(self.pruned, self.model, [each for name in modules for each in known[name].parameters])

    @property
    def passed(self) -> list[str]:
        """The modules in finished blocks, which no later pass runs."""
        blocks = [f"{block}." for block in self._streams[-1].finished] if self.chains else []
        return [module for module in self.modules if f"{module}.".startswith(tuple(blocks))]

    def lay(self, module: str, matrices: Sequence[Tensor]) -> None:
        """Let the copy's weights of a module be these matrices of its layers, which hold the same numbers.

        Nothing happens where the parameter holds more than one matrix, or cannot be laid so; see `laid`.
        """
        stack = stacks(self.pruned)[module]
        if len(matrices) == 1 and stack.weight is stack.parameters[0]:
            laid(self.model, stack.weight, stack.unpack(matrices[0][None]))

    def renewed(self) -> Traversal:
        """The same walk with a fresh copy to write: no further survey, and in parallel mode no further pass."""
        self.survey  # noqa: B018   made once, for both
        other = copy.copy(self)
        other.pruned = sharing(self.model)
        for made in ("_pruned_stacks", "_streams"):
            other.__dict__.pop(made, None)
        return other

    def _captured(self, group: list[str], keep: Collection[str], alone: bool) -> Iterator[tuple[str, list[Layer]]]:
        cascade = self.mode != "parallel"
        residual = self.mode == "residual" and alone and summed(self.survey.record, group[0])
        stacks = self._pruned_stacks if cascade else self.chosen.stacks
        gathering = Gathering(
            self.pruned if cascade else self.model,
            {name: stacks[name] for name in group},
            self.calibration,
            frozenset(other for name in keep for other in self.survey.partners(name)),
            dense=self.model if cascade else None,
            calls=self.survey.calls,
            residual=residual,
            streams=self._streams if self.chains else (),
        )
        account = self._run(gathering, group[0]) if cascade else self._run_once(gathering, keep)
        for module in group:
            yield module, layers_of(module, stacks[module], account, self.chosen.layers, self._behind, residual)

    def _run(self, gathering: Gathering, told: str | None) -> Account:
        """Make a pass; where it fails behind finished blocks, without chains: it is right, or fails by itself."""
        try:
            return gathering.run(tell=lambda index: self._tell(told, index))
        except (Seen, ValueError):
            if not gathering.streams:
                raise
            self.chains = []
            return self._run(replace(gathering, streams=()), told)

    def _run_once(self, gathering: Gathering, keep: Collection[str]) -> Account:
        """A parallel walk's pass, which `renewed` walks share."""
        wanted = set(gathering.stacks)
        known = [each for each in self._gathered if set(each.keep) >= set(keep) and set(each.slots) >= wanted]
        if not known:
            self._gathered[:] = known = [self._run(gathering, None)]
        return known[0]

    @cached_property
    def _pruned_stacks(self) -> Mapping[str, Stack]:
        return choose(self.pruned, list(self.chosen.stacks)).stacks

    @cached_property
    def _behind(self) -> Mapping[str, str | None]:
        return {**self.survey.activations, **self.told}
