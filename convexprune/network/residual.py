"""Find the other branch of the residual sum behind a layer, and the targets that compensate that branch's error.

Let s be the scale and t the shift of a batch norm between the layer and the sum (1 and 0 without one), b the other
branch of the dense network, and b' the same branch after pruning. Then

    s y + t + b = s y' + t + b'    for    y' = y + (b - b') / s

so a layer with the targets y' in place of y compensates the error of the other branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from convexprune.network.forward import Enough, run
from convexprune.network.kinds import ADDITIONS, BATCH_NORMS, DROPOUT, DROPOUT_MODULES, batch_norm_scale
from convexprune.network.recording import Record

FAINT: Final = 1e-3  # a channel whose scale is below this fraction of the largest can repair nothing


def summed(record: Record, layer: str) -> bool:
    """True if the output goes only into a sum of two tensors of one shape, through at most batch norm and dropout."""
    made = [number for step in record.steps if step.layer == layer for number in step.makes]
    return bool(made) and all(_into_sum(record, number) for number in made)


def _into_sum(record: Record, number: int) -> bool:
    readers = [step for step in record.steps if number in step.reads]
    if len(readers) != 1 or number in record.results:
        return False
    (step,) = readers
    if step.operation in ADDITIONS and len(step.reads) == 2:
        return step.even and step.reads[0] != step.reads[1]
    passes = step.operation == "batch_norm" or step.operation in DROPOUT
    return passes and len(step.makes) == 1 and _into_sum(record, step.makes[0])


def repaired(
    dense: nn.Module, model: nn.Module, batch: Any, targets: Mapping[str, list[Tensor]]
) -> dict[str, list[Tensor]]:
    """The targets y' of layers that are `summed`, from the dense network's outputs y, call by call."""
    calls = {name: len(outputs) for name, outputs in targets.items()}
    theirs, ours = _branches(dense, batch, calls), _branches(model, batch, calls)
    return {
        name: [
            y + _over(b.to(y) - b_now.to(y), s)
            for y, (b, s), (b_now, _) in zip(outputs, theirs[name], ours[name], strict=True)
        ]
        for name, outputs in targets.items()
    }


def _over(change: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return change
    scale = scale.to(change).reshape(-1, *(1,) * (change.ndim - 2))  # channels are the second axis
    strong = scale.abs() > FAINT * scale.abs().max()
    return torch.where(strong, change / torch.where(strong, scale, 1.0), 0.0)


Branch = tuple[Tensor, Tensor | None]  # the other operand of the sum, and the norm's scale of each channel


def _branches(model: nn.Module, batch: Any, calls: Mapping[str, int]) -> dict[str, list[Branch]]:
    watch = _Watch(model, calls)
    with suppress(Enough), watch:
        run(model, batch)
    for name, count in calls.items():
        if len(watch.found[name]) != count:
            raise ValueError(
                f"layer {name!r}: {len(watch.found[name])} residual sums in a batch for {count} calls; prune with "
                'mode="cascade"'
            )
    return watch.found


class _Watch(TorchFunctionMode):
    """Follows the outputs of layers to the sums that they go into."""

    def __init__(self, model: nn.Module, calls: Mapping[str, int]) -> None:
        super().__init__()
        self.model, self.left = model, sum(calls.values())
        self.found: dict[str, list[Branch]] = {name: [] for name in calls}
        self._followed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor -> (layer, scale)
        self._hooks = ExitStack()

    def __enter__(self) -> _Watch:
        with ExitStack() as hooks:
            for name, module in self.model.named_modules():
                if name in self.found:
                    hooks.callback(module.register_forward_hook(self._begun(name)).remove)
                elif isinstance(module, (*BATCH_NORMS, *DROPOUT_MODULES, nn.Identity)):
                    hooks.callback(module.register_forward_hook(self._passed).remove)
            self._hooks = hooks.pop_all()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _begun(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            self._followed[output] = (name, None)

        return hook

    def _passed(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        before = self._followed.get(args[0]) if args and isinstance(args[0], Tensor) else None  # type: ignore[no-untyped-call]
        if before is None:
            return
        name, scale = before
        own = batch_norm_scale(module) if isinstance(module, BATCH_NORMS) else None
        if own is not None:
            scale = own if scale is None else scale * own
        self._followed[output] = (name, scale)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; if it adds a followed tensor, keep the other operand."""
        kwargs = kwargs or {}
        enough = False
        if getattr(func, "__name__", "").strip("_") in ADDITIONS and kwargs.get("alpha", 1) == 1:
            pair = [value for value in args[:2] if isinstance(value, Tensor)]
            marks = [self._followed.get(tensor) for tensor in pair]  # type: ignore[no-untyped-call]
            if len(pair) == 2 and (marks[0] is None) != (marks[1] is None):
                at = 0 if marks[1] is None else 1
                name, scale = marks[at]
                other = pair[1 - at].detach()
                self.found[name].append((other.expand_as(pair[at]).clone(), scale))
                self.left -= 1
                enough = self.left == 0
        if enough:
            raise Enough
        return func(*args, **kwargs)
