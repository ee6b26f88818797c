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
from convexprune.forms import GroupedLeastSquares, PerspectiveProblem
from convexprune.layer import Layer, check_layer
from convexprune.layout import Layout, check_pattern
from convexprune.options import numbers, optional
from convexprune.patterns import Pattern, excess, select
from convexprune.problem import Formulation, Misfit
from convexprune.products import spans
from convexprune.quadratic import Quadratic, Step
from convexprune.rounding import down, gamma, lowered, raised, total, total_doubt, up

if TYPE_CHECKING:
    import cvxpy as cp

Minorant = tuple[float, Tensor]
IDLE = 2.0**-20  # of an output's rms: 16 units of float32's rounding


@dataclass(frozen=True, eq=False)
class Reconstruction(PerspectiveProblem):
    """The best least-squares approximation of a layer by weights with a support in a pattern.

    Args:
        layer: Its moments are all that the problem reads.
        pattern: Which supports are allowed, such as `Unstructured(0.3)` or `NM(2, 4)`.
        always: Boolean mask (M, N) of weights that must stay in the support, or None.
        importance: (M,) > 0: how much the error of an output counts, such as the norms of the next layer's columns.

    Raises:
        ValueError: If the pattern does not fit the layer, and for `always` or `importance` of another shape.

    Source:
        Hassibi, Stork 1993; Dong, Chen, Pan, NIPS 2017; Frantar, Singh, Alistarh 2022, eq. 1.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_moments(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        >>> solution = cp.solve(cp.Reconstruction(layer, cp.Unstructured(1)))
        >>> [round(weight, 6) for weight in solution.x[0].tolist()], round(solution.certificate.value, 6)
        ([3.5, 0.0], 0.75)
    """

    needs_samples: ClassVar[bool] = False  # whether it reads Layer.inputs

    layer: Layer
    pattern: Pattern
    always: Tensor | None = None
    importance: Tensor | None = None

    def __post_init__(self) -> None:
        check_layer(self.layer)
        for key in ("always", "importance"):
            optional(numbers)(f"layer {self.layer.name!r}: {key}", getattr(self, key))
        out = len(self.layer.weight)
        if self.importance is not None and (
            tuple(self.importance.shape) != (out,)
            or not bool(torch.isfinite(self.importance).all() & (self.importance > 0).all())
        ):
            name = self.layer.name
            raise Misfit(
                f"layer {name!r}: importance must be {out} finite numbers > 0, one for each output of the layer"
            )
        shape = (self.layer.weight.shape[0], self.layer.weight.shape[1])
        if self.always is not None and (self.always.dtype != torch.bool or tuple(self.always.shape) != shape):
            raise Misfit(
                f"layer {self.layer.name!r}: always is {self.always.dtype} {tuple(self.always.shape)}; expected a "
                f"boolean mask {shape}"
            )
        try:
            check_pattern(self.pattern, shape, self.kernel)
            self.select(torch.zeros(shape, dtype=torch.float64))
        except ValueError as error:
            raise Misfit(f"layer {self.layer.name!r}: {error}") from error

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

    @property
    def gram(self) -> Tensor:
        """G (N, N), float64: what is left of the Gram matrix when the bias is at its best.

        Inputs whose variance is no more than rounding are left out: their rows are 0.
        """
        return self._quadratic.gram

    @cached_property
    def cross(self) -> Tensor:
        """C (M, N), float64."""
        return self._quadratic.cross * self._root[:, None]

    @cached_property
    def energies(self) -> Tensor:
        """(M,): a E[y^2], less a E[y]^2 where there is a bias."""
        return self._quadratic.energies * self._importance

    def select(self, scores: Tensor, grow: float = 1.0) -> Tensor:
        """(M, N) bool: the support in the pattern with the largest sum of scores (M, N) >= 0; see `patterns.select`."""
        return select(self.pattern, scores, self.layer.kernel, self.always, grow)

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: W for V (M, N), with the best bias as the last column, if the layer has one.

        A weight that is 0 in the dense layer stays 0 unless it pays: one that moves its output by less than float32
        resolves is a solver's rounding, and would undo what an earlier pruning removed.
        """
        weight = weight.detach().cpu().double()
        moves = weight.square() * self.gram.diagonal()
        idle = (self.target == 0) & (moves <= IDLE**2 * self.energies.clamp(min=0)[:, None])
        weight = weight.masked_fill(idle, 0.0) / self._root[:, None]
        return weight if self.layer.bias is None else torch.cat([weight, self.layer.best_bias(weight)[:, None]], 1)

    def value(self, x: Tensor) -> float:
        """sum_m a_m E (x_m u - y_m)^2, to the nearest; inf for a point that is not finite."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        return total(self.layer.squared_errors(x) * self._importance)

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        errors, doubts = (each * self._importance for each in self.layer.doubted_errors(x))
        size = float(errors.sum())
        return up(float(raised(doubts.sum(), len(doubts) + 1)), gamma(4) * size)

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
        return self._unaided if witness is None else strongest(self.minorants(witness), self)

    def minorants(self, witness: Tensor | tuple[Tensor, Tensor] | None) -> tuple[Minorant, ...]:
        """For each d that is tried, what the bound is made of: value >= constant - the scores (M, N) where W is not 0.

        So for any W at all, whatever the pattern. Raises ValueError as `lower_bound`.
        """
        v, d = witness if isinstance(witness, tuple) else (witness, None)
        v = self.layer.weight if v is None else self._checked(v)
        if v is None:
            return ((0.0, torch.zeros_like(self.target)),)
        diagonals = self._diagonals if d is None else (*self._diagonals, self._repaired(d))
        found = [(0.0, torch.zeros_like(v)) for _ in diagonals]
        for some in spans(*v.shape):  # the bound is a sum over the rows, of which some are worked on at a time
            at = self._quadratic.rows(some).at(v[some])
            parts = [self._perspective(at, each, self._importance[some]) for each in diagonals]
            found = [_with_rows(whole, some, part) for whole, part in zip(found, parts, strict=True)]
        return tuple(found)

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
    def _unaided(self) -> float:
        """The bound without a witness, whichever point is judged."""
        return strongest(self.minorants(None), self)

    @cached_property
    def _diagonals(self) -> tuple[Tensor, Tensor]:
        """Two choices of d (N,): the smallest eigenvalue of G for each input, and the same in units of G's diagonal."""
        inputs = self._quadratic.inputs
        return inputs.level, lowered(max(inputs.curvature, 0.0) * inputs.root.square() * inputs.live)

    def _repaired(self, d: Tensor) -> Tensor:
        """(N,): the largest t d, t <= 1, for which G - diag(t d) is certain to be positive semidefinite."""
        live = self._quadratic.inputs.live
        if tuple(d.shape) != tuple(live.shape):
            raise ValueError(f"witness has a d of shape {tuple(d.shape)}, expected {tuple(live.shape)}")
        d = d.detach().cpu().double()
        if not bool(torch.isfinite(d).all()) or bool((d < 0).any()):
            return torch.zeros_like(d)
        return self._quadratic.inputs.shrunk(torch.where(live, d, 0.0))

    @cached_property
    def _quadratic(self) -> Quadratic:
        return self.layer.quadratic

    def _perspective(self, at: Step, d: Tensor, importance: Tensor) -> Minorant | None:
        """The minorant of some rows at v and d, in steps from the origin A of their quadratic: nothing cancels near it.

        With D = v - A, p = K - D R and s_i = (d_i A_i + p_i)^2 / d_i, every support S has, row by row,

            value >= v_r - D R D^T + sum_i (d_i A_i^2 + 2 p_i A_i) - sum_{i in S} s_i

        The constant is rounded down, the scores are rounded up. None where a row has no bound but 0.
        """
        step, origin = at.step, at.of.origin
        live, few = d > 0, gamma(8)
        moved, held = step * d, origin * d
        p = at.slopes + moved
        size = p.abs().add_(held.abs())
        blur = torch.add(at.slope_doubts, size, alpha=2 * few).add_(moved.abs(), alpha=few)
        # an input with d = 0 may take any weight: unless its slope vanishes there is no bound but 0
        if bool(blur[:, ~live].any() or p[:, ~live].any()):
            return None
        # rounded up together: a square, a product, a quotient and the importance
        scores = (held + p).abs().add_(blur).square_().mul_(torch.where(live, (1 + gamma(20)) / d, 0.0))
        scores.mul_(importance[:, None])
        if not bool(torch.isfinite(scores).all()):
            return None
        gains = origin * torch.add(held, p, alpha=2)
        blurred = ((blur + few * size) * origin.abs()).sum(1)
        bent = step.square() @ d
        return _floor(at, importance, bent, gains, blurred), scores

    def _checked(self, witness: Tensor) -> Tensor | None:
        width = self.target.shape[1]
        if tuple(witness.shape) not in (self.shape, tuple(self.target.shape)):
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {tuple(self.target.shape)}")
        v = witness.detach().cpu().double()[:, :width] / self._root[:, None]
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
    def _importance(self) -> Tensor:
        """(M,): a."""
        if self.importance is None:
            return torch.ones(len(self.layer.weight), dtype=torch.float64)
        return self.importance.detach().cpu().double()

    @cached_property
    def _root(self) -> Tensor:
        """(M,): sqrt(a)."""
        return self._importance.sqrt()


