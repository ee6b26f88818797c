# ruff: noqa: F811 (a fixture of another file)
"""`convexprune compact` and `merge`: folders of smaller networks that load again and compute what they should."""

import json
import sys

import numpy as np
import pytest
import torch
from test_command import FUNCTION, place, ran, said, save_tokenizer  # noqa: F401 (a fixture)

import convexprune as cp
from convexprune.network.parts import traceable

transformers = pytest.importorskip("transformers")
NETWORK = "smaller.safetensors"


def emptied(place, folder, counts):
    """A model's folder in which so many neurons of each MLP are read by nothing, or give nothing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        for block, count in zip(model.model.layers, counts, strict=True):
            block.mlp.down_proj.weight[:, :count] = 0
            block.mlp.up_proj.weight[-2:] = 0
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model.eval()


def compacted(place, model, out, *arguments):
    given = [model, "--calibration", place / "text.txt", "--windows", 4, "--length", 16, "--out", out]
    return ran("compact", *given, *arguments)


def ids():
    return torch.arange(64).reshape(4, 16) % 18


def same(one, other):
    with torch.no_grad():
        left, right = (model.eval()(ids()).logits.double() for model in (one, other))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


def test_a_transformers_folder_becomes_one_with_narrower_layers(place, tmp_path):
    model = emptied(place, tmp_path / "m", (6, 6, 6))
    (tmp_path / "m" / "report.json").write_text("{}")  # of a pruning: it speaks of other matrices
    (tmp_path / "m" / "README.md").write_text("mine")
    done = compacted(place, tmp_path / "m", tmp_path / "small")
    assert done.exit_code == 0, done.output
    small, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert small.config.intermediate_size == 16
    assert (tmp_path / "small" / "README.md").read_text() == "mine"
    assert not (tmp_path / "small" / "report.json").exists()
    assert {block.mlp.down_proj.in_features for block in small.model.layers} == {16}
    same(small, model)
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    said = json.loads((tmp_path / "small" / "compaction.json").read_text())
    assert said["parameters"] == [before, after]
    assert before - after == 3 * 3 * 8 * 16  # three matrices of three blocks
    assert f"{before:,} -> {after:,}" in done.output
    again = compacted(place, tmp_path / "small", tmp_path / "again")
    assert again.exit_code == 0, again.output
    same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model)
    done = ran("evaluate", tmp_path / "m", tmp_path / "small", "--data", place / "ids.npz")
    assert "same next token     1 (1 to 1)" in done.output, done.output


def test_a_folder_that_no_config_describes_is_a_file_for_load(place, tmp_path):
    model = emptied(place, tmp_path / "m", (6, 0, 3))
    done = compacted(place, tmp_path / "m", tmp_path / "small")
    assert done.exit_code == 0, done.output
    assert "transformers cannot load it, since no number of a config.json says that 24 is now 16 to 22" in done.output
    assert {path.name for path in (tmp_path / "small").iterdir()} == {NETWORK, "compaction.json"}
    dense = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    cp.load(dense, tmp_path / "small" / NETWORK)
    same(dense, model)
    assert [block.mlp.gate_proj.out_features for block in dense.model.layers] == [16, 22, 19]
    done = ran("evaluate", tmp_path / "m", place / "model", "--weights", tmp_path / "small" / NETWORK,
               "--data", place / "ids.npz")  # fmt: skip
    assert "same next token     1 (1 to 1)" in done.output, done.output
    even = compacted(place, tmp_path / "m", tmp_path / "even", "--round-to", 24)
    assert even.exit_code == 0, even.output
    assert (tmp_path / "even" / "config.json").exists()  # nothing went, and all agree


def test_one_wide_layer_among_narrow_ones_is_no_config(place, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 5:] = 0
    model.save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    done = compacted(place, tmp_path / "m", tmp_path / "small")
    assert "24 is now 5;" in done.output
    dense = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    cp.load(dense, tmp_path / "small" / NETWORK)
    same(dense, model.eval())


def test_what_reads_a_part_from_outside_is_found_on_the_data(tmp_path, monkeypatch):
    (tmp_path / "outside_of_a_test.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)
    words = ["compact", "outside_of_a_test:model", "--out", "out"]
    done = ran(*words)
    assert done.exit_code == 2
    assert "give --calibration" in done.output
    assert traceable(sys.modules["outside_of_a_test"].model()) == ("mlp",)
    done = ran(*words, "--calibration", "outside_of_a_test:batches")
    assert done.exit_code == 2, done.output
    assert "its outputs" not in done.output
    assert not (tmp_path / "out").exists()


OUTSIDE = """
import torch
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5))
    def forward(self, x):
        if x.sum() > 0:  # which cannot be traced
            x = x + 1
        return self.mlp(x) + self.mlp[0](x).sum(-1, keepdim=True)
