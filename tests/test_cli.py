"""The command line, on digits, with few samples."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import convexprune
from convexprune import datasets
from convexprune.cli import main
from convexprune.network import load
from convexprune.report import Report


def ran(*arguments):
    return CliRunner().invoke(main, ["demo", *map(str, arguments)])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()  # these matrices are so small that threads only wait for one another
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """The demo's network made small, so that it is pruned in a blink."""
    build = datasets.lenet300
    monkeypatch.setattr(datasets, "lenet300", lambda inputs=784: build(inputs, (12, 8)))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_demo_says_what_is_proven_and_writes_three_files(tmp_path, small, mode):
    result = ran("--samples", 100, "--epsilon", 0.1, "--mode", mode, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for words in ("kept", "gap", "constraints", "network error, guaranteed", "network error, measured", "test error"):
        assert words in result.stdout
    assert "gap: how far" in result.stdout
    assert "\x1b" not in result.output  # no bar and no colours on a pipe
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.table() in result.stdout
    assert report.settings.samples == 100
    assert report.settings.mode == mode
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-6)
    assert "<svg" not in (tmp_path / "out" / "report.html").read_text()
    model = datasets.lenet300(64)
    load(model, tmp_path / "out" / "pruned.safetensors")
    kept = sum(int((model.get_submodule(row.name).weight != 0).sum()) for row in report.rows)
    assert kept == report.kept


def test_demo_is_reproducible(tmp_path, small):
    for name in ("a", "b"):
        assert ran("--samples", 60, "--epsilon", 0.3, "--seed", 3, "--out", tmp_path / name).exit_code == 0
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("a", "b"))
    assert first["settings"] == second["settings"]
    assert [row["kept"] for row in first["rows"]] == [row["kept"] for row in second["rows"]]


def archive(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.fixture
def files(tmp_path):
    """A tiny MNIST and a tiny network, as files."""
    generator = np.random.default_rng(0)
    images = {}
    for split in ("train", "test"):
        images[f"x_{split}"] = generator.integers(0, 256, (40, 3, 3), dtype=np.uint8)
        images[f"y_{split}"] = generator.integers(0, 10, 40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = datasets.lenet300(9, (7, 5)).state_dict()
    network = {key: value.numpy() for key, value in state.items()}
    return archive(tmp_path / "data.npz", **images), archive(tmp_path / "weights.npz", **network), images, network


def test_demo_prunes_a_network_from_files(tmp_path, files):
    result = ran("--data", files[0], "--weights", files[1], "--epsilon", 0.3, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert [row.shape for row in report.rows] == [(7, 9), (5, 7), (10, 5)]
    assert report.settings.samples == 40


def test_wrong_files_are_named_with_what_is_expected(tmp_path, files):
    data, weights, images, network = files
    junk = tmp_path / "junk.npz"
    junk.write_text("not an archive")
    flat = archive(tmp_path / "flat.npz", **(images | {"x_test": images["x_test"] / 255}))
    torn = archive(tmp_path / "torn.npz", **(network | {"fc2.weight": network["fc2.weight"][:, 1:]}))
    wide = archive(tmp_path / "wide.npz", **(network | {"fc1.weight": np.ones((7, 16), np.float32)}))
    cases = [
        (["--data", tmp_path / "none.npz"], "none.npz", "x_train, y_train, x_test, y_test"),
        (["--data", junk], "junk.npz", "x_train, y_train, x_test, y_test"),
        (["--data", weights], "weights.npz", "x_train"),
        (["--data", flat], "flat.npz", "uint8"),
        (["--data", data, "--weights", data], "data.npz", "fc1.weight"),
        (["--data", data, "--weights", torn], "torn.npz", "fc2"),
        (["--data", data, "--weights", wide], "wide.npz", "16"),
        (["--weights", weights], "--data", "--weights"),
        (["--epsilon", -1], "epsilon", "-1"),
        (["--mode", "sideways"], "mode", "sideways"),
    ]
    for arguments, name, expected in cases:
        result = ran(*arguments, "--out", tmp_path / "out")
        assert result.exit_code != 0, arguments
        assert name in result.output, result.output
        assert expected in result.output, result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_named(tmp_path, files):
    (tmp_path / "file").write_text("")
    result = ran("--data", files[0], "--weights", files[1], "--out", tmp_path / "file" / "out")
    assert result.exit_code != 0
    assert str(tmp_path / "file" / "out") in result.output


def test_version_and_help():
    assert CliRunner().invoke(main, ["--version"]).output == f"convexprune, version {convexprune.__version__}\n"
    assert "demo" in CliRunner().invoke(main, ["--help"]).output
    module = subprocess.run(
        [sys.executable, "-m", "convexprune.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert module.stdout.startswith("Usage: convexprune")


def test_the_version_needs_no_installation(tmp_path):
    source = Path(convexprune.__file__).parent
    (tmp_path / "convexprune").symlink_to(source)  # a source tree without metadata beside it
    done = subprocess.run(
        [sys.executable, "-m", "convexprune", "--version"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == f"convexprune, version {convexprune.__version__}\n"


def test_one_version_everywhere():
    root = Path(convexprune.__file__).parents[1]
    if not (root / "CITATION.cff").exists():
        pytest.skip("the package is not in its source tree")
    assert f"\nversion: {convexprune.__version__}\n" in (root / "CITATION.cff").read_text()
    assert f"\n## {convexprune.__version__} (" in (root / "CHANGELOG.md").read_text()


def test_published_network(data):
    images = datasets.mnist(data / "mnist.npz")
    model = datasets.trained_lenet300(data / "lenet300.npz")
    assert datasets.error_rate(model, images.x_test, images.y_test) == pytest.approx(0.0161)


def test_the_bundled_digits_are_whole():
    images = datasets.digits()
    x, y = torch.cat([images.x_train, images.x_test]), torch.cat([images.y_train, images.y_test])
    assert tuple(x.shape) == (1797, 64)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert torch.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
