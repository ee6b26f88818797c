"""The error of a whole network from the errors of its layers, without any normalisation of the weights.

A chain is a network Y_l = act_l(Y_{l-1} W_l^T + 1 b_l^T) whose activations act_l, and whatever else stands between two
layers, are 1-Lipschitz; Y_0 is the calibration data, one sample a row. Yhat_l are the outputs of the pruned network
on the same samples, with weights What_l and biases bhat_l, and e_l = || Yhat_l - Y_l ||_F.

Source: Aghasi, Abdi, Nguyen, Romberg, NIPS 2017, Theorems 1 and 2, which ask for ||W_l||_1 = 1. Here the spectral
norms take the place of the normalisation. The bounds are rounded up; a network that computes in float32 adds its own
rounding, about 1e-7 of the outputs, to whatever is measured on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from convexprune.rounding import spectral_norm, up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class ChainBound:
    """Upper bounds of || Yhat_l - Y_l ||_F for each layer of a chain, in forward order."""

    per_layer: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.per_layer:
            raise ValueError("a chain without layers has no bound; give the figures of at least one layer")

    @property
    def total(self) -> float:
        """The bound at the network's output."""
        return self.per_layer[-1]


def parallel_bound(errors: Sequence[float], weights: Sequence[Tensor]) -> ChainBound:
    """e_l <= E_l + ||What_l||_2 e_{l-1}, with e_0 = 0: every layer was pruned on the dense network's inputs.

    errors   E_l >= || act(Y_{l-1} What_l^T + bhat_l) - act(Y_{l-1} W_l^T + b_l) ||_F; 0 where the layer is as it was
    weights  What_l (out, in), the pruned weights as stored, without the bias

    Proof. Put the pruned layer on the dense inputs between the two. What separates it from Y_l is E_l. What separates
    it from Yhat_l is one and the same layer on two inputs: its bias cancels in the difference, the activation does not
    enlarge it, and (Yhat_{l-1} - Y_{l-1}) What_l^T is at most ||What_l||_2 e_{l-1}. That is why the column of
    biases has no place in the norm.
    """
    _check(errors, weights)
    bounds: list[float] = []
    for error, weight in zip(errors, weights, strict=True):
        own, through = _nonnegative(error), _through(weight, bounds)
        bounds.append(up(own, through) if through else own)
    return ChainBound(tuple(bounds))


def cascade_bound(errors: Sequence[float | None], weights: Sequence[Tensor]) -> ChainBound:
    """e_l <= E_l where E_l is known, else ||W_l||_2 e_{l-1}: every layer was judged on the pruned network's inputs.

    errors   E_l >= || act(Yhat_{l-1} What_l^T + bhat_l) - Y_l ||_F; None where a layer was left as it was, unjudged
    weights  (out, in), as stored, without the bias; only those of the unjudged layers are used

    Proof. In a cascade the layer's inputs are Yhat_{l-1} and its targets are the dense network's outputs on
    the same samples, so act(Yhat_{l-1} What_l^T + bhat_l) *is* Yhat_l and E_l bounds e_l as it stands: the errors of
    the layers before are already in it. An unjudged layer is the dense one, and the argument of `parallel_bound`
    with E_l = 0 applies.
    """
    _check(errors, weights)
    bounds: list[float] = []
    for error, weight in zip(errors, weights, strict=True):
        bounds.append(_through(weight, bounds) if error is None else _nonnegative(error))
    return ChainBound(tuple(bounds))


def slack_product_bound(first: float, gammas: Sequence[float], weights: Sequence[Tensor]) -> ChainBound:
    """e_1 <= first, e_l <= sqrt(gamma_l) ||W_l||_2 e_{l-1}: Theorem 2, known before anything after layer 1 is solved.

    first    the radius of the first layer's ball
    gammas   gamma_l >= 1 of the layers after it, each feasible for the cascade problem of that factor, risk 1 (where a
             layer's inputs have not changed `NetTrim.cascade` states the parallel problem instead: not that one)
    weights  W_l (out, in) of those layers, the *dense* ones, without the bias

    Proof. Let D be the dense layer's pre-activations on the pruned inputs. Where Y_l is active, the ball keeps Yhat_l
    within sqrt(gamma_l) || (D - Y_l)_active ||_F of it; elsewhere Y_l = 0 and the slack D gives 0 <= Yhat_l <= relu(D).
    Both are parts of the dense layer's own change, which is at most ||W_l||_2 e_{l-1}.
    """
    _check(gammas, weights)
    for gamma in gammas:
        if not 1 <= gamma < math.inf:
            raise ValueError(f"gamma is {gamma}; it must be a finite number >= 1")
    bounds = [_nonnegative(first)]
    for gamma, weight in zip(gammas, weights, strict=True):
        bounds.append(up(up(math.sqrt(gamma)) * _through(weight, bounds)))
    return ChainBound(tuple(bounds))


def _through(weight: Tensor, bounds: Sequence[float]) -> float:
    """||W||_2 e_{l-1}; an error of 0 (the first layer's) asks for no norm."""
    if not bounds or bounds[-1] == 0:
        return 0.0
    return up(spectral_norm(weight.detach().cpu().double()) * bounds[-1])


def _nonnegative(error: float) -> float:
    if not error >= 0:
        raise ValueError(f"a layer's error is {error}; it must be a number >= 0")
    return error


def _check(figures: Sequence[float | None], weights: Sequence[Tensor]) -> None:
    if len(figures) != len(weights):
        raise ValueError(f"{len(figures)} figures for {len(weights)} weights; give one of each for every layer")
    for weight in weights:
        if weight.ndim != 2:
            raise ValueError(f"a weight has shape {tuple(weight.shape)}; expected (out, in)")
