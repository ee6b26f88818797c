"""Weights out of a model, into it, and to a file: exact, or refused before anything is touched."""

import contextlib
import copy
import resource
import stat

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network import load, read, save, write

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def network(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), groups=2),
        nn.Conv2d(6, 4, 3, bias=False).to(memory_format=torch.channels_last),
        nn.Flatten(2),
        nn.Conv1d(4, 4, 3, groups=4),
        nn.Linear(5, 3),
    )
    return model.to(dtype)


LAYERS = ["0[0]", "0[1]", "1", "3[0]", "3[3]", "4"]


def bits(model):
    flat = lambda p: p.detach().contiguous().view(-1).view(torch.uint8).clone()  # noqa: E731
    return {key: (id(p), flat(p)) for key, p in model.named_parameters()}


def assert_same_bits(before, after):
    assert before.keys() == after.keys()
    for key, (identity, value) in before.items():
        assert identity == after[key][0], key
        assert torch.equal(value, after[key][1]), key


@pytest.mark.parametrize("dtype", DTYPES)
def test_writing_what_was_read_changes_no_bit(dtype):
    model = network(dtype)
    with torch.no_grad():
        model[4].weight[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).max], dtype=dtype)
    before = bits(model)
    for name in LAYERS:
        x = read(model, name)
        assert x.dtype == torch.float64
        write(model, name, x)
    assert_same_bits(before, bits(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_reading_what_was_written(name, dtype):
    model = network(dtype)
    shape = read(model, name).shape
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    others = {other: read(model, other) for other in LAYERS if other != name}
    write(model, name, x)
    assert torch.equal(read(model, name), x.to(dtype).double())
    for other, value in others.items():
        assert torch.equal(read(model, other), value)


def test_the_matrix_is_the_weights_and_the_bias_last():
    model = network()
    assert torch.equal(read(model, "4"), torch.cat([model[4].weight, model[4].bias[:, None]], 1).double())
    assert torch.equal(read(model, "0[1]")[:, :-1], model[0].weight[3:].flatten(1).double())
    assert torch.equal(read(model, "0[1]")[:, -1], model[0].bias[3:].double())
    assert read(model, "1").shape == (4, 54)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("4", lambda x: x[:, :-1], r"x has shape \(3, 5\), expected \(3, 6\)"),
        ("0[0]", lambda x: torch.cat([x, x]), r"expected \(3, 13\)"),
        ("4", lambda x: x.index_fill(0, torch.tensor([1]), float("nan")), "nan is not a finite torch.float16"),
        ("4", lambda x: x.index_fill(1, torch.tensor([5]), 1e6), r"1e\+06 is not a finite torch.float16"),
        ("5", lambda x: x, "'5' is not in the model"),
        ("2", lambda x: x, "'2' is a Flatten, not one of Linear"),
        ("0", lambda x: x, r"the layers of '0' are '0\[0\]' to '0\[1\]'"),
        ("0[2]", lambda x: x, r"the layers of '0' are '0\[0\]' to '0\[1\]'"),
        ("4[0]", lambda x: x, "the layers of '4' are '4' to '4'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_touched(name, change, message):
    model = network(torch.float16)
    before = bits(model)
    x = read(model, name) if name in LAYERS else torch.zeros(3, 6)
    with pytest.raises(ValueError, match=message):
        write(model, name, change(x))
    assert_same_bits(before, bits(model))


def test_integer_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="dequantise"):
        read(model, "0")
    with pytest.raises(TypeError, match="dequantise"):
        write(model, "0", torch.zeros(3, 5))


def test_what_was_read_is_a_copy():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False)).double()
    before = read(model, "0")
    write(model, "0", torch.zeros(2, 3))
    assert int((before != 0).sum()) == 6
    # a measure that tries weights and puts them back: each layer's curve is its own
    write(model, "0", before)
    x, options = [torch.randn(9, 3).double()], {"levels": (0.25,), "measure": cp.OutputChange()}
    both, (second,) = cp.rate_distortion(model, x, **options), cp.rate_distortion(model, x, "1", **options)
    assert torch.equal(both[1].distortion, second.distortion)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.out.weight = self.embed.weight
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        flat = torch.randn(12)
        self.register_buffer("head", flat[:5])
        self.register_buffer("tail", flat[5:])
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("count", torch.tensor(3))


def test_save_and_load_with_tied_weights(tmp_path):
    from safetensors import safe_open

    torch.manual_seed(0)
    model, other = Tied().half(), Tied().half()
    path = tmp_path / "model.safetensors"
    save(model, path, {"kept": 0.25, "layers": ["out"]})
    assert load(other, path) == {"kept": 0.25, "layers": ["out"]}
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    assert other.out.weight is other.embed.weight
    with safe_open(path, framework="pt") as file:
        assert "out.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata()["aliases"] == '{"out.weight": "embed.weight"}'
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400
    untied = copy.deepcopy(other)
    untied.out.weight = nn.Parameter(torch.zeros_like(untied.out.weight))
    load(untied, path)
    assert torch.equal(untied.out.weight, model.embed.weight)


@contextlib.contextmanager
def full_disk():
    """Only around the write itself: pytest's own output may be a file too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    for target in (path, tmp_path / "new.safetensors"):
        with pytest.raises(OSError, match="large"), full_disk():
            save(nn.Linear(100, 100), target)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_targets_that_cannot_be_replaced(tmp_path):
    model = nn.Linear(3, 2)
    with pytest.raises(OSError, match="not a regular file"):
        save(model, tmp_path)
    with pytest.raises(FileNotFoundError):
        save(model, tmp_path / "nowhere" / "model.safetensors")
    with pytest.raises(ValueError, match="'aliases' is a key of the file format"):
        save(model, tmp_path / "m.safetensors", {"aliases": {}})
    with pytest.raises(TypeError, match="JSON"):
        save(model, tmp_path / "m.safetensors", {"object": object()})
    assert not list(tmp_path.iterdir())


def test_a_file_that_does_not_fit_is_refused_and_nothing_is_touched(tmp_path):
    path = tmp_path / "m.safetensors"
    save(nn.Linear(3, 2), path)
    for model, message in [
        (nn.Linear(3, 4), r"\(2,\) torch.float32 in the file and \(4,\) torch.float32 in the model"),
        (nn.Linear(3, 2).half(), "torch.float32 in the file"),
        (nn.Linear(3, 2, bias=False), "'bias' is not in the model"),
        (nn.Bilinear(3, 3, 2), r"'weight' is"),
        (nn.Sequential(nn.Linear(3, 2)), "is not in the file"),
    ]:
        before = bits(model)
        with pytest.raises(ValueError, match=message):
            load(model, path)
        assert_same_bits(before, bits(model))
