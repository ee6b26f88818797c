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

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn

from convexprune.bounds.gains import Operator
from convexprune.bounds.propagation import ByChannel, Rule, Spread
from convexprune.certify.operations import COPIES, Uncovered, carried, changed, norm_scale
from convexprune.network.kinds import SUMS
from convexprune.network.matrices import Stack
from convexprune.network.names import stacks
from convexprune.network.recording import Record, Step
from convexprune.network.residual import FAINT

ROUNDING: Final = 1e-6  # a repair finds its faint channels in float32: those in doubt are counted as faint


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
        self.modules, self.stacks = dict(pruned.named_modules()), stacks(pruned)
        held = (parameter for module in pruned.modules() for parameter in module._parameters.values())
        self.holders = Counter(id(parameter) for parameter in held if parameter is not None)
        self.operators: dict[Any, Operator] = {}  # they remember their norms, which are the work

    def bound(self, own: Mapping[str, Spread], rule: Rule | None = None) -> GraphBound:
        """From each module's own error; a module that is not there is as it was. Without `rule`, `ByChannel`."""
        walk = _Walk(self.modules, self.stacks, self.operators, own, self.mode != "parallel", rule or ByChannel())
        order = {name: index for index, name in enumerate(own)}  # in which they were pruned
        latest: dict[int, int] = {}  # of the layers that a tensor depends on
        spreads: dict[int, Spread] = {}
        found: dict[str, float] = {}
        called: set[str] = set()
        for step in self.record.steps:
            reads = [spreads[number] for number in step.reads if number in spreads]
            ages = [latest[number] for number in step.reads if number in spreads]
            shapes = zip(step.reads, step.shaped, strict=False)
            stretched = any(not fits and changed(spreads.get(number)) for number, fits in shapes)
            made = Spread(0.0)
            try:
                if step.layer is not None:
                    if step.layer in called:
                        raise Uncovered(f"{step.place} is called more than once")
                    made = walk.layer(step.layer, step, max(reads, key=lambda each: each.total, default=made))
                    called.add(step.layer)
                    if made.repair is None:
                        found[step.layer] = made.total
                elif any(each.repair for each in reads):
                    made = walk.repaired(step, reads, ages, order)
                elif any(map(changed, reads)):
                    if step.operation in SUMS and stretched:
                        raise Uncovered(f"{step.place} stretches a tensor over another, and is not covered")
                    made = carried(step, self.modules[step.module], reads, walk.rule)
            except Uncovered as error:
                return GraphBound(None, found, str(error))
            for number in step.makes:
                spreads[number] = made
                latest[number] = max([order.get(step.layer or "", -1), *ages])
        why = self._unfit(own)
        if why:
            return GraphBound(None, found, why)
        return GraphBound(spreads.get(self.record.results[0], Spread(0.0)).total, found)

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


@dataclass(frozen=True)
class _Walk:
    """What is the same at every step."""

    modules: Mapping[str, Any]
    stacks: Mapping[str, Stack]
    operators: dict[Any, Operator]
    own: Mapping[str, Spread]
    cascade: bool
    rule: Rule

    def layer(self, name: str, step: Step, before: Spread) -> Spread:
        """A whole Linear or convolution, or a module of another kind that is a matrix."""
        own, stack = self.own.get(name, Spread(0.0)), self.stacks[name]
        if stack.module._forward_hooks:
            raise Uncovered(f"{step.place} has forward hooks, and is not covered")
        if own.channels is not None and len(own.channels) < stack.outputs:
            if self.cascade and (before.total > 0 or own.repair):
                raise Uncovered(f"{step.place}: some of its groups were judged on the pruned inputs and some were not")
            own = own.plain()
        batched = stack.channel_axis(len(step.sizes[0])) == 1
        if not batched:  # of tokens, and of a single image, the second axis is no channel
            own, before = replace(own.plain(), repair=own.repair), before.plain()
        if self.cascade and name in self.own:
            return own
        if before.total == 0:
            return own
        if name not in self.operators:
            operator = stack.operator(step.sizes[0])
            if operator is None:
                raise Uncovered(f"{step.place}: no gain is known of this layer")
            self.operators[name] = operator
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
            scale = norm_scale(self.modules[step.module], step)
            passed = scale if first.repair.scale is None else scale * first.repair.scale
            return replace(self.rule.scaled(scale, first), repair=replace(first.repair, scale=passed))
        if step.operation in COPIES:
            return first
        if step.operation not in SUMS or not step.even or len(step.reads) != 2:
            raise Uncovered(f"{step.place} reads a layer that was judged by a residual sum, and is no such sum")
        if max(ages) > order[first.repair.layer]:
            raise Uncovered(f"{step.place}: a branch was pruned after {first.repair.layer}, which was to repair it")
        total, faint = replace(first, repair=None, folded=None), first.repair.faint(FAINT * (1 + ROUNDING))
        if faint is not None:
            for each in others:
                if each.repair is not None:
                    raise Uncovered(
                        f"{step.place}: {first.repair.layer} leaves out channels that its norm switches off"
                    )
                total = total.plus(each.within(faint))
        return total
