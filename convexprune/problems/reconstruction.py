"""The best least-squares reconstruction of a layer under a sparsity pattern.

    minimise  E|W u + b - y|^2   over W with a support in the pattern, and any b
           =  tr(W G W^T) - 2 <C, W> + energy      for the best b

G = Cov[u], C = Cov[y, u] where the layer has a bias (the best one is E[y] - W E[u]), else the raw moments.
Source: Hassibi, Stork 1993; Dong, Chen, Pan, NIPS 2017; Frantar, Singh, Alistarh 2022, eq. 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convexprune.layer import Layer
from convexprune.patterns import Pattern, Support, excess, select
from convexprune.problem import Formulation


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """Least squares with a support in `pattern`; `always` (M, N) bool marks weights that must stay in the support.

    Raises ValueError where the pattern does not fit the layer.
    """

    layer: Layer
    pattern: Pattern
    always: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (self.layer.weight.shape[0], self.layer.weight.shape[1])
        if self.always is not None and (self.always.dtype != torch.bool or tuple(self.always.shape) != shape):
            raise ValueError(
                f"always is {self.always.dtype} {tuple(self.always.shape)}; expected a boolean mask {shape}"
            )
        self.select(torch.zeros(shape, dtype=torch.float64))

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
        """(M, N): the dense layer's weights."""
        return self.layer.weight

    @property
    def kernel(self) -> int:
        """The number of kernel positions behind each input channel; 1 if linear."""
        return self.layer.kernel

    @cached_property
    def gram(self) -> Tensor:
        """G (N, N), float64: what is left of the Gram matrix when the bias is at its best."""
        mean = self._mean
        return self.layer.gram if mean is None else self.layer.gram - torch.outer(mean, mean)

    @cached_property
    def cross(self) -> Tensor:
        """C (M, N), float64."""
        mean, aim = self._mean, self.layer.target_mean
        return self.layer.cross if mean is None or aim is None else self.layer.cross - torch.outer(aim, mean)

    @cached_property
    def energies(self) -> Tensor:
        """(M,): E[y^2], less E[y]^2 where there is a bias."""
        aim = self.layer.target_mean
        return self.layer.energies if self._mean is None or aim is None else self.layer.energies - aim.square()

    def select(self, scores: Tensor, grow: float = 1.0) -> Tensor:
        """(M, N) bool: the support in the pattern with the largest sum of scores (M, N) >= 0; see `patterns.select`."""
        return select(self.pattern, scores, self.layer.kernel, self.always, grow)

    def completed(self, weight: Tensor) -> Tensor:
        """(M, P), float64: the weights (M, N) with the best bias as the last column, if the layer has one."""
        weight = weight.detach().cpu().double()
        mean, aim = self._mean, self.layer.target_mean
        if mean is None or aim is None:
            return weight
        return torch.cat([weight, (aim - weight @ mean)[:, None]], 1)

    def value(self, x: Tensor) -> float:
        """E|x u - y|^2, summed over the outputs."""
        return max(float(self._errors(x).sum()), 0.0)  # a sum of squares, but for the rounding of its terms

    def violation(self, x: Tensor) -> float:
        """Weights (or blocks) kept beyond the pattern, as a fraction of the layer's weights."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        mask = x.detach().cpu()[:, : self.target.shape[1]] != 0
        return excess(self.pattern, mask, self.layer.kernel) / mask.numel()

    def output_error(self, x: Tensor) -> float:
        """sqrt(samples E|x u - y|^2) >= || act(X x^T) - act(Y) ||_F for a 1-Lipschitz activation."""
        return math.sqrt(self.layer.samples * max(self.value(x), 0.0))

    def lower_bound(self, witness: Tensor | None) -> float:
        """The perspective bound at the witness v (M, N), or at the dense weights without one; at least 0.

        With d >= 0 such that R = G - diag(d) is positive semidefinite, for any v and any W with support S

            value >= energies - v R v^T - sum_{i in S} (C - v R)_i^2 / d_i

        and the largest such sum over the pattern's supports is a choice of scores. Tight only where G is well
        conditioned: d is the smallest eigenvalue of G, in units of its diagonal or not, whichever serves better.
        """
        v = self.target if witness is None else self._checked(witness)
        if v is None:
            return 0.0
        return max(0.0, *(self._perspective(v, d) for d in self._diagonals))

    def perspective_point(self, witness: Tensor) -> Tensor:
        """(M, N): the minimiser of the bound's inner problem at v, towards which v improves its bound."""
        d = max(self._diagonals, key=lambda each: self._perspective(witness, each))
        slope = self.cross - witness @ self.gram + witness * d
        scores = torch.where(d > 0, slope.square() / d.clamp(min=1e-300), 0.0)
        return torch.where(self.select(scores) & (d > 0), slope / d.clamp(min=1e-300), 0.0)

    def to_cvxpy(self) -> Formulation:
        """The same problem with a boolean for every cell: a mixed-integer quadratic program.

        |W_ij| is at most what the ellipsoid value <= energies allows, so no optimum is cut off.
        Raises ValueError where the Gram matrix is singular and there is no such limit.
        """
        import cvxpy as cp

        values, vectors = torch.linalg.eigh(self.layer.affine_gram)
        if float(values[0]) <= 1e-10 * float(values[-1]):
            raise ValueError(f"layer {self.layer.name!r}: its Gram matrix is singular; use layer.damped(1e-6) or so")
        root = (vectors * values.sqrt()).numpy()
        out, width = self.target.shape
        cells = self._cells()
        x, kept = cp.Variable(self.shape, name="x"), cp.Variable(int(cells.max()) + 1, boolean=True, name="kept")
        weight = x[:, :width]
        spread = kept[cells.flatten().numpy()]
        limit = self._limits().flatten().numpy()
        flat = cp.reshape(weight, (out * width,), order="C")
        constraints = [cp.abs(flat) <= cp.multiply(limit, spread)]
        if isinstance(self.pattern, Support):
            constraints.append(spread == self.pattern.mask.flatten().numpy().astype(float))
        else:
            grouped = cp.reshape(kept, (self._groups, (int(cells.max()) + 1) // self._groups), order="C")
            constraints.append(cp.sum(grouped, axis=1) <= self.pattern.quota((out, width), self.kernel))
        if self.always is not None:
            constraints.append(spread[self.always.flatten().nonzero()[:, 0].numpy()] == 1)
        smooth = cp.sum_squares(x @ root) - 2 * cp.sum(cp.multiply(self.layer.affine_cross.numpy(), x))
        program = cp.Problem(cp.Minimize(smooth + self.layer.energy), constraints)
        return Formulation(program, x, lambda: torch.from_numpy(x.value[:, :width]))

    @cached_property
    def _diagonals(self) -> tuple[Tensor, ...]:
        """Two choices of d (N,) with G - diag(d) positive semidefinite, rounding included."""
        diagonal = self.gram.diagonal()
        live = diagonal > 1e-12 * diagonal.max()
        scale = torch.where(live, diagonal, 1.0).sqrt()
        part = self.gram[live][:, live]
        found = []
        for unit in (torch.ones_like(scale), scale):
            matrix = part / (unit[live][:, None] * unit[live])
            values = torch.linalg.eigvalsh(matrix)
            # eigenvalues are computed to a few units in the last place of the largest
            least = float(values[0]) - 8 * len(matrix) * 2.0**-53 * float(values[-1])
            found.append(torch.where(live, max(least, 0.0) * unit.square(), 0.0))
        return tuple(found)

    def _perspective(self, v: Tensor, d: Tensor) -> float:
        through = v @ self.gram - v * d
        slope = self.cross - through
        scores = torch.where(d > 0, slope.square() / d.clamp(min=1e-300), 0.0)
        # an input with d = 0 may take any weight: unless its slope vanishes there is no bound
        if bool(((d == 0) & (slope.abs() > 1e-12 * (self.cross.abs() + through.abs()).clamp(min=1e-300))).any()):
            return -math.inf
        gain = float(scores[self.select(scores)].sum())
        curved = float((v * through).sum())
        rounding = 64 * len(d) * 2.0**-53 * (float(self.energies.abs().sum()) + abs(curved) + gain)
        return float(self.energies.sum()) - curved - gain - rounding

    def _checked(self, witness: Tensor) -> Tensor | None:
        width = self.target.shape[1]
        if tuple(witness.shape) not in (self.shape, tuple(self.target.shape)):
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {tuple(self.target.shape)}")
        v = witness.detach().cpu().double()[:, :width]
        return v if bool(torch.isfinite(v).all()) else None

    @property
    def _groups(self) -> int:
        return len(self.pattern.folded(torch.zeros_like(self.target), self.kernel))

    def _cells(self) -> Tensor:
        """(M, N): the cell that each weight belongs to, numbered group by group."""
        shape = (self.target.shape[0], self.target.shape[1])
        numbers = torch.arange(self.pattern.folded(torch.zeros_like(self.target), self.kernel).numel())
        return self.pattern.unfolded(numbers.reshape(self._groups, -1), shape, self.kernel)

    def _limits(self) -> Tensor:
        """(M, N): how large a weight can be where value <= energies."""
        inverse = torch.linalg.inv(self.gram)
        optimum = self.cross @ inverse
        drop = (self.cross * optimum).sum(1).clamp(min=0)  # energies less the least value
        limits: Tensor = optimum.abs() + (drop[:, None] * inverse.diagonal().clamp(min=0)).sqrt()
        return limits

    @property
    def _mean(self) -> Tensor | None:
        return None if self.layer.bias is None else self.layer.mean

    def _errors(self, x: Tensor) -> Tensor:
        """E (x_m u - y_m)^2 for each neuron."""
        x = x.detach().cpu().double()
        gram, cross = self.layer.affine_gram, self.layer.affine_cross
        return ((x @ gram) * x).sum(1) - 2 * (cross * x).sum(1) + self.layer.energies
