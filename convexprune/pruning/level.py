"""A network on the way: its layers are written, and judged only if it is the one that is wanted.

A test of the network itself needs its weights alone. The layers' certificates and the network's error cost as much as
the weights of a quick solver, or more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import nn

from convexprune.network import read
from convexprune.network.names import check_untied
from convexprune.network.traversal import Traversal
from convexprune.pruning.backends import Task
from convexprune.pruning.layer_by_layer import put, stored_in
from convexprune.pruning.stated import Asked, Choose, State, check_any, planned, problems_of, solver_for
from convexprune.report.progress import Teller
from convexprune.report.shares import Shares
from convexprune.solution import Solution
from convexprune.solve import Proposal

UNSTEADY: Final = "`build` stated another problem when it was asked again; let it state the same"


@dataclass
class Level:
    """The network that a walk has written.

    kept, total  of the weights of all walked layers, biases not counted
    proposals    of the layers' problems, in order
    """

    walk: Traversal
    state: State
    choose: Choose
    shares: Shares | None = None
    kept: int = 0
    total: int = 0
    proposals: list[Proposal] = field(default_factory=list)

    def write(self, tell: Teller) -> None:
        """Solve and write each layer; raises what `prune` raises."""
        plan = planned(self.walk, self.state, self.choose, tell, self.shares)
        written = list(plan.pruned)
        for group in self.walk.groups(plan.keep):
            for module, layers in group:
                tell.solving(module, self.walk.modules.index(module), len(self.walk.modules))
                asked = [Asked(module, groups, problem) for groups, problem in problems_of(self.state, layers)]
                if module not in written and any(each.problem is not None for each in asked):
                    written.append(module)
                    check_untied(self.walk.pruned, written)
                for each in asked:
                    self._solve(each)
        check_any([each.solver for each in self.proposals])

    def _solve(self, asked: Asked) -> None:
        if asked.problem is not None:
            solver = solver_for(asked.problem, self.choose(asked.layers[0]))
            found = Task(asked.module, asked.problem, solver).proposed()
            self.walk.own([asked.module])
            put(self.walk.pruned, asked.layers, asked.problem, found, asked.problem.violation(found.x))
            self.proposals.append(found)
        weights = stored_in(self.walk.pruned, asked.layers)[:, : asked.layers[0].weight.shape[1]]
        self.kept, self.total = self.kept + int(weights.count_nonzero()), self.total + weights.numel()

    def check_same(self, pruned: nn.Module) -> None:
        """Raise ValueError where another network does not have this one's weights."""
        for name in (name for names in self.walk.names.values() for name in names):
            if not torch.equal(read(pruned, name), read(self.walk.pruned, name)):
                raise ValueError(f"layer {name!r}: {UNSTEADY}")


@dataclass(frozen=True)
class Known:
    """A backend that has the proposals already."""

    proposals: Sequence[Proposal]

    def solutions(self, tasks: Iterable[Task]) -> Iterator[Solution]:
        """Each judged by its task's problem."""
        known = iter(self.proposals)
        for task in tasks:
            found = next(known, None)
            if found is None:
                raise ValueError(f"layer {task.layer!r}: {UNSTEADY}")
            yield found.certified(task.problem)
