"""The walk: what is written, what is judged, what is left alone."""

import copy
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from convexprune import datasets
from convexprune.network import Calibration, capture, read
from convexprune.patterns import NM, Blocks, Channels, PerRow, Support, Unstructured
from convexprune.problem import judge
from convexprune.problems import L1Reconstruction, NetTrim, OptimalBrainSurgeon, Reconstruction
from convexprune.prune import prune
from convexprune.report.progress import Progress
from convexprune.solution import Attempt, Status
from convexprune.solvers import ADMM


@dataclass(frozen=True)
class Given:
    """Proposes the dense point times a factor, and says what it is told to say."""

    status: Status = Status.CONVERGED
    factor: float = 1.0

    def solve(self, problem, start=None):
        return Attempt(self.factor * problem.dense, None, self.status, 3)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))


@pytest.fixture
def batches():
    return list(torch.randn(3, 10, 6, generator=torch.Generator().manual_seed(1)))


def trim(layer):
    return NetTrim(layer, 0.1)


def free(layer):
    """A problem that every point satisfies."""
    return L1Reconstruction(layer, 0.1)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_the_dense_point_leaves_the_network_as_it_is(model, batches, mode):
    pruned, report = prune(model, batches, trim, Given(), mode)
    assert pruned is not model
    assert same(pruned, model)
    assert report.network.measured == 0
    assert report.kept_fraction == 1
    assert [row.name for row in report.rows] == ["0", "3", "5"]
    assert report.settings.mode == mode
    assert report.settings.samples == 30
    assert report.settings.dtype == "float32"


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_the_model_is_bit_for_bit_what_it_was(model, batches, mode):
    model.train()
    before = copy.deepcopy(model)
    pruned, _ = prune(model, batches, free, Given(factor=0.5), mode)
    assert same(model, before)
    assert not same(pruned, before)
    assert model.training
    assert pruned.training
    assert not any(module._forward_hooks for module in model.modules())


class Bomb:
    """A solver that fails at the second layer."""

    calls = 0

    def solve(self, problem, start=None):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("boom")
        return Attempt(torch.zeros(problem.shape), None, Status.CONVERGED, 1)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_a_solver_that_raises_leaves_the_model_alone(model, batches, mode):
    before = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="boom"):
        prune(model, batches, trim, Bomb(), mode)
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_certificates_are_of_the_weights_as_stored(model, batches, dtype):
    model = model.to(dtype)
    batches = [batch.to(dtype) for batch in batches]
    factor = 1 - 0.1 / 3  # no weight is a number of half precision any more
    build = lambda layer: NetTrim(layer, 1e-4, slack=-0.5)  # noqa: E731   not even the dense weights satisfy it
    pruned, report = prune(model, batches, build, Given(factor=factor), names=["0", "3"])
    for row, layer in zip(report.rows, capture(model, batches, ["0", "3"], keep_inputs=True), strict=True):
        problem, stored = build(layer), read(pruned, row.name)
        assert row.certificate == judge(problem, stored)
        assert row.error == float(problem.output_errors(stored).norm())
        proposed = judge(problem, factor * layer.affine_weight)
        assert row.certificate.violation != proposed.violation
        assert row.certificate.violation == pytest.approx(proposed.violation, abs=4 * torch.finfo(dtype).eps)


def test_rounding_alone_can_make_a_point_infeasible(model, batches):
    model, batches = model.half(), [batch.half() for batch in batches]
    nudge = 0.51 * 2**-10  # just over half a unit in the last place of the smallest mantissas, so all are rounded up

    (layer,) = capture(model, batches, ["0"], keep_inputs=True)
    proposed = (1 + nudge) * layer.affine_weight
    problem = NetTrim(layer, nudge * (1 + 1e-9), slack=layer.affine_inputs.double() @ proposed.T + 1e-12)
    assert problem.violation(proposed) == 0
    _, report = prune(model, batches, lambda _: problem, Given(factor=1 + nudge), names=["0"])
    assert report.rows[0].certificate.violation > 0


