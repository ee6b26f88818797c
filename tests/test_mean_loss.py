"""Upper bounds of an expected loss: right as often as they say, by enumeration and simulation, and fair bets."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convexprune.bounds import Betting, Binomial, Hoeffding, HoeffdingBentkus, ShorterOf, clopper_pearson

LAW = settings(max_examples=25, deadline=None)
GENERAL = [Betting(), Betting(events=2.0, most=0.5, seed=3), HoeffdingBentkus(), Hoeffding(),
           ShorterOf(Betting(), HoeffdingBentkus())]  # fmt: skip
LOSSES = st.lists(st.floats(0, 1), min_size=2, max_size=40).map(lambda x: torch.tensor(x, dtype=torch.float64))


@pytest.mark.parametrize("bound", [Binomial(), *GENERAL], ids=repr)
@pytest.mark.parametrize("mean", [0.1, 0.4])
def test_every_sequence_of_zeros_and_ones(bound, mean):
    """The exact probability of a bound below the truth: all sequences, each with its probability."""
    wrong = 0.0
    for x in itertools.product((0.0, 1.0), repeat=7):
        losses = torch.tensor(x, dtype=torch.float64)
        if bound.upper_bound(losses, 0.7, 0.3) < mean:
            wrong += mean ** sum(x) * (1 - mean) ** (7 - sum(x))
    assert wrong <= 0.3


@pytest.mark.parametrize("bound", GENERAL, ids=repr)
def test_every_sequence_of_three_values(bound):
    values, chances = (0.0, 0.25, 1.0), (0.5, 0.3, 0.2)
    mean = math.fsum(v * p for v, p in zip(values, chances, strict=True))
    wrong = 0.0
    for picks in itertools.product(range(3), repeat=5):
        losses = torch.tensor([values[i] for i in picks], dtype=torch.float64)
        if bound.upper_bound(losses, 0.7, 0.3) < mean:
            wrong += math.prod(chances[i] for i in picks)
    assert wrong <= 0.3


def law(kind, mean, samples, generator):
    uniform = torch.rand(samples, generator=generator, dtype=torch.float64)
    if kind == "binary":
        return (uniform < mean).double()
    if kind == "rare":
        return (torch.rand(samples, generator=generator) < 2 * mean).double() * uniform
    return 2 * mean * uniform


@pytest.mark.parametrize("bound", GENERAL, ids=repr)
@pytest.mark.parametrize("kind", ["binary", "rare", "small"])
def test_coverage(bound, kind):
    generator, mean = torch.Generator().manual_seed(0), 0.05
    wrong = sum(bound.upper_bound(law(kind, mean, 300, generator), 0.9, 0.06) < mean for _ in range(300))
    assert wrong <= 30 + 3 * math.sqrt(300 * 0.1 * 0.9)


def test_a_small_variance_makes_betting_shorter():
    generator = torch.Generator().manual_seed(1)
    losses = law("rare", 0.01, 1000, generator)
    betting, bentkus, plain = (b.upper_bound(losses, 0.99, 0.02) for b in (Betting(), HoeffdingBentkus(), Hoeffding()))
    assert betting < bentkus < 0.5 * plain
    small = law("small", 0.01, 1000, generator)
    betting, bentkus = (b.upper_bound(small, 0.99, 0.02) for b in (Betting(), HoeffdingBentkus()))
    assert betting < 0.7 * bentkus
    half = losses / 2 + 0.5  # a paired difference: nearly all samples at the middle
    assert Betting().upper_bound(half, 0.99, 0.51) - 0.5 < 0.25 * (Hoeffding().upper_bound(half, 0.99, 0.51) - 0.5)


@LAW
@given(LOSSES, st.floats(0.55, 0.99), st.floats(0.01, 0.99))
def test_a_bound_is_between_the_mean_and_one_and_grows_with_the_confidence(losses, confidence, level):
    for bound in GENERAL:
        found = bound.upper_bound(losses, confidence, level)
        assert float(losses.mean()) <= found * (1 + 1e-12) + 1e-12
        assert found <= 1
    bentkus, plain = HoeffdingBentkus(), Hoeffding()
    assert bentkus.upper_bound(losses, confidence, level) <= plain.upper_bound(losses, confidence, level) + 1e-9
    surer = (1 + confidence) / 2
    for bound in (bentkus, plain):
        assert bound.upper_bound(losses, surer, level) >= bound.upper_bound(losses, confidence, level) * (1 - 1e-9)


@LAW
@given(LOSSES, st.integers(1, 30), st.floats(0.01, 0.9))
def test_a_bet_does_not_look_ahead(losses, kept, level):
    kept = min(kept, len(losses))
    other = losses.clone()
    other[kept - 1 :] = 1 - other[kept - 1 :]
    bound = Betting()
    assert torch.equal(bound.bets(losses, 0.9, level)[:kept], bound.bets(other, 0.9, level)[:kept])


@LAW
@given(LOSSES, st.floats(0.6, 0.99), st.floats(0.05, 0.9))
def test_at_the_bound_the_bettor_is_rich_enough_and_below_it_is_not(losses, confidence, level):
    bound = Betting()
    found = bound.upper_bound(losses, confidence, level)
    order = torch.randperm(len(losses), generator=torch.Generator().manual_seed(0))
    x = losses[order].tolist()
    bets = bound.bets(losses[order], confidence, level).tolist()

    def richest(m):
        wealth = best = 1.0
        for bet, loss in zip(bets, x, strict=True):
            wealth *= 1 + min(bet, bound.most / (1 - m)) * (m - loss)
            assert wealth > 0
            best = max(best, wealth)
        return best

    if found < 1:
        assert richest(found) >= (1 / (1 - confidence)) * (1 - 1e-12)
    below = found - 1e-6
    if below > float(losses.mean()):
        assert richest(below) < 1 / (1 - confidence)


def test_betting_agrees_with_the_exact_bound_where_nothing_was_lost():
    for n in (200, 1000):
        zeros = torch.zeros(n, dtype=torch.float64)
        assert Binomial().upper_bound(zeros, 0.99, 0.01) == clopper_pearson(0, n, 0.99)
        exact = 1 - 0.01 ** (1 / n)
        assert exact <= Betting().upper_bound(zeros, 0.99, exact) <= 2.2 * exact


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Binomial().upper_bound(torch.tensor([0.5]), 0.9, 0.1), "losses that are 0 or 1"),
        (lambda: Betting().upper_bound(torch.tensor([]), 0.9, 0.1), "no samples"),
        (lambda: Hoeffding().upper_bound(torch.tensor([1.5]), 0.9, 0.1), "losses are from 1.5"),
        (lambda: HoeffdingBentkus().upper_bound(torch.tensor([float("nan")]), 0.9, 0.1), "must be in"),
        (lambda: Betting().upper_bound(torch.zeros(3), 1.0, 0.1), "confidence is 1.0"),
        (lambda: Betting().upper_bound(torch.zeros(3), 0.9, 1.0), "level is 1.0"),
        (lambda: Betting(most=1.0), "most is 1.0"),
        (lambda: Betting(events=0.0), "events is 0.0"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
