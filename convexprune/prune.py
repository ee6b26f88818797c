"""The walk: capture the layers, build a problem for each, solve, write the weights into a copy, report.

The recipe is first asked which problems it states, with outlines of the layers: what cannot be solved is refused, and
what need not be kept is not, before the work begins. `network.traversal` then gives the layers as the mode wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.allocate import Allocation
from convexprune.certify.network_error import network_error
from convexprune.forms import adapted
from convexprune.layer import Layer
from convexprune.network import Calibration, read, write
from convexprune.network.coverage import Coverage, check_counted, coverage
from convexprune.network.forward import check_model
from convexprune.network.traversal import Traversal
from convexprune.options import function, optional
from convexprune.patterns import Unstructured
from convexprune.problem import LayerProblem, Misfit, Solver, check_problem, check_solver
from convexprune.problems import Reconstruction, Stacked, StackedReconstruction, stacked
from convexprune.report import Report, Settings
from convexprune.report.progress import Progress
from convexprune.report.row import TOLERANCE, Row, small
from convexprune.report.row_of import row_of
from convexprune.report.shares import Shares
from convexprune.solution import Solution, Status
from convexprune.solve import default_solver, rejudged, solve
from convexprune.solvers import Groupwise

UNSOLVED: Final = (Status.INFEASIBLE, Status.NUMERICAL)  # no point worth writing: the layer stays as it was
Build = Callable[..., LayerProblem | None]  # of a layer, and of its count where there is an allocation
State = Callable[[Layer], LayerProblem | None]


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
    walk = Traversal(model, calibration, mode, tell.captured)
    shares = None if allocation is None else allocation.shares(model, calibration, progress=progress)
    counts = None if shares is None else shares.by_layer(walk.names)
    report = walked(walk, _stated(build, counts), solver, tell, shares)
    return walk.pruned, report


def walked(walk: Traversal, state: State, solver: Solver | None, tell: Teller, shares: Shares | None = None) -> Report:
    """Prune the walk's copy layer by layer, by what `state` says of each layer; returns the report.

    shares  that a budget gave the layers, if there was one: each of them has to be pruned

    Raises what `prune` raises.
    """
    plan = _Plan.of(walk, state, solver)
    if shares is not None:
        check_counted(shares.counts, [module for module, names in walk.names.items() if not {*names} <= {*plan.left}])
    tell.planned(plan.coverage, len(walk.modules))
    rows: list[Row] = []
    used: dict[str, None] = {}  # in order, each once
    written = list(plan.pruned)
    for done, (module, layers) in enumerate(walk.layers(plan.keep)):
        tell.solving(module, done, len(walk.modules))
        for groups, problem in _asked(state, layers):
            if problem is not None and module not in written:
                written.append(module)
                _check_untied(walk.pruned, written)
            solution, refusal = None, ""
            if problem is not None:
                solution, refusal = _written(walk.pruned, groups, problem, solver)
                used[solution.solver] = None
            rows.append(row_of(groups, _stored(walk.pruned, groups), problem, solution, refusal))
    if not used:
        raise ValueError("nothing was pruned: build(layer) returned None for every layer; return a problem for one")
    network = network_error(walk, rows, tell.measured)
    fingerprint, dtype = walk.calibration.fingerprint, next(walk.model.parameters()).dtype
    settings = Settings(
        walk.mode, "; ".join(used), fingerprint.samples, fingerprint.text, str(dtype).removeprefix("torch."),
        walk.calibration.seed, torch.get_num_threads(), torch.__version__,
    )  # fmt: skip
    return Report(tuple(rows), network, settings, shares, plan.coverage)


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


@dataclass(frozen=True)
class _Plan:
    """What the recipe states of the layers' outlines.

    pruned  the modules that get a problem, as far as that is known
    keep    the modules whose rows have to be kept: a problem of theirs needs samples, or that is not known
    coverage  which of the model's weights they have
    left    the layers for which the recipe states no problem
    """

    pruned: tuple[str, ...]
    keep: frozenset[str]
    coverage: Coverage
    left: tuple[str, ...]

    @classmethod
    def of(cls, walk: Traversal, state: State, solver: Solver | None) -> _Plan:
        """Ask the recipe.

        Raises ValueError where two of the modules that get a problem are tied or a pattern does not fit its layer,
        TypeError for what is no problem, and what the solver raises of a problem that it does not take.
        """
        pruned: list[str] = []
        keep: set[str] = set()
        left: list[str] = []
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
            if stated:
                pruned.append(module)
                _check_solvable(module, stated, solver)
            if any(getattr(problem, "needs_samples", True) for problem in stated):
                keep.add(module)
        _check_untied(walk.pruned, pruned)
        if walk.calibration.keep_inputs is not None:
            keep = set(walk.modules) if walk.calibration.keep_inputs else set()
        covered = coverage(walk.model, walk.modules, walk.chosen.stacks)
        return cls(tuple(pruned), frozenset(keep), covered, tuple(left))


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


def _check_untied(model: nn.Module, modules: Iterable[str]) -> None:
    """Of two layers with one parameter, writing the second would overwrite what the first was judged by."""
    owners: dict[int, str] = {}
    for module in modules:
        for parameter in model.get_submodule(module).parameters():
            owner = owners.setdefault(id(parameter), module)
            if owner != module:
                raise ValueError(
                    f"layers {owner!r} and {module!r} are tied: they share a parameter, which only one of them can be "
                    "pruned by; leave the other out of `names`"
                )


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
    pruned: nn.Module, layers: Sequence[Layer], problem: LayerProblem, solver: Solver | None
) -> tuple[Solution, str]:
    """Solve, write the weights, and let the problem judge what is in the model now; and why nothing was written."""
    try:
        solution = solve(problem, _solver_for(problem, solver))
    except (TypeError, ValueError, MemoryError) as error:
        error.add_note(f"This was layer {layers[0].module!r}.")
        raise
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
