"""What a recipe states of the layers: of their outlines before the work begins, and of the layers in their turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from convexprune.forms import adapted
from convexprune.layer import Layer
from convexprune.network.coverage import Coverage, check_counted, coverage
from convexprune.network.names import check_untied
from convexprune.network.traversal import Traversal
from convexprune.problem import LayerProblem, Misfit, Solver, check_problem
from convexprune.problems import Stacked, StackedReconstruction, stacked
from convexprune.pruning.store import content, text_hash
from convexprune.report.progress import Teller
from convexprune.report.shares import Shares
from convexprune.solve import default_solver
from convexprune.solvers import Groupwise

State = Callable[[Layer], LayerProblem | None]
Choose = Callable[[Layer], Solver | None]  # of a layer the solver; None for the default of its problem


@dataclass(frozen=True)
class Asked:
    """Some groups of a module, and the problem that the recipe states for them, if any."""

    module: str
    layers: list[Layer]
    problem: LayerProblem | None


@dataclass(frozen=True)
class Stated:
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
    def of(cls, walk: Traversal, state: State, choose: Choose) -> Stated:
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
                    stated.append(checked(problem, outline.name))
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


def planned(walk: Traversal, state: State, choose: Choose, tell: Teller, shares: Shares | None) -> Stated:
    """What is stated of the layers; whoever watches is told.

    shares  that a budget gave the layers, if there was one

    Raises ValueError where one of these is not pruned, and what `Stated.of` raises.
    """
    plan = Stated.of(walk, state, choose)
    if shares is not None:
        check_counted(shares.counts, [module for module, names in walk.names.items() if not {*names} <= {*plan.left}])
    tell.planned(plan.coverage, len(walk.modules))
    return plan


def check_any(used: Collection[str]) -> None:
    """Raise ValueError where no solver was used."""
    if not used:
        raise ValueError("nothing was pruned: build(layer) returned None for every layer; return a problem for one")


def checked(problem: Any, name: str) -> LayerProblem:
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
        adapted(solver_for(problem, solver), problem)
    except (TypeError, ValueError, MemoryError) as error:
        kind = next(each for each in (TypeError, ValueError, MemoryError) if isinstance(error, each))
        raise kind(f"layer {module!r}: {error}") from error


def problems_of(state: State, layers: Sequence[Layer]) -> list[tuple[list[Layer], LayerProblem | None]]:
    """The groups of a module that get a problem, with that problem; and those that do not."""
    problems = [state(layer) for layer in layers]
    stated = [
        (layer, checked(problem, layer.name))
        for layer, problem in zip(layers, problems, strict=True)
        if problem is not None
    ]
    dense = [layer for layer, problem in zip(layers, problems, strict=True) if problem is None]
    found: list[tuple[list[Layer], LayerProblem | None]] = []
    if stated:
        found.append(([layer for layer, _ in stated], stacked([problem for _, problem in stated])))
    return [*found, (dense, None)] if dense else found


def solver_for(problem: LayerProblem, solver: Solver | None) -> Solver:
    """The solver for a problem; for the groups of a module it is made of the one for a layer."""
    if not isinstance(problem, Stacked):
        return default_solver(problem) if solver is None else solver
    if solver is not None:
        return Groupwise(solver)
    if isinstance(problem, StackedReconstruction):
        return default_solver(problem)
    return Groupwise(default_solver(problem.parts[0]))
