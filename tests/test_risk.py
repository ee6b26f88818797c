"""A risk on data not seen: the losses, the samples that are refused, and the rate at which a path goes too far."""

import copy
import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.certify.held_out_risk import HeldOut, bounded
from convexprune.forms import PerspectiveProblem
from convexprune.report import Report
from convexprune.solution import Attempt
from convexprune.solvers.warm_start import WarmStart

PATH = (0.9, 0.7, 0.5, 0.3)
SHARE = lambda layer, kept: cp.Reconstruction(layer, cp.Unstructured(kept))  # noqa: E731


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
    return model, [torch.randn(60, 8), torch.randn(40, 8)], torch.randn(1500, 8)


def test_the_last_certified_network_of_the_path_is_returned():
    model, used, held_out = network()
    before = copy.deepcopy(model.state_dict())
    goal = cp.RiskGoal(cp.PredictionChanged(), 0.1, [*held_out.split(400)], PATH)
    pruned, report = cp.prune_within(model, used, goal, SHARE)
    path = report.path
    best = path.certified
    changed = (model(held_out).argmax(1) != pruned(held_out).argmax(1)).double().mean()
    assert best.measured == pytest.approx(float(changed))
    assert best.measured < best.bound <= 0.1 < path.levels[-1].bound
    assert [level.certified for level in path.levels] == [True] * (len(path.levels) - 1) + [False]
    assert (best.kept, best.total) == (report.kept, report.total)
    assert path.samples == 1500
    fresh = torch.randn(20_000, 8)
    assert (model(fresh).argmax(1) != pruned(fresh).argmax(1)).double().mean() <= 0.1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert "at most 10.0% with confidence 0.99" in str(report)


def test_a_larger_risk_keeps_fewer_weights_and_an_allocation_works_too():
    model, used, held_out = network(1)
    curves = cp.Allocation(0.5, measure=cp.LayerError())
    kept = []
    for level in (0.05, 0.2):
        goal = cp.RiskGoal(cp.PredictionChanged(), level, [held_out], PATH, allocation=curves)
        report = cp.prune_within(model, used, goal)[1]
        assert report.allocation is not None
        assert report.kept <= report.path.certified.setting * report.total
        kept.append(report.kept)
    assert kept[1] < kept[0]


@pytest.mark.parametrize("mode", ["json", "html"])
def test_the_report_holds_the_path(mode):
    model, used, held_out = network()
    goal = cp.RiskGoal(cp.OutputError(clip=5.0), 0.5, [held_out], PATH)
    report = cp.prune_within(model, used, goal, SHARE)[1]
    if mode == "json":
        assert Report.from_json(report.to_json()).path == report.path
    else:
        from convexprune.report.html import page

        assert "Risk on data not seen" in page(report)


@dataclass
class Planted:
    """The k-th network of the path loses 1 with the k-th probability, whatever it does."""

    chances: tuple[float, ...]
    low: float = 0.0
    high: float = 1.0
    zero_one: bool = True
    name: str = "planted"
    asked: list = field(default_factory=list)

    def losses(self, dense, pruned, batch):
        chance = self.chances[len(self.asked)]
        self.asked.append(chance)
        return (batch[:, 0].double() < chance).double()


def test_the_rate_of_false_certificates_along_a_path():
    """Risks that rise and fall: any network above the level that is passed counts, also where a later one is better."""
    model = nn.Sequential(nn.Linear(2, 3))
    torch.manual_seed(0)
    used, wrong, repetitions, delta = [torch.randn(10, 2)], 0, 80, 0.2
    chances = (0.02, 0.1, 0.12, 0.03, 0.11)
    for _ in range(repetitions):
        risk = Planted(chances)
        goal = cp.RiskGoal(risk, 0.1, [torch.rand(100, 2)], (6, 5, 4, 3, 2), confidence=1 - delta)
        try:
            report = cp.prune_within(model, used, goal, SHARE, cp.Magnitude())[1]
        except ValueError:
            continue
        passed = report.path.levels if report.path.levels[-1].certified else report.path.levels[:-1]
        wrong += any(chance >= 0.1 for chance, _ in zip(chances, passed, strict=False))
        assert len(risk.asked) == len(report.path.levels)
    assert wrong <= repetitions * delta + 3 * math.sqrt(repetitions * delta * (1 - delta))
    assert wrong > 0  # the level that is exactly as risky as allowed does pass at times


