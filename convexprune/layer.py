"""A layer as a problem sees it: its weights and the moments of what it reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from convexprune.moments import CrossMoments, InputMoments, Moments, TargetMoments, affine, check_moments
from convexprune.options import number, numbers, optional, text, whole
from convexprune.products import spans
from convexprune.quadratic import Quadratic, Residual
from convexprune.rounding import gamma, raised

ACTIVATIONS: Final = ("relu", None)


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear map y = W x + b of a network, with the moments of its inputs over a calibration set.

    Everything is float64 on the CPU except `inputs`, which keep the dtype they were given. `y` is the *dense*
    network's pre-activation; `x` is what this layer reads now (in a cascade, from the network pruned so far).

    A bias is one more input that is always 1. The `affine_*` views have it as their last column, P = in + 1; for a
    layer without bias they are the plain arrays and P = in. Every problem is stated in these views.

    Make one by `capture`, `Layer.from_samples` or `Layer.from_moments`; the constructor takes moments that are summed.

    Raises:
        ValueError: For shapes that do not fit, numbers that are not finite, and an unknown activation.
        TypeError: For weights that are no floating-point tensor.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.tensor([[1.0, -2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> layer.gram.tolist(), layer.energy
        ([[0.5, 0.0], [0.0, 0.5]], 2.5)
    """

    name: str
    weight: Tensor  # (out, in)   a convolution as a matrix: in = in_channels / groups * kernel size
    bias: Tensor | None  # (out,)
    read: Moments  # of x, about the mean; layers that read the same tensor share one
    aimed: CrossMoments | None = None  # of y, with x; None where y = W x + b
    activation: str | None = None  # what follows the layer: "relu", or None
    inputs: Tensor | None = field(default=None, repr=False)  # (samples, in)   kept only when asked for
    targets: Tensor | None = field(default=None, repr=False)  # (samples, out)  y; None where y = W x + b
    kernel: int = 1  # kernel positions: inputs i, i + kernel, ... are one position of consecutive channels
    repairs: bool = False  # True if the targets also compensate the error of the other residual branch
    damping: float = 0.0  # the ridge that is in the moments, as a fraction of the mean diagonal of the Gram matrix
    module: str = None  # type: ignore[assignment]  # the name of the module that it is in; the layer's unless given
    group: int = 0  # which of the module's `groups` it is
    groups: int = 1

    def __post_init__(self) -> None:
        if self.module is None:
            object.__setattr__(self, "module", self.name)
        if not 0 <= self.group < self.groups:
            raise ValueError(f"layer {self.name!r}: group is {self.group}, of {self.groups} groups")
        _check_weight(self.name, self.weight, self.bias)
        out, width = self.weight.shape
        expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
            "gram": (self.read.covariance, (width, width)), "mean": (self.read.mean, (width,)),
            "inputs": (self.inputs, (self.samples, width)), "targets": (self.targets, (self.samples, out)),
        }  # fmt: skip
        if self.aimed is not None:
            expected |= {
                "cross": (self.aimed.covariance, (out, width)), "energies": (self.aimed.variance, (out,)),
                "target_mean": (self.aimed.mean, (out,)),
            }  # fmt: skip
        for key, (value, shape) in expected.items():
            _check_array(self.name, key, value, shape)
        if self.bias is not None and (self.read.mean is None or (self.aimed is not None and self.aimed.mean is None)):
            raise ValueError(f"layer {self.name!r} has a bias: its moments need `mean` and `target_mean` too")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"layer {self.name!r}: activation {self.activation!r} is not one of {ACTIVATIONS}")

    def __repr__(self) -> str:
        """The fields that differ from their defaults, tensors by their shape."""
        shown = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "read":
                shown.append(f"samples={self.samples}")
            elif value is not entry.default:
                shown.append(f"{entry.name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)}")
        return f"Layer({', '.join(shown)})"

    @classmethod
    def from_samples(
        cls,
        weight: Tensor,
        inputs: Tensor,
        bias: Tensor | None = None,
        activation: str | None = "relu",
        name: str = "layer",
        targets: Tensor | None = None,
    ) -> Layer:
        """The layer whose inputs are the rows of `inputs` (samples, in); `targets` default to W x + b."""
        _check_weight(name, weight, bias)
        _check_numbers(name, inputs=inputs, targets=targets)
        if inputs.ndim != 2 or inputs.shape[1] != weight.shape[1]:
            raise ValueError(
                f"layer {name!r}: inputs have shape {tuple(inputs.shape)}, expected (samples, {weight.shape[1]})"
            )
        if not inputs.is_floating_point():
            raise TypeError(f"layer {name!r}: inputs are {inputs.dtype}; convert them to float32 or float64")
        if len(inputs) == 0:
            raise ValueError(f"layer {name!r}: no samples; give at least one row of inputs")
        inputs = inputs.detach().cpu()
        weight, bias = _double(weight), None if bias is None else _double(bias)
        if targets is not None:
            targets = _double(targets)
            if targets.shape != (len(inputs), len(weight)):
                raise ValueError(
                    f"layer {name!r}: targets have shape {tuple(targets.shape)}, expected {(len(inputs), len(weight))}"
                )
        read, aimed = InputMoments(weight.shape[1]), TargetMoments(*weight.shape)
        read.add(inputs)
        if targets is not None:
            aimed.add(inputs, targets)
        return cls.from_sums(
            weight, read.finished(), bias, activation, name, None if targets is None else aimed, inputs, targets
        )

    @classmethod
    def from_sums(
        cls,
        weight: Tensor,
        read: Moments,
        bias: Tensor | None = None,
        activation: str | None = "relu",
        name: str = "layer",
        aimed: TargetMoments | None = None,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Layer:
        """The layer of finished input moments; without `aimed` its targets are its own outputs W x + b."""
        if read.count == 0:
            raise ValueError(f"layer {name!r}: no samples reached it; check the batches and the token mask")
        _check_weight(name, weight, bias)
        weight = _double(weight)
        bias = None if bias is None else _double(bias)
        goal = None if aimed is None else aimed.finished()
        return cls(name, weight, bias, read, goal, activation, inputs, targets)

    @classmethod
    def from_moments(
        cls,
        weight: Tensor,
        gram: Tensor,
        cross: Tensor | None = None,
        energy: Tensor | float | None = None,
        bias: Tensor | None = None,
        name: str = "layer",
        samples: int = 1,
        mean: Tensor | None = None,
        target_mean: Tensor | None = None,
        activation: str | None = None,
    ) -> Layer:
        """The layer with given moments; without `cross` the targets are the layer's own outputs W x (+ b).

        `energy` is E[y^2] for each output (out,), needed with `cross`: a bound for each neuron needs its own.
        Raises ValueError for moments that no data has, beyond rounding: a Gram matrix that is not symmetric, a negative
        energy, an entry above Cauchy-Schwarz. What an asymmetry leaves within rounding is averaged.
        """
        _check_weight(name, weight, bias)
        numbers(f"layer {name!r}: gram", gram)
        _check_numbers(name, cross=cross, mean=mean, target_mean=target_mean)
        weight, gram = _double(weight), _double(gram)
        out, width = weight.shape
        _check_array(name, "gram", gram, (width, width))
        if bias is not None:
            bias = _double(bias)
            if mean is None:
                raise ValueError(f"layer {name!r} has a bias: give the inputs' mean E[x] as well")
        mean = None if mean is None else _double(mean)
        _check_array(name, "mean", mean, (width,))
        _check_possible(name, gram, mean)
        whole(1)("samples", samples)
        read = Moments.given(int(samples), gram, mean)
        if cross is None:
            return cls(name, weight, bias, read, None, activation)
        if energy is None:
            raise ValueError(f"layer {name!r}: with `cross`, give `energy` = E[y^2] for each output as well")
        if not isinstance(energy, Tensor):
            number()(f"layer {name!r}: energy", energy)
        energies = torch.as_tensor(energy, dtype=torch.float64).cpu().reshape(-1)
        cross, target_mean = _double(cross), None if target_mean is None else _double(target_mean)
        for key, value, shape in (
            ("cross", cross, (out, width)), ("energies", energies, (out,)), ("target_mean", target_mean, (out,)),
        ):  # fmt: skip
            _check_array(name, key, value, shape)
        _check_possible(name, gram, None, cross, energies, target_mean)
        if target_mean is None and bias is None:
            read = Moments.given(int(samples), gram, None)  # moments about a mean need both means
        return cls(name, weight, bias, read, CrossMoments.given(cross, energies, target_mean, read), activation)

    @property
    def samples(self) -> int:
        """How many x the expectations run over."""
        return self.read.count

    @property
    def mean(self) -> Tensor | None:
        """(in,): E[x]; None where moments were given without it."""
        return self.read.mean

    @property
    def gram(self) -> Tensor:
        """(in, in): E[x x^T]."""
        return self.read.gram

    @cached_property
    def cross(self) -> Tensor:
        """(out, in): E[y x^T]."""
        if self.aimed is not None:
            return self.aimed.raw(self.read).covariance
        through = self.weight @ self.gram
        return through if self.bias is None or self.mean is None else through.addr(self.bias, self.mean)

    @cached_property
    def energies(self) -> Tensor:
        """(out,): E[y^2], one for each output."""
        if self.aimed is not None:
            return self.aimed.raw(self.read).variance
        varied = ((self.weight @ self.read.covariance) * self.weight).sum(1)
        mean = self.target_mean
        return (varied if mean is None else varied + mean.square()).clamp(min=0)

    @property
    def target_mean(self) -> Tensor | None:
        """(out,): E[y]; None where the inputs' mean is not known."""
        if self.aimed is not None:
            return self.aimed.mean
        if self.mean is None:
            return None
        drift = self.weight @ self.mean
        return drift if self.bias is None else drift + self.bias

    @classmethod
    def outline(
        cls,
        name: str,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        kernel: int = 1,
    ) -> Layer:
        """The layer before anything is known of what it reads: one sample of zeros, in next to no memory.

        It tells which problem a recipe states, before the work begins.
        """
        _check_weight(name, weight, bias)
        width, zero = weight.shape[1], torch.zeros(1, 1, dtype=torch.float64)
        line = zero[0].expand(width)
        read = Moments(1, line, zero.expand(width, width), line, line, line, line)
        bias, inputs = None if bias is None else _double(bias), zero.float().expand(1, width)
        return cls(name, _double(weight), bias, read, None, activation, inputs, kernel=kernel)

    @property
    def energy(self) -> float:
        """E|y|^2, summed over the outputs."""
        return float(self.energies.sum())

    @property
    def affine_weight(self) -> Tensor:
        """(out, P): the weights, and the bias as the last column."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)

    @property
    def affine_gram(self) -> Tensor:
        """(P, P): E[x x^T] with the constant input 1 last."""
        if self.bias is None or self.mean is None:
            return self.gram
        one = torch.ones(1, 1, dtype=torch.float64)
        mean = self.mean[None]
        return torch.cat([torch.cat([self.gram, mean]), torch.cat([mean, one], 1).T], 1)

    @property
    def affine_gram_above(self) -> Tensor:
        """(P, P): at least the exact one, as semidefinite matrices go: e e^T of the doubts is at most P diag(e)^2."""
        doubt, means = self.read.raw.doubt, self.read.mean_doubt
        if self.bias is not None:
            # a raw doubt counts the mean's: where it is 0, so is that
            last = (means / torch.where(doubt > 0, doubt, 1.0)).max()
            doubt = torch.cat([doubt, last[None]])
        above = self.affine_gram.clone()
        above.diagonal().add_(raised(len(doubt) * doubt.square() + gamma(2) * above.diagonal(), 8))
        return above

    @property
    def affine_cross(self) -> Tensor:
        """(out, P): E[y x^T] with the constant input 1 last."""
        if self.bias is None or self.target_mean is None:
            return self.cross
        return torch.cat([self.cross, self.target_mean[:, None]], 1)

    @property
    def affine_inputs(self) -> Tensor:
        """(samples, P): the inputs with a last column of ones, in the inputs' own dtype."""
        if self.inputs is None:
            raise ValueError(
                f"layer {self.name!r} was captured without its inputs; a problem over samples needs "
                "capture(..., keep_inputs=True) or Layer.from_samples"
            )
        return self.inputs if self.bias is None else torch.cat([self.inputs, torch.ones_like(self.inputs[:, :1])], 1)

    @property
    def targets_or_dense(self) -> Tensor:
        """(samples, out), float64: the dense pre-activations y of the kept samples."""
        if self.targets is not None:
            return self.targets.double()
        return affine(self.affine_inputs, self.affine_weight)

    @cached_property
    def centred(self) -> Quadratic:
        """E (y - W' x - b')^2 in the weights W' (out, in), with the bias at its best."""
        return Quadratic(self._origin[0], self.read, self.aimed)

    @cached_property
    def quadratic(self) -> Quadratic:
        """The error in the weights alone: `centred` where there is a bias, else E (y - W' x)^2."""
        if self.bias is not None:
            return self.centred
        return Quadratic(self._origin[0], self.read.raw, None if self.aimed is None else self.aimed.raw(self.read))

    def residual(self, x: Tensor) -> Residual:
        """What the weights x (out, P) leave of the targets, y - x u, by its moments."""
        return self._residual(x, slice(None))

    def _residual(self, x: Tensor, some: slice) -> Residual:
        """Of some outputs."""
        start = None if self.bias is None else self._origin[1][some]
        return Residual(self.centred.rows(some), start, _double(x[some]))

    def best_bias(self, weight: Tensor) -> Tensor:
        """(out,): the bias with which weights (out, in) err least, E[y] - W' E[x]; of a layer that has one."""
        start = self._origin[1]
        return start - self.residual(torch.cat([weight, start[:, None]], 1)).offsets[0]

    def squared_errors(self, x: Tensor) -> Tensor:
        """(out,), float64: E (x_m u - y_m)^2 for each output m of the weights x (out, P), by the moments; nearest."""
        return self.doubted_errors(x)[0]

    def doubted_errors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(out,), (out,): the squared errors, and by how much each may be off."""
        errors, doubts = torch.zeros(2, len(self.weight), dtype=torch.float64)
        for some in spans(*self.weight.shape):
            left = self._residual(x, some)
            errors[some], doubts[some] = left.errors, left.error_doubts
        return errors, doubts

    def error_norms(self, x: Tensor) -> Tensor:
        """(out,), float64: at least || X x_m - Y_m || over the samples, with what rounding may hide."""
        errors, doubts = self.doubted_errors(x)
        return raised((self.samples * (errors + doubts)).sqrt())

    def damped(self, fraction: float) -> Layer:
        """The layer with a ridge lambda |W' - W|^2, lambda = fraction * mean diagonal of the Gram matrix.

        Damping is data: it is folded into the moments, so every solver sees the same problem. The kept inputs no
        longer match the moments and are dropped.
        """
        number(0)(f"layer {self.name!r}: damping fraction", fraction)
        diagonal = self.read.covariance.diagonal()
        ridge = fraction * float((diagonal if self.mean is None else diagonal + self.mean.square()).mean())
        return replace(
            self,
            read=self.read.damped(ridge),
            aimed=None if self.aimed is None else self.aimed.damped(ridge, self.weight),
            damping=self.damping + fraction,
            inputs=None,
            targets=None,
        )

    @cached_property
    def _origin(self) -> tuple[Tensor, Tensor]:
        """Weights and bias that errors are measured from: those that make the targets, else none."""
        none = torch.zeros(len(self.weight), dtype=torch.float64)
        if self.aimed is not None:
            return none.new_zeros(1, 1).expand(self.weight.shape), none
        return self.weight, none if self.bias is None else self.bias

    def spectrum(self) -> tuple[int, float]:
        """Rank of the Gram matrix, and its condition number (inf where it is singular), both at float64's rounding."""
        return self.read.conditioning


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def check_layer(layer: Any) -> None:
    """Raise TypeError for what is no `Layer`."""
    if not isinstance(layer, Layer):
        raise TypeError(
            f"the layer is a {type(layer).__name__}; give a Layer, as `capture`, `prune` or Layer.from_samples makes it"
        )


def _check_numbers(name: str, **tensors: Tensor | None) -> None:
    for key, value in tensors.items():
        optional(numbers)(f"layer {name!r}: {key}", value)


def _check_array(name: str, key: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is None:
        return
    if tuple(value.shape) != shape:
        raise ValueError(f"layer {name!r}: {key} has shape {tuple(value.shape)}, expected {shape}")
    if not _finite(value):
        raise ValueError(f"layer {name!r}: {key} holds NaN or inf; check the calibration data")


def _finite(value: Tensor) -> bool:
    """Whether all are finite: their extremes are, and NaN is one. isfinite would make arrays of the value's size."""
    return not value.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(value))


def _check_possible(name: str, *moments: Tensor | None) -> None:
    try:
        check_moments(*moments)  # type: ignore[arg-type]  # the first is there
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _check_weight(name: str, weight: Tensor, bias: Tensor | None) -> None:
    text("name", name)
    numbers(f"layer {name!r}: weight", weight)
    _check_numbers(name, bias=bias)
    for key, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"layer {name!r}: {key} is {value.dtype}; convert it to a floating-point dtype first")
        if not _finite(value):
            raise ValueError(f"layer {name!r}: {key} holds NaN or inf; nothing can be pruned from it")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"layer {name!r}: weight has shape {tuple(weight.shape)}, expected (out, in), both > 0")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"layer {name!r}: bias has shape {tuple(bias.shape)}, expected ({len(weight)},)")
