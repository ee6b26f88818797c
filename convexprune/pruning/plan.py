"""What a pruning takes, from shapes alone: memory by phase, and the time of each layer's solver.

The flops of a solver are those of its dominant products; the seconds follow from how fast this machine multiplies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from convexprune.network import Calibration
from convexprune.network.forward import tensors_in
from convexprune.network.memory import available
from convexprune.network.names import choose
from convexprune.pruning.recipe import Recipe, Rule

# flops of a solver on M neurons of n inputs, k kept in each, in units of n^3, M n^2 and M k^3; fitted to measured times
COST: Final[Mapping[str, tuple[float, float, float]]] = {
    "magnitude": (0, 1, 0), "activation-magnitude": (0, 1, 0), "column-sweep": (4, 4, 0), "fast": (40, 60, 0),
    "rising-penalty": (40, 60, 0), "admm": (40, 300, 0), "balanced": (40, 100, 1.5), "best": (40, 400, 6),
}  # fmt: skip
# arrays in float64 that a layer's moments, problem and solver hold at once, fitted to measured peaks: moments come with
# bounds of what rounding did to them, which are made of products of absolute values
WORK: Final = 20  # of (M, n)
SQUARES: Final = 10  # of (n, n)


@dataclass(frozen=True)
class LayerPlan:
    """One module: what its problem is, and what it takes."""

    module: str
    groups: int
    outputs: int  # of a group
    inputs: int
    does: str
    seconds: float

    @property
    def gram(self) -> int:
        """Bytes of the Gram matrices of what it reads, with the sums that they are made of."""
        return 2 * 8 * self.groups * self.inputs**2

    @property
    def solving(self) -> int:
        """Bytes of its weights, moments and the solver's arrays, all in float64."""
        return 8 * self.groups * (WORK * self.outputs * self.inputs + SQUARES * self.inputs**2)


@dataclass(frozen=True)
class Plan:
    """The layers, and bytes by phase.

    process     that the process has without a model and with the samples read: Python, torch, transformers, a tokenizer
    reading     that reading the samples took for a moment beyond that
    model       of the dense model and its copy
    samples     of the batches
    activations of a batch in a pass
    streams     of what blocks make of all batches, for both networks; 0 where none is kept
    """

    layers: tuple[LayerPlan, ...]
    process: int
    reading: int
    model: int
    samples: int
    activations: int
    streams: int
    capture: int

    @classmethod
    def of(
        cls, model: nn.Module, calibration: Calibration, recipe: Recipe, mode: str, process: int = 0, reading: int = 0
    ) -> Plan:
        """Of a recipe on a model; nothing is run."""
        chosen = choose(model, calibration.names)
        speed = flops_a_second()
        layers = []
        for module, stack in chosen.stacks.items():
            rule = recipe.rule(module, *stack.names(module))
            if rule is not None and rule.problem != "dense":
                layers.append(_planned(module, stack, rule, speed))
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
            model=2 * size,
            samples=sum(each.numel() * each.element_size() for each in tensors),
            activations=(sum(widths[:8]) + 4 * hidden) * rows * element,
            streams=0 if mode == "parallel" else 2 * hidden * rows * element * batches,
            capture=sum(grams) if mode == "parallel" else max(grams, default=0),
        )

    @property
    def peak(self) -> int:
        """Bytes at the most."""
        kept = self.process + self.model + self.samples + self.streams + self.capture
        return max(kept + max(self.activations, self.solving), self.process + self.model // 2 + self.reading)

    @property
    def solving(self) -> int:
        """Bytes of the largest problem and its solver."""
        return max((layer.solving for layer in self.layers), default=0)

    @property
    def seconds(self) -> float:
        """Of all solvers, one after the other."""
        return sum(layer.seconds for layer in self.layers)

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
            "Python": self.process, "models": self.model, "samples": self.samples, "streams": self.streams,
            "Gram matrices": self.capture, "a pass": self.activations, "a layer's solver": self.solving,
        }  # fmt: skip
        shares = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in parts.items())
        lines.append(f"memory: {self.peak / 1e9:.2f} GB at the peak; {shares}")
        lines.append(f"solvers: {_time(self.seconds)} one after the other")
        return "\n".join(lines)


def _planned(module: str, stack: Any, rule: Rule, speed: float) -> LayerPlan:
    outputs, inputs = stack.outputs // stack.groups, stack.width
    name = rule.solver or ("balanced" if rule.problem == "reconstruction" else "working-set")
    cube, square, kept = COST.get(name, COST["admm"])
    share = rule.nm[0] / rule.nm[1] if rule.nm else 1 - (rule.sparsity or 0.5)
    flops = cube * inputs**3 + square * outputs * inputs**2 + kept * outputs * (share * inputs) ** 3
    does = f"{rule.problem} {rule.pattern}{'' if rule.sparsity is None else f' {1 - rule.sparsity:.0%} kept'} by {name}"
    return LayerPlan(module, stack.groups, outputs, inputs, does, stack.groups * flops / speed)


def _rows(calibration: Calibration) -> tuple[int, int]:
    """Tokens, or samples, of the first batch, and how many batches there are."""
    first = next(tensors_in(calibration.first))
    tokens = first.numel() if not first.is_floating_point() else math.prod(first.shape[:-1]) or 1
    return tokens, calibration.length or 1


def flops_a_second(size: int = 512) -> float:
    """How fast this machine multiplies matrices in float32, measured in some milliseconds."""
    one = torch.rand(size, size)
    one @ one
    begun = time.perf_counter()
    for _ in range(4):
        one @ one
    return 4 * 2 * size**3 / max(time.perf_counter() - begun, 1e-9)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"about {seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return f"about {seconds / 60:.0f} min" if seconds < 6000 else f"about {seconds / 3600:.1f} h"
