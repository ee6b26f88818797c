"""The walk: capture the layers, build a problem for each, solve, write the weights into a copy, report.

The recipe is first asked which problems it states, with outlines of the layers: what cannot be solved is refused, and
what need not be kept is not, before the work begins. `network.traversal` then gives the layers as the mode wants them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.allocate import Allocation
from convexprune.backends import Backend, Task
from convexprune.certify.network_error import network_error
from convexprune.execution import Execution
from convexprune.forms import adapted
from convexprune.layer import Layer
from convexprune.network import Calibration, read, write
from convexprune.network.coverage import Coverage, check_counted, coverage
from convexprune.network.forward import check_model
from convexprune.network.names import check_untied, find
from convexprune.network.traversal import Traversal
from convexprune.options import function, optional
from convexprune.patterns import Unstructured
from convexprune.problem import LayerProblem, Misfit, Solver, check_problem, check_solver
from convexprune.problems import Reconstruction, Stacked, StackedReconstruction, stacked
from convexprune.recipe import Recipe
from convexprune.report import Report, Settings
from convexprune.report.progress import Progress
from convexprune.report.row import TOLERANCE, Row, small
from convexprune.report.row_of import row_of
from convexprune.report.shares import Shares
from convexprune.solution import Solution, Status
from convexprune.solve import default_solver, rejudged
from convexprune.solvers import Groupwise
from convexprune.store import Store, content, model_hash, text_hash

UNSOLVED: Final = (Status.INFEASIBLE, Status.NUMERICAL)  # no point worth writing: the layer stays as it was
Build = Callable[..., LayerProblem | None]  # of a layer, and of its count where there is an allocation
State = Callable[[Layer], LayerProblem | None]
Choose = Callable[[Layer], Solver | None]  # of a layer the solver; None for the default of its problem


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def prune(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    build: Build | None = None,
    solver: Solver | None = None,
    mode: str = "parallel",
    *,
    names: Sequence[str] | str | None = None,
    allocation: Allocation | None = None,
    progress: Callable[[Progress], None] | None = None,
    execution: Execution | None = None,
) -> tuple[nn.Module, Report]:
    """Prune a model layer by layer: solve a problem for each, write its weights into a copy, judge what was written.

    The weights are cast to the model's dtype first and judged then: the certificates speak of what is in the model.
    A layer whose solver ends INFEASIBLE or NUMERICAL is left as it was, and so is one whose dense weights satisfy the
    constraints where the solver's point does not; its row says so.

    Args:
        model: the dense network; never changed.
        batches: the calibration data, as a `Calibration` or its batches alone: a list or a DataLoader that gives the
            same samples each time. They are gone through several times (`Traversal.passes`).
        build: states a layer's problem; returning None leaves the layer dense. With an `allocation` it is called with
            the layer and the number of weights it may keep (a group of a convolution: its even share of the module's),
            and is Reconstruction of that many unless given. It is asked twice: first with an outline of the layer (its
            name, weights and activation; one sample of zeros).
        solver: None: each problem's default.
        mode: "parallel": every layer is judged on the dense network's inputs; "cascade": on those of the network
            pruned so far, against the dense network's outputs; "residual": a cascade that repairs residual sums.
        names: which layers, as in `Calibration`, where that does not say.
        allocation: divides a budget among the layers first.
        progress: called with a `Progress` at each step.
        execution: how the work is done, such as `Execution(store="folder")`, which goes on where it was killed.

    Returns:
        The pruned copy, and the report on it.

    Raises:
        ValueError: for an unknown mode, a budget that cannot be met, two layers that are tied and when `build` stated
            no problem at all; else what `capture`, `build` and the solver raise.
        TypeError: for what is no model, recipe, solver or allocation.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> recipe = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5))
        >>> pruned, report = cp.prune(model, [torch.randn(20, 8)], recipe)
        >>> report.kept, report.total
        (16, 32)
    """
    check_model(model)
    _check_options(build, solver, allocation)
    check_watcher(progress)
    calibration = Calibration.of(batches, names)
    tell = Teller(progress, calibration)
    execution = _checked_execution(execution)
    walk = Traversal(model, calibration, mode, tell.captured, execution.way)
    shares = None if allocation is None else allocation.shares(model, calibration, progress=progress)
    counts = None if shares is None else shares.by_layer(walk.names)
    report = walked(walk, _stated(build, counts), _chosen(build, solver), tell, shares, execution)
    return walk.pruned, report


def walked(
    walk: Traversal, state: State, choose: Choose, tell: Teller, shares: Shares | None = None,
    execution: Execution | None = None,
) -> Report:  # fmt: skip
    """Prune the walk's copy layer by layer, by what `state` says of each layer; returns the report.

    choose  says which solver a layer gets
    shares  that a budget gave the layers, if there was one: each of them has to be pruned

    Raises what `prune` raises.
    """
    execution = execution or Execution()
    plan = _Plan.of(walk, state, choose)
    if shares is not None:
        check_counted(shares.counts, [module for module, names in walk.names.items() if not {*names} <= {*plan.left}])
    tell.planned(plan.coverage, len(walk.modules))
    store = None if execution.kept is None else execution.kept.opened(_run(walk, plan), walk.modules)
    run = _Run(walk, state, choose, tell, execution.backend, store, list(plan.pruned))
    rows = run.rows(plan.keep)
    if not run.used:
        raise ValueError("nothing was pruned: build(layer) returned None for every layer; return a problem for one")
    network = network_error(walk, rows, tell.measured)
    fingerprint, dtype = walk.calibration.fingerprint, next(walk.model.parameters()).dtype
    settings = Settings(
        walk.mode, "; ".join(run.used), fingerprint.samples, fingerprint.text, str(dtype).removeprefix("torch."),
        walk.calibration.seed, torch.get_num_threads(), torch.__version__,
    )  # fmt: skip
    return Report(tuple(rows), network, settings, shares, plan.coverage)


def _run(walk: Traversal, plan: _Plan) -> dict[str, Any]:
    """What makes this run: its store is no other's."""
    return {
        "model": model_hash(walk.model),
        "data": walk.calibration.fingerprint.text,
        "recipe": plan.recipe,
        "solver": plan.solvers,
        "mode": walk.mode,
        "seed": walk.calibration.seed,
        "threads": torch.get_num_threads(),
    }


