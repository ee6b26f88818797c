"""The layers of a network in forward order, each with what it reads and aims at, as a mode wants it.

    parallel   every layer reads what the dense network gives it       survey, then one pass for all layers
    cascade    a layer reads what the network pruned so far gives it,  survey, then a pass of both networks for each
               and aims at the dense network's outputs                 layer, as far as that layer; layers that read
    residual   the same, and a layer whose output goes into a          the same tensor go together
               residual sum repairs what the other branch has lost

Names, kinds, order, calls and activations come from one survey of the dense network over all batches. What is written
here for a network holds for a part of it: a part is a module, and what it reads are its batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from torch import nn

from convexprune.layer import Layer
from convexprune.network.calibration import Calibration
from convexprune.network.capture import Gathering, layers_of, told_activations
from convexprune.network.forward import copied
from convexprune.network.matrices import Stack
from convexprune.network.memory import check_grams, check_rows
from convexprune.network.moment_accumulator import Account
from convexprune.network.names import choose
from convexprune.network.residual import summed
from convexprune.network.survey import Survey, survey

MODES: Final = ("parallel", "cascade", "residual")
Tell = Callable[[str | None, int], None]  # of a module that is captured (None: all) the number of the batch


@dataclass(frozen=True)
class Passes:
    """How often each batch goes through each network; in a cascade only as far as the layer that is captured."""

    dense: int
    pruned: int


class Traversal:
    """The way through a network, layer by layer.

    pruned  a copy of the model whose layers are written while it is walked: in a cascade the next reads what it makes

    Raises ValueError for an unknown mode and for names that mean no layer that is called.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, mode: str, tell: Tell | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
        self.model, self.calibration, self.mode = model, calibration, mode
        self.chosen = choose(model, calibration.names)
        check_grams(self.chosen.stacks)
        self.told = told_activations(model, calibration)
        self.pruned = copied(model)
        self._tell = tell or (lambda module, batch: None)
        self._gathered: list[Account] = []  # of a parallel walk

    @cached_property
    def survey(self) -> Survey:
        """One pass of the dense network over all batches."""
        found = survey(self.model, self.calibration, self.chosen.stacks, lambda index: self._tell(None, index))
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

    def layers(self, keep: Collection[str]) -> Iterator[tuple[str, list[Layer]]]:
        """Each module with its layers, one for each group, after the module before it was written.

        keep  the modules whose rows are kept: their problems need samples
        """
        if self.calibration.positions is None and self.calibration.mask is None:
            for name in filter(keep.__contains__, self.modules):
                check_rows(name, self.survey.rows[name], self.chosen.stacks[name])
        groups = [self.modules] if self.mode == "parallel" else self.survey.groups
        for group in groups:
            yield from self._captured(group, keep)

    def renewed(self) -> Traversal:
        """The same walk with a fresh copy to write: no further survey, and in parallel mode no further pass."""
        self.survey  # noqa: B018   made once, for both
        other = copy.copy(self)
        other.pruned = copied(self.model)
        other.__dict__.pop("_pruned_stacks", None)
        return other

    def _captured(self, group: list[str], keep: Collection[str]) -> Iterator[tuple[str, list[Layer]]]:
        cascade = self.mode != "parallel"
        residual = self.mode == "residual" and len(group) == 1 and summed(self.survey.record, group[0])
        stacks = self._pruned_stacks if cascade else self.chosen.stacks
        gathering = Gathering(
            self.pruned if cascade else self.model,
            {name: stacks[name] for name in group},
            self.calibration,
            frozenset(other for name in keep for other in self.survey.partners(name)),
            dense=self.model if cascade else None,
            calls=self.survey.calls,
            residual=residual,
        )
        account = self._run(gathering, group[0]) if cascade else self._run_once(gathering, keep)
        for module in group:
            yield module, layers_of(module, stacks[module], account, self.chosen.layers, self._behind, residual)

    def _run(self, gathering: Gathering, told: str | None) -> Account:
        return gathering.run(tell=lambda index: self._tell(told, index))

    def _run_once(self, gathering: Gathering, keep: Collection[str]) -> Account:
        """A parallel walk's pass, which `renewed` walks share."""
        known = [account for account in self._gathered if set(account.keep) >= set(keep)]
        if not known:
            self._gathered[:] = known = [self._run(gathering, None)]
        return known[0]

    @cached_property
    def _pruned_stacks(self) -> Mapping[str, Stack]:
        return choose(self.pruned, list(self.chosen.stacks)).stacks

    @cached_property
    def _behind(self) -> Mapping[str, str | None]:
        return {**self.survey.activations, **self.told}
