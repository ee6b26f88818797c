"""How the work is done does not change what comes out: other processes, a killed run that goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.pruning.store import Store

MODES = ["parallel", "cascade", "residual"]


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.three(self.one(x).relu() * self.two(x))


def network():
    return nn.Sequential(nn.Linear(4, 6), Block(), Block(), Block(), nn.Linear(6, 3)).eval()


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


def same(one, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


@dataclass(frozen=True)
class Fatal:
    """Kills the process that it runs in, once for each shape of a layer, or once in all."""

    folder: str
    once: bool = False

    def solve(self, problem, start=None):
        mark = Path(self.folder) / ("once" if self.once else f"{tuple(problem.shape)}")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return cp.Fast().solve(problem, start)


class Stopping:
    """Stops the run at its n-th problem."""

    def __init__(self, after):
        self.left = after

    def __repr__(self):
        return "Stopping()"

    def solve(self, problem, start=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return cp.Fast().solve(problem, start)


@pytest.mark.parametrize("mode", MODES)
def test_processes_find_the_same_weights(mode):
    model, batches = network(), [torch.randn(30, 4)]
    alone, expected = cp.prune(model, batches, half, cp.Fast(), mode)
    together, report = cp.prune(
        model, batches, half, cp.Fast(), mode, execution=cp.Execution(backend=cp.Joblib(jobs=2, threads=1))
    )
    assert same(alone, together)
    assert [row.certificate for row in report.rows] == [row.certificate for row in expected.rows]


def test_a_worker_that_dies_loses_one_layer(tmp_path):
    model, batches = network(), [torch.randn(30, 4)]
    alone, _ = cp.prune(model, batches, half, cp.Fast())
    work = cp.Execution(backend=cp.Joblib(jobs=2, threads=1))
    survived, _ = cp.prune(model, batches, half, Fatal(str(tmp_path)), execution=work)
    assert [*tmp_path.iterdir()]
    assert same(alone, survived)


def test_a_dask_cluster_finds_the_same_weights():
    distributed = pytest.importorskip("distributed")
    model, batches = network(), [torch.randn(30, 4)]
    alone, _ = cp.prune(model, batches, half, cp.Fast(), "cascade")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        work = cp.Execution(backend=cp.Joblib(jobs=2, engine="dask", threads=1))
        together, _ = cp.prune(model, batches, half, cp.Fast(), "cascade", execution=work)
    assert same(alone, together)


def test_a_dask_worker_that_is_killed_loses_one_layer(tmp_path):
    distributed = pytest.importorskip("distributed")
    model, batches = network(), [torch.randn(30, 4)]
    alone, _ = cp.prune(model, batches, half, cp.Fast())
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        work = cp.Execution(backend=cp.Joblib(jobs=2, engine="dask", threads=1))
        survived, _ = cp.prune(model, batches, half, Fatal(str(tmp_path), once=True), execution=work)
    assert [*tmp_path.iterdir()]
    assert same(alone, survived)


@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(mode, tmp_path):
    model, batches = network(), [torch.randn(30, 4), torch.randn(10, 4)]
    whole, expected = cp.prune(model, batches, half, Stopping(99), mode)
    for after in range(12):
        work = cp.Execution(store=tmp_path / str(after))
        try:
            cp.prune(model, batches, half, Stopping(after), mode, execution=work)
        except KeyboardInterrupt:
            assert len([*(tmp_path / str(after) / "layers").iterdir()]) == after
        else:
            assert after >= 11
        solver = Stopping(11 - after)  # just enough for what is left
        resumed, report = cp.prune(model, batches, half, solver, mode, execution=work)
        assert solver.left == 0
        assert same(whole, resumed)
        assert [row.certificate for row in report.rows] == [row.certificate for row in expected.rows]
        assert report.network == expected.network


def test_a_finished_run_is_read_and_not_solved(tmp_path):
    model, batches = network(), [torch.randn(30, 4)]
    work = cp.Execution(store=tmp_path)
    pruned, report = cp.prune(model, batches, half, Stopping(99), execution=work)
    again, same_report = cp.prune(model, batches, half, Stopping(0), execution=work)
    assert same(pruned, again)
    assert same_report.rows == report.rows
    for one, other in zip(same_report.rows, report.rows, strict=True):
        assert torch.equal(one.pattern, other.pattern)
        assert torch.equal(one.errors, other.errors)


OTHER = {
    "the model's weights": {"model": network},
    "the calibration samples": {"batches": lambda: [torch.randn(30, 4)]},
    "the recipe states other problems": {"build": lambda: lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.4))},
    "the solver is another": {"solver": lambda: cp.Magnitude()},
    "the mode": {"mode": lambda: "cascade"},
    "other layers": {"names": lambda: "1.*"},
    "threads": {},
}  # fmt: skip


def test_what_finished_blocks_have_lies_in_the_store(tmp_path, monkeypatch):
    model, batches = network(), [torch.randn(30, 4)]
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    mapped, read = [], Store.mapped

    def counted(store, module):
        mapped.append(module)
        return read(store, module)

    alone, _ = cp.prune(model, batches, half, cp.Fast(), "cascade")
    monkeypatch.setattr(Store, "mapped", counted)
    work = cp.Execution(store=tmp_path)
    kept, _ = cp.prune(model, batches, half, cp.Fast(), "cascade", execution=work)
    assert sorted(mapped) == sorted(["0", *(f"{n}.{key}" for n in (1, 2, 3) for key in ("one", "two", "three"))])
    assert same(alone, kept)
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.fill_(7.0)  # reaches neither the files nor the model
    assert same(alone, cp.prune(model, batches, half, cp.Fast(), "cascade", execution=work)[0])
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("what", OTHER)
def test_another_run_is_refused_by_what_differs(what, tmp_path):
    arguments = {
        "model": network(),
        "batches": [torch.randn(30, 4)],
        "build": half,
        "solver": cp.Fast(),
        "mode": "parallel",
    }
    work = cp.Execution(store=tmp_path)
    cp.prune(**arguments, execution=work)
    changed = {**arguments, **{key: make() for key, make in OTHER[what].items()}}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + (what == "threads"))
        with pytest.raises(ValueError, match=what):
            cp.prune(**changed, execution=work)
    finally:
        torch.set_num_threads(threads)
    if what == "the recipe states other problems":
        mask = torch.ones(6, 4, dtype=torch.bool)
        mask[0, 0] = False
        supports = [cp.Support(mask), cp.Support(~mask)]  # two recipes that print alike
        for folder, support in zip("ab", supports, strict=True):
            kept = cp.Execution(store=tmp_path / "support")
            build = lambda layer, s=support: cp.Reconstruction(layer, s) if layer.name == "0" else None  # noqa: E731
            if folder == "a":
                cp.prune(**{**arguments, "build": build}, execution=kept)
            else:
                with pytest.raises(ValueError, match=what):
                    cp.prune(**{**arguments, "build": build}, execution=kept)


@pytest.mark.parametrize("damage", ["cut", "empty", "run"])
def test_a_damaged_store_is_refused(damage, tmp_path):
    model, batches = network(), [torch.randn(30, 4)]
    work = cp.Execution(store=tmp_path)
    cp.prune(model, batches, half, execution=work)
    place = tmp_path / "run.json" if damage == "run" else tmp_path / "layers" / "00001.safetensors"
    place.write_bytes(b"" if damage == "empty" else place.read_bytes()[:40])
    with pytest.raises(ValueError, match=place.name):
        cp.prune(model, batches, half, execution=work)


KILLED = """
import sys, torch, convexprune as cp
sys.path.insert(0, {tests!r})
from test_execution import half, network
torch.manual_seed(0)
model, batches = network(), [torch.randn(2000, 4)]
print("begun", flush=True)
pruned, report = cp.prune(model, batches, half, cp.Best(), "cascade", execution=cp.Execution(store={store!r}))
cp.save(pruned, {out!r})
"""


def test_a_process_that_is_killed_goes_on(tmp_path):
    def command(out, store):
        text = KILLED.format(tests=str(Path(__file__).parent), store=str(tmp_path / store), out=str(tmp_path / out))
        return [sys.executable, "-c", text]

    subprocess.run(command("whole", "undisturbed"), check=True, capture_output=True)
    for wait in (0.05, 0.1, 0.2, 0.3):
        process = subprocess.Popen(command("resumed", "killed"), stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(wait)
        process.kill()
        process.wait()
    subprocess.run(command("resumed", "killed"), check=True, capture_output=True)
    one, other = network(), network()
    cp.load(one, tmp_path / "whole")
    cp.load(other, tmp_path / "resumed")
    assert same(one, other)
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["mode"] == "cascade"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"backend": 3}, TypeError),
        ({"store": 3}, TypeError),
        ({"scratch": b"x"}, TypeError),
        ({"by_block": "yes"}, TypeError),
    ],
)
def test_wrong_fields_are_refused(arguments, error):
    with pytest.raises(error):
        cp.Execution(**arguments)


def test_wrong_jobs_are_refused():
    for wrong in ({"jobs": 0}, {"jobs": 2.0}, {"engine": 3}, {"threads": 0}):
        with pytest.raises((TypeError, ValueError)):
            cp.Joblib(**wrong)
    with pytest.raises(TypeError, match="execution"):
        cp.prune(network(), [torch.randn(3, 4)], half, execution="store")