@dataclass(frozen=True)
class _Asked:
    """Some groups of a module, and the problem that the recipe states for them, if any."""

    module: str
    layers: list[Layer]
    problem: LayerProblem | None


@dataclass
class _Run:
    """The layers of a walk, solved and written group by group.

    written  the modules that get a problem: no two may be tied
    used     what the solvers say of themselves, in order, each once
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

    def rows(self, keep: Collection[str]) -> list[Row]:
        """Of all modules, in order; those that the store has are written from there first."""
        if self.store is not None:
            for module in self.walk.modules:
                self._restore(module, self.store)
        for group in self.walk.groups(keep, frozenset(self.finished)):
            self._solve(group)
        return [row for module in self.walk.modules for row in self.finished[module]]

    def _restore(self, module: str, store: Store) -> None:
        found = store.get(module)
        if found is None:
            return
        stored, self.finished[module] = found
        for name, x in stored.items():
            write(self.walk.pruned, name, x.double())
        self.used.update({row.solver: None for row in self.finished[module] if row.solver})

    def _solve(self, group: Iterable[tuple[str, list[Layer]]]) -> None:
        """Layers that do not depend on each other."""
        waiting: deque[_Asked] = deque()
        rows: list[Row] = []
        solution: Solution | None
        for solution in chain(self.backend.solutions(self._tasks(group, waiting)), [None]):
            while waiting and (waiting[0].problem is None or solution is not None):
                asked = waiting.popleft()
                if asked.problem is None:
                    rows.append(row_of(asked.layers, _stored(self.walk.pruned, asked.layers), None, None))
                else:
                    rows.append(self._write(asked.layers, asked.problem, solution))
                    solution = None
                if not waiting or waiting[0].module != asked.module:
                    self._finish(asked.module, rows)
                    rows = []

    def _tasks(self, group: Iterable[tuple[str, list[Layer]]], waiting: deque[_Asked]) -> Iterator[Task]:
        """One for each problem; what waits for an answer is put down, module by module."""
        for module, layers in group:
            self.tell.solving(module, self.walk.modules.index(module), len(self.walk.modules))
            asked = [_Asked(module, groups, problem) for groups, problem in _asked(self.state, layers)]
            if module not in self.written and any(each.problem is not None for each in asked):
                self.written.append(module)
                check_untied(self.walk.pruned, self.written)
            waiting.extend(asked)
            for each in asked:
                if each.problem is not None:
                    yield Task(module, each.problem, _solver_for(each.problem, self.choose(each.layers[0])))

    def _write(self, layers: list[Layer], problem: LayerProblem, solution: Solution | None) -> Row:
        assert solution is not None  # of a backend that gives one for each task
        written, refusal = _written(self.walk.pruned, layers, problem, solution)
        self.used[written.solver] = None
        return row_of(layers, _stored(self.walk.pruned, layers), problem, written, refusal)

    def _finish(self, module: str, rows: list[Row]) -> None:
        self.finished[module] = tuple(rows)
        if self.store is not None:
            self.store.put(module, {name: self._as_stored(name) for name in self.walk.names[module]}, rows)

    def _as_stored(self, name: str) -> Tensor:
        """(M, P), in the dtype that the model has."""
        place = find(self.walk.pruned, name)
        return place.read().to(place.stack.weight.dtype)


@dataclass(frozen=True)
class Teller:
    """Tells whoever watches how far the run has come."""

    progress: Callable[[Progress], None] | None
    calibration: Calibration

    def planned(self, coverage: Coverage, layers: int) -> None:
        """This is what will be walked."""
        self._tell(Progress("plan", None, 0, layers, "\n".join(coverage.lines())))

    def captured(self, module: str | None, batch: int) -> None:
        """A batch has gone through, as far as this module."""
        self._tell(Progress("capture", module, batch + 1, self.calibration.length))

    def solving(self, module: str, done: int, total: int) -> None:
        """This module is next."""
        self._tell(Progress("solve", module, done, total))

    def measured(self, batch: int) -> None:
        """A batch was measured."""
        self._tell(Progress("measure", None, batch + 1, self.calibration.length))

    def _tell(self, event: Progress) -> None:
        if self.progress is not None:
            self.progress(event)


def check_watcher(progress: Any) -> None:
    """Raise TypeError for what cannot be told how far a run has come."""
    optional(function("a function that takes a `Progress`, such as print"))("progress", progress)


def _check_options(build: Any, solver: Any, allocation: Any) -> None:
    if solver is not None:
        check_solver(solver)
    if build is not None and not callable(build):
        raise TypeError(
            f"build is {build!r}; give a function from a layer to a problem, such as "
            "`lambda layer: Reconstruction(layer, Unstructured(0.5))`"
        )
    if allocation is not None and not isinstance(allocation, Allocation):
        raise TypeError(f"allocation is {allocation!r}; give an Allocation, such as Allocation(0.2)")
    if build is None and allocation is None:
        raise TypeError("give a `build`, which states each layer's problem, or an `allocation`")


def _checked_execution(execution: Any) -> Execution:
    if execution is not None and not isinstance(execution, Execution):
        raise TypeError(f"execution is {execution!r}; give an Execution, such as Execution(store='folder')")
    return execution or Execution()


def _stated(build: Build | None, counts: Mapping[str, int] | None) -> State:
    """The recipe as a function of the layer alone."""
    if counts is None:
        assert build is not None  # by _check_options
        return build

    def state(layer: Layer) -> LayerProblem | None:
        if layer.name not in counts:
            raise ValueError(f"the allocation's curves have no layer {layer.name!r}; leave it out of `names`")
        count = counts[layer.name]
        return Reconstruction(layer, Unstructured(count)) if build is None else build(layer, count)

    return state


def _chosen(build: Any, solver: Solver | None) -> Choose:
    """The solver of a layer: the one that is given, else the recipe's."""
    if solver is None and isinstance(build, Recipe):
        return build.solver
    return lambda layer: solver


