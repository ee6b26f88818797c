"""The command line on a transformers folder: from a model's folder to the folder of the pruned model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import convexprune as cp
from convexprune.cli import main
from convexprune.command.samples import Windows, samples, texts
from convexprune.pruning.plan import Plan

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "in", "our", "old", "tree"]


def said(index):
    """A text of its own."""
    generator = np.random.default_rng(index)
    return " ".join(generator.choice(WORDS, 3000))


def save_tokenizer(folder):
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model's folder, a text, and other things that a command may be given."""
    place = tmp_path_factory.mktemp("command")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=24, max_position_embeddings=64, tie_word_embeddings=False,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(place / "model")
        model.to(torch.bfloat16).save_pretrained(place / "sharded", max_shard_size=6000)
    for folder in ("model", "sharded"):
        save_tokenizer(place / folder)
    (place / "text.txt").write_text(said(0))
    np.savez(place / "ids.npz", input_ids=np.arange(64 * 16).reshape(64, 16) % 18)
    return place


def ran(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def pruned(place, out, *arguments, model="model", calibration="text.txt"):
    given = [place / model, "--calibration", place / calibration, "--out", out, "--windows", 8, "--length", 16]
    return ran("prune", *given, *arguments)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def zeros(model):
    return {name: float((value == 0).float().mean()) for name, value in model.named_parameters() if value.ndim == 2}


def test_a_folder_becomes_the_folder_of_the_pruned_model(place, tmp_path):
    done = pruned(place, tmp_path, "--sparsity", 0.5, "--solver", "fast", "--ignore", "lm_head")
    assert done.exit_code == 0, done.output
    files = {path.name for path in tmp_path.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "report.html", "report.json", "recipe.toml"}
    assert "unfinished" not in files
    model, dense = load(tmp_path), load(place / "model")
    for name, share in zeros(model).items():
        assert share == pytest.approx(0.5 if "proj" in name else 0, abs=1e-9), name
    report = cp.Report.from_json((tmp_path / "report.json").read_text())
    assert sum(row.kept for row in report.rows[:-1]) == sum(
        int((v != 0).sum()) for n, v in model.named_parameters() if "proj" in n
    )
    assert len(report.rows) == 22
    assert (report.rows[-1].name, report.rows[-1].kept) == ("lm_head", report.rows[-1].total)  # judged as it is
    assert report.network.measured <= report.network.guaranteed <= 1.01 * report.network.measured
    again = ran("prune", place / "model", "--calibration", place / "text.txt", "--out", tmp_path / "b", "--windows", 8,
                "--length", 16, "--recipe", tmp_path / "recipe.toml")  # fmt: skip
    assert again.exit_code == 0, again.output
    other = load(tmp_path / "b")
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    assert any(not torch.equal(value, dense.state_dict()[key]) for key, value in model.state_dict().items())


def test_masks_are_packed_as_bits(place, tmp_path):
    from safetensors import safe_open

    assert pruned(place, tmp_path, "--pattern", "2:4", "--solver", "magnitude").exit_code == 0
    model = dict(load(tmp_path).named_parameters())
    with safe_open(tmp_path / "masks.safetensors", framework="np") as file:
        shapes = json.loads(file.metadata()["shapes"])
        assert len(shapes) == 22
        for name, shape in shapes.items():
            bits = np.unpackbits(file.get_tensor(name), count=int(np.prod(shape))).reshape(shape)
            assert np.array_equal(bits, (model[name] != 0).numpy())
            assert (bits.reshape(-1, 4).sum(1) <= 2).all()


def test_shards_and_dtype_are_the_sources(place, tmp_path):
    assert pruned(place, tmp_path, "--sparsity", 0.5, "--solver", "magnitude", model="sharded").exit_code == 0
    before = json.loads((place / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    after = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(before) == set(after)
    assert len(set(after.values())) > 1
    assert {value.dtype for value in load(tmp_path).parameters()} == {torch.bfloat16}


def test_a_dry_run_writes_nothing(place, tmp_path):
    done = pruned(place, tmp_path / "out", "--sparsity", 0.5, "--dry-run", "--only", "*mlp*")
    assert done.exit_code == 0, done.output
    assert "9 layers to prune" in done.output
    assert "GB at the peak" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("seconds", "chosen"), [(1e6, "best"), (0, None)])
def test_a_time_chooses_the_best_preset_that_fits(seconds, chosen, place, tmp_path):
    words = ["--sparsity", 0.5, "--dry-run", "--solver", "auto", "--time"]
    done = pruned(place, tmp_path / "out", *words, seconds or 1e-9)
    assert (done.exit_code == 0) == (chosen is not None)
    assert f"--solver {chosen}: " in done.output if chosen else "no preset fits" in done.output


@pytest.mark.parametrize(
    "words", [["--solver", "auto"], ["--time", 5], ["--solver", "auto", "--time", 0], ["--solver", "fast", "--time", 5],
              ["--solver", "auto", "--time", 5, "--epsilon", 0.1]],
)  # fmt: skip
def test_a_time_and_auto_go_together(words, place, tmp_path):
    done = pruned(place, tmp_path / "out", "--sparsity", 0.5, *words)
    assert done.exit_code != 0
    assert "--time" in done.output


def test_a_device_is_that_of_the_solvers_too():
    assert cp.Rule(sparsity=0.5).on("cpu") == cp.Rule(sparsity=0.5, solver="balanced", options={"device": "cpu"})
    for rule in (cp.Rule("x", problem="dense"), cp.Rule(sparsity=0.5, solver="magnitude")):
        assert rule.on("cuda") is rule
    with pytest.raises(ValueError, match="device"):
        cp.Recipe([cp.Rule(sparsity=0.5, solver="fast")]).on("cuda:99")


def test_presets_cost_more_the_better_they_are(place):
    plan = Plan.of(load(place / "model"), cp.Calibration([torch.zeros(2, 8, dtype=torch.long)]),
                   cp.Recipe([cp.Rule("*", sparsity=0.5)]), "cascade")  # fmt: skip
    assert [*plan.presets] == ["best", "balanced", "fast", "magnitude"]
    assert sorted(plan.presets.values(), reverse=True) == [*plan.presets.values()]
    assert plan.seconds == pytest.approx(plan.presets["balanced"])
    for name, seconds in plan.presets.items():
        assert plan.within(seconds) == name


MEASURED = """
from convexprune.cli import main
main(standalone_mode=False)
print(open("/proc/self/status").read())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what a process takes")
def test_the_plan_is_near_the_measured_peak(place, tmp_path):
    words = ["prune", place / "model", "--calibration", place / "text.txt", "--out", tmp_path, "--windows", 8,
             "--length", 16, "--sparsity", 0.5, "--solver", "magnitude"]  # fmt: skip
    # ru_maxrss of a child is at least what its parent had when it was forked
    run = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = float(re.search(r"memory: ([0-9.]+) GB at the peak", done.stdout)[1])
    measured = int(re.search(r"VmHWM:\s*([0-9]+) kB", done.stdout)[1]) * 1024 / 1e9
    assert planned / 1.3 <= measured <= 1.3 * planned


def test_net_trim_and_arrays(place, tmp_path):
    done = pruned(
        place, tmp_path, "--epsilon", 0.3, "--only", "*down_proj", "--mode", "parallel", calibration="ids.npz"
    )
    assert done.exit_code == 0, done.output
    shares = zeros(load(tmp_path))
    assert all((share > 0) == ("down_proj" in name) for name, share in shares.items())


def test_an_allocation_divides_the_budget(place, tmp_path):
    done = pruned(place, tmp_path, "--sparsity", 0.5, "--allocate", "--ignore", "lm_head", "--distill", 2)
    assert done.exit_code == 0, done.output
    report = cp.Report.from_json((tmp_path / "report.json").read_text())
    assert report.kept <= 0.5 * report.total
    assert report.kept > 0.49 * report.total
    assert len({row.kept / row.total for row in report.rows}) > 1
    kept = sum(int((v != 0).sum()) for n, v in load(tmp_path).named_parameters() if "proj" in n)
    assert kept <= report.kept


def test_evaluate_speaks_of_both_models(place, tmp_path):
    assert pruned(place, tmp_path, "--sparsity", 0.5, "--solver", "magnitude").exit_code == 0
    done = ran("evaluate", place / "model", tmp_path, "--data", place / "text.txt", "--windows", 5, "--length", 20)
    assert done.exit_code == 0, done.output
    tokens = torch.cat([batch["input_ids"] for batch in samples(
        str(place / "text.txt"), load(tmp_path), lambda: transformers.AutoTokenizer.from_pretrained(tmp_path),
        Windows(5, 0, 20, 5))])  # fmt: skip
    for name, model in (("dense", load(place / "model")), ("pruned", load(tmp_path))):
        with torch.no_grad():
            loss = float(model(input_ids=tokens, labels=tokens).loss)
        line = next(line for line in done.output.splitlines() if line.startswith(f"perplexity, {name}"))
        assert float(line.split()[2]) == pytest.approx(np.exp(loss), rel=1e-3)
    assert "same next token" in done.output
    shown = ran("report", tmp_path)
    assert shown.exit_code == 0
    assert "model.layers.0.mlp.up_proj" in shown.output


def test_windows_are_those_of_the_text(place):
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    model = load(place / "model")
    batches = texts(said(0), "text", model, tokenizer, Windows(5, 2, 11, 3))
    assert [len(batch["input_ids"]) for batch in batches] == [3, 2]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    assert (rows[:, 0] == 1).all()
    words = said(0).split()[20:70]
    assert tokenizer.decode(rows[:, 1:].reshape(-1)).split() == words


FUNCTION = """
import torch
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
def batches():
    torch.manual_seed(1)
    return [torch.randn(20, 8)]
def nothing():
    return 3
number = 3
"""


def test_a_model_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "mine_of_a_test.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    done = ran(
        "prune", "mine_of_a_test:model", "--calibration", "mine_of_a_test:batches", "--sparsity", 0.5, "--out", "out"
    )
    assert done.exit_code == 0, done.output
    model = sys.modules["mine_of_a_test"].model()
    cp.load(model, "out/pruned.safetensors")
    assert int((model[0].weight != 0).sum()) == 24
    again = ran("prune", "mine_of_a_test:model", "--weights", "out/pruned.safetensors", "--calibration",
                "mine_of_a_test:batches", "--sparsity", 0.75, "--out", "more")  # fmt: skip
    assert again.exit_code == 0, again.output
    done = ran("evaluate", "mine_of_a_test:model", "mine_of_a_test:model", "--data", "mine_of_a_test:batches")
    assert "same class             1 (1 to 1)" in done.output


def test_killed_and_interrupted_runs_go_on_to_the_same_bits(place, tmp_path):
    def command(out):
        return [
            sys.executable, "-m", "convexprune", "prune", str(place / "model"),
            "--calibration", str(place / "text.txt"),
            "--out", str(tmp_path / out), "--windows", "40", "--length", "32", "--sparsity", "0.5", "--solver", "best",
        ]  # fmt: skip

    whole = subprocess.run(command("whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    for count, signalled in ((3, signal.SIGKILL), (9, signal.SIGINT), (15, signal.SIGKILL)):
        process = subprocess.Popen(command("out"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        layers = tmp_path / "out" / "unfinished" / "layers"
        while process.poll() is None and (not layers.exists() or len([*layers.iterdir()]) < count):
            time.sleep(0.01)
        process.send_signal(signalled)
        process.wait()
        assert not (tmp_path / "out" / "config.json").exists()
    done = subprocess.run(command("out"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = load(tmp_path / "whole").state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    for name in ("model.safetensors", "masks.safetensors", "config.json", "recipe.toml"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_another_run_in_the_folder_is_refused(place, tmp_path):
    (tmp_path / "unfinished").mkdir()
    first = cp.Execution(store=tmp_path / "unfinished")
    cp.prune(load(place / "model"), [{"input_ids": torch.zeros(2, 4, dtype=torch.long)}],
             lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)) if "down" in layer.name else None,
             cp.Magnitude(), execution=first)  # fmt: skip
    done = pruned(place, tmp_path, "--sparsity", 0.5)
    assert done.exit_code == 2
    assert "another run" in done.output
    assert pruned(place, tmp_path, "--sparsity", 0.5, "--solver", "magnitude", "--no-resume").exit_code == 0


def without_weights(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    return [tmp_path / "m"], {}, "no *.safetensors"


def truncated(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    return [tmp_path / "m"], {}, "whole safetensors"


def lost_shard(place, tmp_path):
    shutil.copytree(place / "sharded", tmp_path / "m")
    next((tmp_path / "m").glob("*00002*")).unlink()
    return [tmp_path / "m"], {}, "00002"


def no_config(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{")
    return [tmp_path / "m"], {}, "no JSON"


def no_folder(place, tmp_path):
    return [tmp_path / "nowhere"], {}, "no folder"


def no_tokenizer(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "m")
    for path in (tmp_path / "m").glob("token*"):
        path.unlink()
    return [tmp_path / "m"], {}, "tokenizer"


def short_text(place, tmp_path):
    (tmp_path / "t.txt").write_text("the cat sat")
    return [place / "model"], {"--calibration": tmp_path / "t.txt"}, "windows"


def no_text(place, tmp_path):
    return [place / "model"], {"--calibration": tmp_path / "t.txt"}, "No such file"


def binary_text(place, tmp_path):
    (tmp_path / "t.txt").write_bytes(bytes(range(256)))
    return [place / "model"], {"--calibration": tmp_path / "t.txt"}, "UTF-8"


def long_windows(place, tmp_path):
    return [place / "model"], {"--length": 100}, "64"


def uneven_arrays(place, tmp_path):
    np.savez(tmp_path / "a.npz", input_ids=np.zeros((3, 4), int), attention_mask=np.zeros((2, 4), int))
    return [place / "model"], {"--calibration": tmp_path / "a.npz"}, "rows"


def wrong_arrays(place, tmp_path):
    np.savez(tmp_path / "a.npz", pictures=np.zeros((3, 4)), more=np.zeros((3, 4)))
    return [place / "model"], {"--calibration": tmp_path / "a.npz"}, "pictures"


def recipe_of(text):
    def case(place, tmp_path):
        (tmp_path / "r.toml").write_text(text)
        return [place / "model"], {"--recipe": tmp_path / "r.toml", "--sparsity": None}, None

    return case


def no_only(place, tmp_path):
    return [place / "model"], {"--only": "decoder.*"}, "decoder"


def nothing_wanted(place, tmp_path):
    return [place / "model"], {"--sparsity": None}, "--sparsity"


def too_sparse(place, tmp_path):
    return [place / "model"], {"--sparsity": 1.5}, "1.5"


def misfit(place, tmp_path):
    return [place / "model"], {"--sparsity": None, "--pattern": "3:7"}, "7"


def little_memory(place, tmp_path):
    return [place / "model"], {"--memory": 1e-6}, "GB"


def other_class(place, tmp_path):
    return [place / "model"], {"--class": "NoSuchModel"}, "NoSuchModel"


def wrong_class(place, tmp_path):
    return [place / "model"], {"--class": "GPT2LMHeadModel"}, "GPT2LMHeadModel"


def no_function(place, tmp_path):
    return ["json:nothing"], {}, "nothing"


def no_module(place, tmp_path):
    return ["no_such_module_here:model"], {}, "no_such_module_here"


def a_file_out(place, tmp_path):
    (tmp_path / "o").write_text("")
    return [place / "model"], {"--out": tmp_path / "o"}, "o"


def another_model_out(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "o")
    return [place / "model"], {"--out": tmp_path / "o"}, "has not made"


WRONG = {
    "without weights": without_weights, "truncated": truncated, "lost shard": lost_shard, "no config": no_config,
    "no folder": no_folder, "no tokenizer": no_tokenizer, "short text": short_text, "no text": no_text,
    "binary text": binary_text, "long windows": long_windows, "uneven arrays": uneven_arrays,
    "wrong arrays": wrong_arrays, "no only": no_only, "nothing wanted": nothing_wanted, "too sparse": too_sparse,
    "misfit": misfit, "little memory": little_memory, "other class": other_class, "wrong class": wrong_class,
    "no function": no_function, "no module": no_module, "a file": a_file_out, "another model": another_model_out,
    "unknown key": recipe_of("[[rule]]\nlayer = 'x'"), "no toml": recipe_of("[[rule"), "empty": recipe_of(""),
    "matches nothing": recipe_of("[[rule]]\nlayers = 'encoder.*'\nsparsity = 0.5"),
    "behind": recipe_of("[[rule]]\nlayers = '*'\nsparsity = 0.5\n[[rule]]\nlayers = 'lm_head'\nproblem = 'dense'"),
    "all dense": recipe_of("[[rule]]\nproblem = 'dense'"),
    "unknown solver": recipe_of("[[rule]]\nsolver = 'magic'\nsparsity = 0.5"),
    "unknown option": recipe_of("[[rule]]\nsolver = 'fast'\nsparsity = 0.5\noptions = { magic = 1 }"),
    "two sparsities": recipe_of("[[rule]]\npattern = '2:4'\nsparsity = 0.5"),
    "a regex": recipe_of("[[rule]]\nlayers = 're:('\nsparsity = 0.5"),
    "a kind": recipe_of("[[rule]]\nsparsity = 'half'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_and_exit_code_2(case, place, tmp_path):
    (model,), changed, words = WRONG[case](place, tmp_path)
    given = {"--calibration": place / "text.txt", "--out": tmp_path / "out", "--windows": 8, "--length": 16}
    given |= {"--sparsity": 0.5, **changed}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = ran("prune", model, *(part for pair in given.items() if pair[1] is not None for part in pair))
    assert done.exit_code == 2, done.output
    error = done.output.splitlines()[-1]
    assert "Traceback" not in done.output
    assert words is None or words in done.output, done.output
    assert error.startswith("Error: ")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if "unfinished" not in path.parts} == before


def test_a_full_disk_is_one_sentence(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40k", "none", small]).returncode:
        pytest.skip("no small file system can be made here")
    try:
        done = pruned(place, small / "out", "--sparsity", 0.5, "--solver", "magnitude")
        assert done.exit_code == 2, done.output
        assert "No space left" in done.output
        assert not (small / "out" / "config.json").exists()
        assert not [*small.rglob(".convexprune*")]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_folder_that_may_not_be_written_is_one_sentence(place, tmp_path):
    if os.geteuid() == 0:
        done = pruned(place, Path("/proc/out"), "--sparsity", 0.5)
    else:
        tmp_path.chmod(0o500)
        done = pruned(place, tmp_path / "out", "--sparsity", 0.5)
    assert done.exit_code == 2
    assert done.output.splitlines()[-1].startswith("Error: ")
