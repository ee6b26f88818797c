"""The layers' own errors carried along the real graph to the network's output: before the pruned network is run.

Every tensor D that a forward pass made carries bounds of its change over the calibration samples, here by ||D||_F:

    a layer           parallel  e_out <= E + gain(What) e_in        E: its own error on the dense inputs
                      cascade   e_out <= E                          E: its error against the dense outputs
                      unjudged  e_out <= gain(W) e_in
    batch norm        e_out <= max |s| e_in
    a sum             e_out <= e_1 + e_2    residual mode, if one of the two repairs the other:  its E alone
    1-Lipschitz       e_out <= e_in       activations, reshapings, slices, padding
    a mean over P     e_out <= e_in / sqrt(P)      also over each of many disjoint windows

`bounds.propagation` has the rules for layers and norms: by Frobenius norms, by spectral norms, channel by channel.
What is not in this list stops the chain, by name. Source: the triangle inequality; for a plain chain this is
`bounds.chain`, whose proofs hold link by link.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from convexprune.bounds.gains import ConvolutionOperator, LinearOperator, Operator, pooling_gain
from convexprune.bounds.propagation import ByChannel, Rule, Spread
from convexprune.network.trace import DROPOUT, RESHAPING, Record, Step

# |f(a) - f(b)| <= |a - b|, entry by entry
LIPSCHITZ: Final = frozenset(
    ("relu", "relu6", "tanh", "sigmoid", "hardtanh", "hardsigmoid", "softplus", "softsign", "abs")
)
ORDERED: Final = frozenset(("view", "view_as", "reshape", "reshape_as", "flatten", "squeeze", "unsqueeze"))
COPIES: Final = DROPOUT | frozenset(("contiguous", "clone", "detach", "alias"))
MOVES: Final = RESHAPING | DROPOUT | frozenset(("getitem", "pad", "narrow", "select", "chunk"))
NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d)
POOLS: Final = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)
MEANS: Final = ("mean", "adaptive_avg_pool2d", "adaptive_avg_pool1d")
SUMS: Final = frozenset(("add", "iadd", "sub", "isub"))


@dataclass(frozen=True)
class GraphBound:
    """The bound at the network's output, and at each layer's, in forward order; or why there is none."""

    total: float | None
    layers: Mapping[str, float]
    obstacle: str = ""


class Propagation:
    """A recorded pass of the dense network, ready to carry the layers' own errors to its output.

    pruned  gives the weights as stored
    mode    as of `prune`: whether a judged layer has seen the errors before it
    """

    def __init__(self, pruned: nn.Module, record: Record, mode: str) -> None:
        self.record, self.mode = record, mode
        self.modules = dict(pruned.named_modules())
        held = (parameter for module in pruned.modules() for parameter in module._parameters.values())
        self.holders = Counter(id(parameter) for parameter in held if parameter is not None)
        self.operators: dict[Any, Operator] = {}  # they remember their norms, which are the work

    def bound(self, own: Mapping[str, Spread], rule: Rule | None = None) -> GraphBound:
        """From each module's own error; a module that is not there is as it was. Without `rule`, `ByChannel`."""
        walk = _Walk(self.modules, self.operators, own, self.mode != "parallel", rule or ByChannel())
        order = {name: index for index, name in enumerate(own)}  # in which they were pruned
        latest: dict[int, int] = {}  # of the layers that a tensor depends on
        changed: dict[int, Spread] = {}
        found: dict[str, float] = {}
        called: set[str] = set()
        for step in self.record.steps:
            reads = [changed[number] for number in step.reads if number in changed]
            ages = [latest[number] for number in step.reads if number in changed]
            shapes = zip(step.reads, step.shaped, strict=False)
            stretched = any(not fits and _changed(changed.get(number)) for number, fits in shapes)
            made = Spread(0.0)
            try:
                if step.layer is not None:
                    if step.layer in called:
                        raise _Uncovered(f"{step.place} is called more than once")
                    made = walk.layer(step.layer, step, max(reads, key=lambda each: each.total, default=made))
                    called.add(step.layer)
                    if made.repair is None:
                        found[step.layer] = made.total
                elif any(each.repair for each in reads):
                    made = walk.repaired(step, reads, ages, order)
                elif any(map(_changed, reads)):
                    if step.operation in SUMS and stretched:
                        raise _Uncovered(f"{step.place} stretches a tensor over another, and is not covered")
                    made = walk.step(step, reads)
            except _Uncovered as error:
                return GraphBound(None, found, str(error))
            for number in step.makes:
                changed[number] = made
                latest[number] = max([order.get(step.layer or "", -1), *ages])
        why = self._unfit(own)
        if why:
            return GraphBound(None, found, why)
        return GraphBound(changed.get(self.record.results[0], Spread(0.0)).total, found)

    def _unfit(self, own: Mapping[str, Spread]) -> str:
        """Why the record does not say what the pruned network does, or nothing."""
        if len(self.record.results) != 1:
            return "the model does not return one tensor"
        if self.record.random:
            return "the model draws random numbers, others in each of the two networks"
        if self.record.transformed:
            return "the model uses torch.func, whose transforms are not covered"
        for name in own:
            for key, parameter in self.modules[name]._parameters.items():
                if f"{name}.{key}" in self.record.parameters or self.holders[id(parameter)] > 1:
                    return f"the {key} of {name} ({type(self.modules[name]).__name__}) is read elsewhere as well"
        return ""


