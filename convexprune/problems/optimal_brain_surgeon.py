"""Optimal Brain Surgeon: what the other weights do best when given ones are removed.

    minimise  E|x u - y|^2 = tr(x G x^T) - 2 <C, x> + energy   subject to   x_q = 0 for q in the removed set Q

G = E[u u^T] over the inputs u (the constant 1 included where the layer has a bias), C = E[y u^T]. From the dense
weights theta, with P = G^-1:

    one weight    the value rises by theta_q^2 / P_qq            x = theta - theta_q P e_q / P_qq
    a set Q       by theta_Q^T (P_QQ)^-1 theta_Q                 x = theta - P_{:,Q} (P_QQ)^-1 theta_Q

Source: Hassibi, Stork, NIPS 1993; Dong, Chen, Pan, NIPS 2017. The latter write theta_q^2 / (2 [H^-1]_qq) with H = G,
but the Hessian of this value is 2 G: the constants here are the exact ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import EqualityQuadratic
from convexprune.layer import Layer
from convexprune.problem import Formulation


@dataclass(frozen=True, eq=False)
class OptimalBrainSurgeon(EqualityQuadratic):
    """The equality-constrained quadratic of a layer; `removed` is a boolean mask (M, N), or (M, P) with the bias last.

    Raises ValueError for a mask of another shape or type.
    """

    needs_samples: ClassVar[bool] = False  # whether it reads Layer.inputs

    layer: Layer
    removed: Tensor

    def __post_init__(self) -> None:
        shapes = (tuple(self.layer.weight.shape), self.shape)
        if self.removed.dtype != torch.bool or tuple(self.removed.shape) not in shapes:
            raise ValueError(
                f"removed is {self.removed.dtype} {tuple(self.removed.shape)}; expected a boolean mask {shapes[0]}"
            )
        if tuple(self.removed.shape) != self.shape:  # the bias stays
            stays = torch.zeros(self.shape[0], 1, dtype=torch.bool)
            object.__setattr__(self, "removed", torch.cat([self.removed.cpu(), stays], 1))

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
        """E|x u - y|^2, summed over the outputs."""
        return max(float(self.layer.squared_errors(x).sum()), 0.0)  # a sum of squares, but for rounding

    def violation(self, x: Tensor) -> float:
        """The largest |x_q| of a removed weight, relative to the largest dense weight."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        held = x.detach().cpu().double()[self.removed]
        return float(held.abs().max()) / max(float(self.dense.abs().max()), 1e-300) if len(held) else 0.0

    def output_errors(self, x: Tensor) -> Tensor:
        """(M,) of the pre-activations: >= || act(X x_m) - act(Y_m) || for a 1-Lipschitz activation."""
        return self.layer.error_norms(x)

    def lower_bound(self, witness: Tensor | None) -> float:
        """value(v) - sum_i g_i^2 / (4 mu G_ii) for the witness v (M, P), its removed weights set to 0; at least 0.

        g is the gradient at v over the weights that are free, mu the smallest eigenvalue of G in coordinates with unit
        diagonal, inputs that are constantly zero left out: no step from v can gain more. Where G is singular otherwise
        the bound is 0; `layer.damped(1e-6)` or so gives it back.
        """
        if witness is None:
            return 0.0
        if tuple(witness.shape) != self.shape:
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {self.shape}")
        v = torch.where(self.removed, 0.0, witness.detach().cpu().double())
        if not bool(torch.isfinite(v).all()):
            return 0.0
        scale, least = self._curvature
        slope = torch.where(self.removed, 0.0, 2 * (v @ self.gram - self.cross))
        live = scale > 0
        gain = float((slope[:, live] / scale[live]).square().sum()) / (4 * least) if least > 0 else math.inf
        if bool(slope[:, ~live].any()):  # no second moment, but a first: these are no moments of anything
            gain = math.inf
        value = float(self.layer.squared_errors(v).sum())
        rounding = 64 * len(scale) * 2.0**-53 * (self.layer.energy + abs(value))
        bound = value - gain - rounding
        return max(bound, 0.0) if math.isfinite(bound) else 0.0

    def to_cvxpy(self) -> Formulation:
        """The same quadratic program with its equalities."""
        with extras():
            import cvxpy as cp

        values, vectors = torch.linalg.eigh(self.gram)
        root = (vectors * values.clamp(min=0).sqrt()).numpy()
        x = cp.Variable(self.shape, name="x")
        objective = cp.sum_squares(x @ root) - 2 * cp.sum(cp.multiply(self.cross.numpy(), x)) + self.layer.energy
        gone = cp.multiply(self.removed.numpy().astype(float), x) == 0
        return Formulation(cp.Problem(cp.Minimize(objective), [gone]), x, lambda: torch.from_numpy(x.value))

    @cached_property
    def _curvature(self) -> tuple[Tensor, float]:
        """sqrt(diag G) and the smallest eigenvalue in those units, less what rounding can add to it."""
        scale = self.gram.diagonal().clamp(min=0).sqrt()
        live = scale > 0
        values = torch.linalg.eigvalsh(self.gram[live][:, live] / (scale[live][:, None] * scale[live]))
        rounding = 8 * len(values) * 2.0**-53 * float(values[-1:].sum())
        return scale, float(values[0]) - rounding if len(values) else math.inf


def saliencies(layer: Layer) -> Tensor:
    """(M, P), float64: theta_q^2 / [G^-1]_qq, by how much the value rises when one weight is removed
    from its minimiser, which the dense weights are where the targets are their own outputs (not in a cascade).

    An input that is constantly zero costs nothing. Raises ValueError where G is singular otherwise: damp the layer.
    """
    live, inverse = _inverse(layer)
    pivots = torch.full((len(live),), math.inf, dtype=torch.float64)
    pivots[live] = inverse.diagonal()
    return layer.affine_weight.square() / pivots


def increase(layer: Layer, removed: Tensor) -> Tensor:
    """(M,), float64: theta_Q^T ([G^-1]_QQ)^-1 theta_Q for each neuron, by how much removing `removed` (M, P) raises it
    from its minimiser, as for `saliencies`.

    An input that is constantly zero costs nothing. Raises ValueError where G is singular otherwise: damp the layer.
    """
    live, inverse = _inverse(layer)
    rises = []
    for gone, weights in zip(removed[:, live], layer.affine_weight[:, live], strict=True):
        part = weights[gone]
        rises.append(part @ torch.linalg.solve(inverse[gone][:, gone], part) if len(part) else part.sum())
    return torch.stack(rises)


def _inverse(layer: Layer) -> tuple[Tensor, Tensor]:
    """The inputs that are not constantly zero (P,) bool, and the inverse of their G."""
    gram = layer.affine_gram
    live = gram.diagonal() > 1e-12 * gram.diagonal().max()
    scale = gram.diagonal()[live].sqrt()
    factor, failed = torch.linalg.cholesky_ex(gram[live][:, live] / (scale[:, None] * scale))
    if bool(failed) or float(factor.diagonal().min()) < 1e-6:
        raise ValueError(f"layer {layer.name!r}: its Gram matrix is singular; use layer.damped(1e-6) or so")
    return live, torch.cholesky_inverse(factor) / (scale[:, None] * scale)
