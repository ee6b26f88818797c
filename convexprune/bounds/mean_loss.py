"""Upper bounds of an expected loss in [0, 1] from independent samples, at a given confidence 1 - delta.

Binomial           exact, for losses that are 0 or 1
Betting            the wealth of somebody who bets against "the expectation is m"; for small variances much the shortest
HoeffdingBentkus   from the mean alone
Hoeffding          the plain one, to compare with
ShorterOf          the smaller of two bounds, each at delta / 2

The losses are what was computed, and exact. A bound is chosen before the samples are looked at.
Source: Clopper, Pearson 1934; Waudby-Smith, Ramdas, JRSS B 2024; Bates, Angelopoulos, Lei, Malik, Jordan, JACM 2021,
section 3.1; Bentkus, Annals of Probability 2004; Hoeffding 1963.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

import torch
from torch import Tensor

from convexprune.bounds.confidence import clopper_pearson, log_binomial
from convexprune.options import between, check_options, positive
from convexprune.rounding import down, gamma, total, up

HALVINGS: Final = 35  # 3e-11 of the distance to 1
SHAPES: Final = 256  # points of the table of bets


class MeanBound(Protocol):
    """A small frozen object."""

    def upper_bound(self, losses: Tensor, confidence: float, level: float) -> float:
        """A number that the expected loss exceeds with probability at most 1 - confidence.

        losses  (n,) in [0, 1], independent draws of one law
        level   the number that the bound should be below: a hint, named before the losses are seen
        """


@dataclass(frozen=True)
class Binomial:
    """Clopper and Pearson's bound, exact for losses that are 0 or 1; it refuses others."""

    def upper_bound(self, losses: Tensor, confidence: float, level: float) -> float:
        """The p with P(Bin(n, p) <= k) = delta, k the sum of the losses; the level is not used."""
        x = checked_losses(losses, confidence)
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError("Binomial takes losses that are 0 or 1; give Betting() for others in [0, 1]")
        return clopper_pearson(int(x.sum()), len(x), confidence)


@dataclass(frozen=True)
class Hoeffding:
    """mean + sqrt(log(1 / delta) / (2 n))."""

    def upper_bound(self, losses: Tensor, confidence: float, level: float) -> float:
        """The level is not used."""
        x = checked_losses(losses, confidence)
        found = total(x) / len(x) + math.sqrt(-math.log(_miss(confidence)) / (2 * len(x)))
        return min(up(found, gamma(16) * found), 1.0)


@dataclass(frozen=True)
class HoeffdingBentkus:
    """The largest m with min(exp(-n kl(R, m)), e P(Bin(n, m) <= ceil(n R))) > delta, for the mean R of the losses.

    Both bound the same probability, that a mean is at most R; so their minimum does, and costs no further delta.
    """

    def upper_bound(self, losses: Tensor, confidence: float, level: float) -> float:
        """The level is not used."""
        x = checked_losses(losses, confidence)
        n, sum_ = len(x), _sum_above(x)
        if sum_ >= n:
            return 1.0
        mean, miss = min(up(sum_ / n), 1.0) if sum_ else 0.0, down(math.log(_miss(confidence)))

        def rejected(m: float) -> bool:
            if m >= 1:
                return True
            return min(_log_hoeffding(mean, n, m), up(1 + log_binomial(math.ceil(sum_), n, m))) <= miss

        return _least(rejected, sum_ / n)


@dataclass(frozen=True)
class Betting:
    """The least m at which a bettor against "the expected loss is at least m" has become 1 / delta times as rich.

    K_t(m) = prod_{i <= t} (1 + min(lambda_i, most / (1 - m)) (m - x_i))
    bound  = min {m >= mean : max_t K_t(m) >= 1 / delta}

    lambda_i depends on x_1 .. x_{i-1} alone. If E[x_i | x_1 .. x_{i-1}] >= m, K is a nonnegative supermartingale that
    begins at 1, and reaches 1 / delta with probability at most delta (Ville). K grows with m, so all from the bound on
    is excluded. lambda_i is Kelly's bet for a loss of two values, 1 and one below, whose variance is to p (1 - p)
    as it was in the samples before, and whose mean p is where n samples just suffice to be below `level`. The samples
    are taken in an order drawn by the seed, so that independent draws may be listed in any order, by class for example.

    Args:
        events: Weight of the guess, before any sample, that the losses are 0 or 1: so many losses of 1.
        most: The largest share of the wealth that one sample may cost, in (0, 1).
        seed: Draws the order. To try several and take the best bound would need a union bound.

    Raises:
        ValueError: For an option out of its range.

    Source:
        Waudby-Smith, Ramdas, JRSS B 2024, Theorem 3 and section 4 (the bets are ours; any predictable ones are valid).

    Example:
        >>> import torch
        >>> losses = torch.full((1000,), 0.005, dtype=torch.float64)
        >>> [round(bound.upper_bound(losses, 0.99, 0.02), 3) for bound in (Betting(), HoeffdingBentkus(), Hoeffding())]
        [0.01, 0.015, 0.053]
    """

    events: float = 0.25
    most: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        check_options(self, events=positive, most=between(0, 1))

    def upper_bound(self, losses: Tensor, confidence: float, level: float) -> float:
        """`level` says for which size of the expectation the bets are made; any is valid."""
        between(0, 1)("level", level)
        x = checked_losses(losses, confidence)
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))]
        bets = self.bets(x, confidence, level)
        wanted = up(-math.log(_miss(confidence)))
        return _least(lambda m: m >= 1 or self._log_wealth(x, bets, m) >= wanted, total(x) / len(x))

    def bets(self, losses: Tensor, confidence: float, level: float) -> Tensor:
        """lambda (n,): each entry from the losses before it."""
        n = len(losses)
        shapes, bets, mean = _table(n, confidence, level)
        prior = self.events / mean  # that many samples, of which `events` are 1 and the others 0
        before = torch.stack([losses, losses.square()]).cumsum(1).roll(1, 1)
        before[:, 0] = 0
        first, second = (before + self.events) / (prior + torch.arange(n, dtype=torch.float64))
        variance = (second - first.square()) / (first * (1 - first)).clamp(min=1e-300)
        at = torch.searchsorted(shapes, variance.clamp(shapes[0], shapes[-1])).clamp(max=len(shapes) - 1)
        return bets[at]

    def _log_wealth(self, losses: Tensor, bets: Tensor, m: float) -> float:
        """At most max_t log K_t(m)."""
        capped = bets.clamp(max=self.most / (1 - m))
        terms = torch.log1p(capped * (m - losses))
        # an argument is off by 4 units of it, which a slope 1 / (1 + argument) turns into at most 4 / (1 - most)
        doubt = gamma(len(losses) + 8) * float(terms.abs().sum()) + gamma(8) * len(losses) / (1 - self.most)
        return down(float(terms.cumsum(0).max()), doubt)