_BASIC: Final = (int, slice, type(None), type(...))


class _Uncovered(Exception):
    """A step for which no bound is known."""


@dataclass(frozen=True)
class _Walk:
    """What is the same at every step."""

    modules: Mapping[str, Any]
    operators: dict[Any, Operator]
    own: Mapping[str, Spread]
    cascade: bool
    rule: Rule

    def layer(self, name: str, step: Step, before: Spread) -> Spread:
        """A whole Linear or convolution."""
        own = self.own.get(name, Spread(0.0))
        module = self.modules[name]
        if module._forward_hooks:
            raise _Uncovered(f"{step.place} has forward hooks, and is not covered")
        linear = isinstance(module, nn.Linear)
        if own.channels is not None and len(own.channels) < (module.out_features if linear else module.out_channels):
            if self.cascade and (before.total > 0 or own.repair):
                raise _Uncovered(f"{step.place}: some of its groups were judged on the pruned inputs and some were not")
            own = own.plain()
        batched = len(step.sizes[0]) == (2 if linear else len(module.kernel_size) + 2)
        if not batched:  # of tokens, and of a single image, the second axis is no channel
            own, before = replace(own.plain(), repair=own.repair), before.plain()
        if self.cascade and name in self.own:
            return own
        if before.total == 0:
            return own
        if name not in self.operators:
            self.operators[name] = _operator(module, step)
        through = self.rule.through(self.operators[name], before)
        if not batched:
            return own.plus(through).plain()
        if own.rectified:  # a Gram matrix of what the ReLU reads says nothing of what it makes
            return replace(own.plus(through.activated()), rectified=True)

        def folded(scale: Tensor) -> Spread:
            """diag(s) W together is smaller than the largest scale times W."""
            key = name, tuple(scale.tolist())
            if key not in self.operators:
                self.operators[key] = self.operators[name].scaled(scale)
            return self.rule.scaled(scale, own).plus(self.rule.through(self.operators[key], before))

        return replace(own.plus(through), folded=folded)

    def repaired(self, step: Step, reads: Sequence[Spread], ages: Sequence[int], order: Mapping[str, int]) -> Spread:
        """Between a layer that repairs a residual sum and the sum, and the sum itself.

        With s the norm's scale and b the other branch, the layer aims at y' = y + (b - b_now) / s, so that its own
        error, scaled, is the sum's: s yhat + b_now - (s y + b) = s (yhat - y'), but in channels of a faint s.
        """
        # of two layers that repair one sum the later knows what the earlier has done
        age = lambda each: -1 if each.repair is None else order[each.repair.layer]  # noqa: E731
        first, *others = sorted(reads, key=age, reverse=True)
        assert first.repair is not None
        if step.operation == "batch_norm" and not others:
            scale = self._norm(step)
            passed = scale if first.repair.scale is None else scale * first.repair.scale
            return replace(self.rule.scaled(scale, first), repair=replace(first.repair, scale=passed))
        if step.operation in COPIES:
            return first
        if step.operation not in SUMS or not step.even or len(step.reads) != 2:
            raise _Uncovered(f"{step.place} reads a layer that was judged by a residual sum, and is no such sum")
        if max(ages) > order[first.repair.layer]:
            raise _Uncovered(f"{step.place}: a branch was pruned after {first.repair.layer}, which was to repair it")
        total, faint = replace(first, repair=None, folded=None), first.repair.faint()
        if faint is not None:
            for each in others:
                if each.repair is not None:
                    raise _Uncovered(
                        f"{step.place}: {first.repair.layer} leaves out channels that its norm switches off"
                    )
                total = total.plus(each.within(faint))
        return total

    def _norm(self, step: Step) -> Tensor:
        """The scale (C,) of a batch norm in evaluation mode."""
        module: Any = self.modules[step.module]
        if not _computes(module, NORMS) or module.running_var is None:
            raise _Uncovered(f"{step.place} is not covered by the bound")
        scale: Tensor = (module.running_var.double() + module.eps).rsqrt()
        return scale if module.weight is None else (scale * module.weight).detach()

    def step(self, step: Step, reads: Sequence[Spread]) -> Spread:
        """Anything else; `reads` are the changes of what it reads, the unchanged tensors among them or left out."""
        name = step.operation
        before = max(reads, key=lambda each: each.total)
        if name in SUMS:
            return _sum(reads)
        if sum(map(_changed, reads)) > 1:
            raise _Uncovered(f"{step.place} reads two tensors that have changed, and is not covered")
        if name in LIPSCHITZ:
            return before.activated()
        if name in MOVES:
            return _moved(step, before)
        if name == "batch_norm":
            scale = self._norm(step)
            return before.folded(scale) if before.folded else self.rule.scaled(scale, before)
        module: Any = self.modules[step.module]
        if name.startswith(("max_pool", "avg_pool")) and _computes(module, POOLS):
            through = before.times(_pooling(module, step))
            return through if _batched(step) else through.plain()
        if name in MEANS and len(step.sizes) == 2:
            return _mean(step, before)
        raise _Uncovered(f"{step.place} is not covered by the bound")