@pytest.mark.parametrize("status", [Status.INFEASIBLE, Status.NUMERICAL])
@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_an_unsolved_layer_is_left_as_it_was_and_says_so(model, batches, mode, status):
    pruned, report = prune(model, batches, trim, Given(status, 0.0), mode)
    assert same(pruned, model)
    assert report.kept_fraction == 1
    # that nothing is feasible is claimed here, not proven
    assert all(row.status is Status.NUMERICAL and row.left_dense for row in report.rows)
    assert report.network.measured == 0
    assert "left dense" in str(report)
    assert mode == "cascade" or report.network.guaranteed == 0


def test_a_point_that_is_not_finite_is_never_written(model, batches):
    pruned, report = prune(model, batches, trim, Given(factor=float("nan")))
    assert same(pruned, model)
    assert {row.status for row in report.rows} == {Status.NUMERICAL}


def test_a_worse_point_never_replaces_a_feasible_one(model, batches):
    pruned, report = prune(model, batches, trim, Given(Status.MAX_ITER, 0.5))
    assert same(pruned, model)
    for row in report.rows:
        assert row.left_dense
        assert row.certificate.violation <= 1e-6
        assert "the dense weights are feasible" in row.refusal
        assert row.stopped == "iteration limit: left dense"
    assert "left dense: 3: its point is off by" in str(report)
    assert report.network.guaranteed == report.network.measured == 0


def test_a_skipped_layer_has_a_row_without_a_certificate(model, batches):
    pruned, report = prune(model, batches, lambda layer: free(layer) if layer.name == "3" else None, Given(factor=0.0))
    assert [row.certificate is None for row in report.rows] == [True, False, True]
    assert torch.equal(pruned[0].weight, model[0].weight)
    assert not pruned[3].weight.any()
    assert report.kept == 6 * 8 + 4 * 3


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_names_choose_the_layers(model, batches, mode):
    pruned, report = prune(model, batches, free, Given(factor=0.0), mode, names=["3"])
    assert [row.name for row in report.rows] == ["3"]
    assert torch.equal(pruned[0].weight, model[0].weight)
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-6)


def test_cascade_layers_see_the_pruned_network_and_the_dense_targets(model, batches):
    seen = {}

    def build(layer):
        seen[layer.name] = layer
        return free(layer)

    prune(model, Calibration(batches, keep_inputs=True), build, Given(factor=0.5), "cascade")
    x = torch.cat(batches)
    half = model[0](x).div(2).relu()
    torch.testing.assert_close(seen["3"].inputs, half.detach())
    dense = model[3](model[0](x).relu())
    torch.testing.assert_close(seen["3"].targets, dense.detach(), check_dtype=False)


def test_a_generator_is_read_once_and_gives_the_same(model, batches):
    _, from_list = prune(model, batches, free, Given(factor=0.5), "cascade")
    _, from_generator = prune(model, (batch for batch in batches), free, Given(factor=0.5), "cascade")
    assert from_generator.network == from_list.network
    assert from_generator.settings == from_list.settings


def test_the_data_hash_tells_data_apart(model, batches):
    digests = set()
    for data in (batches, [batch + 1e-6 for batch in batches], batches[:2]):
        digests.add(prune(model, data, trim, Given())[1].settings.data)
    assert len(digests) == 3
    shuffled = torch.cat(batches)[torch.randperm(30)].split(15)
    assert prune(model, shuffled, trim, Given())[1].settings.data in digests


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_grouped_convolutions_are_judged_group_by_group(mode):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        x = torch.randn(5, 4, 4, 4)
    pruned, report = prune(model, [x], free, Given(factor=0.0), mode, names=["0[1]", "3"])
    assert [row.name for row in report.rows] == ["0[1]", "3"]
    assert pruned[0].weight[:3].all()
    assert not pruned[0].weight[3:].any()
    assert 0 < report.network.measured <= report.network.guaranteed * (1 + 1e-6)


