"""Laws of the patterns: exact counts, ties to the lower index, folding, N:M along input channels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convexprune.patterns import NM, Blocks, PerRow, Support, Unstructured, excess, kth_smallest, select

SEEDS = st.integers(0, 2**32 - 1)
LAW = settings(max_examples=40)


def scores(seed, shape=(4, 12), levels=None):
    generator = torch.Generator().manual_seed(seed)
    if levels:  # few values, so that there are ties
        return torch.randint(levels, shape, generator=generator).double()
    return torch.rand(shape, generator=generator, dtype=torch.float64)


@LAW
@given(seed=SEEDS, keep=st.floats(0, 1), levels=st.sampled_from([None, 1, 2, 3]))
def test_counts_are_exact_whatever_the_ties(seed, keep, levels):
    s = scores(seed, levels=levels)
    assert int(select(Unstructured(keep), s).sum()) == math.floor(48 * keep + 0.5)
    assert (select(PerRow(keep), s).sum(1) == math.floor(12 * keep + 0.5)).all()
    assert (select(NM(2, 4), s).reshape(4, 3, 4).sum(2) == 2).all()
    assert int(select(Blocks((2, 3), keep), s).sum()) == 6 * math.floor(8 * keep + 0.5)


@LAW
@given(seed=SEEDS, keep=st.integers(0, 48))
def test_the_largest_scores_are_chosen(seed, keep):
    s = scores(seed)
    mask = select(Unstructured(keep), s)
    assert mask.sum() == keep
    if 0 < keep < 48:
        assert s[mask].min() >= s[~mask].max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_the_kth_smallest_is_torchs(dtype, k):
    cells = scores(3, (6, 50), levels=20).to(dtype)
    cells[2, 4], cells[3, 5] = math.inf, -1
    before = cells.clone()
    assert torch.equal(kth_smallest(cells, k), torch.kthvalue(cells, k, dim=1, keepdim=True).values)
    assert torch.equal(cells, before)


def test_ties_go_to_the_lower_index():
    mask = select(Unstructured(5), torch.ones(2, 4))
    assert mask.flatten().tolist() == [True] * 5 + [False] * 3
    assert select(NM(1, 4), torch.zeros(1, 8)).nonzero()[:, 1].tolist() == [0, 4]


@pytest.mark.parametrize("pattern", [Unstructured(0.5), PerRow(3), NM(2, 4), Blocks((2, 3), 2), NM(1, 2)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_unfolding_undoes_folding(pattern, kernel):
    values = scores(0)
    cells = pattern.folded(values, kernel)
    back = pattern.unfolded(cells, (4, 12), kernel)
    torch.testing.assert_close(pattern.folded(back, kernel) / (6 if isinstance(pattern, Blocks) else 1), cells)


def test_n_of_m_runs_along_the_input_channels_of_a_convolution():
    # 8 channels of a 3-pixel kernel: input c * 3 + k
    mask = select(NM(2, 4), scores(1, (5, 24)), kernel=3)
    assert (mask.reshape(5, 2, 4, 3).sum(2) == 2).all()


def test_always_stays_and_counts():
    s = scores(2)
    always = s < 0.1
    mask = select(Unstructured(20), s, always=always)
    assert mask[always].all()
    assert mask.sum() == 20
    with pytest.raises(ValueError, match="must stay, but"):
        select(NM(2, 4), s, always=torch.ones(4, 12, dtype=torch.bool))


def test_a_larger_support_to_start_from():
    s = scores(3)
    assert select(Unstructured(20), s, grow=1.5).sum() == 30
    assert select(NM(2, 4), s, grow=1.1).sum() == 24  # rounded: two of four stay two of four
    mask = s > 0.5
    assert (select(Support(mask), s, grow=2.0) == mask).all()


def test_excess_counts_what_is_too_much():
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[0, :4] = True
    assert excess(Unstructured(4), mask) == 0
    assert excess(Unstructured(3), mask) == 1
    assert excess(PerRow(1), mask) == 3
    assert excess(NM(2, 4), mask) == 2
    assert excess(Blocks((2, 3), 1), mask) == 1
    assert excess(Support(~mask), mask) == 4


@pytest.mark.parametrize("keep", [-1, 1.5, math.nan, math.inf, True, "0.5"])
@pytest.mark.parametrize("kind", [Unstructured, PerRow, lambda keep: Blocks((1, 1), keep)])
def test_a_bad_keep_is_refused(kind, keep):
    with pytest.raises(TypeError if keep is True or keep == "0.5" else ValueError, match="keep is"):
        kind(keep)


def test_what_does_not_fit_is_refused():
    s = scores(0)
    with pytest.raises(ValueError, match="multiple of 5"):
        select(NM(2, 5), s)
    with pytest.raises(ValueError, match="do not tile"):
        select(Blocks((3, 3), 0.5), s)
    with pytest.raises(ValueError, match="has only 48"):
        select(Unstructured(49), s)
    with pytest.raises(ValueError, match="n is 5; it must be a whole number from 0 to 4"):
        NM(5, 4)
    with pytest.raises(TypeError, match="m is '4'"):
        NM("2", "4")
    with pytest.raises(ValueError, match="the support has shape"):
        select(Support(torch.ones(2, 2, dtype=torch.bool)), s)
    with pytest.raises(ValueError, match="boolean"):
        Support(torch.ones(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        select(PerRow(2), s * math.nan)