def _changed(spread: Spread | None) -> bool:
    return spread is not None and spread.total != 0


def _computes(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is of these kinds, and no subclass with a forward of its own."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def _batched(step: Step) -> bool:
    """Whether a pool has read (samples, channels, ...); torch takes a tensor of one axis less for a single image."""
    return len(step.sizes[0]) == (3 if "1d" in step.operation else 4)


def _pooling(module: Any, step: Step) -> float:
    """The gain of a pooling module."""
    planes = 1 if isinstance(module, (nn.MaxPool1d, nn.AvgPool1d)) else 2
    sizes = {key: getattr(module, key, 1) for key in ("kernel_size", "stride", "dilation")}
    kernel, stride, dilation = ((size,) * planes if isinstance(size, int) else size for size in sizes.values())
    if getattr(module, "divisor_override", None):
        raise _Uncovered(f"{step.place} divides by its divisor_override, and is not covered")
    average = isinstance(module, (nn.AvgPool1d, nn.AvgPool2d))
    # a window that hangs over the edge may divide by fewer entries than it has
    whole = not module.ceil_mode and (getattr(module, "count_include_pad", True) or not _any(module.padding))
    return pooling_gain(kernel, stride, dilation, average and whole)


def _any(padding: int | Sequence[int]) -> bool:
    return bool(padding) if isinstance(padding, int) else any(padding)


def _mean(step: Step, before: Spread) -> Spread:
    """An average over axes other than the samples'; the channels stay if their axis does."""
    many, few = (math.prod(size) for size in step.sizes)
    share = 1 / math.sqrt(many / max(few, 1))
    if step.operation != "mean":
        maps = slice(-1 if "1d" in step.operation else -2, None)
        wide, narrow = (size[maps] for size in step.sizes)
        if 0 in narrow or any(a % b for a, b in zip(wide, narrow, strict=True)):
            raise _Uncovered(f"{step.place} averages windows that overlap, and is not covered")
        return before.times(share) if _batched(step) else before.plain().times(share)
    planes = len(step.sizes[0])
    given = (step.detail,) if isinstance(step.detail, int) else step.detail
    axes = {axis % planes for axis in given} if isinstance(given, (tuple, list)) else {0}
    if 0 in axes:
        raise _Uncovered(f"{step.place} averages over the samples, and is not covered")
    return before.plain().times(share) if 1 in axes else before.times(share)


def _operator(module: Any, step: Step) -> Operator:
    if isinstance(module, nn.Linear):
        return LinearOperator(module.weight)
    unpadded = isinstance(module.padding, tuple) and not any(module.padding)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and (module.padding_mode == "zeros" or unpadded):
        reach = [d * (k - 1) + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        # "same" pads by the dilated kernel less one in all
        room = [2 * p for p in module.padding] if isinstance(module.padding, tuple) else [r - 1 for r in reach]
        torus = [max(s + p, r) for s, p, r in zip(step.sizes[0][-len(reach) :], room, reach, strict=True)]
        return ConvolutionOperator(module.weight, torus, module.dilation, module.groups)
    raise _Uncovered(f"{step.place}: no gain is known of this layer")


def _sum(reads: Sequence[Spread]) -> Spread:
    """A sum of two tensors, or of a tensor and a constant."""
    total = Spread(0.0)
    for each in reads:
        total = total.plus(each)
    return total


def _moved(step: Step, before: Spread) -> Spread:
    """Entries that are copied, moved, left out, or joined by zeros: what the norms say stays, channels if they stay."""
    parts = step.detail if isinstance(step.detail, tuple) else (step.detail,)
    if step.operation == "getitem" and not all(isinstance(part, _BASIC) for part in parts):
        raise _Uncovered(f"{step.place} takes entries by a list or a tensor, perhaps twice, and is not covered")
    if step.operation in COPIES:
        return before
    before = replace(before, folded=None)
    if step.even:
        return before if step.operation in ORDERED else before.plain()
    if before.channels is None or len(step.sizes) < 2:
        return before.plain()
    old, new = step.sizes
    if step.operation in ORDERED:
        flat = len(new) == 2 and len(old) >= 2 and old[0] == new[0]  # runs of columns now stand for channels
        together = len(old) >= 2 and old[:2] == new[:2]
        kept = before if math.prod(old[2:]) == math.prod(new[2:]) else replace(before, gram=None)
        return kept if (flat or together) and old[1] == len(before.channels) else before.plain()
    if step.operation == "getitem" and isinstance(step.detail, tuple):
        sliced = all(isinstance(part, slice) for part in step.detail)
        return before if sliced and step.detail[:2] == (slice(None), slice(None)) else before.plain()
    if step.operation == "pad" and isinstance(step.detail, (tuple, list)) and len(old) >= 2:
        amounts = [int(part) for part in step.detail] + [0] * (2 * len(old))
        left, right = amounts[2 * len(old) - 4 : 2 * len(old) - 2]
        if old[1] == len(before.channels) and min(amounts) >= 0 and not any(amounts[2 * len(old) - 2 :]):
            return before.padded(left, right)
    return before.plain()
