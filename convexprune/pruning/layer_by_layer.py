"""The layers of a walk, solved and written group by group; what is written is judged by the problem, and kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.layer import Layer
from convexprune.network import read, write
from convexprune.network.names import check_untied, find
from convexprune.network.traversal import Traversal
from convexprune.problem import LayerProblem
from convexprune.pruning.backends import Backend, Task
from convexprune.pruning.stated import Asked, Choose, State, Stated, problems_of, solver_for
from convexprune.pruning.store import Store, model_hash
from convexprune.report.progress import Teller
from convexprune.report.row import TOLERANCE, Row, small
from convexprune.report.row_of import row_of
from convexprune.solution import Solution, Status
from convexprune.solve import Proposal, rejudged

UNSOLVED: Final = (Status.INFEASIBLE, Status.NUMERICAL)  # no point worth writing: the layer stays as it was


@dataclass
class LayerByLayer:
    """The layers of a walk, solved and written group by group.

    written  the modules that get a problem: no two may be tied
    used     what the solvers say of themselves, in order, each once
    settled  the finished modules whose weights lie in the store's files
    """

    walk: Traversal
    state: State
    choose: Choose
    tell: Teller
    backend: Backend
    store: Store | None
    written: list[str]
    used: dict[str, None] = field(default_factory=dict)
    finished: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)

    def rows(self, keep: Collection[str]) -> list[Row]:
        """Of all modules, in order; those that the store has are written from there first."""
        if self.store is not None:
            for module in self.walk.modules:
                self._restore(module, self.store)
        for group in self.walk.groups(keep, frozenset(self.finished)):
            self._settle()
            self._solve(group)
        return [row for module in self.walk.modules for row in self.finished[module]]

    def _restore(self, module: str, store: Store) -> None:
        found = store.get(module)
        if found is None:
            return
        stored, self.finished[module] = found
        self.walk.own([module])
        for name, x in stored.items():
            write(self.walk.pruned, name, x.double())
        self.used.update({row.solver: None for row in self.finished[module] if row.solver})

    def _settle(self) -> None:
        """What finished blocks have is mapped from the store's files: it takes no memory until the model is read."""
        if self.store is not None:
            for module in set(self.walk.passed) & set(self.finished) - self.settled:
                self.settled.add(module)
                self.walk.lay(module, self.store.mapped(module))

    def _solve(self, group: Iterable[tuple[str, list[Layer]]]) -> None:
        """Layers that do not depend on each other."""
        waiting: deque[Asked] = deque()
        rows: list[Row] = []
        solution: Solution | None
        for solution in chain(self.backend.solutions(self._tasks(group, waiting)), [None]):
            while waiting and (waiting[0].problem is None or solution is not None):
                asked = waiting.popleft()
                if asked.problem is None:
                    rows.append(row_of(asked.layers, stored_in(self.walk.pruned, asked.layers), None, None))
                else:
                    rows.append(self._write(asked.layers, asked.problem, solution))
                    solution = None
                if not waiting or waiting[0].module != asked.module:
                    self._finish(asked.module, rows)
                    rows = []

    def _tasks(self, group: Iterable[tuple[str, list[Layer]]], waiting: deque[Asked]) -> Iterator[Task]:
        """One for each problem; what waits for an answer is put down, module by module."""
        for module, layers in group:
            self.tell.solving(module, self.walk.modules.index(module), len(self.walk.modules))
            asked = [Asked(module, groups, problem) for groups, problem in problems_of(self.state, layers)]
            if module not in self.written and any(each.problem is not None for each in asked):
                self.written.append(module)
                check_untied(self.walk.pruned, self.written)
            waiting.extend(asked)
            for each in asked:
                if each.problem is not None:
                    yield Task(module, each.problem, solver_for(each.problem, self.choose(each.layers[0])))

    def _write(self, layers: list[Layer], problem: LayerProblem, solution: Solution | None) -> Row:
        assert solution is not None  # of a backend that gives one for each task
        self.walk.own([layers[0].module])
        self.used[solution.solver] = None
        refusal = put(self.walk.pruned, layers, problem, solution, solution.certificate.violation)
        stored = stored_in(self.walk.pruned, layers)
        return row_of(layers, stored, problem, rejudged(solution, problem, stored), refusal)

    def _finish(self, module: str, rows: list[Row]) -> None:
        self.finished[module] = tuple(rows)
        if self.store is not None:
            stored = {name: find(self.walk.pruned, name).stored() for name in self.walk.names[module]}
            self.store.put(module, stored, rows)


def run_of(walk: Traversal, stated: Stated) -> dict[str, Any]:
    """What makes this run: its store is no other's."""
    return {
        "model": model_hash(walk.model),
        "data": walk.calibration.fingerprint.text,
        "recipe": stated.recipe,
        "solver": stated.solvers,
        "mode": walk.mode,
        "seed": walk.calibration.seed,
        "threads": torch.get_num_threads(),
    }


def put(
    pruned: nn.Module, layers: Sequence[Layer], problem: LayerProblem, found: Solution | Proposal, violation: float
) -> str:
    """Write the weights that were found into the model; or why they are not written.

    violation  of the point that was found
    """
    if found.status is Status.INFEASIBLE:
        return "no weights satisfy its problem's constraints; loosen them, such as by a larger epsilon"
    if found.status in UNSOLVED:
        return "the solver found no point"
    if violation > TOLERANCE and problem.violation(stored_in(pruned, layers)) <= TOLERANCE:
        return f"its point is off by {small(violation)}, and the dense weights are feasible"
    for layer, x in zip(layers, torch.split(found.x, len(found.x) // len(layers)), strict=True):
        write(pruned, layer.name, x)
    return ""


def stored_in(pruned: nn.Module, layers: Sequence[Layer]) -> Tensor:
    """(M, P): the weights of a module's groups as they are in the model now."""
    return torch.cat([read(pruned, layer.name) for layer in layers])
