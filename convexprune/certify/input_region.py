"""The most that pruning can change a network's outputs over whole sets of inputs, for chains of Linear and ReLU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from convexprune.bounds.difference import (
    LinearRelaxation,
    Method,
    cannot_change,
    difference_bounds,
    keeps_signs,
    sampled_difference,
)
from convexprune.bounds.input_sets import Ball, Box
from convexprune.bounds.relaxation import ChainPair
from convexprune.certify.chain import chain_of
from convexprune.network.forward import check_batch, check_eager, check_model, undisturbed
from convexprune.network.predict import rule_name
from convexprune.options import having, number, optional

# rule -> where its predictions are provably steady
STEADY: Final = {"classes": cannot_change, "sign": keeps_signs, "labels": keeps_signs}
TRIES: Final = 3  # inputs of each set at which the networks are run, beside its sample
CHUNK = 64  # samples that are bounded together: a layer's planes take samples x rows x inputs numbers


@dataclass(frozen=True, eq=False)
class WorstCase:
    """What holds for every input within `radius` of a sample, in the max norm (`norm` inf) or the 2-norm (2).

    lower, upper  (samples, outputs) bounds of pruned(x) - dense(x)
    found         (samples,) the largest |pruned(x) - dense(x)| of an output that was found: no bound is below it
    unchanged     (samples,) bool: both networks provably make one and the same prediction at every such x. False proves
                  nothing
    """

    radius: float
    norm: float
    lower: Tensor
    upper: Tensor
    found: Tensor
    unchanged: Tensor

    @property
    def largest(self) -> Tensor:
        """A bound of max_k |pruned(x) - dense(x)|_k, (samples,)."""
        return torch.maximum(self.lower.abs(), self.upper.abs()).amax(1)

    def __str__(self) -> str:
        """Two sentences."""
        norm = "max norm" if self.norm == math.inf else "2-norm"
        return (
            f"no output of the pruned network is further than {float(self.largest.max()):.4g} from the dense one's, at "
            f"any input within {self.radius:g} ({norm}) of {len(self.found)} samples; {float(self.found.max()):.4g} "
            f"was found\nthe prediction is provably the same at every such input for {int(self.unchanged.sum())} of "
            "them"
        )


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def worst_case(
    model: nn.Module,
    pruned: nn.Module,
    around: Tensor,
    radius: float,
    *,
    norm: float = math.inf,
    within: tuple[float | Tensor, float | Tensor] | None = None,
    method: Method | None = None,
    predict: str | None = None,
) -> WorstCase:
    """Bound pruned(x) - model(x) for every x within `radius` of each sample, not only at the samples.

    Both networks are chains of Linear and ReLU with the same shapes, in evaluation mode; they are not changed. What
    they compute is read from the functions of torch that they call, at the samples and at other inputs of the sets. The
    bounds are for exact arithmetic: what the networks round in float32 or float64 is not counted.

    Args:
        model: The dense network.
        pruned: Its pruned copy.
        around: Inputs (samples, ...) of the networks.
        radius: In the units of the inputs, in the max norm (`norm=math.inf`) or the 2-norm over a sample (`norm=2`).
        norm: `math.inf` or 2.
        within: Smallest and largest value of an input's entry, such as (0, 1) for pixels: numbers, or tensors of the
            shape of one sample; for the max norm only.
        method: `LinearRelaxation()` if None; `Exact()` for tiny networks, `IntervalPropagation()` for a quick look.
        predict: How an output is a prediction: "classes" (the largest output), "sign" (of one logit) or "labels" (the
            sign of each). None means "sign" for one output, else "classes".

    Returns:
        The bounds, and for which samples both networks provably make the same prediction everywhere.

    Raises:
        ValueError: For a module or an operation that is not covered, by name, and for inputs that make no set.

    Source: Zhang et al. 2018 (CROWN), for the difference of two networks.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> found = cp.worst_case(model, model, torch.rand(5, 4), radius=0.01)
        >>> bool(found.largest.max() < 1e-6)
        True
    """
    for each, name in ((model, "the model"), (pruned, "the pruned model")):
        check_model(each, name)
        check_eager(each)
    optional(having("maximum", "LinearRelaxation()"))("method", method)
    if not isinstance(around, Tensor) or not around.is_floating_point() or around.ndim < 2 or not len(around):
        raise ValueError("around must be a floating-point tensor (samples, ...) of at least one sample")
    check_batch(around, "around")
    around = around.detach().clone()  # it may have been made in inference mode
    centers = around.cpu().double().flatten(1)
    region = _region(centers, radius, norm, within, tuple(around.shape[1:]))
    with undisturbed(model, pruned):
        inputs = [around, *_elsewhere(region, around)]
        dense, thin = chain_of(model, inputs, "the model"), chain_of(pruned, inputs, "the pruned model")
    (weights, biases, doubts), (pruned_weights, pruned_biases, others) = (
        zip(*each, strict=True) for each in (dense, thin)
    )
    pair = ChainPair(weights, biases, pruned_weights, pruned_biases, (tuple(doubts), tuple(others)))
    rule = rule_name(predict, (len(around), pair.outputs))
    if rule not in STEADY:
        raise ValueError(f"predict={rule!r} is not covered here; it must be one of {', '.join(map(repr, STEADY))}")
    method = method or LinearRelaxation()
    parts = [_bounds(pair, part, method, STEADY[rule]) for part in region]
    return WorstCase(float(radius), norm, *(torch.cat(each) for each in zip(*parts, strict=True)))


def _bounds(
    pair: ChainPair, region: Box | Ball, method: Method, steady: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounds = difference_bounds(pair, region, method)
    return bounds.lower, bounds.upper, sampled_difference(pair, region), steady(pair, region, method)


def _region(
    centers: Tensor, radius: float, norm: float, within: tuple[float | Tensor, float | Tensor] | None,
    shape: tuple[int, ...],
) -> Sequence[Box | Ball]:  # fmt: skip
    """The sets around the samples, some samples at a time."""
    if isinstance(norm, (bool, Tensor)) or norm not in (2, math.inf):
        raise ValueError(f"norm is {norm!r}; it must be 2 or math.inf")
    if within is not None and (not isinstance(within, (tuple, list)) or len(within) != 2):
        raise ValueError(f"within is {within!r:.80}; give the least and the most of an entry, such as (0, 1)")
    if norm == 2:
        if within is not None:
            raise ValueError("within goes with the max norm: a ball cut by bounds on its entries is not covered")
        return [Ball(part, radius) for part in torch.split(Ball(centers, radius).center, CHUNK)]
    ends = [None, None] if within is None else [_flat(end, shape) for end in within]
    return [Box(part, radius, *ends) for part in torch.split(Box(centers, radius, *ends).center, CHUNK)]


def _elsewhere(region: Sequence[Box | Ball], around: Tensor) -> list[Tensor]:
    """Inputs of the sets, shaped as the samples are."""
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([part.points(TRIES, generator) for part in region])
    return [points[:, index].reshape(around.shape).to(around) for index in range(TRIES)]


def _flat(end: float | Tensor, shape: tuple[int, ...]) -> float | Tensor:
    if not isinstance(end, Tensor):
        number(infinite=True)("an end of `within`", end)
    if not isinstance(end, Tensor) or end.ndim == 0:
        return float(end)
    if tuple(end.shape) != shape:
        raise ValueError(f"within has shape {tuple(end.shape)}; one sample's is {shape}")
    return end.flatten()
