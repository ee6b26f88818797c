"""A reconstruction problem in coordinates where every input has second moment 1.

    w_i = W_i sqrt(G_ii),    H_ij = G_ij / sqrt(G_ii G_jj),    value = delta H delta^T + constant,   delta = w - optimum

Inputs that are constantly zero cannot change the value: they are taken out (H = identity there, weight 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.forms import SparseLeastSquares
from convexprune.rounding import gamma
from convexprune.solvers.least_squares.on_support import ridge_of

# of the unit diagonal, for a regular and for a nearly singular H: the Cholesky factors of its parts exist, and choices
# hardly change (measured: up to 1e-4 the errors agree to three digits, 1e-3 moves them by half a percent)
RIDGES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-9, 1e-6)}


@dataclass(frozen=True, eq=False)
class Scaled:
    """The moments (M, N) and (N, N) in float64 on the CPU, and in `dtype` on the device the solver works on.

    Raises torch.linalg.LinAlgError where the Gram matrix is not positive semidefinite.
    """

    gram64: Tensor  # (N, N)
    optimum64: Tensor  # (M, N): least squares with all weights
    scale: Tensor  # (N,)
    live: Tensor  # (N,) bool, on the working device
    ridge: float  # what inverses of parts of H want on their diagonal, in the working precision
    gram: Tensor
    optimum: Tensor
    cross: Tensor  # optimum H
    dense: Tensor  # the dense weights

    @classmethod
    def of(cls, problem: SparseLeastSquares, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Scaled:
        """Scale a problem."""
        diagonal = problem.gram.diagonal()
        live = diagonal > 0
        scale = torch.where(live, diagonal, 1.0).sqrt()
        both = live[:, None] & live[None]
        gram = torch.where(both, problem.gram / (scale[:, None] * scale), 0.0)
        gram.diagonal().fill_(1.0)
        dense = torch.where(live, problem.target * scale, 0.0)
        cross = torch.where(live, problem.cross / scale, 0.0)
        least = ridge_of(gram)
        optimum = _least_squares(gram, cross, dense, least)
        cross = optimum @ gram
        work = [tensor.to(device, dtype) for tensor in (gram, optimum, cross, dense)]
        return cls(gram, optimum, scale, live.to(device), max(RIDGES[dtype][least > 0], 4 * least), *work)

    def restored(self, weights: Tensor) -> Tensor:
        """(M, N), float64: the problem's own weights."""
        return weights.detach().cpu().double() / self.scale

    def excess(self, weights: Tensor) -> Tensor:
        """(M,): how far each neuron's value is above that of its optimum, for scaled weights in the working dtype."""
        delta = weights - self.optimum
        return ((delta @ self.gram) * delta).sum(1)


def _least_squares(gram: Tensor, cross: Tensor, dense: Tensor, ridge: float) -> Tensor:
    # no entry of H is beyond 1, so a row of dense H is known to that many roundings of the sum of its weights
    settled = (dense @ gram - cross).abs().amax(1) <= gamma(4 * len(gram) + 16) * dense.abs().sum(1)
    if bool(settled.all()):
        return dense
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return torch.where(settled[:, None], dense, torch.cholesky_solve((cross + ridge * dense).T, factor).T)
