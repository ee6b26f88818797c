"""Calibration data: gone through again and again, hashed in no order, and checked for being the same."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import convexprune as cp
from convexprune.network.calibration import Calibration, digests


def x(seed=0, samples=30):
    return torch.randn(samples, 6, generator=torch.Generator().manual_seed(seed))


def half(layer):
    return cp.Reconstruction(layer, cp.Unstructured(0.5))


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))


class Drawn:
    """Other noise at each pass, as augmentation makes."""

    def __init__(self, length=3, same=False):
        self.length, self.same, self.generator = length, same, torch.Generator().manual_seed(7)

    def __iter__(self):
        if self.same:
            self.generator.manual_seed(7)
        for _ in range(self.length):
            yield torch.randn(10, 6, generator=self.generator)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(x())


def test_the_order_and_the_batch_size_do_not_matter():
    one = Calibration([x()]).fingerprint
    assert one.samples == 30
    assert Calibration(x()[torch.randperm(30)].split(7)).fingerprint == one
    assert Calibration([(batch, torch.zeros(len(batch))) for batch in x().split(4)]).fingerprint == one
    assert Calibration(DataLoader(TensorDataset(x()), batch_size=4, shuffle=True)).fingerprint == one


@pytest.mark.parametrize(
    "other",
    [
        x(1),
        x()[:29],
        torch.cat([x(), x()[:1]]),
        torch.cat([x()[:28], x()[:1], x()[:1]]),  # a sample twice in place of another
        x() + 1e-6,
        x().roll(1, 1),
    ],
)
def test_other_samples_have_another_fingerprint(other):
    assert Calibration([other]).fingerprint != Calibration([x()]).fingerprint


def test_dicts_are_hashed_by_key_and_zeros_have_one_sign():
    batch = {"b": torch.tensor([[0.0], [1.0]]), "a": torch.ones(2, 3)}
    turned = {"a": torch.ones(2, 3, dtype=torch.float64), "b": torch.tensor([[-0.0], [1.0]])}
    assert list(digests(batch)) == list(digests(turned))
    assert list(digests(batch)) != list(digests({"a": batch["b"], "b": batch["a"]}))


def test_tensors_that_share_no_axis_of_samples_are_hashed_together():
    batch = {"x": torch.ones(4, 3), "positions": torch.arange(3)}
    assert Calibration([batch]).fingerprint.samples == 4
    assert Calibration([batch]).fingerprint != Calibration([{**batch, "positions": torch.arange(3) + 1}]).fingerprint


def test_the_length_is_known_or_said_to_be_unknown():
    assert len(Calibration(x().split(10))) == 3
    assert Calibration(iter(x().split(10))).length == 3
    for unknown in (Drawn(), DataLoader(Endless(), batch_size=7)):
        calibration = Calibration(unknown)
        assert calibration.length is None
        with pytest.raises(TypeError, match="does not say how many"):
            len(calibration)


def test_an_iterator_can_be_gone_through_again():
    calibration = Calibration(iter(x().split(10)))
    assert len(list(calibration)) == len(list(calibration)) == 3
    assert calibration.passes == 2
    assert calibration.unsteady == ""


def test_a_pass_that_ends_early_is_not_compared():
    calibration = Calibration(Drawn())
    calibration.first  # noqa: B018
    next(iter(calibration))
    assert calibration.passes == 0
    list(calibration)
    assert calibration.unsteady == ""
    list(calibration)
    assert "two passes over the batches gave other samples (30 in each)" in calibration.unsteady


def test_names_given_beside_share_the_passes():
    calibration = Calibration(Drawn(), names="0")
    assert Calibration.of(calibration) is calibration
    other = Calibration.of(calibration, ["2", "4"])
    assert other.names == ["2", "4"]
    list(calibration), list(other)
    assert calibration.unsteady


@pytest.mark.parametrize("mode", ["parallel", "cascade", "residual"])
def test_no_guarantee_over_samples_that_change(model, mode):
    _, report = cp.prune(model, Drawn(), half, mode=mode)
    assert report.network.guaranteed is None
    assert "two passes over the batches gave other samples" in report.network.reason
    _, report = cp.prune(model, Drawn(same=True), half, mode=mode)
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-6)


@pytest.mark.parametrize("mode", ["parallel", "cascade", "residual"])
def test_shuffling_alone_keeps_the_guarantee(model, mode):
    loader = DataLoader(TensorDataset(x()), batch_size=10, shuffle=True)
    _, report = cp.prune(model, loader, half, mode=mode)
    assert report.network.measured <= report.network.guaranteed * (1 + 1e-6)


def test_samples_drawn_with_replacement_are_seen(model):
    draw = np.random.default_rng(0)

    class Sampled:
        def __iter__(self):
            yield x()[draw.integers(30, size=30)]

    _, report = cp.prune(model, Sampled(), half, mode="cascade")
    assert "other samples" in report.network.reason


def test_a_pass_of_another_length_is_seen():
    class Shrinking:
        left = 4

        def __iter__(self):
            self.left -= 1
            yield from x().split(10)[: self.left]

    calibration = Calibration(Shrinking())
    list(calibration), list(calibration)
    assert "gave 30 samples and another 20" in calibration.unsteady


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Calibration(x()), TypeError, "batches is a Tensor"),
        (lambda: Calibration({"x": x()}), TypeError, "batches is a dict"),
        (lambda: Calibration(None), TypeError, "batches is a NoneType"),
        (lambda: Calibration(3), TypeError, "batches is a int"),
        (lambda: Calibration(TensorDataset(x())), TypeError, "a TensorDataset holds samples"),
        (lambda: Calibration([x()], mask="tokens"), TypeError, "mask is 'tokens'"),
        (lambda: Calibration([x()], positions=0), ValueError, "positions is 0"),
        (lambda: Calibration([x()], positions=1.5), TypeError, r"positions is 1\.5"),
        (lambda: Calibration([x()], positions=True), TypeError, "positions is True"),
        (lambda: Calibration([x()], seed="7"), TypeError, "seed is '7'"),
        (lambda: Calibration([x()], seed=None), TypeError, "seed is None"),
        (lambda: Calibration([x()], names=3), TypeError, "names is 3"),
        (lambda: Calibration([x()], names=[1]), TypeError, r"names is \[1\]"),
        (lambda: Calibration([x()], activations=["relu"]), TypeError, "activations is "),
        (lambda: Calibration([x()], keep_inputs="yes"), TypeError, "keep_inputs is 'yes'"),
        (lambda: list(Calibration([])), ValueError, "no batches"),
    ],
)
def test_wrong_calls(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_regular_expression_names_layers():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    layers = cp.capture(model, [x()[:, :3]], names="re:[02]")
    assert [layer.name for layer in layers] == ["0", "2"]
    for wrong, words in (("re:(", "no regular expression"), ("re:fc.*", "pattern matches no")):
        with pytest.raises(ValueError, match=words):
            cp.capture(model, [x()[:, :3]], names=wrong)
