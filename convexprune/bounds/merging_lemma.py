"""Lemma 1 of data-free neuron merging, for one merge and for all of them together.

Source: Srinivas, Babu, BMVC 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from convexprune.bounds.statement import Hypothesis, Statement

PAPER = "Srinivas, Babu, BMVC 2015"


def lemma_1(
    inputs: Tensor, incoming: Tensor, outgoing: Tensor, joined: Tensor, activation: Callable[[Tensor], Tensor]
) -> Statement:
    """E (z_before - z_after)^2 <= E|x|^2 (sum_j sqrt(<a_j^2>) ||w_j - w_{i(j)}||)^2, the mean over the outputs z.

    inputs (n, in), with a last column of ones if incoming (N, in) holds biases; outgoing (out, N); joined (N,): the
    neuron that each neuron joins. For one merge the right side is the published E|x|^2 <a_j^2> ||w_i - w_j||^2.
    """
    x, w, a = (part.detach().cpu().double() for part in (inputs, incoming, outgoing))
    to = joined.flatten().round().long()
    hidden = activation(x @ w.T)
    merged = torch.zeros_like(a).index_add_(1, to, a)
    measured = float((hidden @ merged.T - hidden @ a.T).square().mean())
    roots = (a.square().mean(0) * (w - w[to]).square().sum(1)).sqrt()
    guaranteed = float(x.square().sum(1).mean()) * float(roots.sum()) ** 2
    return Statement("Lemma 1", PAPER, (_gentle(activation, x @ w.T),), guaranteed, measured)


def _gentle(activation: Callable[[Tensor], Tensor], seen: Tensor) -> Hypothesis:
    """Check the activation's slopes on a grid over the pre-activations that occurred; the lemma uses no others."""
    reach = max(float(seen.abs().max()), 1.0)
    grid = torch.linspace(-reach, reach, 4001, dtype=torch.float64)
    steps = activation(grid).diff() / grid.diff()
    holds = bool((steps.abs() <= 1 + 1e-9).all())
    least, most = float(steps.min()), float(steps.max())
    text = f"the activation's slopes, from {least:.3g} to {most:.3g}, are between -1 and 1"
    return Hypothesis(text, holds and math.isfinite(most))