def test_no_guarantee_through_what_is_not_covered():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x):
            return x * self.fc(x)

    _, report = prune(Product(), [torch.randn(8, 5)], lambda layer: L1Reconstruction(layer, 0.1), Given(factor=0.0))
    assert report.network.guaranteed is None
    assert report.network.reason.startswith("mul in the model (Product) is called with arguments that are not covered")
    assert report.network.measured > 0


def test_a_model_without_an_output_is_not_measured():
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 5)

        def forward(self, x):
            return {"made": self.fc(x).tolist()}

    _, report = prune(Silent(), [torch.randn(8, 5)], free, Given(factor=0.0))
    assert report.network.measured is None
    assert report.network.guaranteed is None
    assert "not measured" in str(report)


def test_a_mask_takes_the_guarantee_away(batches):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    tokens = [batch.reshape(2, 5, 6) for batch in batches]

    def mask(batch):
        return torch.ones(batch.shape[:2], dtype=torch.bool)

    _, report = prune(model, Calibration(tokens, mask=mask), free, Given(factor=0.0))
    assert report.network.guaranteed is None
    assert "mask" in report.network.reason


def test_an_activation_that_is_only_claimed_takes_the_guarantee_away(model, batches):
    _, report = prune(model, Calibration(batches, activations={"5": "relu"}), free, Given(factor=0.5))
    assert report.network.guaranteed is None
    assert "activations" in report.network.reason
    _, report = prune(model, Calibration(batches, activations={"3": None}), free, Given(factor=0.5))
    assert report.network.measured <= report.network.guaranteed


def test_a_run_is_logged_and_silent_unless_asked(model, batches, caplog, capfd):
    prune(model, batches, trim, Given())
    assert capfd.readouterr() == ("", "")
    with caplog.at_level("INFO", logger="convexprune"):
        prune(model, batches, trim, Given())
    assert {record.name for record in caplog.records} == {"convexprune"}
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("plan 0 of ")
    assert [line.split()[0] for line in lines[1:]] == ["solve"] * (len(lines) - 1)


def test_progress_counts_batches_and_layers(model, batches):
    events = []
    prune(model, batches, trim, Given(), "cascade", progress=events.append)
    assert [event for event in events if event.stage == "solve"] == [
        Progress("solve", name, done, 3) for done, name in enumerate(["0", "3", "5"])
    ]
    assert Progress("capture", "3", 3, 3) in events
    assert events[-1] == Progress("measure", None, 3, 3)


def test_a_bar_is_drawn_where_one_is_asked_for(model, batches, capfd, monkeypatch):
    pytest.importorskip("rich")
    prune(model, batches, trim, Given(), progress=True)
    assert capfd.readouterr() == ("", "")  # not a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, report = prune(model, batches, trim, Given(), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "left:" in err  # how far it has come is drawn ten times a second, and this run is over before
    assert report.kept == prune(model, batches, trim, Given())[1].kept
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=r"rich is not installed.*convexprune\[report\]"):
        prune(model, batches, trim, Given(), progress=True)
    with pytest.raises(TypeError, match="progress is 'yes'; give True for a bar"):
        prune(model, batches, trim, Given(), progress="yes")


