"""Capture: what each layer of a model reads over a calibration set, as Layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.layer import ACTIVATIONS, Layer
from convexprune.network.blocks import Stream
from convexprune.network.calibration import Calibration, Mask
from convexprune.network.expansion import Routes, expanded
from convexprune.network.forward import Enough, check_model, check_untransformed, numbered, run, tensors_in, undisturbed
from convexprune.network.matrices import Stack
from convexprune.network.memory import check_grams
from convexprune.network.moment_accumulator import Account
from convexprune.network.names import choose, stacks, suggestion
from convexprune.network.recording import Recorder
from convexprune.network.residual import repaired
from convexprune.network.survey import Survey
from convexprune.options import flag

DAMPING: Final = 0.01  # of an expert with fewer samples than inputs, as a fraction of the mean diagonal
Hook = Callable[[str, Stack, Tensor, Tensor], None]  # module name, its matrices, its input, its output


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def capture(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    names: Iterable[str] | str | None = None,
    *,
    dense: nn.Module | None = None,
    keep_inputs: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Layer]:
    """The layers of a model with the moments of their inputs, in forward order: one forward pass for each batch.

    Layers that read the same tensor share one `gram` array. A module called several times in a pass counts all the
    rows. A grouped convolution "conv" is the layers "conv[0]", "conv[1]", ...

    Args:
        model: left bit for bit as it was, also when it raises; run in eval mode, without gradients.
        batches: a `Calibration`, or its batches alone.
        names: which layers, as in `Calibration`, where that does not say.
        dense: the targets y come from this network, the inputs x from `model` (a cascade); None: y = W x + b.
        keep_inputs: keep the rows in Layer.inputs (and Layer.targets with `dense`), in the model's dtype.
        progress: called with the index of each batch when it is done.

    Returns:
        The layers; weights (out, in) in float64, a convolution as a matrix, in = channels / groups * kernel size.

    Raises:
        ValueError: for names that mean no layer or a layer never called, for no batches, for a mask of the wrong shape
            and for non-finite inputs and weights.
        TypeError: for integer weights and for batches of another kind.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
        >>> (layer,) = capture(model, [torch.ones(5, 3)])
        >>> layer.name, layer.activation, layer.samples
        ('0', 'relu', 5)
    """
    check_model(model)
    calibration = Calibration.of(batches, names)
    chosen = choose(model, calibration.names)
    check_grams(chosen.stacks)
    if dense is not None:
        check_model(dense, "the dense network")
    flag("keep_inputs", keep_inputs)
    told = told_activations(model, calibration)
    gathering = Gathering(model, chosen.stacks, calibration, keep_inputs or bool(calibration.keep_inputs), dense)
    found = Survey(chosen.stacks)
    account = gathering.run(survey=found, tell=progress)
    chosen.check_called(found.order)
    behind = {**found.activations, **told}
    return [
        layer for name in found.order for layer in layers_of(name, chosen.stacks[name], account, chosen.layers, behind)
    ]


@dataclass(frozen=True, eq=False)
class Gathering:
    """One pass over the batches that adds up what some layers read and aim at.

    What is a network here may be a part of one, with what it reads as the batches.

    stacks    module name -> its matrices, of the layers that are gathered
    keep      whether the rows are kept: of all of them, or of those named
    dense     the targets come from this network; None: from the layers themselves
    calls     how often each module is called in a batch: the pass ends with the last call that is wanted
    residual  with `dense`: targets that also repair the other branch of the residual sum behind each layer
              (`network.residual`); for layers that have one
    streams   of the networks, whose finished blocks do not run
    """

    model: nn.Module
    stacks: Mapping[str, Stack]
    calibration: Calibration
    keep: bool | Collection[str] = False
    dense: nn.Module | None = None
    calls: Mapping[str, int] | None = None
    residual: bool = False
    streams: Sequence[Stream] = ()

    def __post_init__(self) -> None:
        if self.dense is not None:
            _check_dense(self.dense, self.stacks)

    def run(self, survey: Survey | None = None, tell: Callable[[int], None] | None = None) -> Account:
        """Make the pass. `survey` is told what each batch did, `tell` the number of each batch."""
        keep = self.stacks if self.keep is True else self.keep or ()
        account = Account(keep, self.calibration.positions, self.calibration.seed)
        with self._opened() as routes:
            for index, batch in enumerate(self.calibration):
                with numbered(index), ExitStack() as finished:
                    for stream in self.streams:
                        finished.enter_context(stream.at(index))
                    self._take(account, batch, survey)
                routes.clear()
                if tell is not None:
                    tell(index)
        return account

    @contextmanager
    def _opened(self) -> Iterator[Routes]:
        """Ready to be watched. With a dense network the tokens go to the experts that they go to there."""
        routes: Routes = {}
        if self.dense is None:
            with undisturbed(self.model), expanded(self.model):
                yield routes
        else:
            both = undisturbed(self.model, self.dense)
            with both, expanded(self.dense, noted=routes), expanded(self.model, followed=routes):
                yield routes

    def _take(self, account: Account, batch: Any, survey: Survey | None) -> None:
        account.begin()
        targets = self._targets(batch)
        mask = None if self.calibration.mask is None else _mask(self.calibration.mask, batch)
        into = partial(_add, account, mask, targets)
        if survey is None:
            _run_until(self.model, batch, self.stacks, into, self.calls)
        else:
            # hooked first, so that what the hooks do falls inside the layer's own step and is not recorded
            with _hooked(self.stacks, into), Recorder(self.model) as recorder:
                output = run(self.model, batch)
            survey.add(recorder.record(output, self.calibration.output), batch)
        account.end()
        _check_calls(account, targets or {})

    def _targets(self, batch: Any) -> dict[str, list[Tensor]] | None:
        """What the layers aim at, call by call; None where they aim at their own outputs."""
        if self.dense is None:
            return None
        outputs: dict[str, list[Tensor]] = {}

        def collect(name: str, _stack: Stack, _x: Tensor, y: Tensor) -> None:
            outputs.setdefault(name, []).append(y.detach().clone())  # a ReLU may overwrite the output in place

        known = stacks(self.dense)
        twins = {name: known[name] for name in self.stacks}
        _run_until(self.dense, batch, twins, collect, self.calls)
        return repaired(self.dense, self.model, batch, outputs) if self.residual else outputs


def layers_of(
    module: str,
    stack: Stack,
    account: Account,
    wanted: Collection[str],
    behind: Mapping[str, str | None],
    residual: bool = False,
) -> list[Layer]:
    """The gathered layers of a module, one for each of its groups that is wanted.

    behind  layer or module name -> the activation behind it
    """
    totals, weights, biases = account.totals(module), stack.weights(), stack.biases()
    layers = []
    for group, name in enumerate(stack.names(module)):
        if name in wanted:
            layer = Layer.from_sums(
                weights[group],
                totals.read[group],
                bias=None if biases is None else biases[group],
                activation=behind.get(name, behind.get(module)),
                name=name,
                aimed=None if totals.aimed is None else totals.aimed[group],
                inputs=None if totals.inputs is None else totals.inputs[group],
                targets=None if totals.targets is None else totals.targets[group],
            )
            if stack.routed and layer.inputs is None and layer.samples < stack.width:
                layer = layer.damped(DAMPING)
            layers.append(
                replace(layer, kernel=stack.kernel, repairs=residual, module=module, group=group, groups=stack.groups)
            )
    return layers


def told_activations(model: nn.Module, calibration: Calibration) -> Mapping[str, str | None]:
    """The activations that the calibration tells; raises ValueError for a name that is no layer's."""
    known = {name for module, stack in stacks(model).items() for name in (module, *stack.names(module))}
    for name, value in calibration.activations.items():
        if name not in known:
            raise ValueError(f"activations: {name!r} is no layer; {suggestion(name, sorted(known))}")
        if value not in ACTIVATIONS:
            raise ValueError(f"activations: {name!r} is {value!r}, not one of {ACTIVATIONS}")
    return calibration.activations


