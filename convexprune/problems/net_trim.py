"""Net-Trim: the sparsest layer, in L1, whose outputs stay within a ball of the dense layer's.

    minimise ||x||_1   subject to   || (X x^T - Y)_active ||_F <= radius      one ball for the whole layer
                                    (X x^T)_pm <= V_pm  where inactive

Y = relu(dense pre-activations); active = {Y > 0}. A layer without ReLU has only the ball, over all entries.
Source: Aghasi, Abdi, Nguyen, Romberg, NIPS 2017, eq. (5) and (8); Aghasi, Abdi, Romberg, SIMODS 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import BallProblem
from convexprune.layer import Layer
from convexprune.moments import affine
from convexprune.problem import Formulation

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 8192  # rows of X converted to float64 at a time


@dataclass(frozen=True, eq=False)
class NetTrim(BallProblem):
    """The parallel Net-Trim problem of a layer; `NetTrim.cascade` states the cascade one.

    layer    captured with its inputs
    epsilon  the ball's radius, relative: radius = epsilon ||Y||_F
    slack    V: None (zero), a number, or an array (samples, out) read where the dense layer is inactive

    Raises ValueError for a negative or non-finite epsilon, a slack of the wrong shape, a layer without samples.
    """

    needs_samples: ClassVar[bool] = True  # whether it reads Layer.inputs

    layer: Layer
    epsilon: float
    slack: Tensor | float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.epsilon, Real) or not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon!r}; it must be a finite number >= 0, such as 0.05")
        self.layer.affine_inputs  # noqa: B018   a layer without samples says so now, not in the solver
        if isinstance(self.slack, Tensor):
            expected = (self.layer.samples, len(self.layer.weight))
            if tuple(self.slack.shape) != expected:
                raise ValueError(f"slack has shape {tuple(self.slack.shape)}, expected {expected}, or give a number")
        if self.slack is not None and not bool(torch.isfinite(torch.as_tensor(self.slack)).all()):
            raise ValueError("slack holds NaN or inf; give finite numbers, or None for zero")

    @classmethod
    def cascade(cls, layer: Layer, epsilon: float, gamma: float = 1.1, risk: float = 1.0) -> NetTrim:
        """The cascade problem: radius = risk sqrt(gamma) || (X W^T - Y)_active ||_F and V = X W^T.

        With gamma >= 1 and risk = 1 the dense W is feasible; risk < 1 may leave no feasible point, and the solver then
        says so. A layer whose inputs are the dense network's (the first) has no error to hold on to and gets the
        parallel problem of `epsilon`.
        """
        if not 1 <= gamma < math.inf:
            raise ValueError(f"gamma is {gamma}; it must be a finite number >= 1, such as 1.1")
        if not 0 < risk <= 1:
            raise ValueError(f"risk is {risk}; it must be in (0, 1]")
        parallel = cls(layer, epsilon)
        now = affine(layer.affine_inputs, layer.affine_weight)
        drift = float((now - parallel.outputs)[parallel.active].norm()) / max(parallel.scale, 1e-300)
        if drift < 1e-6:
            return parallel
        return cls(layer, risk * math.sqrt(gamma) * drift, now if layer.activation == "relu" else None)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, P)."""
        return tuple(self.dense.shape)  # type: ignore[return-value]

    @property
    def dense(self) -> Tensor:
        """(M, P): the dense layer's weights, the bias as the last column."""
        return self.layer.affine_weight

    @cached_property
    def inputs(self) -> Tensor:
        """X (n, P), in the dtype it was captured in."""
        return self.layer.affine_inputs

    @cached_property
    def outputs(self) -> Tensor:
        """Y (n, M), float64: what follows the dense layer's activation."""
        y = self.layer.targets_or_dense
        return y.clamp_(min=0) if self.layer.activation == "relu" else y

    @cached_property
    def active(self) -> Tensor:
        """(n, M) bool: the entries that the ball covers."""
        return self.outputs > 0 if self.layer.activation == "relu" else torch.ones_like(self.outputs, dtype=torch.bool)

    @cached_property
    def ceiling(self) -> Tensor:
        """V, float64, broadcastable to (n, M)."""
        if self.slack is None:
            return torch.zeros(1, 1, dtype=torch.float64)
        slack = torch.as_tensor(self.slack).detach().cpu().double()
        return slack if slack.ndim == 2 else slack.reshape(1, 1)

    @cached_property
    def scale(self) -> float:
        """||Y||_F: violations are relative to it, as epsilon is."""
        return float(self.outputs.norm())

    @property
    def radius(self) -> float:
        """epsilon ||Y||_F."""
        return self.epsilon * self.scale

    def value(self, x: Tensor) -> float:
        """||x||_1, the bias included."""
        return float(x.double().abs().sum())

    def violation(self, x: Tensor) -> float:
        """max of (ball error - radius) / ||Y||_F and of the largest (X x^T - V) where inactive / rms of Y, or 0."""
        errors, excess, _ = self._residuals(x)
        error = float(errors.norm())
        scale = self.scale or 1.0
        rms = scale / math.sqrt(max(int(self.active.sum()), 1))
        return max(0.0, (error - self.radius) / scale, excess / rms)

    def output_errors(self, x: Tensor) -> Tensor:
        """(M,) sqrt( |X x_m - Y_m|^2 where active + |relu(X x_m)|^2 where inactive ) = || relu(X x_m) - Y_m ||.

        For a feasible x and V = 0 their norm is at most the radius (Proposition 1 of the paper).
        """
        balls, _, leaks = self._residuals(x)
        return torch.hypot(balls, leaks)

    def lower_bound(self, witness: Tensor | None) -> float:
        """max over 0 <= s of  sum_m s_m (<z_m, Y> + <z_m, V>)  -  radius || (s Z)_active ||_F,  a weak-duality bound.

        Any Z (n, M) serves: its sign is clipped where inactive, and each neuron's column is scaled by its own s_m so
        that s_m ||X^T z_m||_inf <= 1, rounding errors of that product included. Scaling the neurons one by one
        is tighter than dividing all of Z by the worst of them.
        """
        if witness is None:
            return 0.0
        if tuple(witness.shape) != tuple(self.outputs.shape):
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {tuple(self.outputs.shape)}")
        z = witness.detach().cpu().double()
        if not bool(torch.isfinite(z).all()):
            return 0.0
        z = torch.where(self.active, z, z.clamp(max=0))
        gain = torch.where(self.active, z * self.outputs, z * self.ceiling).sum(0)
        energy = torch.where(self.active, z, 0).square().sum(0)
        reach, columns = z.new_zeros(self.shape).T, z.new_zeros(self.shape[1])
        for rows, x in self._blocks():
            reach = reach + x.T @ z[rows]
            columns += x.square().sum(0)
        # the computed X^T z is off by at most n u |x| |z| (Higham, Accuracy and Stability, 3.5)
        rounding = 2 * len(z) * 2.0**-53 * float(columns.max().sqrt()) * z.norm(dim=0)
        limit = 1 / (reach.abs().amax(0) + rounding).clamp(min=1e-300)
        return _best_scaling(gain, energy, limit, self.radius)

    def to_cvxpy(self) -> Formulation:
        """The second-order cone program."""
        with extras():
            import cvxpy as cp

        inputs, outputs, active = self.inputs.double().numpy(), self.outputs.numpy(), self.active.numpy()
        x = cp.Variable(self.shape, name="x")
        produced = inputs @ x.T
        pieces = []
        if active.any():
            residual = (produced - outputs)[active]
            # a ball of radius 0 has no interior, and interior-point methods stall on it
            ball = cp.SOC(cp.Constant(self.radius), residual) if self.radius > 0 else residual == 0
            pieces.append((ball, self.active))
        if not active.all():
            below = produced[~active] <= self.ceiling.expand_as(self.outputs).numpy()[~active]
            pieces.append((below, ~self.active))
        problem = cp.Problem(cp.Minimize(cp.sum(cp.abs(x))), [constraint for constraint, _ in pieces])

        def witness() -> Tensor | None:
            z = torch.zeros_like(self.outputs)
            for constraint, entries in pieces:
                dual = constraint.dual_variables[-1].value
                if dual is None:
                    return None
                z[entries] = torch.from_numpy(dual).flatten() * (1 if isinstance(constraint, cp.SOC) else -1)
            return z

        return Formulation(problem, x, witness)

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.inputs), BLOCK):
            rows = slice(start, min(start + BLOCK, len(self.inputs)))
            yield rows, self.inputs[rows].double()

    def _residuals(self, x: Tensor) -> tuple[Tensor, float, Tensor]:
        """Each output's error in the ball, the largest excess over V, and || relu(X x_m) || where inactive."""
        weight = x.detach().cpu().double()
        error, leak = torch.zeros(2, len(weight), dtype=torch.float64)
        excess = -math.inf
        for rows, inputs in self._blocks():
            produced, active = inputs @ weight.T, self.active[rows]
            ceiling = self.ceiling if len(self.ceiling) == 1 else self.ceiling[rows]
            error += torch.where(active, produced - self.outputs[rows], 0).square().sum(0)
            excess = max(excess, float((produced - ceiling).masked_fill(active, -math.inf).max()))
            leak += produced.masked_fill(active, 0).clamp(min=0).square().sum(0)
        return error.sqrt(), excess, leak.sqrt()


def _best_scaling(gain: Tensor, energy: Tensor, limit: Tensor, radius: float, steps: int = 20) -> float:
    """max over 0 <= s <= limit of <s, gain> - radius sqrt(<s^2, energy>), by a fixed point; every iterate is valid."""
    scale = torch.where(gain > 0, limit, 0)
    best = 0.0
    for _ in range(steps):
        norm = float((scale.square() * energy).sum().sqrt())
        best = max(best, float((scale * gain).sum()) - radius * norm)
        if radius == 0 or norm == 0:
            break
        wanted = gain * norm / (radius * energy.clamp(min=1e-300))
        scale = torch.minimum(wanted.clamp(min=0), limit)
    return best
