# ruff: noqa: F811 (a fixture of another file)
"""What the commands say: figures that name what they are a share of, and one sentence for what is wrong."""

import re

import pytest
import torch
from test_command import place, pruned, ran, save_tokenizer  # noqa: F401 (a fixture)

import convexprune as cp
from convexprune.report.report import LISTED

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tied(place):
    """A model whose head is its embedding: it is judged, and not pruned."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=24, max_position_embeddings=64, tie_word_embeddings=True,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(place / "tied")
    save_tokenizer(place / "tied")
    return "tied"


def test_a_head_that_is_only_judged_is_no_part_of_what_is_pruned(place, tied, tmp_path):
    words = ["--sparsity", 0.5, "--solver", "magnitude"]
    planned = pruned(place, tmp_path, *words, "--dry-run", model=tied)
    assert "7 layers to prune" in planned.output
    assert "stays as it is, and its error is measured: lm_head" in planned.output
    done = pruned(place, tmp_path, *words, model=tied)
    assert done.exit_code == 0, done.output
    layers = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 24 * 16
    whole = layers + 24 * 16  # the embedding, once
    share = (layers / 2 + 24 * 16) / whole
    sentence = (
        f"kept {layers // 2} of {layers} weights that were to be pruned (50.0%), {share:.1%} of the model's {whole}"
    )
    assert sentence in done.output
    assert sentence in ran("report", tmp_path).output
    assert sentence.capitalize() in (tmp_path / "report.html").read_text()
    report = cp.Report.from_json((tmp_path / "report.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    left = sum(int((p != 0).sum()) for p in model.parameters() if p.ndim > 1)
    assert report.model_kept_fraction == pytest.approx(left / whole)


def test_a_layer_left_dense_by_choice_is_no_part_of_the_share():
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    recipe = cp.Recipe([cp.Rule("2", problem="dense"), cp.Rule(sparsity=0.5, solver="magnitude")])
    _, report = cp.prune(model, [torch.randn(20, 8)], recipe)
    assert report.share() == "kept 16 of 32 weights that were to be pruned (50.0%), 60.0% of the model's 40"
    _, report = cp.prune(model, [torch.randn(20, 8)], cp.Recipe([cp.Rule(sparsity=0.5, solver="magnitude")]))
    assert report.share() == "kept 20 of 40 weights (50.0%)"


def test_constraints_that_nothing_meets_are_named():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))

    def build(layer):  # the second layer cannot make up for what the first has lost
        return cp.NetTrim(layer, 0.6 if layer.name == "0" else 1e-3)

    _, report = cp.prune(model, [torch.randn(30, 4)], build, mode="cascade")
    assert [row.refusal for row in report.rows] == [
        "", "no weights satisfy its problem's constraints; loosen them, such as by a larger epsilon"
    ]  # fmt: skip


def test_a_long_list_of_singular_layers_is_cut():
    model = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(7)))
    _, report = cp.prune(model, [torch.randn(3, 6)], lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)))
    (line,) = [line for line in report.summary() if line.startswith("singular Gram matrices: ")]
    assert len(re.findall(r"rank \d+ of 6", line)) == LISTED
    assert line.endswith(f"; and {7 - LISTED} more")


def test_a_report_says_that_it_is_not_about_weights_trained_afterwards(place, tied, tmp_path):
    words = ["--sparsity", 0.5, "--solver", "magnitude", "--only", "*mlp*"]
    assert pruned(place, tmp_path / "plain", *words, model=tied).exit_code == 0
    done = pruned(place, tmp_path / "out", *words, "--distill", 3, model=tied)
    assert done.exit_code == 0, done.output
    sentence = "afterwards the weights that were kept were trained on the dense outputs, which this report is not about"
    for text in (done.output, ran("report", tmp_path / "out").output):
        assert sentence in text
    assert sentence.capitalize() in (tmp_path / "out" / "report.html").read_text()
    plain, trained = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / each).state_dict() for each in ("plain", "out")
    )
    assert any(not torch.equal(value, trained[key]) for key, value in plain.items())
    assert sentence not in ran("report", tmp_path / "plain").output


@pytest.mark.parametrize(("pattern", "of"), [("unstructured", 1), ("per-row", 16), ("channels", 16), ("4x4", 16)])
def test_an_allocation_counts_weights_and_a_pattern_what_it_keeps(pattern, of, place, tied, tmp_path):
    """Each layer keeps whole rows' counts, channels or blocks, and all of them together no more than the budget."""
    words = ["--sparsity", 0.5, "--allocate", "--pattern", pattern, "--solver", "magnitude", "--only", "*down_proj"]
    done = pruned(place, tmp_path, *words, model=tied)
    assert done.exit_code == 0, done.output
    (row,) = cp.Report.from_json((tmp_path / "report.json").read_text()).rows
    assert row.shape == (16, 24)
    assert row.kept % of == 0
    assert 0.4 * row.total <= row.kept <= 0.5 * row.total
    weight = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.down_proj.weight != 0
    cells = {"channels": weight.T, "per-row": weight.sort(1).values.T, "4x4": weight.unfold(0, 4, 4).unfold(1, 4, 4)
             .reshape(-1, 16), "unstructured": weight.reshape(-1, 1)}[pattern]  # fmt: skip
    assert (cells == cells[:, :1]).all()


@pytest.mark.parametrize(
    "rule", [cp.Rule(sparsity=0.5), cp.Rule(pattern="2:4"), cp.Rule(problem="net-trim", epsilon=0.1)]
)
def test_a_rule_that_counts_by_itself_takes_no_allocation(rule):
    model, batches = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 4)), [torch.randn(9, 8)]
    with pytest.raises(ValueError, match="says by itself how many weights stay"):
        cp.prune(model, batches, cp.Recipe([rule]), allocation=cp.Allocation(0.5))
    assert cp.prune(model, batches, cp.Recipe([rule]))[1].kept > 0


WRONG = {
    "no such kind of device": (["--device", "gpu"], "--device gpu"),
    "no such device": (["--device", "cuda:77"], "--device cuda:77"),
    "a device without numbers": (["--device", "meta"], "--device meta"),
    "memory nan": (["--memory", "nan"], "--memory is nan"),
    "memory inf": (["--memory", "inf"], "--memory is inf"),
    "memory below 0": (["--memory", "-1"], "--memory is -1.0"),
    "scratch in a file": (["--scratch", "text.txt"], "text.txt"),
    "allocated Net-Trim": (["--allocate", "--epsilon", "0.1"], "leave the allocation out"),
    "allocated N:M": (["--allocate", "--pattern", "2:4"], "leave the allocation out"),
    "weights of a folder": (["--weights", "x.safetensors"], "has weights of its own"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence_before_the_work_begins(case, place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    words, expected = WRONG[case]
    done = pruned(place, tmp_path / "out", "--sparsity", 0.5, *words)
    assert done.exit_code == 2, done.output
    assert expected in done.output
    assert len(done.output.splitlines()) == 1  # no plan was made
    assert done.output.startswith("Error: ")
    assert not (tmp_path / "out").exists()
