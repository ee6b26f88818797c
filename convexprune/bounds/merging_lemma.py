"""Lemma 1 of data-free neuron merging, for one merge and for all of them together.

Source: Srinivas, Babu, BMVC 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from convexprune.bounds.statement import Figure, Hypothesis, Statement
from convexprune.rounding import affine_doubt, gamma

PAPER = "Srinivas, Babu, BMVC 2015"


def lemma_1(
    inputs: Tensor, incoming: Tensor, outgoing: Tensor, joined: Tensor, activation: Callable[[Tensor], Tensor]
) -> Statement:
    """E (z_before - z_after)^2 <= E|x|^2 (sum_j sqrt(<a_j^2>) ||w_j - w_{i(j)}||)^2, the mean over the outputs z.

    inputs (n, in), with a last column of ones if incoming (N, in) holds biases; outgoing (out, N); joined (N,): the
    neuron that each neuron joins. For one merge the right side is the published E|x|^2 <a_j^2> ||w_i - w_j||^2.

    The lemma needs |h(p) - h(q)| <= |p - q| of the pre-activations p, q of two neurons that join, and no others. That
    is checked at those that occurred, as they and h are computed.
    """
    x, w, a = (part.detach().cpu().double() for part in (inputs, incoming, outgoing))
    to = joined.flatten().round().long()
    before = x @ w.T
    hidden = activation(before)
    change = (hidden - hidden[:, to]) @ a.T
    roots = (a.square().mean(0) * (w - w[to]).square().sum(1)).sqrt()
    guaranteed = float(x.square().sum(1).mean()) * float(roots.sum()) ** 2
    # in norm: the change's own products, and the pre-activations', which h does not enlarge
    off = affine_doubt((hidden - hidden[:, to]).abs(), _doubt(x, w, to), a)
    measured = Figure.norm(change, off).times(1 / math.sqrt(change.numel()))
    doubt = 2 * measured.value * measured.doubt + measured.doubt**2 + gamma(x.numel() + w.numel() + 16) * guaranteed
    return Statement("Lemma 1", PAPER, (_gentle(before, hidden, to),), guaranteed, measured.value**2, doubt)


def _doubt(x: Tensor, w: Tensor, to: Tensor) -> Tensor:
    """By how much the difference of two neurons' pre-activations, or of what a gentle h makes of them, may be off."""
    off = affine_doubt(x, torch.zeros_like(x), w)
    return torch.where(to == torch.arange(len(to)), 0.0, off + off[:, to])


def _gentle(before: Tensor, hidden: Tensor, to: Tensor) -> Hypothesis:
    """|h(p) - h(q)| - |p - q| <= 0, where each is a sum of two floats and the difference has the exact sign."""
    (made, lost), (read, less) = (_difference(each, each[:, to]) for each in (hidden, before))
    beyond = (made.abs() - read.abs()) + (made.sign() * lost - read.sign() * less)
    text = f"the activation enlarges no difference of two neurons that join: by {float(beyond.max()):.3g} at most"
    return Hypothesis(text, bool((beyond <= 0).all()))


def _difference(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """one - other as a sum of two floats: TwoSum, Knuth."""
    found = one - other
    back = found - one
    return found, (one - (found - back)) + (-other - back)
