"""`Channels` keeps whole input channels, and `compact` takes the others out of the network for good."""

import pytest
import torch
from instances import random_layer
from torch import nn

import convexprune as cp
from convexprune.patterns import Blocks, Channels, select
from convexprune.problems import Reconstruction
from convexprune.solve import solve


def chain():
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Conv2d(6, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def one_plane():
    return nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Conv1d(6, 5, 3), nn.ReLU(), nn.Conv1d(5, 2, 1))


# the model, the shape of a sample, and how many channels each layer shall read; the first reads the network's input
NETWORKS = {
    "linear": (chain, (6,), {"2": 5, "4": 4}),
    "convolutions": (convolutions, (2, 8, 8), {"3": 4, "5": 3, "9": 2}),
    "one_plane": (one_plane, (2, 12), {"2": 3, "4": 2}),
}


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
@pytest.mark.parametrize("network", NETWORKS)
def test_channels_that_are_dropped_leave_the_network(network, mode):
    make, shape, keep = NETWORKS[network]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
    batches = list(torch.randn(3, 20, *shape, generator=torch.Generator().manual_seed(1)))
    pruned, report = cp.prune(
        model, batches, lambda layer: Reconstruction(layer, Channels(keep[layer.name])), mode=mode, names=list(keep)
    )
    assert [row.certificate.violation for row in report.rows] == [0] * len(keep)
    small, compaction = cp.compact(pruned)
    for name, count in keep.items():
        assert int(pruned.get_submodule(name).weight.transpose(0, 1).flatten(1).any(1).sum()) == count
        module = small.get_submodule(name)
        assert module.weight.shape[1] == count
        assert (module.in_features if isinstance(module, nn.Linear) else module.in_channels) == count
    assert compaction.parameters[1] < compaction.parameters[0]
    x = torch.cat(batches)
    torch.testing.assert_close(small(x), pruned(x), rtol=1e-4, atol=1e-5)


def test_a_transposed_convolution_keeps_whole_channels_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 5, 3, stride=2)).eval()
    batches = [torch.randn(20, 2, 6, 6, generator=torch.Generator().manual_seed(1))]
    pruned = cp.prune(model, batches, lambda layer: Reconstruction(layer, Channels(2)), names=["2"])[0]
    assert int(pruned[2].weight.flatten(1).any(1).sum()) == 2  # (in, out, height, width)


def test_behind_a_flatten_a_channel_is_an_input():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).eval()
    batches = [torch.randn(40, 2, 4, 4, generator=torch.Generator().manual_seed(1))]
    by_input = cp.prune(model, batches, lambda layer: Reconstruction(layer, Channels(12)), names=["3"])[0]
    assert int(by_input[3].weight.any(0).sum()) == 12
    by_channel = cp.prune(model, batches, lambda layer: Reconstruction(layer, Blocks((3, 4), 3)), names=["3"])[0]
    small, _ = cp.compact(by_channel)
    assert (small[0].out_channels, small[3].in_features) == (3, 12)
    torch.testing.assert_close(small(batches[0]), by_channel(batches[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("keep", [0, 1, 3, 4, 0.5, 0.1, 1.0])
def test_channels_are_blocks_over_all_neurons(keep, kernel):
    """The trick that this pattern replaces."""
    scores = torch.rand(5, 4 * kernel, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = select(Channels(keep), scores, kernel)
    assert torch.equal(mask, select(Blocks((5, kernel), keep), scores, kernel))
    assert int(mask[0].sum()) == kernel * (keep if isinstance(keep, int) else int(4 * keep + 0.5))


SOLVERS = [cp.ADMM(), cp.Balanced(), cp.Best(), cp.ExactOBS(), cp.SwapSearch(), cp.BranchAndBound()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
def test_channels_and_the_same_blocks_get_the_same_answer(solver):
    layer = random_layer(90, inputs=8, out=5)
    x, y = (solve(Reconstruction(layer, pattern), solver).x for pattern in (Channels(3), Blocks((5, 1), 3)))
    torch.testing.assert_close(x, y)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="keep is 7, but the layer's channels are only 6"):
        Reconstruction(random_layer(inputs=6), Channels(7))
    with pytest.raises(ValueError, match="5 inputs are no whole channels of 2 kernel positions"):
        select(Channels(1), torch.zeros(3, 5), kernel=2)
    for keep in (-1, 1.5, float("nan"), True, "3"):
        with pytest.raises((TypeError, ValueError), match="keep is"):
            Channels(keep)
