"""A layer as a problem sees it: its weights and the moments of what it reads."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Final

import torch
from torch import Tensor

from convexprune.moments import InputMoments, TargetMoments, affine

ACTIVATIONS: Final = ("relu", None)


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear map y = W x + b of a network, with the moments of its inputs over a calibration set.

    Everything is float64 on the CPU except `inputs`, which keep the dtype they were given. `y` is the *dense*
    network's pre-activation; `x` is what this layer reads now (in a cascade, from the network pruned so far).

    A bias is one more input that is always 1. The `affine_*` views have it as their last column, P = in + 1; for a
    layer without bias they are the plain arrays and P = in. Every problem is stated in these views.
    """

    name: str
    weight: Tensor  # (out, in)   a convolution as a matrix: in = in_channels / groups * kernel size
    bias: Tensor | None  # (out,)
    gram: Tensor  # (in, in)    E[x x^T]
    cross: Tensor  # (out, in)   E[y x^T]
    energies: Tensor  # (out,)      E[y^2], one for each output
    samples: int  # how many x the expectations run over
    activation: str | None = None  # what follows the layer: "relu", or None
    mean: Tensor | None = None  # (in,)       E[x]; with `target_mean`, needed for a bias
    target_mean: Tensor | None = None  # (out,)      E[y]
    inputs: Tensor | None = field(default=None, repr=False)  # (samples, in)   kept only when asked for
    targets: Tensor | None = field(default=None, repr=False)  # (samples, out)  y; None where y = W x + b
    kernel: int = 1  # kernel positions: inputs i, i + kernel, ... are one position of consecutive channels
    repairs: bool = False  # whether the targets also make good what the other branch of the sum behind it has lost
    module: str = ""  # the module that it is, or a group of; its name where nothing else is said
    damping: float = 0.0  # the ridge that is in the moments, as a fraction of the mean diagonal of the Gram matrix

    def __post_init__(self) -> None:
        object.__setattr__(self, "module", self.module or self.name)
        _check_weight(self.name, self.weight, self.bias)
        out, width = self.weight.shape
        expected = {
            "gram": (width, width), "cross": (out, width), "energies": (out,), "mean": (width,),
            "target_mean": (out,), "inputs": (self.samples, width), "targets": (self.samples, out),
        }  # fmt: skip
        for key, shape in expected.items():
            value = getattr(self, key)
            if value is None:
                continue
            if tuple(value.shape) != shape:
                raise ValueError(f"layer {self.name!r}: {key} has shape {tuple(value.shape)}, expected {shape}")
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"layer {self.name!r}: {key} holds NaN or inf; check the calibration data")
        if self.bias is not None and (self.mean is None or self.target_mean is None):
            raise ValueError(f"layer {self.name!r} has a bias: its moments need `mean` and `target_mean` too")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"layer {self.name!r}: activation {self.activation!r} is not one of {ACTIVATIONS}")

    def __repr__(self) -> str:
        """The fields that differ from their defaults, tensors by their shape."""
        shown = []
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is not entry.default:
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
        for start in range(0, len(inputs), 8192):
            x = inputs[start : start + 8192].double()
            read.add(x)
            if targets is not None:
                aimed.add(x, targets[start : start + 8192])
        return cls.from_sums(
            weight, read.finished(), bias, activation, name, None if targets is None else aimed, inputs, targets
        )

    @classmethod
    def from_sums(
        cls,
        weight: Tensor,
        read: InputMoments,
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
        if aimed is None:
            shift = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias
            through = weight @ read.gram
            drift = weight @ read.mean
            cross = through + torch.outer(shift, read.mean)
            target_mean = drift + shift
            energies = ((through * weight).sum(1) + 2 * shift * drift + shift.square()).clamp(min=0)
        else:
            cross, target_mean, energies = (a / aimed.count for a in (aimed.cross, aimed.mean, aimed.energies))
        return cls(
            name, weight, bias, read.gram, cross, energies, read.count, activation, read.mean, target_mean, inputs,
            targets,
        )  # fmt: skip

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
        """
        _check_weight(name, weight, bias)
        weight, gram = _double(weight), _double(gram)
        width = weight.shape[1]
        if gram.shape != (width, width):
            raise ValueError(f"layer {name!r}: gram has shape {tuple(gram.shape)}, expected {(width, width)}")
        if bias is not None:
            bias = _double(bias)
            if mean is None:
                raise ValueError(f"layer {name!r} has a bias: give the inputs' mean E[x] as well")
        mean = None if mean is None else _double(mean)
        if cross is None:
            read = InputMoments(0)
            read.count, read.gram = samples, gram
            read.mean = torch.zeros(width, dtype=torch.float64) if mean is None else mean
            return cls.from_sums(weight, read, bias, activation, name)
        if energy is None:
            raise ValueError(f"layer {name!r}: with `cross`, give `energy` = E[y^2] for each output as well")
        energies = torch.as_tensor(energy, dtype=torch.float64).cpu().reshape(-1)
        target_mean = None if target_mean is None else _double(target_mean)
        return cls(name, weight, bias, gram, _double(cross), energies, samples, activation, mean, target_mean)

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
        (out, width), zero = weight.shape, torch.zeros(1, 1, dtype=torch.float64)
        line, double = zero[0], _double(weight)
        return cls(
            name, double, None if bias is None else _double(bias), zero.expand(width, width), zero.expand(out, width),
            line.expand(out), 1, activation, line.expand(width), line.expand(out), zero.float().expand(1, width),
            kernel=kernel,
        )  # fmt: skip

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

    def squared_errors(self, x: Tensor) -> Tensor:
        """(out,), float64: E (x_m u - y_m)^2 for each output m of the weights x (out, P), by the moments."""
        x = _double(x)
        return ((x @ self.affine_gram) * x).sum(1) - 2 * (self.affine_cross * x).sum(1) + self.energies

    def error_norms(self, x: Tensor) -> Tensor:
        """(out,), float64: at least || X x_m - Y_m || over the samples, with what rounding may hide."""
        x = _double(x)
        # by how much rounding may have lowered a sum of terms of this size that cancel
        size = (x.abs() @ self.affine_gram.diagonal().clamp(min=0).sqrt()).square() + self.energies
        return (self.samples * (self.squared_errors(x).clamp(min=0) + 8 * 2.0**-53 * size)).sqrt()

    def damped(self, fraction: float) -> Layer:
        """The layer with a ridge lambda |W' - W|^2, lambda = fraction * mean diagonal of the Gram matrix.

        Damping is data: it is folded into the moments, so every solver sees the same problem. The kept inputs no
        longer match the moments and are dropped.
        """
        if not 0 <= fraction < float("inf"):
            raise ValueError(f"layer {self.name!r}: damping fraction is {fraction}, expected a finite number >= 0")
        ridge = fraction * float(self.gram.diagonal().mean())
        return replace(
            self,
            gram=self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64),
            cross=self.cross + ridge * self.weight,
            energies=self.energies + ridge * self.weight.square().sum(1),
            damping=self.damping + fraction,
            inputs=None,
            targets=None,
        )

    def spectrum(self) -> tuple[int, float]:
        """Rank of the Gram matrix, and its condition number (inf where it is singular), both at float64's rounding."""
        values = torch.linalg.eigvalsh(self.gram)
        top = float(values[-1])
        rank = int((values > len(values) * 2.0**-52 * top).sum())
        return rank, top / float(values[0]) if rank == len(values) else float("inf")


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def _check_weight(name: str, weight: Tensor, bias: Tensor | None) -> None:
    for key, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"layer {name!r}: {key} is {value.dtype}; convert it to a floating-point dtype first")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"layer {name!r}: {key} holds NaN or inf; nothing can be pruned from it")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"layer {name!r}: weight has shape {tuple(weight.shape)}, expected (out, in), both > 0")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"layer {name!r}: bias has shape {tuple(bias.shape)}, expected ({len(weight)},)")
