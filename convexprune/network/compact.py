"""Networks that really get smaller: channels that carry nothing are taken out of their modules and of their readers.

A channel goes where every reader either ignores it (zero weights) or gets the same number from it whatever the input;
that number folds into the reader's bias. It stays where a sum, a border of zeros or an unknown reader makes that
inexact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from convexprune.network.channels import ChannelGraph, Channels, unpadded
from convexprune.network.forward import check_model, copied, undisturbed
from convexprune.network.kinds import CONVOLUTIONS, FX_ENTRYWISE


@dataclass(frozen=True)
class Compaction:
    """What `compact` did.

    removed  module name -> channels taken out of its output
    left     what carries nothing and had to stay, and why
    """

    removed: dict[str, int]
    left: tuple[str, ...]
    parameters: tuple[int, int]  # before and after

    def __str__(self) -> str:
        """A few lines."""
        before, after = self.parameters
        share = f"{after / before:.1%}" if before else "-"
        lines = [f"parameters: {before:,} -> {after:,} ({share})"]
        lines += [f"  {name}: {count} channels removed" for name, count in self.removed.items()]
        return "\n".join([*lines, *(f"  left: {line}" for line in self.left)])


def compact(
    model: nn.Module, *, batches: Iterable[Any] | None = None, round_to: int = 1
) -> tuple[nn.Module, Compaction]:
    """A smaller copy of the model that computes the same function (in eval mode), and what was removed.

    batches   calibration data: channels that a ReLU never lets through on it count as constant too, which is exact on
              these data only; None: only what is constant whatever the input
    round_to  leave a multiple of so many channels

    The model itself is not changed. Raises ValueError where it cannot be traced by torch.fx, or round_to < 1.
    """
    if round_to < 1:
        raise ValueError(f"round_to is {round_to}; it must be at least 1")
    check_model(model)
    small = copied(model)
    data = None if batches is None else list(batches)
    removed: dict[str, int] = {}
    while True:  # a neuron that loses its last input is a constant itself
        graph = ChannelGraph(small, None if data is None else _silent(small, data))
        progress, left = False, []
        for channels in graph.groups:
            gone, why = _removable(graph, channels, round_to)
            if why:
                left.append(why)
            if len(gone):
                for name in channels.makers:
                    removed[name] = removed.get(name, 0) + len(gone)
                _take_out(graph, channels, gone)
                progress = True
                break  # the constants of everything behind have changed
        if not progress:
            break
    counts = tuple(sum(p.numel() for p in each.parameters()) for each in (model, small))
    return small, Compaction(removed, tuple(left), (counts[0], counts[1]))


def _removable(graph: ChannelGraph, channels: Channels, round_to: int) -> tuple[Tensor, str]:
    """The channels that can go, and what carries nothing but must stay."""
    none = torch.zeros(0, dtype=torch.long)
    can = torch.ones(channels.count, dtype=torch.bool)
    dead = torch.ones(channels.count, dtype=torch.bool)
    for reader in channels.readers:
        module = graph.modules[reader.module]
        source = graph.values[reader.node.all_input_nodes[0]]
        assert source is not None  # it has a reader
        silent = (module.weight.detach().transpose(0, 1).flatten(1) == 0).all(1)
        unread = silent.reshape(channels.count, -1).all(1).cpu()
        known = ~source.constant.isnan()
        everywhere = not isinstance(module, CONVOLUTIONS) or unpadded(module)
        exact = known if everywhere else known & (source.constant == 0)
        can &= unread | exact
        dead &= unread | known
    if not channels.readers or channels.frozen:
        stuck = int(dead.sum()) if channels.readers else 0
        return none, f"{stuck} channels of {', '.join(channels.makers)}: {channels.frozen}" if stuck else ""
    stuck = int((dead & ~can).sum())
    why = f"{stuck} channels of {', '.join(channels.makers)}: a constant meets a border of zeros" if stuck else ""
    gone = can.nonzero()[:, 0]
    spare = (channels.count - len(gone)) % round_to
    keep_more = (round_to - spare) % round_to
    if len(gone) == channels.count:
        keep_more = max(keep_more, 1)  # a module needs an output
    return gone[: max(len(gone) - keep_more, 0)], why


def _take_out(graph: ChannelGraph, channels: Channels, gone: Tensor) -> None:
    stays = torch.ones(channels.count, dtype=torch.bool)
    stays[gone] = False
    with torch.no_grad():
        for reader in channels.readers:
            module: Any = graph.modules[reader.module]
            source = graph.values[reader.node.all_input_nodes[0]]
            assert source is not None
            constant = torch.where(stays, 0.0, source.constant.nan_to_num())  # NaN only where the weights are 0
            wide = constant.repeat_interleave(reader.repeat)
            if bool((wide != 0).any()):
                kernel = module.weight.double().cpu()
                kernel = kernel.flatten(2).sum(2) if kernel.ndim > 2 else kernel
                shift = kernel @ wide
                old = torch.zeros_like(shift) if module.bias is None else module.bias.double().cpu()
                module.bias = nn.Parameter((old + shift).to(module.weight))
            columns = stays.repeat_interleave(reader.repeat)
            module.weight = nn.Parameter(module.weight[:, columns.to(module.weight.device)].clone())
            if isinstance(module, nn.Linear):
                module.in_features = module.weight.shape[1]
            else:
                module.in_channels = module.weight.shape[1]
        for name in (*channels.makers, *dict.fromkeys(channels.passers)):
            _narrow(graph.modules[name], stays)


def _narrow(module: Any, stays: Tensor) -> None:
    """Keep some of a module's outputs."""
    count = int(stays.sum())
    for key in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(module, key, None)
        if value is None:
            continue
        part = value.detach()[stays.to(value.device)].clone()
        if isinstance(value, nn.Parameter):
            setattr(module, key, nn.Parameter(part, requires_grad=value.requires_grad))
        else:
            setattr(module, key, part)
    if isinstance(module, nn.Linear):
        module.out_features = count
    elif isinstance(module, CONVOLUTIONS):
        if module.groups > 1:  # depthwise
            module.groups = module.in_channels = count
        module.out_channels = count
    else:
        module.num_features = count


class _Watch(fx.Interpreter):
    """Runs a traced model and remembers the largest output of each channel of each ReLU."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.largest: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        result = super().run_node(n)
        relu = (n.op == "call_module" and isinstance(self.fetch_attr(str(n.target)), nn.ReLU)) or (
            n.op == "call_function" and n.target in FX_ENTRYWISE and getattr(n.target, "__name__", "") == "relu"
        ) or (n.op == "call_method" and n.target in ("relu", "relu_"))  # fmt: skip
        if relu and isinstance(result, Tensor) and result.ndim > 1:
            top = result.detach().transpose(0, 1).flatten(1).amax(1).cpu()
            known = self.largest.get(n.name)
            self.largest[n.name] = top if known is None else torch.maximum(known, top)
        return result


def _silent(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """ReLU node -> (C,) bool: channels that are 0 on all the batches."""
    watch = _Watch(fx.GraphModule(model, fx.Tracer().trace(model)))
    with undisturbed(model), torch.no_grad():
        for batch in batches:
            watch.run(batch[0] if isinstance(batch, (tuple, list)) else batch)
    return {name: top <= 0 for name, top in watch.largest.items()}