def test_the_losses():
    dense, pruned = (
        torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]),
        torch.tensor([[1.0, 2.0], [0.0, 1.0], [0.0, 1.0]]),
    )
    assert cp.PredictionChanged().losses(dense, pruned, None).tolist() == [1, 0, 1]
    batch = (torch.zeros(3, 1), torch.tensor([1, 1, 0]))
    assert cp.AccuracyLost().losses(dense, pruned, batch).tolist() == [-1, 0, 1]
    assert cp.AccuracyLost(labels=lambda b: b["y"]).losses(dense, pruned, {"y": batch[1]}).tolist() == [-1, 0, 1]
    assert cp.OutputError(clip=5.0).losses(dense, pruned, None).tolist() == [2, 0, 5]
    divergence = cp.OutputDivergence(clip=1.0).losses(dense, pruned, None)
    p, q = dense.double().softmax(1), pruned.double().softmax(1)
    torch.testing.assert_close(divergence, (p * (p / q).log()).sum(1).clamp(max=1))


def test_the_losses_of_sequences():
    torch.manual_seed(0)
    dense, pruned, tokens = torch.randn(2, 4, 5), torch.randn(2, 4, 5), torch.randint(5, (2, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask}
    different = (dense.argmax(-1) != pruned.argmax(-1)).double()
    expected = [float(different[0].mean()), float(different[1, :2].mean())]
    assert cp.TokensChanged().losses(dense, pruned, batch).tolist() == pytest.approx(expected)
    every = cp.TokensChanged(mask=lambda b: torch.ones(2, 4)).losses(dense, pruned, batch)
    torch.testing.assert_close(every, different.mean(1))

    def loss(outputs, row, places):
        return nn.functional.cross_entropy(outputs[row, : places - 1].double(), tokens[row, 1:places])

    expected = [float(loss(pruned, row, places) - loss(dense, row, places)) for row, places in ((0, 4), (1, 2))]
    found = cp.ExcessLogLoss(clip=10.0).losses(dense, pruned, batch)
    assert found.tolist() == pytest.approx(expected)
    cut = cp.ExcessLogLoss(clip=0.1).losses(dense, pruned, tokens)
    assert cut.abs().max() <= 0.1
    assert cp.OutputDivergence(clip=9.0).losses(dense, pruned, batch).shape == (2,)


class Tiny(nn.Module):
    """A language model that answers as Hugging Face's do: a mapping of several outputs."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)

    def forward(self, input_ids, attention_mask=None):
        hidden = torch.tanh(self.proj(self.embed(input_ids)))
        return OrderedDict(logits=self.head(hidden), hidden=hidden)


@pytest.mark.parametrize("risk", [cp.TokensChanged(), cp.ExcessLogLoss(clip=1.0), cp.PredictionChanged("tokens")])
def test_a_language_model_with_several_outputs(risk):
    torch.manual_seed(0)
    model, draw = Tiny(), lambda n: {"input_ids": torch.randint(11, (n, 12)), "attention_mask": torch.ones(n, 12)}
    used, held_out = [draw(20)], [draw(300), draw(200)]
    level = 0.3 if risk != cp.PredictionChanged("tokens") else 0.99
    goal = cp.RiskGoal(risk, level, held_out, (0.95, 0.8, 0.6), output="logits")
    report = cp.prune_within(model, used, goal, SHARE, names="proj")[1]
    assert report.path.certified.bound <= level
    unnamed = cp.RiskGoal(risk, level, held_out, (0.95, 0.8, 0.6))  # "logits" is the rule
    assert cp.prune_within(model, used, unnamed, SHARE, names="proj")[1].path == report.path
    with pytest.raises(ValueError, match="its keys are 'logits', 'hidden'"):
        cp.prune_within(model, used, cp.RiskGoal(risk, level, held_out, PATH, output="words"), SHARE, names="proj")


@pytest.mark.parametrize(
    "hide",
    [
        lambda x: torch.cat([torch.randn(3, 8), x[5:6]]),
        lambda x: x.double(),
        lambda x: (x, torch.zeros(len(x))),
        lambda x: {"input": x, "labels": torch.arange(len(x))},
        lambda x: {"input": x[:, :5], "attention_mask": torch.ones(len(x), 5)},
        lambda x: {"attention_mask": torch.ones(len(x), 8).index_fill(1, torch.arange(5, 8), 0), "input": x},
    ],
)
def test_a_used_sample_is_refused_however_it_is_wrapped(hide):
    x = torch.randn(10, 8)
    used = {"input": x, "attention_mask": torch.cat([torch.ones(10, 5), torch.zeros(10, 3)], 1)}
    plain = isinstance(hide(x), dict) and "labels" not in hide(x)
    with pytest.raises(ValueError, match="of held-out batch 1 was used to prune"):
        HeldOut([torch.randn(4, 8), hide(x)], [used if plain else x], None)


def test_the_curves_samples_are_used_too():
    model, used, held_out = network()
    curves = cp.Allocation(0.5, measure=cp.LayerError(), batches=iter([held_out[:50]]))
    goal = cp.RiskGoal(cp.PredictionChanged(), 0.1, [held_out], PATH, allocation=curves)
    with pytest.raises(ValueError, match="sample 0 of held-out batch 0 was used"):
        cp.prune_within(model, used, goal)


class Redrawn:
    """Batches that are drawn anew at each pass."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter([torch.randn(self.count, 8)])


@pytest.mark.parametrize("which", ["used", "held out"])
def test_samples_that_change_from_pass_to_pass_are_refused(which):
    model, used, held_out = network()
    used, held_out = (Redrawn(50), [held_out]) if which == "used" else (used, Redrawn(900))
    with pytest.raises(ValueError, match="two passes over the batches gave other samples"):
        cp.prune_within(model, used, cp.RiskGoal(cp.PredictionChanged(), 0.2, held_out, PATH), SHARE)


def test_too_few_samples_and_a_path_that_begins_too_late_say_so():
    model, used, held_out = network()
    few = cp.RiskGoal(cp.PredictionChanged(), 0.01, [held_out[:400]], PATH)
    with pytest.raises(ValueError, match="400 held-out samples can certify nothing"):
        cp.prune_within(model, used, few, SHARE)
    late = cp.RiskGoal(cp.PredictionChanged(), 0.01, [held_out], (0.05, 0.02))
    with pytest.raises(ValueError, match=r"the first level of the path, 0.05, is not certified"):
        cp.prune_within(model, used, late, SHARE)


def test_a_path_that_is_certified_to_its_end_says_so():
    model, used, held_out = network()
    report = cp.prune_within(model, used, cp.RiskGoal(cp.PredictionChanged(), 0.9, [held_out], PATH), SHARE)[1]
    assert len(report.path.levels) == len(PATH)
    assert "all 4 levels of the path are certified" in str(report)


def test_a_bound_in_the_unit_of_the_loss():
    torch.manual_seed(0)
    risk = cp.ExcessLogLoss(clip=2.0)
    losses = (0.1 * torch.randn(2000, dtype=torch.float64)).clamp(-2, 2)
    found = bounded(losses, risk, 0.99, 0.05, cp.bounds.Betting())
    assert float(losses.mean()) < found < 0.03
    rough = bounded(losses, risk, 0.99, 0.05, cp.bounds.Hoeffding())
    assert rough == pytest.approx(float(losses.mean()) + 4 * math.sqrt(math.log(100) / 4000))


def test_a_statement_has_its_hypotheses():
    model, used, held_out = network()
    held, risk = HeldOut([held_out], used, None), cp.PredictionChanged()
    statement = held.statement(held.losses(model, model, risk), risk, 0.99, 0.01)
    assert statement.applies
    assert statement.measured == 0
    assert statement.guaranteed == cp.bounds.clopper_pearson(0, 1500, 0.99)
    assert any("independent draws" in each.text for each in statement.hypotheses)


@dataclass(frozen=True)
class Noting:
    """Keeps the starts that it is given."""

    starts_seen: list = field(default_factory=list)

    def solve(self, problem, start=None):
        self.starts_seen.append(start)
        return Attempt(problem.dense * 0.5, None, cp.Status.CONVERGED, 1)


def test_warm_starts_go_from_level_to_level_layer_by_layer():
    model, used, held_out = network()
    solver = Noting()
    goal = cp.RiskGoal(cp.PredictionChanged(), 0.9, [held_out], (0.9, 0.7))
    cp.prune_within(model, used, goal, lambda layer, number: cp.L1Reconstruction(layer, number), solver)
    first, second = solver.starts_seen[:2], solver.starts_seen[2:]
    assert first == [None, None]
    assert [tuple(start.shape) for start in second] == [(20, 9), (4, 21)]
    assert WarmStart.of(cp.Magnitude()) == cp.Magnitude()  # which cannot begin from a start


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"risk": "changes"}, TypeError, "risk is 'changes'"),
        ({"risk": cp.PredictionChanged}, TypeError, "risk is <class"),
        ({"level": 0.0}, ValueError, "level is 0.0"),
        ({"level": 1.0}, ValueError, "level is 1.0"),
        ({"confidence": 1.0}, ValueError, "confidence is 1.0"),
        ({"held_out": torch.rand(5, 2)}, TypeError, "batches is a Tensor"),
        ({"path": ()}, ValueError, "path is empty"),
        ({"path": 0.5}, TypeError, "path is 0.5"),
        ({"path": (0.5, "x")}, TypeError, r"path\[1\] is 'x'"),
        ({"path": (2.0,), "allocation": cp.Allocation(0.5)}, ValueError, r"path\[0\] is 2.0"),
        ({"allocation": 0.5}, TypeError, "allocation is 0.5"),
        ({"output": 1.5}, TypeError, "output is 1.5"),
        ({"bound": cp.bounds.Binomial(), "risk": cp.TokensChanged()}, ValueError, "bound is Binomial"),
        ({"bound": "betting"}, TypeError, "bound is 'betting'"),
    ],
)
def test_wrong_goals(fields, error, message):
    good = {"risk": cp.PredictionChanged(), "level": 0.1, "held_out": [torch.rand(5, 2)], "path": (0.5,)}
    with pytest.raises(error, match=message):
        cp.RiskGoal(**{**good, **fields})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cp.OutputError(clip=0.0), "clip is 0.0"),
        (lambda: cp.AccuracyLost().losses(torch.eye(2), torch.eye(2), torch.eye(2)), "the batches have no labels"),
        (lambda: cp.AccuracyLost().losses(torch.eye(2), torch.eye(2), (0, torch.zeros(3))), r"labels are \(3,\)"),
        (
            lambda: cp.ExcessLogLoss(1.0).losses(torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.zeros(2, 2)),
            "tokens are",
        ),
        (
            lambda: cp.TokensChanged(lambda b: torch.ones(2)).losses(torch.rand(2, 3, 4), torch.rand(2, 3, 4), None),
            "the mask is",
        ),
    ],
)
def test_losses_that_cannot_be_computed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@dataclass(frozen=True)
class Halved:
    """Proposes half of the dense weights, whatever the problem allows."""

    def solve(self, problem, start=None):
        return Attempt(problem.dense * 0.5, None, cp.Status.CONVERGED, 1)


