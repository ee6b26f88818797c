"""Bounds for data not seen: exact at the edges, right as often as they say, and only for samples that were not used."""

import math

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.bounds import cannot_flip, clopper_pearson, empirical_bernstein


def test_clopper_pearson_at_the_edges_and_against_the_sum():
    assert clopper_pearson(0, 100, 0.99) == pytest.approx(1 - 0.01 ** (1 / 100))
    assert clopper_pearson(7, 7, 0.9) == 1
    for k, n in ((3, 50), (20, 60), (500, 20_000)):
        p = clopper_pearson(k, n, 0.95)
        logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p)
                + (n - i) * math.log1p(-p) for i in range(k + 1)]  # fmt: skip
        assert math.fsum(map(math.exp, logs)) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("p", [0.01, 0.2])
def test_coverage(p):
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 300, generator=generator) < p
    inside = sum(clopper_pearson(int(row.sum()), 300, 0.95) >= p for row in draws)
    assert inside >= 0.94 * 2000
    values = torch.rand(500, 300, generator=generator) ** 4  # mean 1 / 5
    assert sum(empirical_bernstein(row, 1.0, 0.95) >= 0.2 for row in values) >= 0.94 * 500


def test_a_margin_above_twice_the_error_cannot_flip():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 5, generator=generator)
    noise = 0.6 * torch.rand(500, 5, generator=generator) - 0.3
    stays = cannot_flip(logits, 0.3)
    assert stays.any()
    assert ((logits + noise).argmax(1) == logits.argmax(1))[stays].all()
    each = cannot_flip(logits, noise.abs().amax(1))
    assert ((logits + noise).argmax(1) == logits.argmax(1))[each].all()
    assert each.sum() >= stays.sum()


@pytest.fixture
def networks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 4))
    used = [torch.randn(50, 6), torch.randn(30, 6)]
    pruned, _ = cp.prune(model, used, lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)))
    return model, pruned, used


def test_a_certificate_from_held_out_samples(networks):
    model, pruned, used = networks
    held_out = [torch.randn(200, 6), (torch.randn(100, 6), torch.zeros(100))]
    found = cp.certify_unseen(model, pruned, held_out, used, clip=10.0)
    x = torch.randn(20_000, 6)
    changed = (model(x).argmax(1) != pruned(x).argmax(1)).float().mean()
    assert found.samples == 300
    assert found.changed / 300 < found.changed_most
    assert changed <= found.changed_most
    assert (model(x) - pruned(x)).detach().square().sum(1).clamp(max=10).mean() <= found.error_most
    assert "at most" in str(found)


def test_a_used_sample_is_refused(networks):
    model, pruned, used = networks
    mixed = torch.cat([torch.randn(5, 6), used[1][3:4]])
    with pytest.raises(ValueError, match="sample 5 of held-out batch 1 was used"):
        cp.certify_unseen(model, pruned, [torch.randn(4, 6), mixed], used, clip=1.0)


@pytest.mark.parametrize("wrap", [lambda x: x.double(), lambda x: (x, x), lambda x: {"input": x}, lambda x: -x])
def test_a_used_sample_is_known_in_other_wrappings(networks, wrap):
    model, pruned, used = networks
    used = [*used, torch.zeros(1, 6)]
    with pytest.raises(ValueError, match="of held-out batch 0 was used"):
        cp.certify_unseen(model, pruned, [wrap(torch.cat([used[2], used[0]]))], used, clip=1.0)


def test_of_several_inputs_the_order_of_the_keys_does_not_count(networks):
    model, pruned, _ = networks
    a, b = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match="of held-out batch 0 was used"):
        cp.certify_unseen(model, pruned, [{"b": b, "a": a}], [{"a": a, "b": b}], clip=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, p, u: cp.certify_unseen(m, p, [], u, clip=1.0), "no samples"),
        (
            lambda m, p, u: cp.certify_unseen(m, p, [torch.randn(9, 6)], u, clip=1.0, confidence=1.0),
            "confidence is 1.0",
        ),
        (lambda m, p, u: cp.certify_unseen(m, p, u, iter([]), clip=1.0), "no used samples"),
        (
            lambda m, p, u: cp.certify_unseen(m, p, [torch.full((1, 6), torch.nan)], u, clip=1.0),
            "NaN or inf of held-out",
        ),
        (
            lambda m, p, u: cp.certify_unseen(m, p, [{"a": torch.ones(4, 6), "b": torch.ones(1, 6)}], u, clip=1.0),
            r"have \[1, 4\] rows",
        ),
        (
            lambda m, p, u: cp.certify_unseen(m, torch.nn.Linear(6, 1), [torch.rand(9, 6)], u, clip=1.0),
            r"the pruned network's outputs have shape \(9, 1\)",
        ),
        (lambda m, p, u: clopper_pearson(5, 4, 0.9), "successes is 5"),
        (lambda m, p, u: empirical_bernstein(torch.tensor([-1.0, 1.0]), 2.0, 0.9), "least value -1"),
        (lambda m, p, u: empirical_bernstein(torch.ones(1), 2.0, 0.9), "at least two"),
    ],
)
def test_bad_input_is_named(networks, make, message):
    with pytest.raises(ValueError, match=message):
        make(*networks)
