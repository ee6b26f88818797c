"""The best least-squares reconstruction of a layer under a sparsity pattern.

    minimise  sum_m a_m E(W_m u + b_m - y_m)^2   over W with a support in the pattern, and any b
           =  tr(V G V^T) - 2 <C, V> + energy      for the best b, with V = sqrt(a) W

G = Cov[u], C = Cov[sqrt(a) y, u] where the layer has a bias (the best one is E[y] - W E[u]), else the raw moments. The
importance a of the outputs is 1 unless given. Solvers see V: neurons then differ only in their moments.
Source: Hassibi, Stork 1993; Dong, Chen, Pan, NIPS 2017; Frantar, Singh, Alistarh 2022, eq. 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import PerspectiveProblem
from convexprune.layer import Layer
from convexprune.layout import Layout, check_pattern
from convexprune.patterns import Pattern, excess, select
from convexprune.problem import Formulation

if TYPE_CHECKING:
    import cvxpy as cp

Minorant = tuple[float, Tensor]
CONSTANT = 1e-13  # a variance that small, relative to the second moment, is the rounding of a constant


@dataclass(frozen=True, eq=False)
class Reconstruction(PerspectiveProblem):
    """Least squares with a support in `pattern`.

    always      (M, N) bool: weights that must stay in the support
    importance  (M,) > 0: how much an output's error counts; the norms of the next layer's columns, say

    Raises ValueError where the pattern does not fit the layer.
    """

    needs_samples: ClassVar[bool] = False  # whether it reads Layer.inputs

    layer: Layer
    pattern: Pattern
    always: Tensor | None = None
    importance: Tensor | None = None

    def __post_init__(self) -> None:
        out = len(self.layer.weight)
        if self.importance is not None and (
            tuple(self.importance.shape) != (out,)
            or not bool(torch.isfinite(self.importance).all() & (self.importance > 0).all())
        ):
            name = self.layer.name
            raise ValueError(
                f"layer {name!r}: importance must be {out} finite numbers > 0, one for each output of the layer"
            )
        shape = (self.layer.weight.shape[0], self.layer.weight.shape[1])
        if self.always is not None and (self.always.dtype != torch.bool or tuple(self.always.shape) != shape):
            raise ValueError(
                f"layer {self.layer.name!r}: always is {self.always.dtype} {tuple(self.always.shape)}; expected a "
                f"boolean mask {shape}"
            )
        try:
            check_pattern(self.pattern, shape, self.kernel)
            self.select(torch.zeros(shape, dtype=torch.float64))
        except ValueError as error:
            raise ValueError(f"layer {self.layer.name!r}: {error}") from error

    @property
    def shape(self) -> tuple[int, int]:
        """(M, P)."""
        return tuple(self.dense.shape)  # type: ignore[return-value]

    @property
    def dense(self) -> Tensor:
        """(M, P): the dense layer's weights, the bias as the last column."""
        return self.layer.affine_weight

    @property
    def target(self) -> Tensor:
        """(M, N): the dense layer's weights, each row times the root of its importance."""
        return self.layer.weight * self._root[:, None]

    @property
    def kernel(self) -> int:
        """The number of kernel positions behind each input channel; 1 if linear."""
        return self.layer.kernel

    @cached_property
    def gram(self) -> Tensor:
        """G (N, N), float64: what is left of the Gram matrix when the bias is at its best."""
        mean, raw = self._mean, self.layer.gram
        return raw if mean is None else torch.where(self._varies[:, None] & self._varies, raw - mean[:, None] * mean, 0)

    @cached_property
    def cross(self) -> Tensor:
        """C (M, N), float64."""
        mean, aim = self._mean, self.layer.target_mean
        if mean is None or aim is None:
            return self.layer.cross * self._root[:, None]
        return torch.where(self._varies, self.layer.cross - torch.outer(aim, mean), 0.0) * self._root[:, None]

    @cached_property
    def energies(self) -> Tensor:
        """(M,): a E[y^2], less a E[y]^2 where there is a bias."""
        aim = self.layer.target_mean
        left = self.layer.energies if self._mean is None or aim is None else self.layer.energies - aim.square()
        return left * self._root.square()

    def select(self, scores: Tensor, grow: float = 1.0) -> Tensor:
        """(M, N) bool: the support in the pattern with the largest sum of scores (M, N) >= 0; see `patterns.select`."""
        return select(self.pattern, scores, self.layer.kernel, self.always, grow)

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: W for V (M, N), with the best bias as the last column, if the layer has one."""
        weight = weight.detach().cpu().double() / self._root[:, None]
        mean, aim = self._mean, self.layer.target_mean
        if mean is None or aim is None:
            return weight
        return torch.cat([weight, (aim - weight @ mean)[:, None]], 1)

    def value(self, x: Tensor) -> float:
        """sum_m a_m E (x_m u - y_m)^2."""
        weighted = self.layer.squared_errors(x) * self._root.square()
        total, size = float(weighted.sum()), float((self.layer.energies * self._root.square()).sum())
        # a sum of squares: what is below 0 by more than the rounding of its terms comes of impossible moments
        return total if total < -1e-9 * size else max(total, 0.0)

    def violation(self, x: Tensor) -> float:
        """Weights (or blocks) kept beyond the pattern, as a fraction of the layer's weights."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        mask = x.detach().cpu()[:, : self.target.shape[1]] != 0
        return excess(self.pattern, mask, self.layer.kernel) / mask.numel()

    def output_errors(self, x: Tensor) -> Tensor:
        """(M,) of the pre-activations: >= || act(X x_m) - act(Y_m) || for a 1-Lipschitz activation."""
        return self.layer.error_norms(x)

    def lower_bound(self, witness: Tensor | tuple[Tensor, Tensor] | None) -> float:
        """The perspective bound at the witness v (M, N), or (v, d) with d (N,); v is the dense weights without one.

        With d >= 0 such that R = G - diag(d) is positive semidefinite, for any v and any W with support S

            value >= energies - v R v^T - sum_{i in S} (C - v R)_i^2 / d_i

        and the largest such sum over the pattern's supports is a choice of scores. A witness's d is shrunk until R is
        certain to be semidefinite; d is also tried as the smallest eigenvalue of G, in units of its diagonal and not.
        At least 0, which is all there is where G is singular. Raises ValueError for other shapes.
        """
        return strongest(self.minorants(witness), self.select)

    def minorants(self, witness: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Minorant, ...]:
        """For each d that is tried, what the bound is made of: value >= constant - the scores (M, N) where W is not 0.

        So for any W at all, whatever the pattern. Raises ValueError as `lower_bound`.
        """
        v, d = witness if isinstance(witness, tuple) else (witness, None)
        v = self.target if v is None else self._checked(v)
        if v is None:
            return ((0.0, torch.zeros_like(self.target)),)
        diagonals = self._diagonals if d is None else (*self._diagonals, self._repaired(d))
        return tuple(self._perspective(v, each) for each in diagonals)

    @property
    def diagonal(self) -> Tensor:
        """(N,): a d with G - diag(d) positive semidefinite; positive where an input varies, unless G is singular."""
        return self._diagonals[1]

    def to_cvxpy(self) -> Formulation:
        """The same problem with a boolean for every cell: a mixed-integer quadratic program.

        |W_ij| is at most what the ellipsoid value <= energies allows, so no optimum is cut off.
        Raises ValueError where the Gram matrix is singular and there is no such limit.
        """
        found = mixed_integer((self,), self.pattern, self.always)
        return Formulation(found.problem, found.x, lambda: found.witness()[0])

    @cached_property
    def _diagonals(self) -> tuple[Tensor, Tensor]:
        """Two choices of d (N,): the smallest eigenvalue of G for each input, and the same in units of G's diagonal."""
        live = self.gram.diagonal() > 0
        plain = max(_least_eigenvalue(self.gram[live][:, live]), 0.0)
        return plain * live.double(), max(self._curvature, 0.0) * self.gram.diagonal() * live

    def _repaired(self, d: Tensor) -> Tensor:
        """(N,): the largest t d, t <= 1, for which G - diag(t d) is certain to be positive semidefinite."""
        if tuple(d.shape) != tuple(self.gram.diagonal().shape):
            raise ValueError(f"witness has a d of shape {tuple(d.shape)}, expected {tuple(self.gram.diagonal().shape)}")
        d = d.detach().cpu().double()
        live = self.gram.diagonal() > 0
        if not bool(torch.isfinite(d).all()) or bool((d < 0).any()):
            return torch.zeros_like(d)
        scale = self.gram.diagonal()[live].sqrt()
        least = _least_eigenvalue((self.gram[live][:, live] - torch.diag(d[live])) / (scale[:, None] * scale))
        # G - t D = (1 - t) G + t (G - D), and the least eigenvalues of the two are known
        whole = max(self._curvature, 0.0)
        share = 1.0 if least >= 0 else whole / (whole - least)
        return torch.where(live, share * d, 0.0)

    @cached_property
    def _curvature(self) -> float:
        """The smallest eigenvalue of G in coordinates with unit diagonal, constant inputs left out."""
        live = self.gram.diagonal() > 0
        scale = self.gram.diagonal()[live].sqrt()
        return _least_eigenvalue(self.gram[live][:, live] / (scale[:, None] * scale))

    @cached_property
    def _varies(self) -> Tensor:
        """(N,) bool: inputs that are not constant; of a constant one the bias takes all, but for rounding."""
        raw, mean = self.layer.gram.diagonal(), self._mean
        return raw > 0 if mean is None else raw - mean.square() > CONSTANT * raw

    def _perspective(self, v: Tensor, d: Tensor) -> Minorant:
        through = v @ self.gram - v * d
        slope = self.cross - through
        # an input with d = 0 may take any weight: unless its slope vanishes there is no bound but 0
        if bool(((d == 0) & (slope.abs() > 1e-12 * (self.cross.abs() + through.abs()).clamp(min=1e-300))).any()):
            return 0.0, torch.zeros_like(slope)
        scores = torch.where(d > 0, slope.square() / d.clamp(min=1e-300), 0.0)
        curved = float((v * through).sum())
        rounding = 64 * len(d) * 2.0**-53 * (float(self.energies.abs().sum()) + abs(curved))
        return float(self.energies.sum()) - curved - rounding, scores

    def _checked(self, witness: Tensor) -> Tensor | None:
        width = self.target.shape[1]
        if tuple(witness.shape) not in (self.shape, tuple(self.target.shape)):
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {tuple(self.target.shape)}")
        v = witness.detach().cpu().double()[:, :width]
        return v if bool(torch.isfinite(v).all()) else None

    def _limits(self) -> Tensor:
        """(M, N): how large a weight W can be where value <= energies."""
        inverse = torch.linalg.inv(self.gram)
        optimum = self.cross @ inverse
        drop = (self.cross * optimum).sum(1).clamp(min=0)  # energies less the least value
        limits: Tensor = optimum.abs() + (drop[:, None] * inverse.diagonal().clamp(min=0)).sqrt()
        limits = limits / self._root[:, None]
        return limits

    @cached_property
    def _root(self) -> Tensor:
        """(M,): sqrt(a)."""
        if self.importance is None:
            return torch.ones(len(self.layer.weight), dtype=torch.float64)
        return self.importance.detach().cpu().double().sqrt()

    @property
    def _mean(self) -> Tensor | None:
        return None if self.layer.bias is None else self.layer.mean


