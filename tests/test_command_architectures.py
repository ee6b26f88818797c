"""The command on the folders of today's models: what it writes loads again, and holds what the report says."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_architectures import ARCHITECTURES

import convexprune as cp
from convexprune.cli import main
from convexprune.network import read

transformers = pytest.importorskip("transformers", minversion="5")
NETWORKS = [name for name in ARCHITECTURES if name != "LSTM"]
FOLDERS = [name for name in NETWORKS if not name.startswith("nn.")]


def saved(name, place):
    """The folder of a small random model, and its calibration data."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = architecture.make(transformers), architecture.batch()
    model.save_pretrained(place / "model")
    arrays = batch if isinstance(batch, dict) else {model.main_input_name: batch}
    np.savez(place / "data.npz", **{key: value.numpy() for key, value in arrays.items()})
    return model


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_written_loads_and_is_what_the_report_says(name, tmp_path):
    before = saved(name, tmp_path).eval()
    out = tmp_path / "out"
    words = ["prune", tmp_path / "model", "--calibration", tmp_path / "data.npz", "--out", out]
    words += ["--sparsity", 0.5, "--solver", "magnitude"]
    done = CliRunner().invoke(main, [*map(str, words)])
    assert done.exit_code == 0, done.output
    after, said = type(before).from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    report = cp.Report.from_json((out / "report.json").read_text())
    pruned = [row for row in report.rows if row.status is not None and not row.refusal]
    assert len(pruned) >= ARCHITECTURES[name].layers - 2
    for row in report.rows:
        weights = read(after, row.name)[:, : row.shape[1]]
        assert int((weights != 0).sum()) == row.kept, row.name
    for row in pruned:
        assert row.kept == pytest.approx(row.total / 2, abs=1), row.name
    held = {tensor.name: tensor for tensor in report.coverage.tensors}
    own = dict(before.named_parameters())
    for key, value in after.named_parameters():
        if key in held and held[key].why:
            assert torch.equal(value, own[key]), key
            assert held[key].why in done.output
    assert json.loads((out / "config.json").read_text())["architectures"] == [type(before).__name__]


@pytest.mark.parametrize("name", NETWORKS)
def test_block_by_block_finds_the_weights_of_the_plain_cascade(name):
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batches = architecture.make(transformers).eval(), [architecture.batch() for _ in range(2)]

    def build(layer):
        return cp.Reconstruction(layer, cp.Unstructured(0.5))

    one, other = (
        cp.prune(model, batches, build, cp.Fast(), "residual", execution=cp.Execution(by_block=by_block))[0]
        for by_block in (True, False)
    )
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
