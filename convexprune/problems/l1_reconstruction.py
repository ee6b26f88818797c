"""Least squares with an L1 price, from moments alone; any activation.

    minimise  1/2 E|x u - y|^2 + lam ||x||_1  =  1/2 tr(x G x^T) - <C, x> + energy / 2 + lam ||x||_1

G = E[u u^T] over the inputs u (the constant 1 included where the layer has a bias), C = E[y u^T].
Source: Tibshirani 1996 (the lasso), one for each neuron with a common Gram matrix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import LassoProblem
from convexprune.layer import Layer
from convexprune.problem import Formulation
from convexprune.rounding import TINY, down, gamma, lowered, raised, total, total_doubt, up


@dataclass(frozen=True, eq=False)
class L1Reconstruction(LassoProblem):
    """The lasso of a layer: reconstruction with a price on the weights' absolute values.

    Args:
        layer: Its moments are all that the problem reads.
        lam: Price of a unit of weight, > 0, in the units of E[y x].

    Raises:
        ValueError: For a `lam` that is not a finite number > 0.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.eye(2), torch.eye(2), activation=None)
        >>> solution = cp.solve(cp.L1Reconstruction(layer, lam=1.0))  # every weight costs more than it is worth
        >>> solution.x.tolist()
        [[0.0, 0.0], [0.0, 0.0]]
    """

    needs_samples: ClassVar[bool] = False  # whether it reads Layer.inputs

    layer: Layer
    lam: float

    def __post_init__(self) -> None:
        if not 0 < self.lam < math.inf:
            raise ValueError(
                f"lam is {self.lam}; it must be a finite number > 0; without a price the dense layer is optimal"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(M, P)."""
        return tuple(self.dense.shape)  # type: ignore[return-value]

    @property
    def dense(self) -> Tensor:
        """(M, P): the dense layer's weights, the bias as the last column."""
        return self.layer.affine_weight

    @cached_property
    def gram(self) -> Tensor:
        """G (P, P)."""
        return self.layer.affine_gram

    @cached_property
    def cross(self) -> Tensor:
        """C (M, P)."""
        return self.layer.affine_cross

    def value(self, x: Tensor) -> float:
        """1/2 E|x u - y|^2 + lam ||x||_1, to the nearest; inf for a point that is not finite."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        return 0.5 * total(self.layer.squared_errors(x)) + self.lam * total(x.detach().cpu().double().abs())

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        left = self.layer.residual(x)
        size = 0.5 * float(left.errors.sum()) + self.lam * float(x.detach().cpu().double().abs().sum())
        return up(0.5 * float(raised(left.error_doubts.sum(), len(x))), gamma(8) * size)

    def violation(self, x: Tensor) -> float:
        """0: every finite point is feasible."""
        return 0.0 if bool(torch.isfinite(x).all()) else math.inf

    def output_errors(self, x: Tensor) -> Tensor:
        """(M,) of the pre-activations: >= || act(X x_m) - act(Y_m) || for a 1-Lipschitz activation."""
        return self.layer.error_norms(x)

    def lower_bound(self, witness: Tensor | None) -> float:
        """sum_m  1/2 (E y_m^2 - E (y_m - s_m r_m)^2)  with r = y - v u the residual of the witness v (M, P).

        The dual of a lasso is feasible at theta = s r when s ||C - v G||_inf <= lam; any v gives such an s, and the
        best s in that interval is taken for each neuron.
        """
        if witness is None:
            return 0.0
        if tuple(witness.shape) != self.shape:
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {self.shape}")
        v = witness.detach().cpu().double()
        if not bool(torch.isfinite(v).all()):
            return 0.0
        left = self.layer.residual(v)
        (moments, doubts), (aligned, doubt) = left.moments, left.with_targets  # E[r u], E[y r]
        energy = raised(left.errors + left.error_doubts)  # E[r^2]
        # what may not be too large is rounded up, what may not be too small down: any scale within the limit is valid
        limit = lowered(self.lam / raised(moments.abs() + doubts).amax(1))
        scale = torch.minimum(((aligned - doubt) / energy).clamp(min=0), limit).nan_to_num(nan=0.0)
        gain, loss = scale * aligned, 0.5 * scale * (scale * energy)
        found = gain - loss - raised(scale * doubt + gamma(8) * (gain.abs() + loss))
        bound = down(total(found.clamp(min=0)), total_doubt(found))
        return bound if TINY < bound < math.inf else 0.0  # below it products vanish, and their allowances with them

    def to_cvxpy(self) -> Formulation:
        """The same lasso as a quadratic program; its objective leaves out nothing, so values agree."""
        with extras():
            import cvxpy as cp

        # a factor of G is the data matrix of an equivalent least-squares problem
        values, vectors = torch.linalg.eigh(self.gram)
        root = (vectors * values.clamp(min=0).sqrt()).numpy()
        x = cp.Variable(self.shape, name="x")
        smooth = 0.5 * cp.sum_squares(x @ root) - cp.sum(cp.multiply(self.cross.numpy(), x))
        objective = smooth + 0.5 * self.layer.energy + self.lam * cp.sum(cp.abs(x))
        return Formulation(cp.Problem(cp.Minimize(objective)), x, lambda: torch.from_numpy(x.value))