def _floor(at: Step, importance: Tensor, bent: Tensor, gains: Tensor, blurred: Tensor) -> float:
    """Certainly not above the sum of v_r - D R D^T + the gains, where bent (M,) is D diag(d) D^T."""
    targets, terms, few = at.of.targets, at.step.shape[1], gamma(8)
    found = bent - (at.through * at.step).sum(1)
    doubts = at.blur.square() + gamma(2 * terms + 8) * (at.reach.square() + bent)
    doubts = doubts + 2 * blurred + few * gains.abs().sum(1)
    if targets is not None:
        found = found + targets.variance
        doubts = doubts + targets.doubt.square() + (targets.relative + few) * targets.variance.abs()
    doubt = float(raised(doubts * importance, 2 * terms + 8).sum()) * (1 + gamma(len(found) + 2))
    parts = torch.cat([found * importance, (gains * importance[:, None]).flatten()])
    return down(total(parts), total_doubt(parts) + doubt)


def _with_rows(whole: Minorant, some: slice, part: Minorant | None) -> Minorant:
    """The minorant of the rows so far and of some more.

    Rows without a bound have 0, without scores: that holds for any weights of theirs.
    """
    if part is None:
        return whole
    constant, scores = whole
    scores[some] = part[1]
    return down(constant, -part[0]) if constant else part[0], scores


def strongest(minorants: Sequence[Minorant], problem: GroupedLeastSquares) -> float:
    """The largest lower bound that some minorants give over the supports in the problem's pattern; at least 0."""
    return max(0.0, *(_least(constant, scores, problem) for constant, scores in minorants))


def _least(constant: float, scores: Tensor, problem: GroupedLeastSquares) -> float:
    """Certainly not above the constant less the scores of any support."""
    chosen = scores[problem.select(scores)]
    # a pattern adds the scores of a block up before it compares; blocks need not be of one size
    block = max(int(problem.pattern.folded(torch.ones_like(scores), problem.kernel).max()), 1)
    gain = total(chosen)
    return down(constant, up(gain, total_doubt(chosen) + (2 * gamma(block) + gamma(8)) * gain))


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
