"""Layer-wise Optimal Brain Surgeon's bounds.

Source: Dong, Chen, Pan, NIPS 2017: Lemma 3.1, Theorem 3.2, and the saliency behind eq. 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from convexprune.bounds.statement import Hypothesis, Statement
from convexprune.rounding import gamma, norm_above, spectral_norm, up

PAPER = "L-OBS, NIPS 2017"
NORMS = {"frobenius": norm_above, "spectral": spectral_norm}


def lemma_3_1(before: Tensor, after: Tensor) -> Statement:
    """(1 / sqrt n) || relu(Zhat) - relu(Z) ||_F <= sqrt E, E = (1/n) || Zhat - Z ||_F^2, for pre-activations (n, M)."""
    z, thin = before.detach().cpu().double(), after.detach().cpu().double()
    root = math.sqrt(len(z))
    guaranteed, measured = (float(each.norm()) / root for each in (thin - z, thin.relu() - z.relu()))
    return Statement("Lemma 3.1", PAPER, (), guaranteed, measured, gamma(z.numel() + 8) * (guaranteed + measured))


def theorem_3_2(
    errors: Sequence[float], weights: Sequence[Tensor], measured: float, norm: str = "frobenius"
) -> Statement:
    """(1 / sqrt n) || Ytilde_L - Y_L ||_F <= sum_k (prod_{l > k} ||What_l||) sqrt(dE_k).

    errors    dE_k: (1/n) || Zhat - Z ||_F^2 of each layer alone, on the dense network's inputs
    weights   What_l (out, in), without biases
    measured  the left side
    norm      "frobenius", as published, or "spectral": also true, and tighter (||A B||_F <= ||A||_F ||B||_2)
    """
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(map(repr, NORMS))}")
    total = 0.0
    for error, weight in zip(errors, weights, strict=True):
        total = up(up(NORMS[norm](weight.detach().cpu().double()) * total), up(math.sqrt(max(error, 0.0))))
    hypotheses = (Hypothesis("every layer's error is a number >= 0", all(error >= 0 for error in errors)),)
    return Statement(f"Theorem 3.2 ({norm} norms)", PAPER, hypotheses, total, measured)


def removal(
    theta: Tensor, inverse: Tensor, q: int, increase: float, published: bool = False, doubt: float = 0.0
) -> Statement:
    """Removing weight q of one neuron raises E by at least theta_q^2 / [Psi^-1]_qq, with equality at the best update.

    theta (N,), inverse Psi^-1 (N, N) with Psi = X^T X / n; `increase` is the increase of E at the best update; `doubt`
    is what the computing of these two may have lost. The paper's L_q = theta_q^2 / (2 [H^-1]_qq) uses H = Psi, but the
    Hessian of E is 2 Psi: with `published` the statement is false.
    """
    exact = float(theta[q]) ** 2 / float(inverse[q, q])
    limit = exact / 2 if published else exact
    return Statement(
        "saliency" + (" as published" if published else ""), PAPER, (), limit, increase, up(doubt, gamma(4) * limit)
    )
