"""Networks that are nearly a chain of blocks: block by block they get the weights and the report of the plain walk."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import convexprune as cp
from convexprune.network.hollow import Hollow, Seen
from convexprune.network.traversal import Traversal, Way

PLAIN = cp.Execution(by_block=False)


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.one, self.two = nn.Linear(width, 9), nn.Linear(9, width)

    def forward(self, x):
        return x + self.two(self.one(x).relu())


class Chain(nn.Module):
    kind = Block

    def __init__(self, blocks=5):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(self.kind() for _ in range(blocks))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Gated(Chain):
    """An earlier block's output is compared with a level that only later batches reach."""

    def forward(self, x):
        x, before = self.stem(x), None
        for block in self.blocks:
            before, x = x, block(x if before is None else x * (1 + (before.abs() > 6).float()))
        return self.head(x)


class GatedHead(Chain):
    """The head reads all blocks by comparisons, an argmax and a cast."""

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        votes = sum((each > 0).float() + (each * 3).long().float() for each in kept)
        return self.head(x + votes + kept[0].argmax(1, keepdim=True))


class Asserting(Chain):
    """What is between the blocks refuses NaN."""

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
            assert not any(torch.isnan(each).any() for each in kept)
        return self.head(x)


class Printing(Chain):
    """What is between the blocks makes a number of what they made, which only rarely matters."""

    def forward(self, x):
        x, scales = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            scales.append(float(x.abs().max()))
            if max(scales) > 6:
                x = x * 0.5
        return self.head(x)


class Swallowing(Chain):
    """The model catches what goes wrong, and does something else."""

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
            try:
                x = x + kept[0].detach().numpy().mean()
            except Exception:
                x = x * 2
        return self.head(x)


class LaterInPlace(Chain):
    """A block's output is changed in place two blocks later, and read at the end."""

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            if len(kept) > 1:
                kept[-2].add_(1)
            kept.append(x)
        return self.head(x + kept[0])


class Writing(Chain):
    """The blocks return nothing and change what they are given."""

    class kind(Block):
        def forward(self, x):
            x.add_(self.two(self.one(x).relu()))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            block(x)
        return self.head(x)


class Counting(Chain):
    """A tensor beside them counts what is large; in the first batch nothing is."""

    class kind(Block):
        def forward(self, x, count):
            count.add_((x > 6).float().sum(1, keepdim=True))
            return super().forward(x)

    def forward(self, x):
        x, count = self.stem(x), torch.zeros(len(x), 1)
        for block in self.blocks:
            x = block(x, count)
        return self.head(x + count)


class Structures(Chain):
    """The blocks return dataclasses."""

    @dataclass
    class Made:
        x: torch.Tensor

    class kind(Block):
        def forward(self, x):
            return Structures.Made(super().forward(x))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).x.mul_(0.9)
        return self.head(x)


class Twice(Chain):
    """The blocks return one tensor twice, of which one name is changed in place."""

    class kind(Block):
        def forward(self, x):
            made = super().forward(x)
            return made, made

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            left, x = block(x)
            left.clamp_(max=6)
        return self.head(x)


class Remembering(Chain):
    """The first block leaves something for the fourth, in an attribute."""

    class kind(Block):
        left = None

        def forward(self, x):
            self.left = x.mean(0)
            return super().forward(x)

    def forward(self, x):
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = block(x) + (self.blocks[0].left if number == 3 else 0)
        return self.head(x)


class Global(Chain):
    """The same, in a place that the copy of the network has too."""

    left: ClassVar[dict] = {}

    class kind(Block):
        def forward(self, x):
            Global.left.setdefault("x", x.mean(0)) if len(Global.left) else Global.left.update(x=x.mean(0))
            return super().forward(x) + 0.1 * Global.left["x"]

    def forward(self, x):
        Global.left.clear()
        return super().forward(x)


class Deep(Chain):
    """A cache of one pass, in which a later block reads what the first two have put."""

    class kind(Block):
        def forward(self, x, cache):
            cache.made.append(x)
            return super().forward(x) + (cache.made[1] if len(cache.made) == 5 else 0)

    class Cache:
        def __init__(self):
            self.made = []

    def forward(self, x):
        x, cache = self.stem(x), Deep.Cache()
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x)


class Noisy(Chain):
    """The blocks draw random numbers."""

    class kind(Block):
        def forward(self, x):
            return super().forward(x) + 0.1 * torch.randn(x.shape)


class Checkpointed(Chain):
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Reversed(Chain):
    def forward(self, x):
        x = self.stem(x)
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x)


class Interleaved(nn.Module):
    """Two towers, block by block in turn, that read each other."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (nn.ModuleList(Block() for _ in range(4)) for _ in range(2))
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = y = self.stem(x)
        for one, other in zip(self.left, self.right, strict=True):
            x = one(x + 0.1 * y)
            y = other(y - 0.1 * x)
        return self.head(x * y)


class Early(Chain):
    """Some batches leave after two blocks."""

    def forward(self, x):
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number == 2 and len(x) < 8:
                break
            x = block(x)
        return self.head(x)


class Skipped(Chain):
    """A block is left out where the one before it has made little: the same in the dense and the pruned network."""

    def forward(self, x):
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            if number == 3 and x.shape[0] == 5:
                x = x + self.blocks[0](x)
            x = block(x)
        return self.head(x)


class Changing(Chain):
    """A block of the list is put in anew in every pass."""

    def forward(self, x):
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            self.blocks[number] = block
            x = block(x)
        return self.head(x)


class Typed(Chain):
    """What is between the blocks asks of what kind they are."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) if isinstance(block, Block) else block(x) * 2
        return self.head(x)