def model():
    torch.manual_seed(0)
    made = Model()
    made.mlp[2].weight.data[:, :2] = 0
    return made
def batches():
    return [torch.randn(6, 5)]
"""


def test_a_pruned_function_is_compacted_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    mine, data = "mine_of_a_test:model", ["--calibration", "mine_of_a_test:batches"]
    done = ran("prune", mine, *data, "--pattern", "channels", "--sparsity", 0.5, "--only", 2, "--solver", "fast",
               "--out", "p")  # fmt: skip
    assert done.exit_code == 0, done.output
    done = ran("compact", mine, "--weights", "p/pruned.safetensors", "--out", "small", *data)
    assert done.exit_code == 0, done.output
    assert "within rounding" in done.output
    assert f'cp.load(model, "small/{NETWORK}")' in done.output
    small, pruned = (sys.modules["mine_of_a_test"].model() for _ in range(2))
    cp.load(small, f"small/{NETWORK}")
    cp.load(pruned, "p/pruned.safetensors")
    assert small[0].out_features == 3
    x = torch.randn(9, 8)
    torch.testing.assert_close(small(x), pruned(x))
    done = ran("prune", mine, "--weights", f"small/{NETWORK}", *data, "--sparsity", 0.5, "--out", "more")
    assert done.exit_code == 0, done.output
    cp.load(sys.modules["mine_of_a_test"].model(), "more/pruned.safetensors")


def test_neurons_merge(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    mine, data = "mine_of_a_test:model", ["--calibration", "mine_of_a_test:batches"]
    for out, words in {
        "share": ["--keep", 0.5],
        "count": ["--keep", 3],
        "fit": ["--keep", 3, *data, "--refit"],
    }.items():
        done = ran("merge", mine, *words, "--out", out)
        assert done.exit_code == 0, done.output
        assert "0: 6 -> 3 neurons" in done.output
        module = sys.modules["mine_of_a_test"]
        model, options = module.model(), {"batches": module.batches(), "refit": True} if out == "fit" else {}
        cp.load(model, f"{out}/{NETWORK}")
        assert model[2].in_features == 3
        assert {path.name for path in (tmp_path / out).iterdir()} == {NETWORK, "merges.json", "merges.html"}
        expected, _ = cp.merge(module.model(), 3, **options)
        x = torch.randn(4, 8)
        assert torch.equal(model(x), expected(x))
    assert "outputs moved by" in done.output


WRONG = {
    "a full folder": ("compact", ["--out", "full"], "is no empty folder"),
    "a file": ("compact", ["--out", "file"], "file"),
    "no such device": ("compact", ["--out", "o", "--device", "cuda:77"], "--device cuda:77"),
    "no device": ("compact", ["--out", "o", "--device", "gpu"], "--device gpu"),
    "silent alone": ("compact", ["--out", "o", "--silent"], "--calibration"),
    "round to nothing": ("compact", ["--out", "o", "--round-to", "0"], "0"),
    "other weights": ("compact", ["--out", "o", "--weights", "other.safetensors"], "other.safetensors: '0.bias'"),
    "no weights": ("compact", ["--out", "o", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
    "other data": ("compact", ["--out", "o", "--calibration", "other.npz"], "batch 0: the model's forward failed"),
    "keep all and more": ("merge", ["--out", "o", "--keep", "1.5"], "1.5"),
    "keep what": ("merge", ["--out", "o", "--keep", "half"], "'half' is no number"),
    "keep nan": ("merge", ["--out", "o", "--keep", "nan"], "nan"),
    "both": ("merge", ["--out", "o", "--keep", "0.5", "--max-saliency", "1"], "not both"),
    "refit alone": ("merge", ["--out", "o", "--keep", "0.5", "--refit"], "--calibration"),
    "the last layer": ("merge", ["--out", "o", "--only", "2"], "'2' cannot merge"),
    "merged into a full folder": ("merge", ["--out", "full"], "is no empty folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_and_nothing_is_written(case, tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(FUNCTION)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    np.savez(tmp_path / "other.npz", x=np.zeros((4, 3), np.float32))
    cp.save(torch.nn.Linear(2, 2), tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    command, words, expected = WRONG[case]
    done = ran(command, "mine_of_a_test:model", *words)
    assert done.exit_code == 2, done.output
    assert expected in done.output
    assert "Traceback" not in done.output
    assert done.output.splitlines()[-1].startswith("Error: ")
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


def test_a_folder_that_cannot_merge_says_why(place, tmp_path):
    done = ran("merge", place / "model", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "cannot be traced" in done.output
    assert not (tmp_path / "out").exists()
