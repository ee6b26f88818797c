"""The walk: capture the layers, build a problem for each, solve, write the weights into a copy, report.

Parallel: all layers are captured on the dense model. Cascade: each layer sees the inputs of the network pruned so far,
and the dense network's outputs as its targets. Residual: a cascade in which a layer whose output goes into a residual
sum aims at the dense sum, so that it repairs what the other branch has lost. `_layers` is the whole difference.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.allocate.allocation import Allocation
from convexprune.certify.network_error import network_error
from convexprune.forms import EqualityQuadratic, LassoProblem, SparseLeastSquares
from convexprune.layer import Layer
from convexprune.network import capture, count_calls, read, write
from convexprune.network.forward import check_model, tensors_in, undisturbed
from convexprune.network.recording import record
from convexprune.network.residual import summed
from convexprune.patterns import Unstructured
from convexprune.problem import LayerProblem, Solver
from convexprune.problems import Reconstruction
from convexprune.report import Report, Settings, described
from convexprune.report.progress import Progress
from convexprune.report.row import Moments, Row
from convexprune.report.shares import Shares
from convexprune.solution import Solution, Status
from convexprune.solve import check_solver, rejudged, solve

MODES: Final = ("parallel", "cascade", "residual")
UNSOLVED: Final = (Status.INFEASIBLE, Status.NUMERICAL)  # no point worth writing: the layer stays as it was
Build = Callable[..., LayerProblem | None]  # of a layer, and of its count where there is an allocation
GRID: Final = (300, 800)  # a weight pattern is drawn on at most this many cells


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    build: Build | None = None,
    solver: Solver | None = None,
    mode: str = "parallel",
    *,
    allocation: Allocation | None = None,
    names: Sequence[str] | None = None,
    keep_inputs: bool = True,
    mask: Any = None,
    positions: int | None = None,
    seed: int = 0,
    activations: Mapping[str, str | None] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[nn.Module, Report]:
    """Prune a model layer by layer; returns a pruned copy and the report on it. The model itself is never changed.

    batches   the calibration data, gone through several times: a list or a DataLoader that gives the same samples
              each time (an iterator is read into a list first)
    build     states a layer's problem; returning None leaves the layer dense. With an `allocation` it is called with
              the layer and the number of weights it may keep, and is Reconstruction of that many unless given
    solver    None: each problem's default
    mode      "parallel": every layer is judged on the dense network's inputs; "cascade": on those of the network
              pruned so far, against the dense network's outputs; "residual": a cascade that repairs residual sums
    allocation   divides a budget among the layers first
    names, mask, positions, seed, activations, keep_inputs   as in `capture`
    progress  is called with a `Progress` at each step

    The weights are cast to the model's dtype first and judged then: the certificates speak of what is in the model.
    A layer whose solver ends INFEASIBLE or NUMERICAL is left as it was, and its row says so.

    Raises ValueError for an unknown mode, a budget that cannot be met, two layers that are tied and when `build` stated
    no problem at all; else what `capture`, `build` and the solver raise.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {MODES}")
    check_model(model)
    if solver is not None:
        check_solver(solver)
    if build is not None and not callable(build):
        raise TypeError(
            f"build is {build!r}; give a function from a layer to a problem, such as "
            "`lambda layer: Reconstruction(layer, Unstructured(0.5))`"
        )
    if allocation is not None and not isinstance(allocation, Allocation):
        raise TypeError(f"allocation is {allocation!r}; give an Allocation, such as Allocation(0.2)")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    tell = progress or (lambda event: None)
    pruned = copy.deepcopy(model)
    options = {
        "keep_inputs": keep_inputs, "mask": mask, "positions": positions, "seed": seed, "activations": activations,
    }  # fmt: skip
    shares = None
    if allocation is not None:
        shares = allocation.shares(model, batches, names, mask=mask, positions=positions, seed=seed, progress=progress)
    state = _stated(build, shares)
    rows: list[Row] = []
    rectified: dict[str, bool] = {}
    used = ""
    owners: dict[int, str] = {}
    for total, layer in _layers(mode, model, pruned, batches, names, options, tell):
        tell(Progress("solve", layer.name, len(rows), total))
        problem = state(layer)
        rectified[layer.name.partition("[")[0]] = layer.activation == "relu"
        if problem is not None:
            _check_untied(pruned, layer.name, owners)
        solution = None if problem is None else _written(pruned, layer.name, problem, solver)
        used = used or (solution.solver if solution else "")
        rows.append(_row(layer, read(pruned, layer.name), problem, solution))
    if not used:
        raise ValueError("nothing was pruned: build(layer) returned None for every layer; return a problem for one")
    seen = lambda index: tell(Progress("measure", None, index + 1, _length(batches)))  # noqa: E731
    network = network_error(
        model, pruned, batches, rows, rectified=rectified, mode=mode, refusal=_refusal(options), tell=seen
    )
    data, samples = _fingerprint(batches)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    settings = Settings(mode, used, samples, data, dtype, seed, torch.get_num_threads(), torch.__version__)
    return pruned, Report(tuple(rows), network, settings, shares)


