"""Bounds for unseen data from held-out samples, at a given confidence; the pruning must not have used the samples.

Source: Clopper, Pearson, Biometrika 1934; Maurer, Pontil, COLT 2009, Theorem 4 (empirical Bernstein).
"""

from __future__ import annotations

import math

from torch import Tensor

from convexprune.rounding import UNIT, down, gamma, lowered, total, up

HALVINGS = 100


def clopper_pearson(successes: int, trials: int, confidence: float) -> float:
    """Upper bound of a probability, from k successes in n trials: the p with P(Bin(n, p) <= k) = 1 - confidence."""
    _check(trials, confidence)
    if not 0 <= successes <= trials:
        raise ValueError(f"successes is {successes}; it must be between 0 and the {trials} trials")
    if successes == trials:
        return 1.0
    low, high, miss = successes / trials, 1.0, down(math.log(1 - confidence))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if log_binomial(successes, trials, middle) > miss:
            low = middle
        else:
            high = middle
    return high


def empirical_bernstein(values: Tensor, largest: float, confidence: float) -> float:
    """Upper bound of E min(Z, b), b = `largest`, from independent samples of Z >= 0; the clip needs no assumption on Z.

    mean + sqrt(2 V log(2 / delta) / n) + 7 b log(2 / delta) / (3 (n - 1)),    delta = 1 - confidence

    with the mean and the variance V (divisor n - 1) of the clipped samples.
    """
    z = values.detach().cpu().double().flatten().clamp(max=largest)
    _check(len(z), confidence)
    if len(z) < 2:
        raise ValueError("one sample has no variance; give at least two")
    if not 0 < largest < math.inf or bool((z < 0).any()):
        raise ValueError(f"largest is {largest} and the least value {float(z.min()):g}; values must be in [0, largest]")
    weight, mean = math.log(2 / (1 - confidence)), total(z) / len(z)
    variance = total((z - mean).square()) / (len(z) - 1)  # about another number than the mean it is only larger
    found = mean + math.sqrt(2 * variance * weight / len(z)) + 7 * largest * weight / (3 * (len(z) - 1))
    return up(found, gamma(24) * found)


def cannot_flip(logits: Tensor, error: float | Tensor) -> Tensor:
    """Which samples (n,) keep their prediction: the largest logit leads the second by more than twice the error.

    logits (n, classes) of the dense network; error >= max_k |zhat_k - z_k|, one for each sample or one for all
    """
    top = logits.detach().cpu().double().topk(2, dim=1).values
    lead = lowered(top[:, 0] - top[:, 1])
    stays: Tensor = lead > 2 * (error.cpu().double() if isinstance(error, Tensor) else error)
    return stays


def log_binomial(k: int, n: int, p: float) -> float:
    """At least log P(Bin(n, p) <= k), summed downwards from its largest term; logarithms are good to 4 units."""
    if p >= 1:
        return -math.inf
    ratio = (1 - p) / p
    parts = (
        math.lgamma(n + 1), -math.lgamma(k + 1), -math.lgamma(n - k + 1), k * math.log(p), (n - k) * math.log1p(-p),
    )  # fmt: skip
    whole, term, rest = 1.0, 1.0, 0
    for i in range(k, 0, -1):
        term *= i * ratio / (n - i + 1)
        whole += term
        if term < UNIT / n * whole and term < 1:
            rest = i  # terms that are smaller still
            break
    found = math.fsum(parts) + math.log(whole)
    return up(found, gamma(16) * math.fsum(map(abs, parts)) + gamma(6 * (k - rest) + 16) + rest * UNIT / n)


def _check(trials: int, confidence: float) -> None:
    if trials < 1:
        raise ValueError("no samples; give held-out ones")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be in (0, 1), such as 0.99")
