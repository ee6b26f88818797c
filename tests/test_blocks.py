"""A cascade block by block finds the weights of the plain one, in a number of block passes that is linear."""

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network.traversal import Traversal, Way

PLAIN = cp.Execution(by_block=False)


class Block(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.one, self.two = nn.Linear(width, 9), nn.Linear(9, width)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.two(self.one(x).relu())


class Chain(nn.Module):
    """Blocks one after another between a stem and a head."""

    def __init__(self, blocks=5, kind=Block):
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Linear(4, 6),
            nn.ModuleList(kind() for _ in range(blocks)),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Tuples(Chain):
    """Blocks that return a dict of two, and read a bias that the first has made (as T5's do)."""

    class Kind(Block):
        def forward(self, x, bias=None):
            bias = x.mean(0) if bias is None else bias
            return {"x": super().forward(x) + bias, "bias": bias}

    def __init__(self):
        super().__init__(4, Tuples.Kind)

    def forward(self, x):
        given = {"x": self.stem(x)}
        for block in self.blocks:
            given = block(**given)
        return self.head(given["x"])


class Towers(nn.Module):
    """An encoder whose end every block of the decoder reads."""

    class Reader(Block):
        def forward(self, x, memory):
            return super().forward(x + memory)

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.decoder = nn.ModuleList(Towers.Reader() for _ in range(3))

    def forward(self, x):
        memory = x
        for block in self.encoder:
            memory = block(memory)
        memory = self.norm(memory)
        for block in self.decoder:
            x = block(x, memory)
        return x


class InPlace(Chain):
    """What is between the blocks writes to what they made."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
            x.mul_(0.9)
        return self.head(x)


class Skipping(Chain):
    """The head reads what every block has made: their stubs may not be hollow."""

    def forward(self, x):
        x, seen = self.stem(x), 0
        for block in self.blocks:
            x = block(x)
            seen = seen + x
        return self.head(seen)


class Hiding(Chain):
    """What is between the blocks reads an earlier one by a comparison, which NaN does not survive."""

    def forward(self, x):
        x, gate = self.stem(x), 1.0
        for block in self.blocks:
            made = block(x * gate)
            gate = (x > 0).float() + 0.5
            x = made
        return self.head(x)


class Asking(Chain):
    """The model reads an attribute of each block."""

    class Kind(Block):
        factor = 0.5

    def __init__(self):
        super().__init__(4, Asking.Kind)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x * block.factor)
        return self.head(x)


def conv(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def shared():
    """One block that is called five times (as ALBERT's)."""
    model = Chain(1)
    model.blocks.extend([model.blocks[0]] * 4)
    return model


NETWORKS = {
    "chain": Chain, "tuples": Tuples, "towers": Towers, "in place": InPlace, "skipping": Skipping, "hiding": Hiding,
    "asking": Asking,
    "sequential": lambda: nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(6, 6), nn.ReLU()))),
    "nested": lambda: nn.Sequential(*(nn.Sequential(*(Block() for _ in range(5))) for _ in range(2))),
    "convolutions": lambda: nn.Sequential(
        conv(2, 4), conv(4, 4), conv(4, 4), nn.AvgPool2d(2), conv(4, 4), nn.Flatten(), nn.Linear(36, 3)
    ),
    "shared": shared,
}  # fmt: skip
STREAMED = {"chain", "tuples", "towers", "in place", "asking", "sequential", "nested", "convolutions"}


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def made(name):
    model = NETWORKS[name]()
    width = {"sequential": (6,), "nested": (6,), "towers": (6,), "convolutions": (2, 6, 6)}.get(name, (4,))
    batches = [torch.randn(8, *width), torch.randn(5, *width)]
    return model.eval(), batches


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


@pytest.mark.parametrize("mode", ["cascade", "residual"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_weights_are_those_of_the_plain_walk(name, mode, tmp_path):
    model, batches = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    plain, expected = cp.prune(model, batches, half, cp.Fast(), mode, execution=PLAIN)
    for execution in (cp.Execution(), cp.Execution(scratch=tmp_path / "scratch")):
        pruned, report = cp.prune(model, batches, half, cp.Fast(), mode, execution=execution)
        for key, value in plain.state_dict().items():
            assert torch.equal(value, pruned.state_dict()[key]), key
        assert [row.error for row in report.rows] == [row.error for row in expected.rows]
        assert report.network == expected.network
        assert [type(module) for module in pruned.modules()] == kinds == [type(module) for module in model.modules()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert any((tmp_path / "scratch").glob("*.pt")) == (name in STREAMED)


@pytest.mark.parametrize("name", NETWORKS)
def test_chains_are_found_where_stubs_are_not_noticed(name):
    model, batches = made(name)
    walk = Traversal(model, cp.Calibration(batches), "cascade", way=Way())
    assert bool(walk.chains) == (name in STREAMED)


def test_block_passes_are_linear_in_the_blocks():
    counts = {}
    for blocks in (2, 4, 8, 16):
        model = Chain(blocks)
        pruned, _ = cp.prune(model, [torch.randn(8, 4)], half, cp.Magnitude(), "cascade")
        counts[blocks] = sum(block.calls for block in (*model.blocks, *pruned.blocks)) / blocks
    assert max(counts.values()) <= 14  # survey, trial; two groups, the end and two measurements of each network
    plain = Chain(16)
    pruned, _ = cp.prune(plain, [torch.randn(8, 4)], half, cp.Magnitude(), "cascade", execution=PLAIN)
    assert sum(block.calls for block in (*plain.blocks, *pruned.blocks)) / 16 > 2 * counts[16]


def test_a_failure_in_the_midst_leaves_every_block_in_its_place():
    model = Chain()
    kinds = [type(module) for module in model.modules()]

    def build(layer):
        if layer.name == "blocks.3.one" and layer.samples > 1:
            raise KeyboardInterrupt
        return half(layer)

    with pytest.raises(KeyboardInterrupt):
        cp.prune(model, [torch.randn(8, 4)], build, cp.Magnitude(), "cascade")
    assert [type(module) for module in model.modules()] == kinds


def test_what_does_not_fit_in_memory_is_not_kept(monkeypatch):
    monkeypatch.setattr("convexprune.network.traversal.available", lambda: 1000)
    monkeypatch.setattr("convexprune.network.memory.available", lambda: None)
    model, batches = made("chain")
    assert Traversal(model, cp.Calibration(batches), "cascade", way=Way()).chains == []


def test_batches_of_several_shapes():
    model = Chain()
    batches = [torch.randn(size, 3, 4) if size % 2 else torch.randn(size, 4) for size in (3, 4, 7)]
    plain, _ = cp.prune(model, batches, half, cp.Magnitude(), "cascade", execution=PLAIN)
    pruned, _ = cp.prune(model, batches, half, cp.Magnitude(), "cascade")
    assert all(torch.equal(value, pruned.state_dict()[key]) for key, value in plain.state_dict().items())