def _stated(build: Build | None, shares: Shares | None) -> Callable[[Layer], LayerProblem | None]:
    """The recipe as a function of the layer alone."""
    if shares is None:
        if build is None:
            raise TypeError("give a `build`, which states each layer's problem, or an `allocation`")
        return build
    counts = shares.counts

    def state(layer: Layer) -> LayerProblem | None:
        if layer.name not in counts:
            raise ValueError(f"the allocation's curves have no layer {layer.name!r}; leave it out of `names`")
        count = counts[layer.name]
        return Reconstruction(layer, Unstructured(count)) if build is None else build(layer, count)

    return state


def _layers(
    mode: str,
    model: nn.Module,
    pruned: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str] | None,
    options: Mapping[str, Any],
    tell: Callable[[Progress], None],
) -> Iterator[tuple[int, Layer]]:
    """The layers in forward order, each after the one before it was written, with how many there are."""

    def taken(name: str | None) -> Callable[[int], None]:
        return lambda index: tell(Progress("capture", name, index + 1, _length(batches)))

    if mode == "parallel":
        layers = capture(model, batches, names, progress=taken(None), **options)
        yield from ((len(layers), layer) for layer in layers)
        return
    # one batch tells the order, what is behind each layer, and which layers read the same tensor: those go together
    first = capture(model, itertools.islice(batches, 1), names, **{**options, "keep_inputs": False})
    # a grouped convolution "conv" is the layers "conv[0]", "conv[1]", ...
    modules = {layer.name: layer.name.partition("[")[0] for layer in first}
    tensor = {modules[layer.name]: id(layer.read) for layer in reversed(first)}  # by a module's first layer
    counts = count_calls(model, batches, tensor)
    with undisturbed(model):
        steps = record(model, next(iter(batches)))
    known = {**options, "activations": {layer.name: layer.activation for layer in first}, "calls": counts}
    for _, group in itertools.groupby(first, lambda layer: tensor[modules[layer.name]]):
        together = [layer.name for layer in group]
        module = modules[together[0]]
        known["residual"] = mode == "residual" and len({*map(modules.get, together)}) == 1 and summed(steps, module)
        for layer in capture(pruned, batches, together, dense=model, progress=taken(module), **known):
            yield len(first), layer


def _check_untied(pruned: nn.Module, name: str, owners: dict[int, str]) -> None:
    """Of two layers with one parameter, writing the second would overwrite what the first was judged by."""
    module = name.partition("[")[0]
    for parameter in pruned.get_submodule(module).parameters():
        owner = owners.setdefault(id(parameter), module)
        if owner != module:
            raise ValueError(
                f"layers {owner!r} and {module!r} are tied: they share a parameter, which only one of them can be "
                "pruned by; leave the other out of `names`"
            )


def _written(pruned: nn.Module, name: str, problem: LayerProblem, solver: Solver | None) -> Solution:
    """Solve, write the weights, and let the problem judge what is in the model now."""
    solution = solve(problem, solver)
    if solution.status not in UNSOLVED:
        write(pruned, name, solution.x)
    return rejudged(solution, problem, read(pruned, name))


def _row(layer: Layer, stored: Tensor, problem: LayerProblem | None, solution: Solution | None) -> Row:
    kept = stored[:, : layer.weight.shape[1]] != 0
    shape = kept.shape[0], kept.shape[1]
    row = Row(layer.name, shape, int(kept.sum()), pattern=_grid(kept), repairs=layer.repairs)
    if problem is None or solution is None:
        return row
    errors = problem.output_errors(stored)
    return replace(
        row,
        status=solution.status,
        certificate=solution.certificate,
        error=float(errors.norm()),
        errors=errors,
        problem=described(problem),
        iterations=solution.iterations,
        seconds=solution.seconds,
        wanted=int(problem.select(torch.ones(kept.shape)).sum()) if isinstance(problem, SparseLeastSquares) else None,
        moments=_moments(problem),
        trace=solution.trace,
    )


def _moments(problem: LayerProblem) -> Moments | None:
    """Damping and conditioning of a problem that is stated in its layer's moments."""
    layer = getattr(problem, "layer", None)
    if not isinstance(problem, (SparseLeastSquares, EqualityQuadratic, LassoProblem)) or not isinstance(layer, Layer):
        return None
    rank, condition = layer.spectrum()
    return Moments(layer.damping, rank, len(layer.gram), condition)


def _grid(kept: Tensor) -> Tensor:
    """The kept fraction in each cell of a grid no finer than the weights."""
    cells = min(kept.shape[0], GRID[0]), min(kept.shape[1], GRID[1])
    return nn.functional.adaptive_avg_pool2d(kept.float()[None], cells)[0]


def _refusal(options: Mapping[str, Any]) -> str:
    """Which option keeps the layers' errors from saying anything of the network's, or nothing."""
    if options["mask"] is not None:
        return "a mask was given, and the samples it leaves out are in the network's output"
    if options["positions"] is not None:
        return "`positions` was given, and the positions it leaves out are in the network's output"
    if "relu" in (options["activations"] or {}).values():
        return "a ReLU was told by `activations`, not found in the network"
    return ""


def _fingerprint(batches: Iterable[Any]) -> tuple[str, int]:
    """SHA-256 of the batches' tensors, their shapes and dtypes included, and how many examples they hold."""
    digest, samples = hashlib.sha256(), 0
    for batch in batches:
        tensors = [tensor.detach().cpu().contiguous() for tensor in tensors_in(batch)]
        samples += len(tensors[0]) if tensors[0].ndim else 1
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), samples


def _length(batches: Iterable[Any]) -> int | None:
    return len(batches) if isinstance(batches, Sized) else None