@dataclass(frozen=True)
class ShorterOf:
    """The smaller of two bounds, each at delta / 2: it may be chosen after the losses were seen (a union bound)."""

    first: MeanBound
    second: MeanBound

    def upper_bound(self, losses: Tensor, confidence: float, level: float) -> float:
        """As of both."""
        halved = up((1 + confidence) / 2)
        return min(bound.upper_bound(losses, halved, level) for bound in (self.first, self.second))


def checked_losses(losses: Tensor, confidence: float) -> Tensor:
    """The losses (n,) in float64; raises ValueError for none, and for what is not in [0, 1]."""
    between(0, 1)("confidence", confidence)
    x = losses.detach().cpu().double().flatten()
    if not len(x):
        raise ValueError("no samples; give held-out ones")
    if not bool(((x >= 0) & (x <= 1)).all()):
        raise ValueError(f"losses are from {float(x.min()):g} to {float(x.max()):g}; they must be in [0, 1]")
    return x


def _miss(confidence: float) -> float:
    """At most delta: 1 - confidence is exact in float64 above 1 / 2, and below it rounds by one unit."""
    return down(1 - confidence) if confidence < 0.5 else 1 - confidence


def _sum_above(values: Tensor) -> float:
    """The sum, or the next float above it where it is none."""
    found = math.fsum(values.tolist())
    return up(found) if math.fsum([*values.tolist(), -found]) > 0 else found


def _least(rejected: Callable[[float], bool], low: float) -> float:
    """A number at which `rejected` is true, near the least from `low` on; 1 if there is none below."""
    high = 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if rejected(middle):
            high = middle
        else:
            low = middle
    return high


def _log_hoeffding(mean: float, n: int, m: float) -> float:
    """At least -n kl(mean, m); 0 where the mean is not below m."""
    if mean >= m:
        return 0.0
    parts = ((mean * math.log(m / mean) if mean else 0.0), (1 - mean) * (math.log1p(-m) - math.log1p(-mean)))
    return up(n * math.fsum(parts), gamma(16) * n * math.fsum(map(abs, parts)))


@lru_cache(maxsize=64)
def _table(n: int, confidence: float, level: float) -> tuple[Tensor, Tensor, float]:
    """Variances relative to p (1 - p), rising, with Kelly's bet for each; and the mean p of losses of 0 and 1.

    A loss that is 1 with probability q and else a has mean p = q + (1 - q) a and variance (1 - r) p (1 - p) for
    a = r p. At mean `level` the probability would be c = (level - a) / (1 - a). The p wanted has n kl(q, c) =
    log(1 / delta); there the bet (c - q) / ((1 - a) c (1 - c)) grows fastest.
    """
    price = -math.log(_miss(confidence)) / n
    varied = torch.logspace(-6, 0, SHAPES, dtype=torch.float64)
    rest, low, high = 1 - varied, torch.zeros_like(varied), torch.full_like(varied, level)
    for _ in range(HALVINGS):
        mean = (low + high) / 2
        a = rest * mean
        q, c = (mean - a) / (1 - a), (level - a) / (1 - a)
        far = torch.special.xlogy(q, q / c) + torch.special.xlogy(1 - q, (1 - q) / (1 - c)) > price
        low, high = torch.where(far, mean, low), torch.where(far, high, mean)
    a = rest * low
    q, c = (low - a) / (1 - a), (level - a) / (1 - a)
    return varied, (c - q) / ((1 - a) * c * (1 - c)), max(float(low[-1]), level / 20)
