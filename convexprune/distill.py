"""Distillation without labels: train the surviving weights of all layers towards the dense network's activations.

    minimise over the nonzero weights   ||Yhat - Y||_F^2 / ||Y||_F^2  +  h/L sum_l ||Yhat_l - Y_l||_F^2 / ||Y_l||_F^2

Y are the dense network's outputs on the calibration samples, Y_l the outputs of its layer l (of L); h weighs these
hints. In `prune` each layer takes the layers after it as they are; here all layers move together. The problem is not
convex and has no certificate; errors are measured.
Source: Romero et al., FitNets, ICLR 2015; Hinton, Vinyals, Dean, 2015.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.network import Calibration, MaskKeeper, capture
from convexprune.network.compare import behind, hooked, norms, rectified_modules
from convexprune.network.forward import check_eager, check_model, copied, differentiable, run, undisturbed
from convexprune.network.names import stacks
from convexprune.network.outputs import Which, output_of
from convexprune.network.projections import weight_name
from convexprune.network.weights import check_stored
from convexprune.options import between, number, whole
from convexprune.options import seed as check_seed

WHOLE: Final = ""  # the network's output among the layers' names: the root module's


@dataclass(frozen=True)
class Distilled:
    """The relative errors before and after distillation, on the calibration samples.

    Attributes:
        outputs: Error of the network's output before and after; None if the output is not one tensor.
        layers: Error of each module before and after, behind its ReLU if only a ReLU reads the module.
        objective: Value of the objective before and after.
        steps: Number of gradient steps.
        seconds: Time that the whole call took.
        note: Why the network was left as it was; empty if it was not.
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


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
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
    r"""Train the nonzero weights of a pruned network to imitate the dense one; zeros stay zero, labels are not needed.

    $$ \min \; \|\hat Y - Y\|_F^2 / \|Y\|_F^2 + \frac hL \sum_l \|\hat Y_l - Y_l\|_F^2 / \|Y_l\|_F^2 $$

    over the nonzero weights; $Y$ are the dense network's outputs, $Y_l$ those of its layer $l$, hats mark the pruned
    network. Both networks run in evaluation mode: dropout is off and batch norm keeps its statistics. If the steps
    made the objective larger, the copy is `pruned` as it was, and the note says so. The result has no certificate.

    Args:
        model: The dense network.
        pruned: The pruned network, with modules of the same names and shapes; it is not changed.
        batches: Calibration data; each batch is one step of Adam.
        names: Layers that move and are compared, as in `prune`; None takes all.
        epochs: Number of passes over the batches.
        hints: The weight $h$ of the layers' own outputs; 0 compares the network's outputs only.
        rate: Adam's first step size, relative to the root mean square of a layer's nonzero weights. The step size
            falls to 0 along a cosine.
        seed: Seed of the order of the batches in each epoch.

    Returns:
        The trained copy of `pruned`, and a `Distilled` with the errors before and after.

    Raises:
        ValueError: For numbers out of range, and for layers that the two networks do not share.
        ValueError: For networks in float16, and where the two networks call a layer a different number of times.
        TypeError: If the batches are not an iterable of batches, and for options that are no numbers.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(64, 8)
        >>> pruned, report = cp.prune(model, [x], lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)))
        >>> better, distilled = cp.distill(model, pruned, [x], epochs=20)
        >>> before, after = distilled.objective
        >>> after <= before, int((better[0].weight != 0).sum())
        (True, 32)
    """
    check_model(model)
    check_model(pruned, "the pruned model")
    check_eager(pruned)
    whole(1)("epochs", epochs)
    between(0, 1)("rate", rate)
    number(0)("hints", hints)
    check_seed("seed", seed)
    begun = time.perf_counter()
    model, calibration = differentiable(model), Calibration.of(batches, names)
    batches = list(calibration)
    layers = capture(model, batches[:1], calibration.names)
    rectified = rectified_modules(layers)
    student = copied(pruned)
    _check_shared(model, student, rectified)
    pair = _Pair(model, student, batches, rectified, float(hints), calibration.output)
    if not pair.sizes or (hints == 0 and WHOLE not in pair.sizes):
        where = "all that is watched is zero" if hints else "hints is 0, and the output is no tensor, or is zero"
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
    """The two networks, and the modules whose outputs are compared."""

    def __init__(
        self, model: nn.Module, student: nn.Module, batches: list[Any], rectified: Mapping[str, bool], hints: float,
        which: Which,
    ) -> None:  # fmt: skip
        self.model, self.student, self.rectified, self.hints, self.which = model, student, rectified, hints, which
        sizes, whole = norms(model, batches, rectified, which)
        self.sizes = {name: size for name, size in {**sizes, WHOLE: whole or 0.0}.items() if size > 0}

    def compare(self, batch: Any, gradients: bool) -> dict[str, Tensor]:
        """module -> || Yhat_l - Y_l ||_F^2 on a batch; both networks are run."""
        with self._outputs_of(self.model) as dense:
            theirs = output_of(run(self.model, batch), self.which)
        with self._outputs_of(self.student) as own:
            ours = output_of(run(self.student, batch, gradients), self.which)
        found: dict[str, Tensor] = {}
        for name in self.rectified:
            if len(own[name]) != len(dense[name]):
                raise ValueError(
                    f"layer {name!r} is called {len(own[name])} times in the pruned network and {len(dense[name])} "
                    "times in the dense one: the two take different ways, and cannot be compared"
                )
            for made, aim in zip(own[name], dense[name], strict=True):
                if gradients and not made.requires_grad:
                    raise ValueError(
                        f"layer {name!r} runs without gradients, which distill needs (checkpointing by reentrant "
                        "autograd, or a forward under no_grad?); give use_reentrant=False, or leave it out of `names`"
                    )
                change = behind(made, self.rectified[name]) - behind(aim, self.rectified[name])
                found[name] = found.get(name, 0) + change.square().sum(dtype=torch.float64)
        if WHOLE in self.sizes and ours is not None and theirs is not None:
            found[WHOLE] = (ours - theirs).square().sum(dtype=torch.float64)
        return {name: found[name] for name in self.sizes if name in found}

    @contextmanager
    def _outputs_of(self, network: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
        """What each layer makes, call by call. Nothing else is done in the pass: a checkpoint makes it again."""
        made: dict[str, list[Tensor]] = {name: [] for name in self.rectified}

        def keep(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            made[name].append(output.clone())  # what comes next may be in place

        with hooked(network, self.rectified, keep):
            yield made

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
    """Train the student's layers by Adam; zeros stay zero."""
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
            with MaskKeeper(pair.student, optimizer, _masks(pair)):
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


def _masks(pair: _Pair) -> dict[str, Tensor]:
    """The nonzeros of all layers by the names of their weights."""
    layers = stacks(pair.student)
    return {weight_name(name, stack): stack.parameters[0].detach() != 0 for name, stack in layers.items()}


def _groups(student: nn.Module, names: Iterable[str], rate: float) -> list[dict[str, Any]]:
    """Each layer's weight and bias with its own step; a layer that is all zero, or tied to one before, is left out."""
    layers, groups, seen = stacks(student), [], set()
    for name in names:
        weight = layers[name].weight.detach()
        alive = weight[weight != 0]
        stack = layers[name]
        own = stack.module.parameters(recurse=False) if stack.owner is stack.module else stack.parameters
        parameters = [p for p in own if p is not None and id(p) not in seen]
        seen |= {id(parameter) for parameter in parameters}
        if len(alive) and parameters:
            groups.append({"params": parameters, "lr": rate * float(alive.double().square().mean().sqrt())})
    return groups


def _check_shared(model: nn.Module, student: nn.Module, names: Iterable[str]) -> None:
    dense, ours = stacks(model), stacks(student)
    for name in names:
        theirs = tuple(dense[name].weight.shape)
        mine = tuple(ours[name].weight.shape) if name in ours else None
        if mine != theirs:
            found = "has no such layer" if mine is None else f"has weights {mine}"
            raise ValueError(
                f"layer {name!r}: the dense network has weights {theirs}, the pruned one {found}; distill before "
                "compact or merge changes the shapes"
            )
        check_stored(name, ours[name])
        own, other = ours[name].weight.dtype, dense[name].weight.dtype
        if own != other:
            raise ValueError(f"layer {name!r} is {other} in the dense network, {own} in the pruned one; convert one")
        if own == torch.float16:
            raise ValueError(
                f"layer {name!r} is {own}, in which the squares of small gradients vanish; distill in float32: "
                "convert both networks and the batches by .float(), and the result back by .half()"
            )
