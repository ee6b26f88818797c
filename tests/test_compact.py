"""A compacted network computes the same function as the masked one, or leaves the channel and says so."""

import copy

import pytest
import torch
from benchmark_utils import resnet
from torch import nn
from torch.nn import functional as F

import convexprune as cp
from convexprune.network.parts import traceable


class ConvNet(nn.Module):
    """Conv-BN-ReLU-Conv, depthwise, pooling, flatten by view, Linear."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.conv2, self.depth = nn.Conv2d(10, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.conv3 = nn.Conv2d(8, 6, 1)
        self.fc1, self.fc2 = nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.depth(self.conv2(x)))
        x = F.max_pool2d(self.conv3(x), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(torch.tanh(self.fc1(x)))


class Residual(nn.Module):
    """Two branches that agree on some of their dead channels only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.one, self.two = nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(5, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        return self.head(x.mean((2, 3)))


def settled(model, seed=0):
    """Random batch norm statistics, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for key, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                getattr(module, key).data.uniform_(low, low + 1, generator=generator)
    return model.eval()


def kill(module, channels, bias=None):
    with torch.no_grad():
        module.weight[channels] = 0
        if module.bias is not None and bias is not None:
            module.bias[channels] = bias


def same(small, model, x):
    a, b = small(x).detach(), model(x).detach()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_convolutions_shrink_and_compute_the_same():
    torch.manual_seed(0)
    model, x = settled(ConvNet()), torch.randn(4, 3, 6, 6)
    kill(model.conv1, [0, 1, 2])  # constants behind the batch norm fold: conv2 has no border of zeros
    kill(model.conv2, [3, 4], 0.0)
    kill(model.conv3, [5], 0.7)
    kill(model.fc1, [0, 1, 7])
    with torch.no_grad():
        model.conv2.weight[:, 9] = 0  # nobody reads it
    small, done = cp.compact(model)
    same(small, model, x)
    assert small.conv1.out_channels == small.bn.num_features == small.conv2.in_channels == 6
    assert small.depth.groups == small.conv3.in_channels == 6
    assert small.conv3.out_channels == 5
    assert small.fc1.in_features == 20
    assert small.fc1.out_features == 9
    assert done.removed == {"conv1": 4, "conv2": 2, "conv3": 1, "fc1": 3}
    assert done.parameters[1] == sum(p.numel() for p in small.parameters()) < done.parameters[0]


def test_a_constant_at_a_border_of_zeros_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).eval()
    kill(model[0], [0], 0.5)
    kill(model[0], [1], -0.5)
    small, done = cp.compact(model)
    assert small[0].out_channels == 3  # the ReLU makes the second one 0
    assert "border of zeros" in done.left[0]
    same(small, model, torch.randn(2, 2, 6, 6))
    model[2].padding_mode = "circular"
    model[2]._reversed_padding_repeated_twice = (1, 1, 1, 1)
    small, _ = cp.compact(model)
    assert small[0].out_channels == 2
    same(small, model, torch.randn(2, 2, 6, 6))


def test_a_residual_channel_goes_only_where_all_branches_agree():
    torch.manual_seed(0)
    model, x = settled(Residual()), torch.randn(3, 3, 5, 5)
    kill(model.stem, [0, 1], -1.0)
    kill(model.two, [1, 2], -1.0)
    kill(model.one, [4], 0.0)
    small, done = cp.compact(model)
    same(small, model, x)
    assert small.stem.out_channels == small.two.out_channels == small.head.in_features == 7
    assert small.one.out_channels == small.two.in_channels == 4
    assert done.removed == {"stem": 1, "two": 1, "one": 1}


def test_dead_inputs_make_dead_neurons():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    kill(model[0], [0, 1], 0.3)
    with torch.no_grad():
        model[2].weight[0] = 0
        model[2].weight[0, 0] = 1.0  # reads a constant only
    small, _ = cp.compact(model)
    assert small[0].out_features == 4
    assert small[2].out_features == 4
    same(small, model, torch.randn(7, 4))


@pytest.mark.parametrize("round_to", [1, 4, 8])
def test_rounding(round_to):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 21), nn.ReLU(), nn.Linear(21, 2))
    kill(model[0], list(range(6)))
    small, _ = cp.compact(model, round_to=round_to)
    assert small[0].out_features == {1: 15, 4: 16, 8: 16}[round_to]
    same(small, model, torch.randn(7, 4))


def test_silent_neurons_only_when_asked():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2)), torch.randn(50, 4)
    with torch.no_grad():
        model[0].bias[:5] = -100
    assert cp.compact(model)[0][0].out_features == 12
    small, _ = cp.compact(model, batches=[x])
    assert small[0].out_features == 7
    same(small, model, x)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(self.a(x)).relu())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Shared, "more than once"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)), "has groups"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)), "not known"),
    ],
)
def test_what_cannot_go_safely_stays(make, why):
    torch.manual_seed(0)
    model = make().eval()
    first = next(module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    kill(first, [0], 0.0)
    small, done = cp.compact(model)
    x = torch.randn(3, 4, 2, 2) if isinstance(first, nn.Conv2d) else torch.randn(3, 4)
    same(small, model, x)
    assert done.parameters[0] == done.parameters[1]
    assert not done.left or why in done.left[0]


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv3d(2, 6, 3), nn.BatchNorm3d(6), nn.Conv3d(6, 5, 2)
        self.pool, self.head = nn.AvgPool3d(2), nn.Linear(5, 3)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.conv1(x))))
        return self.head(F.max_pool3d(self.conv2(x), 2).mean((2, 3, 4)))


def test_volumes_shrink_and_compute_the_same():
    torch.manual_seed(0)
    model = settled(Volumes())
    kill(model.conv1, [0, 3])
    kill(model.conv2, [1], 0.4)
    small, done = cp.compact(model)
    assert done.removed == {"conv1": 2, "conv2": 1}
    assert (small.norm.num_features, small.conv2.in_channels, small.head.in_features) == (4, 4, 4)
    same(small, model, torch.randn(3, 2, 8, 9, 8))


class PartialMean(nn.Module):
    """As many channels as columns: the head reads columns."""

    def __init__(self, axes):
        super().__init__()
        self.conv, self.head, self.axes = nn.Conv2d(3, 5, 1), nn.Linear(5, 2), axes

    def forward(self, x):
        return self.head(self.conv(x).mean(self.axes))


@pytest.mark.parametrize(("axes", "left"), [(2, 5), ((-2,), 5), ((2, 3), 4), ((-1, 2), 4)])
def test_channels_go_through_a_mean_over_all_positions_only(axes, left):
    torch.manual_seed(0)
    model = PartialMean(axes).eval()
    kill(model.conv, [0], 0.3)
    small, _ = cp.compact(model)
    assert small.conv.out_channels == left
    same(small, model, torch.randn(2, 3, 4, 5))


def test_a_kind_that_is_not_followed_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 3, 2), nn.Conv2d(3, 2, 1)).eval()
    kill(model[0], [0], 0.0)
    small, done = cp.compact(model)
    assert done.left[0] == "1 is a ConvTranspose2d, a kind whose channels are not followed"
    same(small, model, torch.randn(2, 2, 4, 4))


def test_everything_dead_leaves_a_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    kill(model[0], list(range(5)), 1.0)
    small, _ = cp.compact(model)
    assert small[0].out_features == 1
    same(small, model, torch.randn(3, 4))


def test_a_resnet_loses_channels_inside_its_blocks():
    torch.manual_seed(0)
    model, x = settled(resnet.ResNet(1)), torch.randn(2, 3, 16, 16)
    kill(model.layer2[0].conv1, list(range(10)))
    with torch.no_grad():
        model.layer2[0].bn1.running_mean[:10] = 5.0  # the ReLU makes them 0
        model.layer2[0].bn1.bias[:10] = -9.0
        model.layer2[0].bn1.weight[:10] = 0.0
    before = copy.deepcopy(model.state_dict())
    small, done = cp.compact(model)
    assert done.removed == {"layer2.0.conv1": 10}
    same(small, model, x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_net_trim_then_compact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 3))
    x = torch.randn(200, 10)
    pruned, _ = cp.prune(model, [x], lambda layer: cp.NetTrim(layer, 0.3))
    small, done = cp.compact(pruned)
    same(small, pruned, x)
    assert done.parameters[1] <= done.parameters[0]


def test_bad_input_is_named():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match="round_to is 0"):
        cp.compact(nn.Linear(2, 2), round_to=0)
    with pytest.raises(ValueError, match="cannot be traced"):
        cp.compact(Branching())


ALTERED = {
    "an output that a hook shifts": lambda net: net[0].register_forward_hook(lambda m, args, y: y + 2),
    "an input that a hook shifts": lambda net: net[2].register_forward_pre_hook(lambda m, args: (args[0] + 2,)),
    "an activation with a hook": lambda net: net[1].register_forward_hook(lambda m, args, y: y.roll(1, 1)),
    "an activation of another forward": lambda net: setattr(net[1], "forward", lambda x: x + 1),
    "a layer of another forward": lambda net: setattr(net[2], "forward", _Shifted(net[2])),
    "a hook before the network": lambda net: net.register_forward_pre_hook(lambda m, args: (args[0] + 1,)),
}


class _Shifted:
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return F.linear(x, self.layer.weight + 1)


@pytest.mark.parametrize("alter", ALTERED.values(), ids=ALTERED)
def test_channels_behind_hooks_and_other_forwards_stay(alter):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3], model[2].weight[:, 5] = 0, -1, 0
    alter(model)
    small, _ = cp.compact(model)
    x = torch.randn(20, 5)
    torch.testing.assert_close(small(x), model(x))


def test_a_network_whose_forward_was_set_on_it_is_refused():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="a forward was set on it"):
        cp.compact(model)


class Gated(nn.Module):
    """The MLP of today's language models."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 8, bias), nn.Linear(5, 8, bias), nn.Linear(8, 5, bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Walked(nn.Module):
    """Blocks that torch.fx cannot trace around parts that it can."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Gated(bias) for bias in (True, False))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x) if x.sum() > 0 else x - block(x)
        return x


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_constant_where_a_factor_is_zero_or_both_are_constant(bias):
    torch.manual_seed(0)
    model, x = Gated(bias), torch.randn(3, 7, 5)
    with torch.no_grad():
        model.down.weight[:, 0] = 0  # nobody reads it
    kill(model.up, [1], 0.0)  # zero, whatever the gate says
    kill(model.up, [2], 0.5)  # with a bias no constant: the gate goes on
    kill(model.gate, [3], 0.5)
    kill(model.gate, [4], 0.5)
    kill(model.up, [4], 0.5)  # silu(0.5) 0.5
    small, done = cp.compact(model)
    same(small, model, x)
    gone = {False: 5, True: 3}[bias]
    assert done.removed == {"gate": gone, "up": gone}
    assert small.down.in_features == 8 - gone


def test_parts_of_a_model_that_cannot_be_traced_get_smaller():
    torch.manual_seed(0)
    model, x = Walked(), torch.randn(6, 5)
    with torch.no_grad():
        model.blocks[0].down.weight[:, :3] = 0
        model.blocks[1].up.weight[2:4] = 0
    with pytest.raises(ValueError, match="cannot be traced"):
        cp.compact(model)
    small, done = cp.compact(model, parts=["blocks.0", "blocks.1"])
    same(small, model, x)
    same(small, model, -x)
    assert done.removed == {"blocks.0.gate": 3, "blocks.0.up": 3, "blocks.1.gate": 2, "blocks.1.up": 2}
    assert cp.compact(model, parts="blocks.1")[1].removed == {"blocks.1.gate": 2, "blocks.1.up": 2}
    assert traceable(model) == ("blocks.0", "blocks.1")
    assert traceable(Gated()) == ("",)


def tied():
    model = Walked()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (Walked, {"parts": "blocks.7"}, "'blocks.7' is not in the model"),
        (Walked, {"parts": "blocks"}, "cannot be traced"),
        (Walked, {"parts": "blocks.0", "batches": [torch.ones(1, 5)]}, "not both"),
        (tied, {"parts": "blocks.0"}, "shares a weight with blocks.1.up.weight"),
    ],
)
def test_wrong_parts_are_refused(make, options, words):
    with pytest.raises(ValueError, match=words):
        cp.compact(make(), **options)


class Optional(nn.Module):
    """A forward with arguments that may be left out; `way` says what it does with them."""

    def __init__(self, way):
        super().__init__()
        self.one, self.two, self.other, self.way = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3), way

    def forward(self, x, skip=None, *, scale=2.0):
        return self.way(self, torch.relu(self.one(x)), skip, scale)


WAYS = {
    "another layer": lambda m, h, skip, scale: m.two(h) if skip is not None else m.other(h),
    "one step more": lambda m, h, skip, scale: m.two(h + 1 if skip is None else h),
    "another step": lambda m, h, skip, scale: m.two(torch.tanh(h) if skip is None else torch.sigmoid(h)),
    "another number": lambda m, h, skip, scale: m.two(F.leaky_relu(h, 0.1 if skip is None else 0.2)),
    "another input": lambda m, h, skip, scale: m.two(h) + (m.two if skip is None else m.other)(h),
    "other wires": lambda m, h, skip, scale: m.two((h, torch.tanh(h))[0 if skip is None else 1]) + torch.tanh(h).sum(),
    "the branch of a number": lambda m, h, skip, scale: m.two(h) if scale == 2.0 else m.other(h),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_forward_that_goes_another_way_without_an_argument_is_refused(way):
    torch.manual_seed(0)
    model = Optional(WAYS[way])
    kill(model.one, [0, 1], 0.5)
    with pytest.raises(ValueError, match="cannot be traced"):
        cp.compact(model)
    with pytest.raises(ValueError, match="cannot be traced"):
        cp.merge(model, keep=0.5)


@pytest.mark.parametrize(
    "way", [lambda m, h, skip, scale: m.two(h), lambda m, h, skip, scale: m.two(torch.tanh(h)) * scale]
)
def test_arguments_that_change_no_way_are_taken(way):
    torch.manual_seed(0)
    model, x = Optional(way), torch.randn(5, 4)
    kill(model.one, [0, 1], 0.5)
    small, done = cp.compact(model)
    assert done.removed == {"one": 2}
    same(small, model, x)
    torch.testing.assert_close(small(x, x, scale=3.0), model(x, x, scale=3.0))