def strongest(minorants: Sequence[Minorant], select: Callable[[Tensor], Tensor]) -> float:
    """The largest lower bound that some minorants give over the supports of `select`; at least 0."""
    best = 0.0
    for constant, scores in minorants:
        gain = float(scores[select(scores)].sum())
        best = max(best, constant - gain - 64 * scores.shape[1] * 2.0**-53 * gain)
    return best


def mixed_integer(parts: Sequence[Reconstruction], pattern: Pattern, always: Tensor | None) -> Formulation:
    """The program over the rows of all parts, one below the other, in one pattern; its witness is one v for each part.

    Raises ValueError where a Gram matrix is singular.
    """
    with extras():
        import cvxpy as cp

    squares = [_squares(part) for part in parts]  # raises before anything is built
    limit = torch.cat([part._limits() for part in parts]).flatten().numpy()
    out, width = sum(len(part.target) for part in parts), parts[0].target.shape[1]
    layout = Layout.of(pattern, (out, width), parts[0].kernel)
    x = cp.Variable((out, parts[0].shape[1]), name="x")
    kept = cp.Variable(layout.never.numel(), boolean=True, name="kept")
    spread = kept[layout.cell.flatten().numpy()]
    flat = cp.reshape(x[:, :width], (out * width,), order="C")
    constraints = [cp.abs(flat) <= cp.multiply(limit, spread)]
    constraints.append(cp.sum(cp.reshape(kept, layout.never.shape, order="C"), axis=1) <= layout.quota)
    if bool(layout.never.any()):
        constraints.append(kept[layout.never.flatten().nonzero()[:, 0].numpy()] == 0)
    if always is not None:
        constraints.append(spread[always.flatten().nonzero()[:, 0].numpy()] == 1)
    ends = itertools.accumulate((len(part.target) for part in parts), initial=0)
    rows = [slice(*pair) for pair in itertools.pairwise(ends)]
    value = sum(square(x[own]) for square, own in zip(squares, rows, strict=True))

    def witness() -> tuple[Tensor, ...]:
        v = torch.from_numpy(x.value[:, :width])
        return tuple(v[own] * part._root[:, None] for part, own in zip(parts, rows, strict=True))

    return Formulation(cp.Problem(cp.Minimize(value), constraints), x, witness)


def _squares(part: Reconstruction) -> Callable[[cp.Expression], cp.Expression]:
    """The value as a function of x (M, P), by a factor of the Gram matrix."""
    with extras():
        import cvxpy as cp

    values, vectors = torch.linalg.eigh(part.layer.affine_gram)
    if float(values[0]) <= 1e-10 * float(values[-1]):
        raise ValueError(f"layer {part.layer.name!r}: its Gram matrix is singular; use layer.damped(1e-6) or so")
    factor = (vectors * values.sqrt()).numpy()
    root = part._root[:, None]
    cross = (part.layer.affine_cross * root).numpy()
    energy = float((part.layer.energies * root[:, 0].square()).sum())

    def square(x: cp.Expression) -> cp.Expression:
        scaled = cp.multiply(root.numpy(), x)
        return cp.sum_squares(scaled @ factor) - 2 * cp.sum(cp.multiply(cross, scaled)) + energy

    return square


def _least_eigenvalue(matrix: Tensor) -> float:
    """A lower bound of the smallest eigenvalue of a symmetric matrix: the computed one less what rounding can add."""
    if not len(matrix):
        return 0.0
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]) - 8 * len(matrix) * 2.0**-53 * float(values.abs().max())
