"""Layer: the moments are those of the samples, and bad input is refused with a reason."""

import pytest
import torch
from instances import random_layer

from convexprune.layer import Layer
from convexprune.moments import InputMoments, TargetMoments
from convexprune.problems import NeuronMerging


def weight(out=3, inputs=5):
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(0))


def rows(samples=20, inputs=5):
    return torch.randn(samples, inputs, generator=torch.Generator().manual_seed(1))


def test_moments_are_the_means_over_the_samples():
    layer = random_layer()
    x = torch.cat([layer.inputs, torch.ones(len(layer.inputs), 1, dtype=torch.float64)], 1)
    y = x @ layer.affine_weight.T
    torch.testing.assert_close(layer.affine_gram, x.T @ x / len(x))
    torch.testing.assert_close(layer.affine_cross, y.T @ x / len(x))
    torch.testing.assert_close(layer.energies, y.square().mean(0))
    assert layer.energy == pytest.approx(float(y.square().sum(1).mean()))
    torch.testing.assert_close(layer.targets_or_dense, y)


def test_targets_replace_the_dense_outputs():
    targets = torch.randn(20, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layer = Layer.from_samples(weight(), rows(), torch.zeros(3), targets=targets)
    x = rows().double()
    torch.testing.assert_close(layer.cross, targets.T @ x / 20)
    torch.testing.assert_close(layer.energies, targets.square().mean(0))
    torch.testing.assert_close(layer.target_mean, targets.mean(0))
    torch.testing.assert_close(layer.targets_or_dense, targets)


@pytest.mark.parametrize("bias", [True, False])
def test_from_moments_equals_from_samples(bias):
    sampled = random_layer(bias=bias)
    given = Layer.from_moments(
        sampled.weight, sampled.gram, bias=sampled.bias, mean=sampled.mean, samples=sampled.samples, activation="relu"
    )
    explicit = Layer.from_moments(
        sampled.weight, sampled.gram, sampled.cross, sampled.energies, sampled.bias, mean=sampled.mean,
        target_mean=sampled.target_mean,
    )  # fmt: skip
    for layer in (given, explicit):
        torch.testing.assert_close(layer.affine_gram, sampled.affine_gram)
        torch.testing.assert_close(layer.affine_cross, sampled.affine_cross)
        torch.testing.assert_close(layer.energies, sampled.energies)


def test_energy_is_given_for_each_output_or_as_a_float_for_one():
    one = random_layer(out=1, bias=False)
    layer = Layer.from_moments(one.weight, one.gram, one.cross, one.energy)
    assert layer.energy == pytest.approx(one.energy)
    several = random_layer(bias=False)
    with pytest.raises(ValueError, match="energies has shape"):
        Layer.from_moments(several.weight, several.gram, several.cross, several.energy)
    with pytest.raises(ValueError, match="give `energy`"):
        Layer.from_moments(several.weight, several.gram, several.cross)


def test_sums_batch_by_batch_equal_all_at_once():
    whole = random_layer()
    read, aimed = InputMoments(whole.weight.shape[1]), TargetMoments(*whole.weight.shape)
    for part in (slice(0, 7), slice(7, 30), slice(30, None)):
        read.add(whole.inputs[part])
        aimed.add(whole.inputs[part], whole.targets_or_dense[part])
    layer = Layer.from_sums(whole.weight, read.finished(), whole.bias, aimed=aimed)
    torch.testing.assert_close(layer.affine_gram, whole.affine_gram)
    torch.testing.assert_close(layer.affine_cross, whole.affine_cross)


def test_damping_is_a_ridge_around_the_dense_weights():
    layer = random_layer(bias=False)
    damped = layer.damped(0.1)
    other = layer.weight + torch.randn(layer.weight.shape, dtype=torch.float64, generator=torch.Generator())

    def error(moments):
        return (((other @ moments.gram) * other).sum(1) - 2 * (moments.cross * other).sum(1) + moments.energies).sum()

    ridge = 0.1 * layer.gram.diagonal().mean()
    torch.testing.assert_close(error(damped), error(layer) + ridge * (other - layer.weight).square().sum())
    assert damped.inputs is None
    with pytest.raises(ValueError, match="damping fraction"):
        layer.damped(-0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_is_taken_and_computed_in_float64(dtype):
    layer = Layer.from_samples(weight().to(dtype), rows().to(dtype))
    assert layer.weight.dtype is layer.gram.dtype is torch.float64
    assert layer.inputs.dtype is dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "bias", "inputs", "targets"])
