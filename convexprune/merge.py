"""Data-free neuron merging of whole networks: merge layer after layer, then remove the merged neurons.

Source: Srinivas, Babu, BMVC 2015.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from convexprune.network import Calibration, capture, compact, write
from convexprune.network.calibration import listed
from convexprune.network.channels import ChannelGraph, Channels
from convexprune.network.compare import output_change
from convexprune.network.forward import check_model, copied
from convexprune.network.kinds import FX_MONOTONE_NAMES, LINEARS, MONOTONE_NONEXPANSIVE
from convexprune.network.names import check_layers
from convexprune.options import flag, number, optional
from convexprune.problem import Solver, check_solver
from convexprune.problems import NeuronMerging, OptimalBrainSurgeon
from convexprune.report.merges import MergedLayer, MergeReport
from convexprune.solution import Status
from convexprune.solve import solve
from convexprune.solvers import GreedyMerging, Merges


@dataclass(frozen=True, eq=False)
class _Junction:
    """A Linear layer, and the Linear layers that read its outputs."""

    maker: str
    readers: tuple[str, ...]


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def merge(
    model: nn.Module,
    keep: float | int | Mapping[str, float | int] | None = None,
    *,
    max_saliency: float | None = None,
    names: Iterable[str] | None = None,
    batches: Iterable[Any] | None = None,
    refit: bool = False,
    solver: Solver | None = None,
) -> tuple[nn.Module, MergeReport]:
    """Merge similar neurons of Linear layers, and return a smaller copy of the model with a report.

    Neuron $j$ joins neuron $i$: the weights that read $j$ are added to those that read $i$, and $j$ leaves. Layers
    merge in forward order. The model itself is not changed.

    Args:
        model: The network; torch.fx must be able to trace it.
        keep: Number of neurons of a layer that survive: a fraction in (0, 1] (a float), a count (an int), or a mapping
            from layer names to either. None, without `max_saliency`, stops each layer at the published cut-off, the
            mode of the histogram of its saliencies.
        max_saliency: Largest total saliency of a layer; takes the place of `keep`.
        names: Layers whose neurons may merge. None means every Linear that only Linears read, through activations
            that are nondecreasing with slope at most 1.
        batches: Calibration data, optional. With them the saliencies use the Gram matrix of the inputs, and the
            report says how far the outputs moved.
        refit: Fit the weights of the readers to the batches by least squares, instead of adding weights up.
        solver: Solver of `NeuronMerging`; None takes `GreedyMerging()`.

    Returns:
        The smaller model, and a `convexprune.report.MergeReport` with the survivors and the saliency of each layer.

    Raises:
        ValueError: For names that cannot merge, a model that cannot be traced, `keep` together with `max_saliency`,
            and `refit` without batches.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> small, report = cp.merge(model, keep=0.5)
        >>> small[0].out_features, small[2].in_features
        (3, 3)
    """
    flag("refit", refit)
    if refit and batches is None:
        raise ValueError("refit needs batches: least squares want calibration data")
    if keep is not None and max_saliency is not None:
        raise ValueError("give keep or max_saliency, not both")
    for share in keep.values() if isinstance(keep, Mapping) else [] if keep is None else [keep]:
        _check_keep(share)
    optional(number(0))("max_saliency", max_saliency)
    if solver is not None:
        check_solver(solver)
    names = listed(names)
    check_model(model)
    check_layers(model)
    data = None if batches is None else list(Calibration.of(batches))
    small = copied(model)
    graph = ChannelGraph(small)
    junctions = _junctions(graph)
    wanted = _wanted(junctions, names, keep, graph.unfollowed)
    rows: list[MergedLayer] = []
    for junction in junctions:
        if junction.maker in wanted:
            rows.append(_merged(small, model, junction, keep, max_saliency, data, refit, solver))
    measured, size = (None, None) if data is None else output_change(model, small, data)
    small, compaction = compact(small)
    return small, MergeReport(tuple(rows), compaction, measured, size)


def _merged(
    small: nn.Module, model: nn.Module, junction: _Junction, keep: Any, max_saliency: float | None,
    data: list[Any] | None, refit: bool, solver: Solver | None,
) -> MergedLayer:  # fmt: skip
    """Merge the neurons of one layer in place."""
    maker: Any = small.get_submodule(junction.maker)
    readers: list[Any] = [small.get_submodule(name) for name in junction.readers]
    incoming = maker.weight.detach()
    if maker.bias is not None:
        incoming = torch.cat([incoming, maker.bias.detach()[:, None]], 1)
    outgoing = torch.cat([reader.weight.detach() for reader in readers])
    gram = None if data is None else capture(small, data, [junction.maker])[0].affine_gram_above
    count = len(incoming)
    whole = NeuronMerging(incoming, outgoing, keep=1, gram=gram)
    merges = GreedyMerging().merges(whole)
    if max_saliency is None:
        survivors = _survivors(keep, junction.maker, count, merges)
        problem = NeuronMerging(incoming, outgoing, keep=survivors, gram=gram)
    else:
        problem = NeuronMerging(incoming, outgoing, max_saliency=max_saliency, gram=gram)
    solution = solve(problem, solver)
    if solution.status in (Status.INFEASIBLE, Status.NUMERICAL) or solution.certificate.violation > 0:
        raise ValueError(f"layer {junction.maker!r}: the solver's answer is no merging: {solution.status.value}")
    x = solution.x
    stays = problem.survivors(x)
    gone = torch.ones(count, dtype=torch.bool)
    gone[stays] = False
    with torch.no_grad():
        merged, begin = problem.merged(x), 0
        for reader in readers:
            reader.weight.copy_(merged[begin : begin + len(reader.weight)])
            begin += len(reader.weight)
        if refit and data is not None:
            _refit(small, model, junction, gone, data)
        maker.weight[gone.to(maker.weight.device)] = 0
        if maker.bias is not None:
            maker.bias[gone.to(maker.bias.device)] = 0
    return MergedLayer(
        junction.maker, count, len(stays), float(problem.saliencies(x).sum()), problem.change(x), solution.certificate,
        tuple(merges.saliency.tolist()), merges.published_cutoff(), gram is not None,
    )  # fmt: skip


def _refit(small: nn.Module, model: nn.Module, junction: _Junction, gone: Tensor, data: list[Any]) -> None:
    for layer in capture(small, data, list(junction.readers), dense=model):
        removed = torch.zeros(tuple(layer.affine_weight.shape), dtype=torch.bool)
        removed[:, : len(gone)] = gone
        write(small, layer.name, solve(OptimalBrainSurgeon(layer, removed)).x)


def _survivors(keep: Any, name: str, count: int, merges: Merges) -> int:
    share = keep.get(name, 1.0) if isinstance(keep, Mapping) else keep
    if share is None:
        return max(count - merges.published_cutoff(), 1)
    return min(share, count) if isinstance(share, int) else max(1, math.floor(share * count + 0.5))


def _check_keep(share: Any) -> None:
    one = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not one or not (0 < share <= 1 if isinstance(share, float) else share >= 1):
        raise ValueError(f"keep is {share!r}; it must be a fraction in (0, 1] (a float) or a count >= 1 (an int)")


def _wanted(
    junctions: list[_Junction], names: Iterable[str] | None, keep: Any, unfollowed: Mapping[str, str]
) -> set[str]:
    able = [junction.maker for junction in junctions]
    if not able:
        reasons = ["there is no Linear that only Linears read, through covered activations", *unfollowed.values()]
        raise ValueError(f"no layer can merge: {'; '.join(reasons)}")
    chosen = set(able if names is None else [names] if isinstance(names, str) else names)
    if names is None and isinstance(keep, Mapping):
        chosen = set(keep)
    if not chosen:
        raise ValueError(f"no layer is named; leave `names` out to merge {', '.join(map(repr, able))}")
    for name in chosen | (set(keep) if isinstance(keep, Mapping) else set()):
        if name not in able:
            why = f" ({unfollowed[name]})" if name in unfollowed else ""
            raise ValueError(f"the neurons of {name!r} cannot merge{why}; those of {', '.join(map(repr, able))} can")
    return chosen


def _junctions(graph: ChannelGraph) -> list[_Junction]:
    found = []
    for channels in graph.groups:
        if not channels.frozen and len(channels.makers) == 1 and not channels.passers and channels.readers:
            maker = channels.makers[0]
            if isinstance(graph.modules[maker], LINEARS) and _read_by_linears(graph, channels, maker):
                readers = tuple(dict.fromkeys(reader.module for reader in channels.readers))
                found.append(_Junction(maker, readers))
    return found


def _read_by_linears(graph: ChannelGraph, channels: Channels, maker: str) -> bool:
    paths = set()
    for reader in channels.readers:
        if not isinstance(graph.modules[reader.module], LINEARS) or reader.repeat != 1:
            return False
        node, path = reader.node.all_input_nodes[0], []
        while str(node.target) != maker or node.op != "call_module":
            if not _covered(graph, node):
                return False
            path.append(node)
            node = node.all_input_nodes[0]
        paths.add(tuple(path))
    return len(paths) == 1  # every reader sees the same function of the neurons


def _covered(graph: ChannelGraph, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = graph.modules[str(node.target)]
        # a Softplus jumps at its threshold, by log(1 + exp(-threshold)) / beta
        smooth = getattr(module, "threshold", 20) >= 20
        return (
            isinstance(module, (*MONOTONE_NONEXPANSIVE, nn.Dropout))
            and abs(getattr(module, "negative_slope", 0)) <= 1
            and smooth
        )
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    slope = node.kwargs.get("negative_slope", 0.01)
    if name == "softplus":
        return len(node.args) + len(node.kwargs) == 1
    return name in FX_MONOTONE_NAMES and (name != "leaky_relu" or (len(node.args) == 1 and 0 <= float(slope) <= 1))  # type: ignore[arg-type]
