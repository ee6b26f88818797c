"""The walk: capture the layers, build a problem for each, solve, write the weights into a copy, report.

The recipe is first asked which problems it states, with outlines of the layers: what cannot be solved is refused, and
what need not be kept is not, before the work begins. `network.traversal` then gives the layers as the mode wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from convexprune.allocate import Allocation
from convexprune.certify.network_error import network_error
from convexprune.layer import Layer
from convexprune.network import Calibration
from convexprune.network.forward import check_model
from convexprune.network.traversal import Traversal
from convexprune.patterns import Unstructured
from convexprune.problem import LayerProblem, Solver, check_solver
from convexprune.problems import Reconstruction
from convexprune.pruning.execution import Execution
from convexprune.pruning.layer_by_layer import LayerByLayer, run_of
from convexprune.pruning.recipe import Recipe
from convexprune.pruning.stated import Choose, State, check_any, planned
from convexprune.report import Report, Settings
from convexprune.report.progress import Teller, Watcher, checked, watched
from convexprune.report.shares import Shares

Build = Callable[..., LayerProblem | None]  # of a layer, and of its count where there is an allocation


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
@watched
def prune(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    build: Build | None = None,
    solver: Solver | None = None,
    mode: str = "parallel",
    *,
    names: Sequence[str] | str | None = None,
    allocation: Allocation | None = None,
    progress: Watcher = None,
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
        progress: called with a `Progress` at each step; True draws a bar by rich.
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
    told = checked(progress)
    calibration = Calibration.of(batches, names)
    tell = Teller(told, calibration)
    execution = _checked_execution(execution)
    walk = Traversal(model, calibration, mode, tell.captured, execution.way)
    shares = None if allocation is None else allocation.shares(model, calibration, progress=told)
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
    plan = planned(walk, state, choose, tell, shares)
    store = None if execution.kept is None else execution.kept.opened(run_of(walk, plan), walk.modules)
    run = LayerByLayer(walk, state, choose, tell, execution.backend, store, list(plan.pruned))
    rows = run.rows(plan.keep)
    check_any(run.used)
    network = network_error(walk, rows, tell.measured)
    walk.own()
    fingerprint, dtype = walk.calibration.fingerprint, next(walk.model.parameters()).dtype
    settings = Settings(
        walk.mode, "; ".join(run.used), fingerprint.samples, fingerprint.text, str(dtype).removeprefix("torch."),
        walk.calibration.seed, torch.get_num_threads(), torch.__version__,
    )  # fmt: skip
    return Report(tuple(rows), network, settings, shares, plan.coverage)


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
    if allocation is not None and isinstance(build, Recipe):
        build.check_allocated()
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