@contextmanager
def _hooked(modules: Mapping[str, Stack], hook: Hook) -> Iterator[None]:
    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(output, Tensor):
            kind, made = type(module).__name__, type(output).__name__
            raise TypeError(f"layer {name!r}: a {kind} that returns a {made} is no layer; leave it out of `names`")
        check_untransformed(name, args, kwargs, output)
        hook(name, modules[name], next(tensors_in((args, kwargs))), output)

    with ExitStack() as handles:
        for name, stack in modules.items():
            handle = stack.module.register_forward_hook(partial(after, name), with_kwargs=True)
            handles.callback(handle.remove)
        yield


def _add(
    account: Account, mask: Tensor | None, targets: Mapping[str, list[Tensor]] | None, name: str, stack: Stack,
    x: Tensor, y: Tensor,
) -> None:  # fmt: skip
    dense = None
    if targets is not None:
        call, given = account.calls(name), targets.get(name, [])
        if call >= len(given):
            raise ValueError(f"layer {name!r} is called more often in the model than in the dense network")
        dense = given[call]
    account.add(name, stack, x, y, dense, mask)


def _run_until(
    model: nn.Module, batch: Any, modules: Mapping[str, Stack], hook: Hook, last: Mapping[str, int] | None
) -> None:
    """Run a batch, as far as the last call that is wanted where `last` says how many there are of each module."""
    left = None if last is None else sum(last.get(name, 0) for name in modules)

    def counted(name: str, stack: Stack, x: Tensor, y: Tensor) -> None:
        nonlocal left
        hook(name, stack, x, y)
        if left is not None:
            left -= 1
            if left == 0:
                raise Enough

    with _hooked(modules, counted), suppress(Enough):
        run(model, batch)


def _mask(mask: Mask, batch: Any) -> Tensor:
    kept = mask(batch)
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        kind = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise TypeError(f"mask returned {kind}; return a bool tensor, e.g. batch['attention_mask'].bool()")
    return kept


def _check_dense(dense: nn.Module, modules: Mapping[str, Stack]) -> None:
    theirs = stacks(dense)
    for name, stack in modules.items():
        other = theirs.get(name)
        if other is None:
            raise ValueError(f"layer {name!r} is not in the dense network; {suggestion(name, theirs)}")
        mine, its = tuple(stack.weight.shape), tuple(other.weight.shape)
        if mine != its:
            raise ValueError(f"layer {name!r} has weights of shape {mine} in the model, {its} in the dense network")


def _check_calls(account: Account, targets: Mapping[str, list[Tensor]]) -> None:
    for name, outputs in targets.items():
        if len(outputs) != account.calls(name):
            raise ValueError(
                f"layer {name!r} is called {account.calls(name)} times in the model and {len(outputs)} times in the "
                "dense network"
            )
