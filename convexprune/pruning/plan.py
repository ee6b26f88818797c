"""What a pruning takes, from shapes alone: memory by phase, and the time of the layers' solvers and of their judge.

What a solver takes is counted in products of matrices; the seconds follow from how fast this machine multiplies. Passes
of the model are not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn

from convexprune.network import Calibration
from convexprune.network.blocks import CONTAINERS, FEWEST
from convexprune.network.forward import tensors_in
from convexprune.network.memory import available
from convexprune.network.names import choose
from convexprune.pruning.recipe import Recipe, Rule
from convexprune.solvers import Balanced, Best

JUDGE: Final = "judge"  # of a reconstruction: a verdict on a point
VERDICTS: Final = 2  # on a layer: on the solver's point, and on what was stored of it
PRESETS: Final = ("best", "balanced", "fast", "magnitude")  # the best first
# flops whose time a solver takes on M neurons of n inputs, k kept in each, in units of n^3, M n^2, M k^3 and M n,
# fitted to CPU seconds by benchmarks/solver_cost.py: right within a factor 1.6 there
COST: Final[Mapping[str, tuple[float, float, float, float]]] = {
    "magnitude": (0, 0, 0, 1.2e4), "activation-magnitude": (0, 0, 0, 1.2e4), "column-sweep": (24, 0, 0, 3.2e4),
    "fast": (28, 35, 0, 1.2e5), "rising-penalty": (42, 148, 0, 1e5), "admm": (42, 148, 0, 1e5),
    "balanced": (125, 168, 14.4, 5.4e5), "best": (230, 1870, 37, 0.9e6), JUDGE: (24, 0, 0, 4.9e4),
}  # fmt: skip
LIMITS: Final = {"balanced": Balanced.limit, "best": Best.limit}  # beyond them the presets are `RisingPenalty`
# arrays in float64 that a layer's moments, problem and solver hold at once, fitted to measured peaks; what the judge
# makes besides, it makes for some rows at a time
WORK: Final = 12  # of (M, n): weights, moments with the targets about the mean and about 0, a point, scores and what is
# selected among them, nine in all; the heap keeps some of what was freed before
SQUARES: Final = 6  # of (n, n): the moments about the mean and about 0, their unit and what is factorised
JUDGED: Final = 3.5  # of (M, n) of a head that is only judged: weights before and after, moments with the targets


@dataclass(frozen=True)
class LayerPlan:
    """One module: what its problem is, and what it takes."""

    module: str
    groups: int
    outputs: int  # of a group
    inputs: int
    bias: bool
    does: str
    seconds: float  # of the solver
    judging: float

    @property
    def taken(self) -> float:
        """Seconds of its solver and of its judge."""
        return self.seconds + self.judging

    @property
    def stored(self) -> int:
        """How many weights it has."""
        return self.groups * self.outputs * self.inputs

    @property
    def gram(self) -> int:
        """Bytes of the Gram matrices of what it reads: about the mean, and without a bias about 0 too."""
        return (1 if self.bias else 2) * 8 * self.groups * self.inputs**2

    @property
    def solving(self) -> int:
        """Bytes of its weights, moments and the solver's arrays, all in float64."""
        return 8 * self.groups * (WORK * self.outputs * self.inputs + SQUARES * self.inputs**2)


