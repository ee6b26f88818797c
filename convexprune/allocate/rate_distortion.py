"""Rate-distortion curves: what pruning a module alone to each of some levels loses, by one of three measures."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from convexprune.bounds.additivity import Additivity
from convexprune.curve import Curve
from convexprune.layer import Layer
from convexprune.network import Calibration, capture, directions, read, write
from convexprune.network.forward import check_model, copied, numbered, run, undisturbed
from convexprune.network.outputs import sure_output
from convexprune.options import check_options, flag, function, having, number, optional, whole
from convexprune.options import path as check_path
from convexprune.options import seed as check_seed
from convexprune.patterns import Unstructured
from convexprune.problem import LayerProblem, Solver, check_solver
from convexprune.problems import Reconstruction, stacked
from convexprune.report.progress import Progress
from convexprune.solve import solve
from convexprune.solvers import Groupwise
from convexprune.whole_file import write_whole

LEVELS: Final = (
    0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.225, 0.25,
    0.275, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0,
)  # fmt: skip


class Measure(Protocol):
    """What a pruned layer is said to lose; a small frozen object."""

    def prepared(self, model: nn.Module, batches: Calibration, layers: Sequence[Layer]) -> Measured:
        """The measure on a model and its calibration batches."""


Group = Sequence[Layer]  # the layers of a module, one for each group
Measured = Callable[[Group, LayerProblem, Tensor], float]  # layers, their problem at this level, its point


@dataclass(frozen=True)
class LayerError:
    """The layer's own relative error, E|W' x - y|^2 / E|y|^2."""

    def prepared(self, model: nn.Module, batches: Calibration, layers: Sequence[Layer]) -> Measured:
        """Nothing to prepare: the problem's value."""
        return lambda layers, problem, x: problem.value(x) / max(sum(layer.energy for layer in layers), 1e-300)


@dataclass(frozen=True)
class SecondOrder:
    """E|f(x; W) - f(x; W')|^2 by gradients: E_v <W' - W, grad <v, f>>^2, one backward pass over the data in all.

    directions  how many random v: the estimate's standard deviation is sqrt(2 / directions) of it, its memory that
                many times the weights in float32
    """

    directions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, directions=whole(1))

    def prepared(self, model: nn.Module, batches: Calibration, layers: Sequence[Layer]) -> Measured:
        """One sweep over the batches for all layers."""
        known = directions(model, batches, [layer.name for layer in layers], self.directions, self.seed)

        def measured(layers: Group, problem: LayerProblem, x: Tensor) -> float:
            slopes = torch.cat([known[layer.name] for layer in layers], 1)
            change = (x - problem.dense).float().flatten()
            return float((slopes.flatten(1) @ change).double().square().sum())

        return measured


