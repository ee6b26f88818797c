"""Distillation without labels: what is left of all layers at once, against the dense network's activations.

    minimise over the nonzero weights   ||Yhat - Y||_F^2 / ||Y||_F^2  +  h/L sum_l ||Yhat_l - Y_l||_F^2 / ||Y_l||_F^2

Y are the dense network's outputs on the calibration samples, Y_l its layers'; h weighs these hints. A layer's own
problem (`prune`) takes the layers behind it as they are; here they give way to each other. Nothing convex is left and
nothing is certified: what is known of the result is measured.
Source: Romero et al., FitNets, ICLR 2015; Hinton, Vinyals, Dean, 2015.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.network import Calibration, MaskKeeper, capture
from convexprune.network.compare import behind, hooked, norms, rectified_modules
from convexprune.network.forward import check_model, copied, run, undisturbed

WHOLE: Final = ""  # the network's output among the layers' names: the root module's


@dataclass(frozen=True)
class Distilled:
    """What distillation did: relative errors || . ||_F on the calibration samples as (before, after).

    outputs    of the network; None where the output is not one tensor
    layers     module -> of the layer, behind its ReLU where that is all that reads it
    objective  what was minimised
    note       why the network is as it was, if so
    """

    outputs: tuple[float, float] | None
    layers: Mapping[str, tuple[float, float]] = field(repr=False)
    objective: tuple[float, float]
    steps: int
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        """A line."""
        shown = "" if self.outputs is None else "outputs off by {:.4g}, before {:.4g}; ".format(*reversed(self.outputs))
        text = f"{shown}objective {self.objective[1]:.4g}, before {self.objective[0]:.4g}"
        return f"{text} ({self.steps} steps, {self.seconds:.1f} s){': ' if self.note else ''}{self.note}"


def distill(
    model: nn.Module,
    pruned: nn.Module,
    batches: Calibration | Iterable[Any],
    names: Iterable[str] | str | None = None,
    *,
    epochs: int = 30,
    hints: float = 1.0,
    rate: float = 0.01,
    seed: int = 0,
) -> tuple[nn.Module, Distilled]:
    """A copy of `pruned` whose nonzero weights imitate `model`, and how far it came; zeros stay zero.

    batches  calibration data, a step of Adam each; their order in each of the `epochs` is drawn with `seed`
    names    of the layers that move and are watched, as of `prune`; None: all
    hints    the weight h of the layers' own outputs; 0: only the network's count
    rate     Adam's first step relative to the rms of a layer's nonzero weights; it falls to 0 as a cosine

    In eval mode: dropout is off and batch norm keeps its statistics. Where the steps made the objective larger, the
    copy is as it was and the note says so. Raises ValueError for figures out of range and for layers that the two
    networks do not share, TypeError for batches of another kind.
    """
    check_model(model)
    check_model(pruned)
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs is {epochs!r}; it must be a whole number, at least 1")
    if not isinstance(rate, Real) or not 0 < rate < 1:
        raise ValueError(f"rate is {rate!r}; it must be in (0, 1), such as 0.01")
    if not isinstance(hints, Real) or not 0 <= hints < math.inf:
        raise ValueError(f"hints is {hints!r}; it must be a finite number >= 0")
    begun = time.perf_counter()
    calibration = Calibration.of(batches, names)
    batches = list(calibration)
    layers = capture(model, batches[:1], calibration.names)
    rectified = rectified_modules(layers)
    student = copied(pruned)
    _check_shared(model, student, rectified)
    pair = _Pair(model, student, batches, rectified, float(hints))
    if not pair.sizes or (hints == 0 and WHOLE not in pair.sizes):
        where = "all that is watched is zero" if hints else "hints is 0, and the output is not one tensor, or is zero"
        raise ValueError(f"{where}: nothing is left to compare")
    before = pair.errors(batches)
    given = copy.deepcopy(student.state_dict())
    _train(pair, batches, epochs, rate, seed)
    after, note = pair.errors(batches), ""
    if not pair.objective(after) <= pair.objective(before):
        note = f"the objective became {pair.objective(after):.4g}, so the network is as it was; try a smaller rate"
        student.load_state_dict(given)
        after = before
    relative = {name: (math.sqrt(before[name]), math.sqrt(after[name])) for name in before}
    return student, Distilled(
        relative.pop(WHOLE, None), relative, (pair.objective(before), pair.objective(after)), epochs * len(batches),
        time.perf_counter() - begun, note,
    )  # fmt: skip


class _Pair:
    """Two networks and where they are compared."""

    def __init__(
        self, model: nn.Module, student: nn.Module, batches: list[Any], rectified: Mapping[str, bool], hints: float
    ) -> None:
        self.model, self.student, self.rectified, self.hints = model, student, rectified, hints
        sizes, whole = norms(model, batches, rectified)
        self.sizes = {name: size for name, size in {**sizes, WHOLE: whole or 0.0}.items() if size > 0}

    def compare(self, batch: Any, gradients: bool) -> dict[str, Tensor]:
        """module -> || Yhat_l - Y_l ||_F^2 on a batch; both networks are run."""
        dense: dict[str, list[Tensor]] = {}
        found: dict[str, Tensor] = {}

        def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            dense.setdefault(name, []).append(behind(output, self.rectified[name]).clone())

        def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            change = behind(output, self.rectified[name]) - dense[name].pop(0)
            found[name] = found.get(name, 0) + change.square().sum(dtype=torch.float64)

        with hooked(self.model, self.rectified, keep):
            theirs = run(self.model, batch)
        with hooked(self.student, self.rectified, look):
            ours = run(self.student, batch, gradients)
        if WHOLE in self.sizes:
            found[WHOLE] = (ours - theirs).square().sum(dtype=torch.float64)
        return {name: found[name] for name in self.sizes if name in found}

    def errors(self, batches: list[Any]) -> dict[str, float]:
        """module -> || Yhat_l - Y_l ||_F^2 / || Y_l ||_F^2 over all batches."""
        total = dict.fromkeys(self.sizes, 0.0)
        with undisturbed(self.model, self.student):
            for batch in batches:
                for name, square in self.compare(batch, gradients=False).items():
                    total[name] += float(square) / self.sizes[name] ** 2
        return total

    def objective(self, errors: Mapping[str, Any]) -> Any:
        """The output's error, and the mean of the layers' times the weight of the hints."""
        watched = [error for name, error in errors.items() if name != WHOLE]
        return errors.get(WHOLE, 0.0) + self.hints * sum(watched) / max(len(watched), 1)


def _train(pair: _Pair, batches: list[Any], epochs: int, rate: float, seed: int) -> None:
    """Adam on the student's layers, the zeros kept."""
    flags = [(parameter, parameter.requires_grad) for parameter in pair.student.parameters()]
    groups = _groups(pair.student, pair.rectified, rate)
    if not groups:
        raise ValueError(f"nothing can move: every weight of {', '.join(pair.rectified)} is zero")
    generator = torch.Generator().manual_seed(seed)
    with undisturbed(pair.model, pair.student), torch.inference_mode(False), torch.enable_grad():
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for group in groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(True)
            optimizer = torch.optim.Adam(groups)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
            with MaskKeeper(pair.student, optimizer):
                for _ in range(epochs):
                    for index in torch.randperm(len(batches), generator=generator).tolist():
                        optimizer.zero_grad()
                        squares = pair.compare(batches[index], gradients=True)
                        share = {name: len(batches) * s / pair.sizes[name] ** 2 for name, s in squares.items()}
                        loss = pair.objective(share)
                        if not loss.requires_grad:
                            raise ValueError("the network's forward switches gradients off; distill needs them")
                        loss.backward()
                        optimizer.step()
                        schedule.step()
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None


def _groups(student: nn.Module, names: Iterable[str], rate: float) -> list[dict[str, Any]]:
    """Each layer's weight and bias with its own step; a layer that is all zero, or tied to one before, is left out."""
    modules, groups, seen = dict(student.named_modules()), [], set()
    for name in names:
        weight = modules[name].weight.detach()
        alive = weight[weight != 0]
        parameters = [p for p in modules[name].parameters(recurse=False) if id(p) not in seen]
        seen |= {id(parameter) for parameter in parameters}
        if len(alive) and parameters:
            groups.append({"params": parameters, "lr": rate * float(alive.double().square().mean().sqrt())})
    return groups


def _check_shared(model: nn.Module, student: nn.Module, names: Iterable[str]) -> None:
    dense, ours = dict(model.named_modules()), dict(student.named_modules())
    for name in names:
        theirs = tuple(dense[name].weight.shape)
        mine = tuple(ours[name].weight.shape) if isinstance(getattr(ours.get(name), "weight", None), Tensor) else None
        if mine != theirs:
            found = "has no such layer" if mine is None else f"has weights {mine}"
            raise ValueError(
                f"layer {name!r}: the dense network has weights {theirs}, the pruned one {found}; distill before "
                "compact or merge changes the shapes"
            )
