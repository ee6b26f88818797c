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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import EqualityQuadratic, LeastSquares
from convexprune.layer import Layer, check_layer
from convexprune.options import numbers
from convexprune.problem import Formulation, Misfit
from convexprune.quadratic import Quadratic
from convexprune.rounding import down, gamma, raised, total, total_doubt, up


@dataclass(frozen=True, eq=False)
class OptimalBrainSurgeon(EqualityQuadratic):
    """The equality-constrained quadratic of a layer: some weights are removed, and the others make up for them.

    Args:
        layer: Its moments are all that the problem reads.
        removed: Boolean mask (M, N) of the weights that are removed, or (M, P) with the bias as its last column.

    Raises:
        ValueError: For a mask of another shape or type.

    Source:
        Hassibi, Stork, NIPS 1993; Dong, Chen, Pan, NIPS 2017.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_moments(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        >>> problem = cp.OptimalBrainSurgeon(layer, removed=torch.tensor([[True, False]]))
        >>> [round(weight, 6) for weight in cp.solve(problem).x[0].tolist()]
        [0.0, 1.5]
    """

    needs_samples: ClassVar[bool] = False  # whether it reads Layer.inputs

    layer: Layer
    removed: Tensor

    def __post_init__(self) -> None:
        check_layer(self.layer)
        numbers(f"layer {self.layer.name!r}: removed", self.removed)
        shapes = (tuple(self.layer.weight.shape), self.shape)
        if self.removed.dtype != torch.bool or tuple(self.removed.shape) not in shapes:
            raise Misfit(
                f"layer {self.layer.name!r}: removed is {self.removed.dtype} {tuple(self.removed.shape)}; expected a "
                f"boolean mask {shapes[0]}"
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
        """E|x u - y|^2, summed over the outputs, to the nearest; inf for a point that is not finite."""
        return total(self.layer.squared_errors(x)) if bool(torch.isfinite(x).all()) else math.inf

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        left = self.layer.residual(x)
        return up(float(raised(left.error_doubts.sum(), len(x))), gamma(4) * float(left.errors.sum()))

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
        diagonal, inputs that are constantly zero left out: no step from v can gain more. A bias that may move is put
        at its best, and G is then the covariance. Where G is singular otherwise the bound is 0;
        `layer.damped(1e-6)` or so gives it back.
        """
        if witness is None:
            return 0.0
        if tuple(witness.shape) != self.shape:
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {self.shape}")
        v = torch.where(self.removed, 0.0, witness.detach().cpu().double())
        if not bool(torch.isfinite(v).all()):
            return 0.0
        width = self.layer.weight.shape[1]
        free, moves = ~self.removed[:, :width], self._bias_moves
        found = torch.zeros(len(v), dtype=torch.float64)
        if bool(moves.any()):
            step = self.layer.centred.at(v[:, :width])
            found = _below(self.layer.centred, (step.values, step.doubts), (step.slopes, step.slope_doubts), free)
        if not bool(moves.all()):
            left = self.layer.residual(v)
            slopes, doubts = (each[:, :width] for each in left.moments)
            fixed = _below(self._about_zero, (left.errors, left.error_doubts), (slopes, doubts), free)
            found = torch.where(moves, found, fixed)
        bound = down(total(found), total_doubt(found))
        return max(bound, 0.0) if bound < math.inf else 0.0

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

    def pieces(self) -> Iterator[LeastSquares]:
        """Least squares over the weights alone: of neurons whose bias moves, about the means, and of the others."""
        removed, moves = self.removed[:, : self.layer.weight.shape[1]], self._bias_moves
        for neurons, gram, cross in (
            (moves, self.layer.centred.gram, self.layer.centred.cross),
            (~moves, self.layer.gram, self.layer.cross),
        ):
            if bool(neurons.any()):
                yield LeastSquares(neurons, gram, cross[neurons], removed[neurons], self.layer.weight[neurons])

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: the weights (M, N) with the best bias as the last column, 0 where it is removed."""
        if self.layer.bias is None:
            return weight
        return torch.cat([weight, torch.where(self._bias_moves, self.layer.best_bias(weight), 0.0)[:, None]], 1)

    @property
    def _bias_moves(self) -> Tensor:
        """(M,) bool: neurons whose bias is free."""
        if self.layer.bias is None:
            return torch.zeros(self.shape[0], dtype=torch.bool)
        return ~self.removed[:, -1]

    @cached_property
    def _about_zero(self) -> Quadratic:
        """The curvature of neurons without a bias."""
        return Quadratic(self.layer.weight, self.layer.read.raw, None)


def _below(quadratic: Quadratic, values: tuple[Tensor, Tensor], slopes: tuple[Tensor, Tensor], free: Tensor) -> Tensor:
    """(M,): at most what each neuron's value can come down to from here, moving its free weights; at least 0."""
    (value, doubt), (slope, blur) = values, slopes
    # with half the gradient h: value - sum h^2 / (mu G_ii)
    moves = torch.where(free, raised(slope.abs() + blur), 0.0)
    inputs = quadratic.inputs
    stuck = ~inputs.live
    if bool(moves[:, stuck].any()) or not inputs.curvature > 0:
        return torch.zeros_like(value)
    gain = (moves / inputs.root)[:, ~stuck].square().sum(1) / inputs.curvature
    return (value - raised(gain + doubt + gamma(4) * value, len(stuck) + 4)).clamp(min=0)


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
    scale = inverse.diagonal().sqrt()
    inverse, rises = inverse / (scale[:, None] * scale), []
    for gone, weights in zip(removed[:, live], layer.affine_weight[:, live] / scale, strict=True):
        part = weights[gone]
        rises.append(part @ torch.linalg.solve(inverse[gone][:, gone], part) if len(part) else part.sum())
    return torch.stack(rises)


def _inverse(layer: Layer) -> tuple[Tensor, Tensor]:
    """The inputs that are not constantly zero (P,) bool, and the inverse of their G: of the covariance C, bordered.

    With a bias it is [C^-1, -C^-1 m; -m C^-1, 1 + m C^-1 m], m the mean: nothing is subtracted from a square of m.
    """
    inputs = layer.quadratic.inputs
    live = inputs.live
    unit, root = inputs.unit[live][:, live], inputs.root[live]
    factor, failed = torch.linalg.cholesky_ex(unit)
    # a pivot that small may be the rounding of a 0, and a constant input is a second bias
    least = inputs.spread + gamma(len(unit) + 4) * len(unit)
    twice = layer.bias is not None and layer.mean is not None and bool(layer.mean[~live].any())
    if bool(failed) or twice or bool((factor.diagonal().square() <= least).any()):
        raise ValueError(f"layer {layer.name!r}: its Gram matrix is singular; use layer.damped(1e-6) or so")
    inverse = torch.cholesky_inverse(factor) / (root[:, None] * root)
    if layer.bias is None or layer.mean is None:
        return live, inverse
    reach = inverse @ layer.mean[live]
    border = torch.cat([-reach, 1 + (layer.mean[live] @ reach)[None]])
    inverse = torch.cat([torch.cat([inverse, -reach[None]]), border[:, None]], 1)
    return torch.cat([live, torch.ones(1, dtype=torch.bool)]), inverse