@dataclass(frozen=True)
class Plan:
    """The layers, and bytes by phase.

    process     that the process has without a model and with the samples read: Python, torch, transformers, a tokenizer
    reading     that reading the samples took for a moment beyond that
    model       of the dense model
    written     of the copy's own weights while it is walked: of one block where what is finished lies in files
    head        of the moments of a head that is judged
    shard       of a file of weights, which is put together in memory
    samples     of the batches
    activations of a batch in a pass
    streams     of what blocks make of all batches, for both networks; 0 where none is kept
    presets     seconds that all reconstructions and their judge take by each, the best first
    """

    layers: tuple[LayerPlan, ...]
    process: int
    reading: int
    model: int
    written: int
    head: int
    shard: int
    samples: int
    activations: int
    streams: int
    capture: int
    presets: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, calibration: Calibration, recipe: Recipe, mode: str, process: int = 0, reading: int = 0,
        judged: Collection[str] = (), shard: int = 0,
    ) -> Plan:  # fmt: skip
        """Of a recipe on a model; nothing is run.

        judged  layers that stay dense and are judged
        shard   bytes of the largest file that the model is written to
        """
        chosen = choose(model, calibration.names)
        speed = flops_a_second()
        layers, presets = [], dict.fromkeys(PRESETS, 0.0)
        for module, stack in chosen.stacks.items():
            rule = recipe.rule(module, *stack.names(module))
            if rule is not None and rule.problem != "dense":
                layers.append(_planned(module, stack, rule, speed))
                for name in PRESETS if rule.problem == "reconstruction" else ():
                    own = replace(rule, solver=name, options={})
                    presets[name] += _planned(module, stack, own, speed).taken
        rows, batches = _rows(calibration)
        size = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
        element = next(model.parameters()).element_size()
        widths = sorted((layer.outputs * layer.groups for layer in layers), reverse=True)
        hidden = min((layer.inputs for layer in layers), default=0)
        grams = [layer.gram for layer in layers]
        tensors = [each for batch in calibration.batches for each in tensors_in(batch)]
        return cls(
            tuple(layers),
            process=process,
            reading=reading,
            model=size,
            written=min(sum(layer.stored for layer in layers) * element, size if mode == "parallel" else _block(model)),
            head=max((int(8 * JUDGED * chosen.stacks[name].weight.numel()) for name in judged), default=0),
            shard=shard,
            samples=sum(each.numel() * each.element_size() for each in tensors),
            activations=(sum(widths[:8]) + 4 * hidden) * rows * element,
            streams=0 if mode == "parallel" else 2 * hidden * rows * element * batches,
            capture=sum(grams) if mode == "parallel" else 0,  # those of one layer are the solver's
            presets=presets if any(presets.values()) else {},
        )

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        kept = self.process + self.model + self.written + self.samples + self.streams + self.capture
        walked = kept + max(self.activations, self.solving, self.head)
        finished = self.process + 2 * self.model + self.samples + self.shard
        return max(walked, finished, self.process + self.model + self.reading)

    @property
    def solving(self) -> int:
        """Bytes of the largest problem and its solver."""
        return max((layer.solving for layer in self.layers), default=0)

    @property
    def seconds(self) -> float:
        """Of all solvers and their judge, one after the other."""
        return sum(layer.taken for layer in self.layers)

    def within(self, seconds: float) -> str:
        """The best preset whose seconds are no more; raises ValueError where there is none."""
        for name, planned in self.presets.items():
            if planned <= seconds:
                return name
        if not self.presets:
            raise ValueError("no layer has a reconstruction, which the presets solve; name a solver")
        least = min(self.presets, key=self.presets.__getitem__)
        raise ValueError(
            f"no preset fits in {seconds:g} s: {least} takes {_time(self.presets[least])}; allow more, or prune fewer "
            "layers"
        )

    def check(self, memory: float | None) -> None:
        """Raise MemoryError where the peak is above so many gigabytes, or above what is free."""
        there = memory * 1e9 if memory is not None else available()
        if there is not None and self.peak > there:
            limit = "are allowed" if memory is not None else "are free"
            raise MemoryError(
                f"this takes {self.peak / 1e9:.2f} GB at its peak, and {there / 1e9:.2f} GB {limit}; use fewer or "
                "shorter windows, or --scratch FOLDER"
            )

    def text(self) -> str:
        """The plan as lines."""
        kinds: dict[str, list[LayerPlan]] = {}
        for layer in self.layers:
            kinds.setdefault(f"{layer.groups * layer.outputs} x {layer.inputs}, {layer.does}", []).append(layer)
        lines = [f"{len(self.layers)} layers to prune"]
        for what, layers in kinds.items():
            names = layers[0].module + (", ..." if len(layers) > 1 else "")
            lines.append(f"  {len(layers)} of {what}, {_time(sum(layer.seconds for layer in layers))}: {names}")
        parts = {
            "Python": self.process, "models": self.model + self.written, "samples": self.samples,
            "streams": self.streams, "Gram matrices": self.capture, "a pass": self.activations,
            "a layer's solver": self.solving, "the head's judge": self.head,
            "both models at the end": 2 * self.model + self.shard,
        }  # fmt: skip
        shares = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in parts.items())
        lines.append(f"memory: {self.peak / 1e9:.2f} GB at the peak; {shares}")
        solvers = sum(layer.seconds for layer in self.layers)
        lines.append(f"solvers: {_time(solvers)} one after the other, and {_time(self.seconds - solvers)} to judge")
        if self.presets:
            told = (f"{name} {_time(seconds)}" for name, seconds in self.presets.items())
            lines.append(f"by preset, with the judge: {', '.join(told)}")
        return "\n".join(lines)


def _planned(module: str, stack: Any, rule: Rule, speed: float) -> LayerPlan:
    outputs, inputs = stack.outputs // stack.groups, stack.width
    name = rule.solver or ("balanced" if rule.problem == "reconstruction" else "working-set")
    share = rule.nm[0] / rule.nm[1] if rule.nm else 1 - (rule.sparsity or 0.5)
    solving, judging = (stack.groups * cost(each, outputs, inputs, share) / speed for each in (name, JUDGE))
    does = f"{rule.problem} {rule.pattern}{'' if rule.sparsity is None else f' {1 - rule.sparsity:.0%} kept'} by {name}"
    bias = stack.bias is not None
    return LayerPlan(module, stack.groups, outputs, inputs, bias, does, solving, VERDICTS * judging)


def cost(solver: str, outputs: int, inputs: int, share: float) -> float:
    """Flops whose time a solver, or a verdict, takes on a layer of which a share of the weights stays."""
    if (share * inputs) ** 3 > LIMITS.get(solver, math.inf) * inputs**2:
        solver = "rising-penalty"
    cube, square, kept, one = COST.get(solver, COST["admm"])
    return cube * inputs**3 + outputs * (square * inputs**2 + kept * (share * inputs) ** 3 + one * inputs)


def _block(model: nn.Module) -> int:
    """Bytes of the largest of some blocks that are called one after another; of all of it where there are none."""
    sizes: dict[str, int] = {
        name: sum(each.numel() * each.element_size() for each in module.parameters())
        for name, module in model.named_modules()
    }
    chains = [
        [sizes[f"{name}.{key}" if name else key] for key in module._modules]
        for name, module in model.named_modules()
        if isinstance(module, CONTAINERS) and len(module) >= FEWEST
    ]
    return max(max(chains, key=sum)) if chains else sizes[""]


def _rows(calibration: Calibration) -> tuple[int, int]:
    """Tokens, or samples, of the first batch, and how many batches there are."""
    first = next(tensors_in(calibration.first))
    tokens = first.numel() if not first.is_floating_point() else math.prod(first.shape[:-1]) or 1
    return tokens, calibration.length or 1


def flops_a_second(size: int = 512) -> float:
    """How fast this machine multiplies matrices in float32, measured in some milliseconds."""
    one = torch.rand(size, size)
    found = []
    for _ in range(6):  # the first is slow, and so is one that is disturbed
        begun = time.perf_counter()
        one @ one
        found.append(time.perf_counter() - begun)
    return 2 * size**3 / max(min(found), 1e-9)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"about {seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"