def test_non_finite_numbers_are_refused(where, value):
    arrays = {"weight": weight(), "bias": torch.zeros(3), "inputs": rows(), "targets": torch.zeros(20, 3)}
    arrays[where].view(-1)[0] = value
    with pytest.raises(ValueError, match="NaN or inf"):
        Layer.from_samples(**arrays)


@pytest.mark.parametrize("where", ["weight", "bias", "inputs"])
def test_integers_are_refused(where):
    arrays = {"weight": weight(), "bias": torch.zeros(3), "inputs": rows()}
    arrays[where] = arrays[where].to(torch.int32)
    with pytest.raises(TypeError, match="int32"):
        Layer.from_samples(**arrays)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": rows(20, 4)}, r"\(20, 4\)"),
        ({"inputs": rows()[:0]}, "no samples"),
        ({"inputs": rows()[0]}, "expected"),
        ({"bias": torch.zeros(4)}, r"\(4,\)"),
        ({"weight": torch.zeros(3)}, r"\(out, in\)"),
        ({"weight": torch.zeros(0, 5)}, "both > 0"),
        ({"targets": torch.zeros(19, 3)}, r"\(20, 3\)"),
        ({"activation": "gelu"}, "gelu"),
    ],
)
def test_wrong_shapes_are_named(change, reason):
    with pytest.raises(ValueError, match=reason):
        Layer.from_samples(**{"weight": weight(), "inputs": rows(), **change})


def test_moments_without_samples_say_so_when_samples_are_needed():
    layer = random_layer()
    moments = Layer.from_moments(layer.weight, layer.gram)
    with pytest.raises(ValueError, match="keep_inputs"):
        moments.affine_inputs  # noqa: B018
    with pytest.raises(ValueError, match="mean"):
        Layer.from_moments(layer.weight, layer.gram, bias=layer.bias)


@pytest.mark.parametrize(
    ("moments", "words"),
    [
        ({"gram": [[1.0, 0.5], [0.1, 1.0]]}, r"not symmetric: entry \(0, 1\) is 0.5 and entry \(1, 0\) is 0.1, .* 0.4"),
        ({"gram": [[1e8, 0.0], [0.01, 1e-8]]}, "gram is not symmetric"),
        ({"gram": [[0.0, 1.0], [0.0, 1.0]]}, "gram is not symmetric"),
        ({"gram": [[1.0, 2.0], [2.0, 1.0]]}, "gram holds 2 where the second moments allow no more than 1"),
        ({"gram": [[-1.0, 0.0], [0.0, 1.0]]}, "gram holds -1 where"),
        ({"mean": [5.0, 0.0]}, "mean holds 5 where the second moments allow no more than 1"),
        ({"cross": [[1.0, 0.0]], "energy": -1.0}, "energy holds -1; E.y.2. is not negative"),
        ({"cross": [[3.0, 0.0]], "energy": 4.0}, "cross holds 3 where the second moments allow no more than 2"),
        (
            {"cross": [[1.0, 0.0]], "energy": 4.0, "mean": [0.0, 0.0], "target_mean": [-3.0]},
            "target_mean holds -3 where",
        ),
        ({"samples": 0}, "samples is 0; it must be a whole number >= 1"),
    ],
)
def test_moments_that_no_data_has_are_refused(moments, words):
    given = {"gram": [[1.0, 0.0], [0.0, 1.0]], **moments}
    given = {key: value if isinstance(value, (int, float)) else torch.tensor(value) for key, value in given.items()}
    with pytest.raises(ValueError, match=words):
        Layer.from_moments(torch.ones(1, 2), name="fc", **given)
    if len(given) == 1 and given["gram"].min() >= 0:
        with pytest.raises(ValueError, match=words):
            NeuronMerging(torch.ones(3, 2), torch.ones(1, 3), keep=1, **given)


def test_an_asymmetry_of_rounding_is_averaged():
    x = torch.randn(2000, 5, generator=torch.Generator().manual_seed(3)) + 3
    gram = sum(block.T @ block for block in x.split(7)) / 2000
    gram[0, 1] *= 1 + 2e-6
    even = Layer.from_moments(torch.ones(1, 5), gram, mean=x.mean(0)).gram
    torch.testing.assert_close(even, (gram.double() + gram.double().T) / 2, rtol=1e-12, atol=0)
    assert bool((even == even.T).all())