@dataclass(frozen=True)
class OutputChange:
    """The change of the network's output, |f(x; W) - f(x; W')|^2, measured: a pass for each level of each layer.

    worst  the largest over the samples instead of the mean
    """

    worst: bool = False

    def __post_init__(self) -> None:
        check_options(self, worst=flag)

    def prepared(self, model: nn.Module, batches: Calibration, layers: Sequence[Layer]) -> Measured:
        """Keeps the dense outputs, and one copy of the model to try weights in."""
        trial = copied(model)
        dense = _outputs(model, batches)

        def measured(layers: Group, problem: LayerProblem, x: Tensor) -> float:
            names = [layer.name for layer in layers]
            before = [read(trial, name) for name in names]
            try:
                for name, own in zip(names, torch.split(x, len(before[0])), strict=True):
                    write(trial, name, own)
                changes = [
                    (made - known).double().square().reshape(len(known), -1).sum(1)
                    for made, known in zip(_outputs(trial, batches), dense, strict=True)
                ]
            finally:
                for name, own in zip(names, before, strict=True):
                    write(trial, name, own)
            each = torch.cat(changes)
            return float(each.max() if self.worst else each.mean())

        return measured


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def additivity(model: nn.Module, pruned: nn.Module, batches: Iterable[Any]) -> Additivity:
    """How far the distortions of the layers, each pruned alone, add up to that of all: a pass for each layer.

    model, pruned  the same architecture; the modules whose weights or biases differ are the pruned layers

    Raises ValueError where none differs, and where the architectures do.
    """
    check_model(model)
    check_model(pruned, "the pruned model")
    batches = Calibration.of(batches)
    mine, its = ({key: tuple(value.shape) for key, value in each.named_parameters()} for each in (model, pruned))
    if mine != its:
        odd = min(key for key in mine | its if mine.get(key) != its.get(key))
        raise ValueError(f"{odd!r} is not the same in both networks; give a network and its pruned copy")
    trial = copied(model)
    dense = torch.cat(_outputs(model, batches))
    theirs = dict(pruned.named_modules())

    def change(network: nn.Module) -> Tensor:
        return torch.cat(_outputs(network, batches)).double() - dense.double()

    alone = []
    for name, module in trial.named_modules():
        own = dict(module.named_parameters(recurse=False))
        other = dict(theirs[name].named_parameters(recurse=False))
        moved = [key for key in own if not torch.equal(own[key], other[key])]
        if not moved:
            continue
        before = {key: own[key].data for key in moved}
        for key in moved:
            own[key].data = other[key].data
        alone.append(change(trial))
        for key in moved:
            own[key].data = before[key]
    return Additivity.of(alone, change(pruned))


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def rate_distortion(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    names: Iterable[str] | str | None = None,
    *,
    levels: Sequence[float] = LEVELS,
    measure: Measure | None = None,
    solver: Solver | None = None,
    damping: float = 0.0,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[Curve]:
    """Measure a curve for each module: what pruning it alone to each level, by Reconstruction, loses.

    Args:
        model: The dense network; never changed.
        batches: Calibration data, as of `prune`.
        names: Which layers, as in `Calibration`.
        levels: Fractions of the module's weights to keep, of all groups of a convolution together.
        measure: `SecondOrder()` if None; `OutputChange()` is the published measure, `LayerError()` the cheapest.
        solver: Prunes to each level, groups by `Groupwise(solver)`; None takes the default of `Reconstruction`.
        damping: As in `Layer.damped`.
        cache: Folder with a file for each module: a curve is not measured again if the layers, the data and the
            settings are the same.
        progress: Called with a `Progress` at each module.

    Returns:
        A curve for each module, in forward order.

    Raises:
        ValueError: For levels outside (0, 1]; else what `capture` raises.

    Source: Xu et al., ICCV 2023.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
        >>> (curve,) = cp.rate_distortion(model, [torch.rand(20, 8)], levels=(0.25, 0.5, 1.0), measure=cp.LayerError())
        >>> curve.name, curve.kept.tolist()
        ('0', [8.0, 16.0, 32.0])
    """
    check_model(model)
    levels = checked_levels(levels)
    optional(having("prepared", "SecondOrder()"))("measure", measure)
    number(0)("damping", damping)
    optional(check_path)("cache", cache)
    optional(function("a function that takes a `Progress`, such as print"))("progress", progress)
    if solver is not None:
        check_solver(solver)
    calibration = Calibration.of(batches, names)
    calibration = replace(calibration, batches=list(calibration))
    measure = SecondOrder() if measure is None else measure
    layers = capture(model, calibration)
    drawn = f"{calibration.positions!r}; {calibration.seed!r}; {calibration.fingerprint.text}; {calibration.output!r}"
    said = f"{measure!r}; {solver!r}; {damping!r}; {tuple(levels)!r}; {drawn}"
    store = None if cache is None else _Store(Path(cache), hashlib.sha256(said.encode()).hexdigest())
    measured: Measured | None = None
    curves = []
    modules = [(name, list(own)) for name, own in itertools.groupby(layers, lambda layer: layer.module)]
    for done, (name, group) in enumerate(modules):
        if progress is not None:
            progress(Progress("measure", name, done, len(modules)))
        found = None if store is None else store.read(name, group)
        if found is None:
            if measured is None:
                with undisturbed(model):
                    measured = measure.prepared(model, calibration, layers)
            found = _curve(group, levels, measured, solver, damping)
            if store is not None:
                store.write(name, group, found)
        kept, distortion = (torch.tensor(values, dtype=torch.float64) for values in found)
        weight = torch.cat([layer.weight for layer in group])
        curves.append(Curve(name, kept, distortion, total=weight.numel(), weight=weight, kernel=group[0].kernel))
    return curves


def checked_levels(levels: Any) -> tuple[float, ...]:
    """The levels; raises TypeError for what is no sequence of numbers, ValueError for one outside (0, 1] or none."""
    several = isinstance(levels, Iterable) and not isinstance(levels, (str, bytes, Mapping))
    found = tuple(levels) if several else ()
    if not several or any(isinstance(level, bool) or not isinstance(level, Real) for level in found):
        raise TypeError(f"levels is {levels!r}; give fractions in (0, 1], such as (0.1, 0.5, 1.0)")
    wrong = [level for level in found if not 0 < level <= 1]
    if wrong or not found:
        raise ValueError(f"levels are fractions in (0, 1]; got {wrong[0] if wrong else 'none'}")
    return found


def random_inputs(shape: Sequence[int], samples: int = 256, batch: int = 64, seed: int = 0) -> list[Tensor]:
    """Batches of N(0, 1) numbers in place of calibration data (Xu et al., ICCV 2023, zero-data mode).

    shape  of one sample. Raises ValueError or TypeError for sizes that are no whole numbers >= 1.
    """
    if isinstance(shape, (str, bytes, Tensor)) or not isinstance(shape, Iterable):
        raise TypeError(f"shape is {shape!r}; give the sizes of one sample, such as (3, 32, 32)")
    for size in shape:
        whole(1)("a size of `shape`", size)
    whole(1)("samples", samples)
    whole(1)("batch", batch)
    check_seed("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    return list(torch.split(torch.randn(samples, *shape, generator=generator), batch))


def _curve(
    layers: Group, levels: Sequence[float], measured: Measured, solver: Solver | None, damping: float
) -> tuple[list[int], list[float]]:
    kept, distortion = [], []
    damped = [layer.damped(damping) for layer in layers] if damping else layers
    out, width = sum(len(layer.weight) for layer in layers), layers[0].weight.shape[1]
    solver = Groupwise(solver) if solver is not None and len(layers) > 1 else solver
    for level in levels:
        pattern = Unstructured(level)
        count = pattern.quota((out, width))
        problem, judge = (stacked([Reconstruction(layer, pattern) for layer in group]) for group in (damped, layers))
        x = problem.dense if count == out * width else solve(problem, solver).x
        kept.append(count)
        distortion.append(measured(layers, judge, x))
    return kept, distortion


class _Store:
    """A folder with a file for each module, written whole and then renamed."""

    def __init__(self, folder: Path, settings: str) -> None:
        self.folder, self.settings = folder, settings
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(error.errno, f"no folder for the cache: {error.strerror}", str(folder)) from error

    def read(self, name: str, layers: Group) -> tuple[list[int], list[float]] | None:
        """What is known of a module under these settings; None where nothing is."""
        try:
            content = json.loads(self._path(name).read_text(encoding="utf-8"))
            if content["of"] != self._of(layers):
                return None
            return [int(k) for k in content["kept"]], [float(d) for d in content["distortion"]]
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError, ValueError):
            return None

    def write(self, name: str, layers: Group, found: tuple[list[int], list[float]]) -> None:
        """Store a module's levels."""
        content = {"layer": name, "of": self._of(layers), "kept": found[0], "distortion": found[1]}
        write_whole(self._path(name), json.dumps(content, indent=1))

    def _path(self, name: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
        return self.folder / f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"

    def _of(self, layers: Group) -> str:
        content = hashlib.sha256(self.settings.encode())
        for layer in layers:
            for tensor in (layer.affine_weight, layer.affine_gram):
                content.update(tensor.contiguous().numpy().tobytes())
        return content.hexdigest()


def _outputs(model: nn.Module, batches: Calibration | Iterable[Any]) -> list[Tensor]:
    """The output on each batch; raises ValueError where it is no tensor of finite numbers, a row a sample."""
    found, which = [], batches.output if isinstance(batches, Calibration) else None
    with undisturbed(model):
        for index, batch in enumerate(batches):
            with numbered(index):
                output = sure_output(run(model, batch), which)
            if not output.ndim:
                raise ValueError("the model's output is a single number; it must have a row for each sample")
            if not bool(output.isfinite().all()):
                raise ValueError(f"batch {index}: the model makes NaN or inf of it; check the calibration data")
            found.append(output.detach())
    return found