@dataclass(frozen=True)
class _Plan:
    """What the recipe states of the layers' outlines.

    pruned  the modules that get a problem, as far as that is known
    keep    the modules whose rows have to be kept: a problem of theirs needs samples, or that is not known
    coverage  which of the model's weights they have
    left    the layers for which the recipe states no problem
    recipe  a hash of what it states
    solvers  that the layers get, each once
    """

    pruned: tuple[str, ...]
    keep: frozenset[str]
    coverage: Coverage
    left: tuple[str, ...]
    recipe: str
    solvers: str

    @classmethod
    def of(cls, walk: Traversal, state: State, choose: Choose) -> _Plan:
        """Ask the recipe.

        Raises ValueError where two of the modules that get a problem are tied or a pattern does not fit its layer,
        TypeError for what is no problem, and what the solver raises of a problem that it does not take.
        """
        pruned: list[str] = []
        keep: set[str] = set()
        left: list[str] = []
        texts: list[str] = []
        solvers: dict[str, None] = {}
        for module, outlines in walk.outlines():
            stated: list[LayerProblem] = []
            for outline in outlines:
                try:
                    problem = state(outline)
                except Misfit:  # the shape is what it is
                    raise
                except Exception:  # a recipe that minds the moments: it is asked again when they are there
                    keep.add(module)
                    continue
                if problem is None:
                    left.append(outline.name)
                else:
                    stated.append(_checked(problem, outline.name))
            texts.append(f"{module}: {'; '.join(map(content, stated))}")
            if stated:
                pruned.append(module)
                solver = choose(outlines[0])
                solvers[repr(solver)] = None
                _check_solvable(module, stated, solver)
            if any(getattr(problem, "needs_samples", True) for problem in stated):
                keep.add(module)
        check_untied(walk.pruned, pruned)
        if walk.calibration.keep_inputs is not None:
            keep = set(walk.modules) if walk.calibration.keep_inputs else set()
        covered = coverage(walk.model, walk.modules, walk.chosen.stacks, walk.survey.record.parameters)
        recipe = text_hash("\n".join(texts))
        return cls(tuple(pruned), frozenset(keep), covered, tuple(left), recipe, "; ".join(solvers))


