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
from convexprune.patterns import Pattern, excess, select
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
        return float(self._errors(x).sum())

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
        """TODO."""
        return 0.0

    def to_cvxpy(self) -> Formulation:
        """TODO."""
        raise NotImplementedError

    @property
    def _mean(self) -> Tensor | None:
        return None if self.layer.bias is None else self.layer.mean

    def _errors(self, x: Tensor) -> Tensor:
        """E (x_m u - y_m)^2 for each neuron."""
        x = x.detach().cpu().double()
        gram, cross = self.layer.affine_gram, self.layer.affine_cross
        return ((x @ gram) * x).sum(1) - 2 * (cross * x).sum(1) + self.layer.energies