class Tied(Chain):
    """The last block stands in another list too, and the blocks in one of Python."""

    def __init__(self):
        super().__init__()
        self.other = nn.ModuleList([self.blocks[-1]])
        self.order = list(self.blocks)

    def forward(self, x):
        x = self.stem(x)
        for block in self.order:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    """The first child of a Sequential changes what goes round it, where that is negative."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))

    def forward(self, x):
        x = self.stem(x) + 4
        return self.head(x + self.body(x))


def hooked():
    """Hooks of the user change what blocks read and make, and keep some of it."""
    model = Chain()
    model.blocks[1].register_forward_hook(lambda module, args, output: output * 0.9)
    model.blocks[2].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    return model


def keeping():
    """A hook of the user keeps what a block makes for a later hook."""
    model, kept = Chain(), {}
    model.blocks[0].register_forward_hook(lambda module, args, output: kept.update(made=output.mean(0)))
    model.blocks[3].register_forward_hook(lambda module, args, output: output + kept["made"])
    return model


NETWORKS = {
    "gated": Gated, "gated head": GatedHead, "asserting": Asserting, "printing": Printing, "swallowing": Swallowing,
    "later in place": LaterInPlace, "writing": Writing, "counting": Counting, "structures": Structures, "twice": Twice,
    "remembering": Remembering, "global": Global, "deep": Deep, "noisy": Noisy, "checkpointed": Checkpointed,
    "reversed": Reversed, "interleaved": Interleaved, "early": Early, "skipped": Skipped, "changing": Changing,
    "typed": Typed, "tied": Tied, "residual": Residual, "hooked": hooked, "keeping": keeping,
}  # fmt: skip
STREAMED = {"checkpointed", "interleaved", "hooked", "changing"}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batches(count):
    """The later ones are larger."""
    return [(1 + 3 * number) * torch.randn(8 - 3 * (number == 1), 4) for number in range(count)]


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


def check_same(model, samples, mode):
    plain, expected = cp.prune(model, samples, half, cp.Magnitude(), mode, execution=PLAIN)
    pruned, report = cp.prune(model, samples, half, cp.Magnitude(), mode)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, pruned.state_dict()[key]), key
    assert [(row.name, row.error, row.certificate) for row in report.rows] == [
        (row.name, row.error, row.certificate) for row in expected.rows
    ]
    assert report.network == expected.network


@pytest.mark.parametrize(("mode", "count"), [("cascade", 1), ("cascade", 3), ("residual", 3)])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_odd_network_gets_what_the_plain_walk_gives(name, mode, count):
    check_same(NETWORKS[name]().eval(), batches(count), mode)


@pytest.mark.parametrize("name", NETWORKS)
def test_odd_networks_are_chains_only_where_that_is_right(name):
    walk = Traversal(NETWORKS[name]().eval(), cp.Calibration(batches(3)), "cascade", way=Way())
    assert bool(walk.chains) == (name in STREAMED)


def test_hooks_on_all_modules_are_called_once_for_each():
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 0.9 if isinstance(module, Block) or not [*module.children()] else None
    )
    pre = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (args[0] + 0.1,) if isinstance(module, Block) else None
    )
    try:
        model = Chain().eval()
        with pytest.raises(ValueError, match="does not compute W x"):  # of the layers too: refused, both ways
            cp.prune(model, batches(2), half, cp.Magnitude(), "cascade")
    finally:
        handle.remove()
    try:
        check_same(Chain().eval(), batches(2), "cascade")
    finally:
        pre.remove()


class Chosen(Chain):
    """Batches of five rows add up all the blocks: seen only in the second batch."""

    def forward(self, x):
        x, kept = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return self.head(sum(kept) if len(x) == 5 else x)


class Leaving(Chain):
    """Once the first block is sparse, its network leaves early; both networks have the same layers until then."""

    def forward(self, x):
        x = self.stem(x)
        if bool((self.blocks[0].one.weight == 0).any()):
            return self.head(self.blocks[0](x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_what_is_seen_only_in_a_later_batch_ends_the_chains():
    model = Chosen().eval()
    assert Traversal(model, cp.Calibration(batches(3)), "cascade", way=Way()).chains
    for mode in ("cascade", "residual"):
        check_same(model, batches(3), mode)


def test_a_pruned_network_that_goes_another_way_fails_as_in_the_plain_walk():
    words = []
    for execution in (PLAIN, cp.Execution()):
        with pytest.raises(ValueError, match="times in the model") as found:
            cp.prune(Leaving().eval(), batches(2), half, cp.Magnitude(), "cascade", execution=execution)
        words.append(str(found.value))
    assert words[0] == words[1]


def test_a_hollow_tensor_hands_on_its_shape_and_no_number():
    tensor = torch.randn(3, 4)
    hollow = Hollow.like(tensor)
    for made in (hollow + 1, hollow > 0, hollow.argmax(1), hollow.long(), torch.zeros(3, 4) * hollow, hollow[:2].T,
                 nn.Linear(4, 5)(hollow), torch.where(hollow > 0, 1.0, 0.0), hollow.to("cpu"), hollow.mul_(2),
                 torch.zeros(3)[hollow.argmax(1)]):  # fmt: skip
        assert isinstance(made, Hollow)
    assert (hollow.shape, hollow.dtype, hollow.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert (hollow @ torch.zeros(4, 2)).shape == (3, 2)
    for ask in (lambda: bool(hollow.sum() > 0), lambda: float(hollow[0, 0]), lambda: torch.equal(hollow, tensor),
                lambda: tensor.add_(hollow), lambda: tensor.copy_(hollow), lambda: tensor[hollow > 0],
                hollow.nonzero, lambda: tensor.__setitem__(0, hollow[0]), lambda: hollow.sum().item()):  # fmt: skip
        with pytest.raises(Seen):
            ask()
