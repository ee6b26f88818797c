"""Make a network smaller: remove channels that carry nothing from the modules that make them and those that read them.

A channel can be removed if every reader either ignores it (zero weights) or gets the same number from it for every
input; that number is added to the reader's bias. The channel stays where a sum, a border of zeros or an unknown reader
would make the removal inexact.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from convexprune.network.calibration import Calibration, listed
from convexprune.network.channels import ChannelGraph, Channels, unpadded
from convexprune.network.forward import check_model, copied, numbered, run, undisturbed
from convexprune.network.kinds import CONVOLUTIONS, FX_ENTRYWISE, LINEARS
from convexprune.network.names import check_layers
from convexprune.network.parts import check_part
from convexprune.network.sizes import mark
from convexprune.network.tracing import traced
from convexprune.options import whole


@dataclass(frozen=True)
class Compaction:
    """The channels that `compact` removed, and those that it had to leave.

    Attributes:
        removed: Number of channels removed from the output of each module, by its name.
        left: Channels that carry nothing but had to stay, with the reason.
        parameters: Number of parameters before and after.
    """

    removed: dict[str, int]
    left: tuple[str, ...]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        """A few lines."""
        before, after = self.parameters
        share = f"{after / before:.1%}" if before else "-"
        lines = [f"parameters: {before:,} -> {after:,} ({share})"]
        lines += [f"  {name}: {count} channels removed" for name, count in self.removed.items()]
        return "\n".join([*lines, *(f"  left: {line}" for line in self.left)])


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def compact(
    model: nn.Module, *, batches: Iterable[Any] | None = None, round_to: int = 1, parts: Iterable[str] | None = None
) -> tuple[nn.Module, Compaction]:
    """Remove the channels that carry nothing, and return a smaller copy that computes the same function.

    The function is the same in evaluation mode. The model itself is not changed. `save` keeps the copy, and `load`
    takes the dense network for it.

    Args:
        model: The network; torch.fx must be able to trace it, or its `parts`.
        batches: Calibration data, optional. With them a channel whose ReLU is 0 on all batches also counts as
            constant: the copy is then exact on these batches only.
        round_to: Leave a multiple of this number of channels in each module.
        parts: Names of submodules, such as the blocks' MLPs, each of which is traced by itself where the model cannot
            be. What lies between their layers gets smaller. Nothing outside may call these layers or read their
            weights; this is not checked.

    Returns:
        The smaller model, and a `convexprune.network.compact.Compaction` that lists the removed channels.

    Raises:
        ValueError: If the model, or a part, cannot be traced, if a part is not there or shares weights with what is
            outside of it, for `batches` together with `parts`, or if `round_to` is below 1.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> with torch.no_grad():
        ...     _ = model[2].weight[:, :2].zero_()  # nothing reads neurons 0 and 1
        >>> small, compaction = cp.compact(model)
        >>> print(compaction)
        parameters: 44 -> 30 (68.2%)
          0: 2 channels removed
    """
    whole(1)("round_to", round_to)
    check_model(model)
    check_layers(model)
    named = [parts] if isinstance(parts, str) else listed(parts)
    if named is not None and batches is not None:
        raise ValueError("give batches or parts, not both: a part is not run by itself")
    data = None if batches is None else list(Calibration.of(batches))
    small = copied(model)
    removed: dict[str, int] = {}
    left: list[str] = []
    for name in [""] if named is None else named:
        if named is not None:
            check_part(small, name)
        gone, stuck = _shrunk(small.get_submodule(name), data, round_to)
        removed |= {".".join(filter(None, (name, module))): count for module, count in gone.items()}
        left += [f"{name}: {why}" if name else why for why in stuck]
    mark(small, model)
    counts = tuple(sum(p.numel() for p in each.parameters()) for each in (model, small))
    return small, Compaction(removed, tuple(left), (counts[0], counts[1]))


def _shrunk(model: nn.Module, data: list[Any] | None, round_to: int) -> tuple[dict[str, int], list[str]]:
    """Remove channels in place: how many of each module, and why others had to stay."""
    removed: dict[str, int] = {}
    while True:  # a neuron that loses its last input becomes a constant
        graph = ChannelGraph(model, None if data is None else _silent(model, data))
        progress, left = False, list(graph.unfollowed.values())
        for channels in graph.groups:
            gone, why = _removable(graph, channels, round_to)
            if why:
                left.append(why)
            if len(gone):
                for name in channels.makers:
                    removed[name] = removed.get(name, 0) + len(gone)
                _take_out(graph, channels, gone)
                progress = True
                break  # all later constants have changed
        if not progress:
            return removed, left


def _removable(graph: ChannelGraph, channels: Channels, round_to: int) -> tuple[Tensor, str]:
    """The channels that can be removed, and a sentence about those that carry nothing but must stay."""
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
            if isinstance(module, LINEARS):
                module.in_features = module.weight.shape[1]
            else:
                module.in_channels = module.weight.shape[1]
        for name in (*channels.makers, *dict.fromkeys(channels.passers)):
            _narrow(graph.modules[name], stays)


def _narrow(module: Any, stays: Tensor) -> None:
    """Keep the outputs of a module where `stays` is True."""
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
    if isinstance(module, LINEARS):
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
            if not bool(top.isfinite().all()):
                raise ValueError(f"{n.name} makes NaN or inf; check the calibration data")
            known = self.largest.get(n.name)
            self.largest[n.name] = top if known is None else torch.maximum(known, top)
        return result


class _Watched(nn.Module):
    """The traced model, watched; called as the model is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.traced = fx.GraphModule(model, traced(model))
        self.watch = _Watch(self.traced)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        given = inspect.signature(self.traced.forward).bind(*args, **kwargs)
        given.apply_defaults()
        return self.watch.run(*given.arguments.values())


def _silent(model: nn.Module, batches: list[Any]) -> dict[str, Tensor]:
    """ReLU node -> (C,) bool: channels that are 0 on all the batches."""
    watched = _Watched(model)
    with undisturbed(model):
        for index, batch in enumerate(batches):
            with numbered(index):
                run(watched, batch)
    return {name: top <= 0 for name, top in watched.watch.largest.items()}