def test_nothing_is_printed(model, batches, capfd):
    prune(model, batches, free, Given(factor=0.5), "cascade")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_wrong_calls(model, batches, mode):
    with pytest.raises(ValueError, match="mode is 'sideways'"):
        prune(model, batches, trim, Given(), "sideways")
    with pytest.raises(ValueError, match="nothing was pruned"):
        prune(model, batches, lambda layer: None, Given(), mode)
    with pytest.raises(ValueError, match="no batches"):
        prune(model, [], trim, Given(), mode)
    with pytest.raises(ValueError, match="nowhere"):
        prune(model, batches, trim, Given(), mode, names=["nowhere"])
    with pytest.raises(TypeError, match="not a problem"):
        prune(model, batches, lambda layer: "trim", Given(), mode)
    with pytest.raises(TypeError, match="the model is the class Linear"):
        prune(nn.Linear, batches, trim, Given(), mode)
    with pytest.raises(TypeError, match="build is Unstructured"):
        prune(model, batches, Unstructured(0.5), Given(), mode)
    with pytest.raises(TypeError, match="'admm' is not a solver"):
        prune(model, batches, trim, "admm", mode)
    with pytest.raises(TypeError, match=r"allocation is 0.2; give an Allocation"):
        prune(model, batches, mode=mode, allocation=0.2)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()  # these matrices are so small that threads only wait for one another
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["parallel", "cascade"])
def test_digits_pruned_by_admm(mode, one_thread):
    images = datasets.digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = datasets.train(datasets.lenet300(64, (20, 12)), images.x_train, images.y_train, epochs=30)
    x = images.x_train[:300]

    def build(layer):
        return NetTrim(layer, 0.05) if mode == "parallel" else NetTrim.cascade(layer, 0.05, 1.1)

    pruned, report = prune(model, [x[:200], x[200:]], build, ADMM(), mode)
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-6)
    assert report.kept_fraction < 0.6
    dense_error, error = (datasets.error_rate(m, images.x_test, images.y_test) for m in (model, pruned))
    assert error < dense_error + 0.1
    for row in report.rows:
        assert row.status is Status.CONVERGED, row.name
        assert row.certificate.violation <= 1e-6
        assert -1e-6 <= row.certificate.relative_gap <= 1e-4


def test_of_tied_layers_only_one_is_pruned(batches):
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    net = nn.Sequential(first, nn.ReLU(), second)
    with pytest.raises(ValueError, match="'0' and '2' are tied"):
        prune(net, batches, trim, ADMM(max_iter=10))
    pruned, _ = prune(net, batches, trim, ADMM(max_iter=10), names=["2"])
    assert pruned[0].weight is pruned[2].weight


@pytest.mark.parametrize("mode", ["parallel", "cascade", "residual"])
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (lambda layer: Reconstruction(layer, NM(2, 4)), r"layer '2': NM\(2, 4\) does not fit 3 input channels"),
        (
            lambda layer: Reconstruction(layer, Blocks((4, 4), 0.5)),
            r"layer '2': blocks of \(4, 4\) do not tile a layer",
        ),
        (lambda layer: Reconstruction(layer, PerRow(20)), "layer '4': keep is 20, but a neuron has only 8"),
        (lambda layer: Reconstruction(layer, Channels(4)), "layer '2': keep is 4, but the layer's channels"),
        (
            lambda layer: Reconstruction(layer, Support(torch.ones(4, 27) > 0)),
            r"layer '2': the support has shape \(4, 27\)",
        ),
        (
            lambda layer: Reconstruction(layer, PerRow(0.5), importance=torch.ones(4)),
            "layer '2': importance must be 8 finite numbers",
        ),
        (
            lambda layer: OptimalBrainSurgeon(layer, torch.ones(4, 27) > 0),
            r"layer '2': removed is torch.bool \(4, 27\); expected a boolean mask \(8, 27\)",
        ),
    ],
)
def test_what_does_not_fit_a_layer_is_said_before_any_work(recipe, words, mode):
    """The first convolution would be solved before the one of 3 x 3 x 3 = 27 inputs is asked for."""
    net = nn.Sequential(nn.Conv2d(4, 3, 1), nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    heard = []

    def build(layer):
        return Reconstruction(layer, PerRow(0.5)) if layer.name == "0" else recipe(layer)

    with pytest.raises(ValueError, match=words):
        prune(net, [torch.randn(20, 4, 3, 3)], build, mode=mode, progress=heard.append)
    assert [event for event in heard if event.stage == "solve"] == []
