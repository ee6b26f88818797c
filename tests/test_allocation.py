"""Rate-distortion curves, and pruning to a budget for the whole network."""

import copy
import importlib
import json

import pytest
import torch
from torch import nn

import convexprune as cp
from convexprune.network import directions
from convexprune.report import Report

LEVELS = (0.1, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(inplace=True), nn.Flatten(),
            nn.Linear(96, 5),
        )  # fmt: skip


@pytest.fixture
def batches():
    return list(torch.randn(3, 8, 2, 6, 6, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("measure", [cp.OutputChange(), cp.OutputChange(worst=True), cp.SecondOrder(), cp.LayerError()])
def test_curves_fall_to_nothing_and_leave_the_model_alone(model, batches, measure):
    before = copy.deepcopy(model.state_dict())
    curves = cp.rate_distortion(model, batches, levels=LEVELS, measure=measure)
    assert [curve.name for curve in curves] == ["0", "2", "5"]
    for curve in curves:
        assert curve.kept.tolist() == [cp.Unstructured(level).quota(tuple(curve.weight.shape)) for level in LEVELS]
        assert curve.distortion[-1] == pytest.approx(0, abs=1e-9 * float(curve.distortion[0]))
        assert curve.distortion[0] > curve.distortion[-2]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_the_output_change_is_what_a_pruned_layer_does(model, batches):
    curves = cp.rate_distortion(model, batches, "5", levels=[0.3], measure=cp.OutputChange())
    (layer,) = cp.capture(model, batches, "5")
    x = cp.solve(cp.Reconstruction(layer, cp.Unstructured(0.3))).x
    # the last layer's own error is the network's
    assert float(curves[0].distortion[0]) == pytest.approx(
        cp.Reconstruction(layer, cp.Unstructured(0.3)).value(x), rel=1e-4
    )


def test_sensitivities_of_a_linear_network_are_the_squared_columns(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 7), nn.Linear(7, 4), nn.Linear(4, 3))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = cp.sensitivities(model, batches, probes=4000)
    behind = model[3].weight @ model[2].weight
    torch.testing.assert_close(found["1"], behind.square().sum(0).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(found["2"], model[3].weight.square().sum(0).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(found["3"], torch.ones(3, dtype=torch.float64), rtol=0.05, atol=0)
    again = cp.sensitivities(model, batches, probes=4000)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_a_cache_is_used_only_for_the_same_question(model, batches, tmp_path, monkeypatch):
    options = {"levels": LEVELS, "measure": cp.OutputChange(), "cache": tmp_path}
    first = cp.rate_distortion(model, batches, **options)
    calls = []
    distortion = importlib.import_module("convexprune.allocate.rate_distortion")
    real = distortion._curve
    monkeypatch.setattr(distortion, "_curve", lambda group, *rest: calls.append(group[0].name) or real(group, *rest))
    second = cp.rate_distortion(model, batches, **options)
    assert not calls
    assert all(torch.equal(a.distortion, b.distortion) for a, b in zip(first, second, strict=True))
    with torch.no_grad():
        model[5].weight[0, 0] += 1
    cp.rate_distortion(model, batches, **options)
    assert "5" in calls
    calls.clear()
    cp.rate_distortion(model, batches[:2], **options)
    assert calls == ["0", "2[0]", "5"]
    broken = next(tmp_path.glob("0-*.json"))
    broken.write_text(broken.read_text()[:20])
    calls.clear()
    cp.rate_distortion(model, batches[:2], **options)
    assert calls == ["0"]


@pytest.mark.parametrize("mode", ["parallel", "cascade", "residual"])
def test_a_budget_for_the_network_is_kept_and_reported(model, batches, mode, tmp_path):
    allocation = cp.Allocation(0.3, levels=LEVELS, measure=cp.OutputChange())
    pruned, report = cp.prune(model, batches, mode=mode, allocation=allocation)
    assert report.kept <= 0.3 * report.total
    shares = report.allocation
    kept = {name: sum(row.kept for row in report.rows if row.module == name) for name in shares.counts}
    assert kept == shares.counts
    assert shares.certificate.relative_gap < 1e-9
    assert shares.certificate.violation == 0
    difference = torch.cat([(pruned(x) - model(x)).detach() for x in batches]).double().square().sum(1).mean()
    assert report.distortion == pytest.approx(float(difference), rel=1e-4)
    assert "allocation:" in str(report)
    assert "of the prediction" in str(report)
    again = Report.from_json(report.to_json())
    assert again.allocation == shares
    assert json.loads(report.to_json())["allocation"]["budget"] == shares.budget
    report.save_html(tmp_path / "report.html")
    assert "Allocation" in (tmp_path / "report.html").read_text()


def test_prices_limits_and_ties(model, batches):
    price = cp.macs_per_weight(model, batches[0])
    assert price == {"0": 36, "2": 16, "5": 1}
    curves = cp.rate_distortion(model, batches, levels=LEVELS, measure=cp.LayerError())
    allocation = cp.Allocation(
        0.4, price=price, least={"5": 0.5}, most=0.9, tie={"0": "both", "2": "both"}, curves=curves
    )
    _pruned, report = cp.prune(model, batches, allocation=allocation)
    counts = report.allocation.counts
    spent = sum(price[name] * count for name, count in counts.items())
    top = sum(price[curve.name] * float(curve.between(0, 0.9).kept.max()) for curve in curves)
    assert report.allocation.cost == pytest.approx(spent)
    assert spent <= 0.4 * top
    assert counts["5"] >= 0.5 * 480
    assert counts["0"] / 108 == pytest.approx(counts["2"] / 162, abs=0.5 / 108 + 0.5 / 162)  # one level, rounded
    with pytest.raises(ValueError, match="price names 'fc9'"):
        cp.prune(model, batches, allocation=cp.Allocation(0.4, price={"fc9": 1.0}, curves=curves))


def test_random_inputs_take_the_place_of_data(model):
    inputs = cp.random_inputs((2, 6, 6), samples=10, batch=4)
    assert [len(batch) for batch in inputs] == [4, 4, 2]
    _, report = cp.prune(model, inputs, allocation=cp.Allocation(0.5, levels=LEVELS))
    assert report.kept <= 0.5 * report.total


def test_build_gets_the_count(model, batches):
    asked = {}

    def build(layer, kept):
        asked[layer.name] = kept
        return cp.Reconstruction(layer, cp.Unstructured(kept))

    allocation = cp.Allocation(300, levels=LEVELS, measure=cp.LayerError(), solver=cp.Uniform())
    _, report = cp.prune(model, batches, build, cp.Magnitude(), allocation=allocation)
    counts = report.allocation.counts
    shared = {"2[0]": -(-counts["2"] // 2), "2[1]": counts.pop("2") // 2}  # what each group may keep of the module's
    assert asked == counts | shared
    assert sum(asked.values()) <= 300


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, b: cp.Allocation(0.0), ValueError, "budget is 0.0"),
        (lambda m, b: cp.Allocation(1.5), ValueError, "budget is 1.5"),
        (lambda m, b: cp.Allocation("20%"), ValueError, "budget is '20%'"),
        (lambda m, b: cp.prune(m, b), TypeError, "give a `build`"),
        (lambda m, b: cp.prune(m, b, allocation=cp.Allocation(1, levels=LEVELS)), ValueError, "cheapest choice costs"),
        (lambda m, b: cp.rate_distortion(m, b, levels=[0.0]), ValueError, "got 0.0"),
        (lambda m, b: cp.rate_distortion(m, b, levels=[]), ValueError, "got none"),
        (lambda m, b: cp.sensitivities(m, b, probes=0), ValueError, "probes is 0"),
        (lambda m, b: cp.sensitivities(m, []), ValueError, "no batches"),
    ],
)
def test_bad_input_is_named(model, batches, make, error, message):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        make(model, batches)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


def test_the_second_order_estimate_is_exact_for_a_linear_network_on_average(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 7), nn.Linear(7, 3))
    data = [batch.repeat(40, 1, 1, 1) for batch in batches]
    curves = {
        measure: cp.rate_distortion(model, data, "1", levels=[0.1, 0.3], measure=measure, damping=1e-3)[0].distortion
        for measure in (cp.OutputChange(), cp.SecondOrder(directions=960))
    }
    exact, estimate = curves.values()
    torch.testing.assert_close(estimate, exact, rtol=0.2, atol=0)


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_directions_take_every_form_of_batch(model, batches, form):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, scale=1.0):
            return self.inner(x) * scale

    wrapped = {"tensor": lambda x: x, "tuple": lambda x: (x, 0), "dict": lambda x: {"x": x, "scale": 1.0}}[form]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = directions(Named(), [wrapped(batch) for batch in batches], count=8)
    plain = directions(Named(), batches, count=8)
    assert set(found) == {"inner.0", "inner.2[0]", "inner.2[1]", "inner.5"}
    assert all(torch.equal(found[name], plain[name]) for name in found)
    assert found["inner.5"].shape == (9, 5, 97)  # three parts of each batch
    assert not any(parameter.requires_grad for parameter in model.parameters())