def _checked(problem: Any, name: str) -> LayerProblem:
    """What the recipe states of a layer; raises TypeError for what is no problem over its weights."""
    try:
        check_problem(problem, LayerProblem)
    except TypeError as error:
        raise TypeError(f"layer {name!r}: {error}") from error
    return problem  # type: ignore[no-any-return]


def _check_solvable(module: str, problems: Sequence[LayerProblem], solver: Solver | None) -> None:
    """Raises what the solver raises of the problems of a module's groups, with the module's name."""
    try:
        problem = stacked(problems)
        adapted(_solver_for(problem, solver), problem)
    except (TypeError, ValueError, MemoryError) as error:
        kind = next(each for each in (TypeError, ValueError, MemoryError) if isinstance(error, each))
        raise kind(f"layer {module!r}: {error}") from error


def _asked(state: State, layers: Sequence[Layer]) -> list[tuple[list[Layer], LayerProblem | None]]:
    """The groups of a module that get a problem, with that problem; and those that do not."""
    problems = [state(layer) for layer in layers]
    stated = [
        (layer, _checked(problem, layer.name))
        for layer, problem in zip(layers, problems, strict=True)
        if problem is not None
    ]
    dense = [layer for layer, problem in zip(layers, problems, strict=True) if problem is None]
    found: list[tuple[list[Layer], LayerProblem | None]] = []
    if stated:
        found.append(([layer for layer, _ in stated], stacked([problem for _, problem in stated])))
    return [*found, (dense, None)] if dense else found


def _written(
    pruned: nn.Module, layers: Sequence[Layer], problem: LayerProblem, solution: Solution
) -> tuple[Solution, str]:
    """Write the weights, and let the problem judge what is in the model now; and why nothing was written."""
    refusal = "" if solution.status not in UNSOLVED else "the solver found no point"
    if not refusal and solution.certificate.violation > TOLERANCE:
        dense = problem.violation(_stored(pruned, layers))
        if dense <= TOLERANCE:
            refusal = f"its point is off by {small(solution.certificate.violation)}, and the dense weights are feasible"
    if not refusal:
        for layer, x in zip(layers, torch.split(solution.x, len(solution.x) // len(layers)), strict=True):
            write(pruned, layer.name, x)
    return rejudged(solution, problem, _stored(pruned, layers)), refusal


def _solver_for(problem: LayerProblem, solver: Solver | None) -> Solver:
    """The solver for a problem; for the groups of a module it is made of the one for a layer."""
    if not isinstance(problem, Stacked):
        return default_solver(problem) if solver is None else solver
    if solver is not None:
        return Groupwise(solver)
    if isinstance(problem, StackedReconstruction):
        return default_solver(problem)
    return Groupwise(default_solver(problem.parts[0]))


def _stored(pruned: nn.Module, layers: Sequence[Layer]) -> Tensor:
    """(M, P): the weights of a module's groups as they are in the model now."""
    return torch.cat([read(pruned, layer.name) for layer in layers])