class Grouped(nn.Module):
    """A convolution of two groups, a layer for which no problem is stated, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.middle, self.head = nn.Conv2d(4, 6, 3, groups=2), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.middle(torch.relu(self.conv(x)).amax((2, 3)))))


@pytest.mark.parametrize(
    ("build", "solver", "path"),
    [
        (SHARE, cp.Magnitude(), (0.9, 0.8)),
        (SHARE, cp.Balanced(), (0.9, 0.8)),
        (SHARE, None, (0.9, 0.8)),
        (cp.NetTrim, Halved(), (0.01, 0.02)),  # its points are refused: the layers stay dense
        (lambda layer, kept: None if layer.name == "middle" else SHARE(layer, kept), cp.Fast(), (0.9, 0.8)),
    ],
)
def test_the_report_of_a_level_is_the_one_that_prune_makes(build, solver, path):
    torch.manual_seed(0)
    model, draw = Grouped(), lambda n: torch.randn(n, 4, 5, 5)
    used, held_out = [draw(40)], [draw(300)]
    goal = cp.RiskGoal(cp.PredictionChanged(), 0.99, held_out, path)
    pruned, report = cp.prune_within(model, used, goal, build, solver)
    alone, expected = cp.prune(model, used, lambda layer: build(layer, path[-1]), solver)
    for key, value in pruned.state_dict().items():
        assert torch.equal(value, alone.state_dict()[key]), key
    for row, other in zip(report.rows, expected.rows, strict=True):
        assert (row.name, row.kept, row.certificate, row.error) == (
            other.name, other.kept, other.certificate, other.error
        )  # fmt: skip
        assert (row.refusal, row.status) == (other.refusal, other.status)
    assert report.network.guaranteed == expected.network.guaranteed
    level = report.path.certified
    assert (level.kept, level.total) == (report.kept, report.total)
    before = {id(each) for each in model.parameters()}
    assert before.isdisjoint(id(each) for each in pruned.parameters())


@dataclass(frozen=True, eq=False)
class Counted(cp.Reconstruction, PerspectiveProblem):
    """Notes for which number of weights a bound was asked."""

    asked: list = field(default_factory=list)

    def lower_bound(self, witness):
        self.asked.append(self.pattern.keep)
        return super().lower_bound(witness)


def test_only_the_level_that_is_returned_is_certified():
    model, used, held_out = network()
    asked = []
    goal = cp.RiskGoal(cp.PredictionChanged(), 0.1, [held_out], PATH)
    build = lambda layer, kept: Counted(layer, cp.Unstructured(kept), asked=asked)  # noqa: E731
    path = cp.prune_within(model, used, goal, build, cp.Magnitude())[1].path
    assert len(path.levels) > 1
    assert set(asked) == {path.certified.setting}


@pytest.mark.parametrize("silent", [(3, 5), (7,)])
def test_a_recipe_that_changes_its_mind_is_refused(silent):
    """It is asked of two outlines and two layers, and of both again for the report."""
    model, used, held_out = network()
    calls = itertools.count()
    build = lambda layer, kept: None if next(calls) in silent else SHARE(layer, kept)  # noqa: E731
    goal = cp.RiskGoal(cp.PredictionChanged(), 0.99, [held_out], (0.5,))
    with pytest.raises(ValueError, match="'2': `build` stated another problem when it was asked again"):
        cp.prune_within(model, used, goal, build, cp.Magnitude())
