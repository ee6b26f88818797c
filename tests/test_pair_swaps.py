"""Exact pair swaps: prices are numpy's least squares, searches never go up, and the presets say where they stop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import random_layer

from convexprune.patterns import NM, PerRow, Unstructured
from convexprune.problems import Reconstruction
from convexprune.solve import solve
from convexprune.solvers import Balanced, Best, Fast, RisingPenalty, SwapSearch
from convexprune.solvers.least_squares.grams import Grams
from convexprune.solvers.least_squares.on_support import refitted
from convexprune.solvers.least_squares.pair_swaps import offers, price_of
from convexprune.solvers.least_squares.scaling import Scaled
from convexprune.solvers.least_squares.support_inverses import SupportInverses

LAW = settings(max_examples=15)
SEEDS = st.integers(0, 2**32 - 1)
PATTERNS = [Unstructured(0.4), PerRow(9), NM(2, 4)]


def gram_and_cross(seed, rows=3, width=10):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x = draw(40, 4) @ draw(4, width) + 0.3 * draw(40, width)
    x = x / x.square().sum(0).sqrt()
    mask = torch.rand(rows, width, generator=generator) < 0.5
    mask[:, 0], mask[:, 1] = True, False
    return x.T @ x, draw(rows, width), mask


def lowest(gram, cross, support):
    """The least of w H w - 2 c w over weights on a list of inputs."""
    if not support:
        return 0.0
    block, right = gram[support][:, support].numpy(), cross[support].numpy()
    return -float(right @ np.linalg.solve(block, right))


def offered(gram, cross, mask, group=None):
    grams = Grams(gram[None], torch.zeros(len(mask), dtype=torch.long))
    inverses = SupportInverses(grams, cross[:, None], mask, torch.zeros(len(mask), 1, dtype=torch.float64))
    slope = torch.where(mask, 0.0, (cross[:, None] - grams.product(inverses.scattered))[:, 0])
    columns = mask.int().argsort(dim=1, stable=True)[:, : int((~mask).sum(1).min())]
    return offers(inverses, columns, slope, group)


@LAW
@given(seed=SEEDS, grouped=st.booleans())
def test_a_price_is_what_the_least_squares_say(seed, grouped):
    gram, cross, mask = gram_and_cross(seed)
    group = torch.arange(10).div(5, rounding_mode="floor").expand(3, 10) if grouped else None
    found = offered(gram, cross, mask, group)
    for row in range(3):
        support = mask[row].nonzero()[:, 0].tolist()
        now, best = lowest(gram, cross[row], support), {}
        for at, j in enumerate(found.columns[row].tolist()):
            alone = lowest(gram, cross[row], [*support, j])
            assert float(found.gains[row, at]) == pytest.approx(now - alone, rel=1e-6, abs=1e-9)
            exits = [i for i in support if group is None or i // 5 == j // 5]
            trials = [(lowest(gram, cross[row], [k for k in support if k != i] + [j]), i) for i in exits]
            if trials:
                value, i = min(trials)
                best.setdefault(i, []).append(max(now - value, 0.0))
        # an exit counts once, for the entry it serves best
        wanted = sum(max(each) for each in best.values())
        assert float(found.pays[row].sum()) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@LAW
@given(seed=SEEDS)
def test_the_price_lets_in_as_many_as_it_lets_out(seed):
    generator = torch.Generator().manual_seed(seed)
    gains, costs = torch.rand(7, generator=generator), torch.rand(9, generator=generator)
    price = price_of(gains, costs)
    assert int((gains > price).sum()) == int((costs < price).sum()) or torch.isinf(price)
    assert torch.isinf(price_of(gains, costs + 1))


@LAW
@given(seed=SEEDS, pattern=st.sampled_from(PATTERNS))
def test_rounds_of_pairs_never_go_up_and_keep_the_count(seed, pattern):
    problem = Reconstruction(random_layer(seed % 1000, inputs=24, out=12, samples=60), pattern)
    mask = problem.select(torch.rand(problem.target.shape, generator=torch.Generator().manual_seed(seed)).double())
    begun = problem.completed(refitted(problem, mask))
    found = solve(problem, SwapSearch(rounds=0), start=begun)
    assert found.certificate.violation == 0
    assert found.certificate.value <= problem.value(begun)


@pytest.mark.parametrize("pattern", [PerRow(9), NM(2, 4)])
def test_at_the_end_no_exchange_within_a_neuron_pays(pattern):
    problem = Reconstruction(random_layer(3, inputs=24, out=6, samples=60), pattern)
    mask = problem.select(torch.rand(problem.target.shape, generator=torch.Generator().manual_seed(0)).double())
    begun = problem.completed(refitted(problem, mask))
    solution = solve(problem, SwapSearch(rounds=0, dtype=torch.float64), start=begun)
    assert solution.certificate.value < 0.8 * problem.value(begun)
    group = torch.arange(24) // (4 if isinstance(pattern, NM) else 24)
    for row, kept in enumerate(solution.x[:, :24] != 0):
        support = kept.nonzero()[:, 0].tolist()
        now = lowest(problem.gram, problem.cross[row], support)
        for i in support:
            for j in (~kept & (group == group[i])).nonzero()[:, 0].tolist():
                swapped = lowest(problem.gram, problem.cross[row], [k for k in support if k != i] + [j])
                assert swapped >= now - 1e-4 * solution.certificate.value


@LAW
@given(seed=st.integers(0, 10_000), pattern=st.sampled_from(PATTERNS))
def test_best_is_never_above_balanced(seed, pattern):
    problem = Reconstruction(random_layer(seed, inputs=24, out=12, samples=40), pattern)
    assert solve(problem, Best()).certificate.value <= solve(problem, Balanced()).certificate.value


def test_beyond_the_limit_the_presets_are_admm():
    problem = Reconstruction(random_layer(5, inputs=64, out=8, samples=200), Unstructured(0.5))  # 64 / 8 = 8 N^2
    plain = solve(problem, RisingPenalty())
    for preset in (Balanced, Best):
        assert solve(problem, preset(limit=7.9)).solver == plain.solver
        assert torch.equal(solve(problem, preset(limit=7.9, rounds=2)).x, plain.x)
        for limit in (8.0, math.inf):
            assert solve(problem, preset(limit=limit)).solver.startswith(preset.__name__)


def test_conjugate_gradients_reach_least_squares():
    """8 N^2 of factorisations: passes are cheaper from 20 on."""
    problem = Reconstruction(random_layer(6, inputs=320, out=6, samples=1500), Unstructured(0.6))
    scaled = Scaled.of(problem)
    mask = problem.select(problem.target.square())
    found = problem.completed(scaled.fitted(problem, scaled.dense * mask, mask))
    exact = problem.completed(refitted(problem, mask))
    assert not torch.equal(found, exact)
    assert problem.value(found) <= (1 + 1e-4) * problem.value(exact)
    assert int((found != 0).sum()) == int((exact != 0).sum())


def test_fast_runs_the_whole_schedule_on_small_layers():
    problem = Reconstruction(random_layer(7, inputs=48, out=32, samples=300), Unstructured(0.3))
    fast, plain = solve(problem, Fast()), solve(problem, RisingPenalty())
    assert fast.certificate.value == pytest.approx(plain.certificate.value, rel=1e-3)
