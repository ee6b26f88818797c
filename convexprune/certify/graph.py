"""The layers' own errors carried along the real graph to the network's output.

Every tensor D that a forward pass made carries bounds of its change over the calibration samples, here by ||D||_F:

    a layer           parallel  e_out <= E + gain(What) e_in        E: its own error on the dense inputs
                      cascade   e_out <= E                          E: its error against the dense outputs
                      unjudged  e_out <= gain(W) e_in
    batch norm        e_out <= max |s| e_in
    a sum             e_out <= e_1 + e_2    residual mode, if one of the two repairs the other:  its E alone
    1-Lipschitz       e_out <= e_in       activations, reshapings, slices, padding
    f, pools          e_out <= g e_in      g: the Lipschitz constant of f, of the windows; a factor
    a mean over P     e_out <= e_in / sqrt(P)
    tensors joined    e_out <= sqrt(e_1^2 + e_2^2 + ...)
    LayerNorm, ...    e_out <= 2 sqrt(N) max |gamma| / min (s(u) + s(v)) e_in     see `certify.normalisations`

`bounds.propagation` has the rules for layers and norms: by Frobenius norms, by spectral norms, channel by channel.
What is not in this list leaves a tensor without a bound, by name; behind it a judged layer of a cascade has one again.
No bound is below the change that was seen, and there is none where it is below by more than rounding. Source: the
triangle inequality; for a plain chain this is `bounds.chain`, whose proofs hold link by link.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import Tensor, nn

from convexprune.bounds.gains import LinearOperator, Operator
from convexprune.bounds.propagation import ByChannel, Rule, Spread
from convexprune.certify.normalisations import Normalisation, normalisations
from convexprune.certify.operations import COPIES, EVEN, Uncovered, carried, changed, norm_scale
from convexprune.certify.side_by_side import Seen
from convexprune.network.kinds import SUMS
from convexprune.network.names import stacks
from convexprune.network.projections import owner_path
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
        self.known = record.parameter_of(pruned)
        self.norms = normalisations(record, self.known)
        self.operators: dict[Any, Operator] = {}  # they remember their norms, which are the work

    def bound(
        self, own: Mapping[str, Spread], rule: Rule | None = None, seen: Mapping[int, Seen] | None = None
    ) -> GraphBound:
        """From each module's own error; a module that is not there is as it was. Without `rule`, `ByChannel`.

        seen  what the networks were seen to do; None: the bound is that of exact arithmetic, and of these steps
        """
        rule, cascade = rule or ByChannel(), self.mode != "parallel"
        walk = _Walk(self, own, cascade, rule, seen)
        try:
            for step in self.record.steps:
                walk.take(step)
            total = walk.total(self.record.chosen)
        except Uncovered as error:
            return GraphBound(None, walk.found, str(error))
        why = self._unfit(own)
        return GraphBound(None if why else total, walk.found, why)

    def _unfit(self, own: Mapping[str, Spread]) -> str:
        """Why the record does not say what the pruned network does, or nothing."""
        if self.record.random:
            return "the model draws random numbers, others in each of the two networks"
        if self.record.transformed:
            return "the model uses torch.func, whose transforms are not covered"
        calls = Counter(step.place for step in self.record.steps if step.layer is not None)
        for place, count in calls.items():
            if count > 1:
                return f"{place} is called more than once"
        for name in own:
            stack = self.stacks[name]
            path, owner = owner_path(name, stack), stack.owner
            held = owner._parameters
            keys = held if owner is stack.module else {stack.weight_name, stack.bias_name} - {None}
            for key, parameter in ((key, held[key]) for key in keys):
                if f"{path}.{key}" in self.record.parameters or self.holders[id(parameter)] > 1:
                    return f"the {key} of {path} ({type(owner).__name__}) is read elsewhere as well"
        return ""


@dataclass(frozen=True)
class _Walk:
    """Along the steps: what is known of each tensor by its number."""

    network: Propagation
    own: Mapping[str, Spread]
    cascade: bool
    rule: Rule
    seen: Mapping[int, Seen] | None
    spreads: dict[int, Spread] = field(default_factory=dict)
    unknown: dict[int, str] = field(default_factory=dict)  # why there is no bound
    latest: dict[int, int] = field(default_factory=dict)  # of the layers that it depends on, in the order of pruning
    found: dict[str, float] = field(default_factory=dict)  # of the layers' outputs

    def take(self, step: Step) -> None:
        """Bound what the step makes, or keep why not. Raises Uncovered where what has changed leaves all tensors."""
        latest = max([self._order(step.layer), *(self.latest.get(number, -1) for number in step.reads)])
        self.latest.update(dict.fromkeys(step.makes, latest))
        try:
            made = self._made(step)
            for number in step.makes:
                made = self.checked(step, number, made)
        except Uncovered as error:
            if not step.makes:
                raise
            self.unknown.update(dict.fromkeys(step.makes, str(error)))
            return
        self.spreads.update(dict.fromkeys(step.makes, made))
        if step.layer is not None and made.repair is None:
            self.found[step.layer] = made.total

    def total(self, output: int | None) -> float:
        """The bound of the model's output. Raises Uncovered where there is none."""
        if output is None:
            raise Uncovered("the model's output is no tensor that it was seen to make")
        if output in self.unknown:
            raise Uncovered(self.unknown[output])
        return self.spreads.get(output, Spread(0.0)).total

    def _made(self, step: Step) -> Spread:
        norm = self.network.norms.get(step.makes[0]) if step.makes else None
        if norm is not None:
            return self.normalised(step, norm)
        unknown = [self.unknown[number] for number in step.reads if number in self.unknown]
        judged = self.cascade and step.layer in self.own  # by what it makes, whatever it reads
        if unknown and not judged:
            raise Uncovered(unknown[0])
        reads = [self.spreads[number] for number in step.reads if number in self.spreads]
        if step.layer is not None:
            before = Spread(math.inf) if unknown else max(reads, key=lambda each: each.total, default=Spread(0.0))
            return self.layer(step.layer, step, before)
        if any(each.repair for each in reads):
            return self.repaired(step, reads)
        if not any(map(changed, reads)):
            return Spread(0.0)
        shapes = zip(step.reads, step.shaped, strict=False)
        if step.operation in EVEN and any(not fits and changed(self.spreads.get(number)) for number, fits in shapes):
            raise Uncovered(f"{step.place} stretches a tensor over another, and is not covered")
        if any(self.seen[number].varies for number in step.makes if self.seen and number in self.seen):
            raise Uncovered(f"{step.place} is not called alike on all batches, and is not covered")
        each = [self.spreads.get(number, Spread(0.0)) for number in step.reads]
        return carried(step, self.network.modules[step.module], each, self.rule, self.network.known)

    def normalised(self, step: Step, norm: Normalisation) -> Spread:
        """Rows over their norms; only they may have changed, and what is computed from them."""
        for number in set(step.reads) - {norm.beside}:
            if number in self.unknown:
                raise Uncovered(self.unknown[number])
            if number != norm.source and changed(self.spreads.get(number)):
                raise Uncovered(f"{step.place} has a scale or a shift that has changed, and is not covered")
        before = self.spreads.get(norm.source, Spread(0.0))
        if before.repair is not None:
            raise Uncovered(f"{step.place} reads a layer that was judged by a residual sum, and is no such sum")
        if not changed(before):
            return Spread(0.0)
        seen = None if self.seen is None else self.seen.get(step.makes[0])
        if seen is not None and seen.varies:
            raise Uncovered(f"{step.place} is not called alike on all batches, and is not covered")
        gain = norm.gain(0.0 if seen is None else seen.sizes)
        if self.seen is not None and math.isinf(gain):
            raise Uncovered(f"{step.place}: a row has a norm of 0, and is not covered")
        weight = None if norm.weight is None else self.network.known(norm.weight)
        if weight is None or weight.ndim != 1:
            return before.plain().times(gain)
        unit = replace(norm, scale=1.0).gain(0.0 if seen is None else seen.sizes)
        return replace(before.plain().times(gain), factor=(before.plain().times(unit), weight))

    def _order(self, layer: str | None) -> int:
        return list(self.own).index(layer) if layer is not None and layer in self.own else -1

    def checked(self, step: Step, number: int, made: Spread) -> Spread:
        """The bounds, and no less than the change as it was, where rounding alone can be behind what is missing.

        A tensor whose change a later layer is to repair has no bound of its own.
        """
        if self.seen is None or number not in self.seen or made.repair is not None:
            return made
        seen = self.seen[number]
        over = seen.change.excess(made)
        if over.total <= seen.tolerance:
            return made.widened(over)
        by = "its certificate allows" if step.layer in self.own else "its rule allows"
        raise Uncovered(f"{step.place} was changed by {seen.change.total:.3g}, where {by} {made.total:.3g}")

    def layer(self, name: str, step: Step, before: Spread) -> Spread:
        """A whole Linear or convolution, or a module of another kind that is a matrix."""
        own, stack = self.own.get(name, Spread(0.0)), self.network.stacks[name]
        if stack.module._forward_hooks:
            raise Uncovered(f"{step.place} has forward hooks, and is not covered")
        if own.channels is not None and len(own.channels) < stack.outputs:
            if self.cascade and (before.total > 0 or own.repair):
                raise Uncovered(f"{step.place}: some of its groups were judged on the pruned inputs and some were not")
            own = own.plain()
        factor = before.factor
        batched = stack.channel_axis(len(step.sizes[0])) == 1
        if not batched:  # of tokens, and of a single image, the second axis is no channel
            own, before = replace(own.plain(), repair=own.repair), before.plain()
        if self.cascade and name in self.own:
            return own
        if before.total == 0:
            return own
        if name not in self.network.operators:
            operator = stack.operator(step.sizes[0])
            if operator is None:
                raise Uncovered(f"{step.place}: no gain is known of this layer")
            self.network.operators[name] = operator
        through = self.rule.through(self.network.operators[name], before)
        if factor is not None:
            through = replace(through, total=min(through.total, self.behind(name, *factor)))
        if not batched:
            return own.plus(through).plain()
        if own.rectified:  # a Gram matrix of what the ReLU reads says nothing of what it makes
            return replace(own.plus(through.activated()), rectified=True)

        def folded(scale: Tensor) -> Spread:
            """diag(s) W together is smaller than the largest scale times W."""
            key = name, tuple(scale.tolist())
            if key not in self.network.operators:
                self.network.operators[key] = self.network.operators[name].scaled(scale)
            return self.rule.scaled(scale, own).plus(self.rule.through(self.network.operators[key], before))

        return replace(own.plus(through), folded=folded)

    def behind(self, name: str, before: Spread, factor: Tensor) -> float:
        """W diag(g) together is smaller than the largest of g times W."""
        operator, key = self.network.operators[name], (name, "behind", tuple(factor.tolist()))
        if not isinstance(operator, LinearOperator):
            return math.inf
        if key not in self.network.operators:
            self.network.operators[key] = operator.behind(factor)
        return self.rule.through(self.network.operators[key], before).total

    def repaired(self, step: Step, reads: Sequence[Spread]) -> Spread:
        """Between a layer that repairs a residual sum and the sum, and the sum itself.

        With s the norm's scale and b the other branch, the layer aims at y' = y + (b - b_now) / s, so that its own
        error, scaled, is the sum's: s yhat + b_now - (s y + b) = s (yhat - y'), but in channels of a faint s.
        """
        # of two layers that repair one sum the later knows what the earlier has done
        age = lambda each: -1 if each.repair is None else self._order(each.repair.layer)  # noqa: E731
        first, *others = sorted(reads, key=age, reverse=True)
        assert first.repair is not None
        if step.operation == "batch_norm" and not others:
            scale = norm_scale(self.network.modules[step.module], step)
            passed = scale if first.repair.scale is None else scale * first.repair.scale
            return replace(self.rule.scaled(scale, first), repair=replace(first.repair, scale=passed))
        if step.operation in COPIES:
            return first
        if step.operation not in SUMS or not step.even or len(step.reads) != 2:
            raise Uncovered(f"{step.place} reads a layer that was judged by a residual sum, and is no such sum")
        if max(self.latest.get(number, -1) for number in step.reads) > self._order(first.repair.layer):
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
