"""Capture: what each layer of a model reads over a calibration set, as Layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.layer import ACTIVATIONS, Layer
from convexprune.network.activation import activation
from convexprune.network.forward import Enough, check_batches, check_model, run, tensors_in, undisturbed
from convexprune.network.matrices import Stack, stack_of
from convexprune.network.moment_accumulator import Account
from convexprune.network.names import choose, stacks, suggestion
from convexprune.network.recording import Recorder
from convexprune.network.residual import repaired

Hook = Callable[[str, Stack, Tensor, Tensor], None]  # module name, its matrices, its input, its output


def capture(
    model: nn.Module,
    batches: Iterable[Any],
    names: Iterable[str] | str | None = None,
    *,
    dense: nn.Module | None = None,
    keep_inputs: bool = False,
    mask: Callable[[Any], Tensor] | None = None,
    positions: int | None = None,
    seed: int = 0,
    activations: Mapping[str, str | None] | None = None,
    calls: Sequence[Mapping[str, int]] | None = None,
    residual: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Layer]:
    """The layers of a model with the moments of their inputs, in forward order: one forward pass for each batch.

    model        left bit for bit as it was, also when it raises; run in eval mode, without gradients
    batches      tensors, or tuples and lists that begin with the input, or dicts of keyword arguments
    names        names and fnmatch patterns of Linears, convolutions, other kinds (`register_kind`); None: all called.
                 A grouped convolution "conv" is the layers "conv[0]", "conv[1]", ...
    dense        the targets y come from this network, the inputs x from `model` (a cascade); None: y = W x + b
    keep_inputs  keep the rows in Layer.inputs (and Layer.targets with `dense`), in the model's dtype
    mask         batch -> bool tensor (batch, tokens): only the rows where it is True count
    positions    at most so many output positions of each image of a convolution, drawn with `seed`
    activations  layer name -> "relu" or None, where what tracing finds is not what you want
    calls        how often each module is called in each batch (`count_calls`): a pass ends with the last call that
                 is wanted, where `activations` tell what is behind it
    residual     with `dense`: targets that also repair the other branch of the residual sum behind each layer
                 (`network.branches`); for layers that have one
    progress     called with the index of each batch when it is done

    Layers that read the same tensor share one `gram` array. A module called several times in a pass counts all the
    rows. Raises ValueError for names that mean no layer or a layer never called, for no batches, for a mask of the
    wrong shape and for non-finite inputs and weights; TypeError for integer weights and for batches of another kind.
    """
    check_model(model)
    _check_options(batches, positions)
    requests = choose(model, names)
    modules = {module: _stack(model, module) for pairs in requests.values() for module, _ in pairs}
    for name, stack in modules.items():
        _check_finite(name, stack.module)
    told = _told(model, activations)
    if dense is not None:
        _check_dense(dense, modules)
    wanted = {layer for pairs in requests.values() for _, layer in pairs}
    account, first, seen = Account(keep_inputs, positions, seed), None, False
    with undisturbed(model, *(() if dense is None else (dense,))):
        for index, batch in enumerate(batches):
            account.begin()
            last = None if calls is None else {name: calls[index].get(name, 0) for name in modules}
            targets = {} if dense is None else _outputs(dense, batch, modules, last)
            if dense is not None and residual:
                targets = repaired(dense, model, batch, targets)
            keep = None if mask is None else _mask(mask, batch)
            into = partial(_add, account, keep, None if dense is None else targets)
            if seen or wanted <= told.keys():
                _run_until(model, batch, modules, into, last)
            else:
                # hooked first, so that what the hooks do falls inside the layer's own step and is not recorded
                with _hooked(modules, into), Recorder(model) as recorder:
                    output = run(model, batch)
                first = recorder.record(output)
                del output
            seen = True
            account.end()
            _check_calls(account, targets)
            if progress is not None:
                progress(index)
    if not seen:
        raise ValueError("no batches; give at least one (an iterator that was used up before gives none)")
    _check_called(requests, account)
    found = {module: None if first is None else activation(first, module) for module in account.slots}
    layers: list[Layer] = []
    for module in account.slots:
        layers += _layers(module, modules[module], account, wanted, told, found[module])
    return [replace(layer, repairs=residual) for layer in layers]


def count_calls(model: nn.Module, batches: Iterable[Any], names: Iterable[str]) -> list[dict[str, int]]:
    """How often each of the modules `names` is called in each batch."""
    modules = {name: _stack(model, name) for name in names}
    counts: list[dict[str, int]] = []

    def count(name: str, _stack: Stack, _x: Tensor, _y: Tensor) -> None:
        counts[-1][name] = counts[-1].get(name, 0) + 1

    with undisturbed(model), _hooked(modules, count):
        for batch in batches:
            counts.append({})
            run(model, batch)
    return counts


def _layers(
    module: str, stack: Stack, account: Account, wanted: set[str], told: Mapping[str, str | None], found: str | None
) -> list[Layer]:
    totals, weights, biases = account.totals(module), stack.weights(), stack.biases()
    layers = []
    for group, name in enumerate(stack.names(module)):
        if name in wanted:
            parts = (totals.aimed, totals.inputs, totals.targets)
            aimed, inputs, targets = (None if part is None else part[group] for part in parts)
            behind = told.get(name, told.get(module, found))
            bias = None if biases is None else biases[group]
            layer = Layer.from_sums(weights[group], totals.read[group], bias, behind, name, aimed, inputs, targets)  # type: ignore[arg-type]
            layers.append(replace(layer, kernel=stack.kernel, module=module, group=group, groups=stack.groups))
    return layers


@contextmanager
def _hooked(modules: Mapping[str, Stack], hook: Hook) -> Iterator[None]:
    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not isinstance(output, Tensor):
            kind, made = type(module).__name__, type(output).__name__
            raise TypeError(f"layer {name!r}: a {kind} that returns a {made} is no layer; leave it out of `names`")
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
    left = None if last is None else sum(last.values())

    def counted(name: str, stack: Stack, x: Tensor, y: Tensor) -> None:
        nonlocal left
        hook(name, stack, x, y)
        if left is not None:
            left -= 1
            if left == 0:
                raise Enough

    with _hooked(modules, counted), suppress(Enough):
        run(model, batch)


def _outputs(
    dense: nn.Module, batch: Any, modules: Mapping[str, Stack], last: Mapping[str, int] | None
) -> dict[str, list[Tensor]]:
    # copies: a ReLU may overwrite the output in place
    outputs: dict[str, list[Tensor]] = {}

    def collect(name: str, _stack: Stack, _x: Tensor, y: Tensor) -> None:
        outputs.setdefault(name, []).append(y.detach().clone())

    _run_until(dense, batch, {name: _stack(dense, name) for name in modules}, collect, last)
    return outputs


def _stack(model: nn.Module, name: str) -> Stack:
    stack = stack_of(model.get_submodule(name))
    assert stack is not None  # by choose and _check_dense
    return stack


def _mask(mask: Callable[[Any], Tensor], batch: Any) -> Tensor:
    kept = mask(batch)
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        kind = kept.dtype if isinstance(kept, Tensor) else type(kept).__name__
        raise TypeError(f"mask returned {kind}; return a bool tensor, e.g. batch['attention_mask'].bool()")
    return kept


def _check_options(batches: Any, positions: int | None) -> None:
    check_batches(batches)
    if positions is not None and positions < 1:
        raise ValueError(f"positions is {positions}; it must be at least 1, or None for all")


def _check_finite(name: str, module: nn.Module) -> None:
    for key, parameter in module.named_parameters(recurse=False):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"layer {name!r}: its {key} holds NaN or inf; leave it out of `names`, or repair the model"
            )


def _check_dense(dense: nn.Module, modules: Mapping[str, Stack]) -> None:
    theirs = dict(dense.named_modules(remove_duplicate=False))
    for name, stack in modules.items():
        other = stack_of(theirs[name]) if name in theirs else None
        if other is None:
            raise ValueError(f"layer {name!r} is not in the dense network; {suggestion(name, stacks(dense))}")
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


def _check_called(requests: Mapping[str, list[tuple[str, str]]], account: Account) -> None:
    for request, pairs in requests.items():
        if not any(module in account.slots for module, _ in pairs):
            raise ValueError(
                f"{request!r}: no such layer was called in the forward pass (a module whose weights are used directly, "
                "as in nn.MultiheadAttention, cannot be captured)"
            )


def _told(model: nn.Module, activations: Mapping[str, str | None] | None) -> Mapping[str, str | None]:
    known = {name for module, stack in stacks(model).items() for name in (module, *stack.names(module))}
    for name, value in (activations or {}).items():
        if name not in known:
            raise ValueError(f"activations: {name!r} is no layer; {suggestion(name, sorted(known))}")
        if value not in ACTIVATIONS:
            raise ValueError(f"activations: {name!r} is {value!r}, not one of {ACTIVATIONS}")
    return activations or {}
