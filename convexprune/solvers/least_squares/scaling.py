"""A reconstruction problem in coordinates where every input has second moment 1.

    w_i = W_i sqrt(G_ii),    H_ij = G_ij / sqrt(G_ii G_jj),    value = delta H delta^T + constant,   delta = w - optimum

Inputs that are constantly zero cannot change the value: they are taken out (H = identity there, weight 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from convexprune.forms import GroupedLeastSquares, SparseLeastSquares
from convexprune.rounding import gamma
from convexprune.solvers.least_squares.grams import Grams
from convexprune.solvers.least_squares.on_support import ridge_of

# of the unit diagonal, for a regular and for a nearly singular H: the Cholesky factors of its parts exist, and choices
# hardly change (measured: up to 1e-4 the errors agree to three digits, 1e-3 moves them by half a percent)
RIDGES = {torch.float32: (1e-4, 1e-3), torch.float64: (1e-9, 1e-6)}


@dataclass(frozen=True, eq=False)
class Scaled:
    """The moments in float64 on the CPU, and in `dtype` on the device the solver works on.

    Every group is in a scale of its own: `grams.rows` makes of its figures those of its neurons.

    Raises torch.linalg.LinAlgError where the Gram matrix is not positive semidefinite.
    """

    grams64: Grams
    optimum64: Tensor  # (M, N): least squares with all weights
    scale: Tensor  # (G, N)
    live: Tensor  # (G, N) bool, on the working device
    ridge: Tensor  # (G, 1), on it: what inverses of parts of H want on their diagonal, in the working precision
    grams: Grams
    optimum: Tensor
    cross: Tensor  # optimum H
    dense: Tensor  # the dense weights

    @classmethod
    def of(cls, problem: GroupedLeastSquares, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Scaled:
        """Scale a problem."""
        each = [_Group.of(part) for part in problem.parts]
        gram, scale, live, optimum, cross, dense = (
            _below([getattr(group, name) for group in each])
            for name in ("gram", "scale", "live", "optimum", "cross", "dense")
        )
        grams = Grams.of(gram, len(dense))
        ridges = [max(RIDGES[dtype][group.ridge > 0], 4 * group.ridge) for group in each]
        ridge = torch.tensor(ridges, dtype=dtype, device=device)[:, None]
        work = [tensor.to(device, dtype) for tensor in (optimum, cross, dense)]
        return cls(grams, optimum, scale, live.to(device), ridge, grams.to(device, dtype), *work)

    def restored(self, weights: Tensor) -> Tensor:
        """(M, N), float64: the problem's own weights."""
        return weights.detach().cpu().double() / self.grams64.rows(self.scale)

    def excess(self, weights: Tensor) -> Tensor:
        """(M,): how far each neuron's value is above that of its optimum, for scaled weights in the working dtype."""
        delta = weights - self.optimum
        return (self.grams.product(delta) * delta).sum(1)


class _Group(NamedTuple):
    """One group in float64, what is said of the group itself with a leading dimension of 1."""

    gram: Tensor
    scale: Tensor
    live: Tensor
    optimum: Tensor
    cross: Tensor
    dense: Tensor
    ridge: float

    @classmethod
    def of(cls, part: SparseLeastSquares) -> _Group:
        diagonal = part.gram.diagonal()
        live = diagonal > 0
        scale = torch.where(live, diagonal, 1.0).sqrt()
        gram = torch.where(live[:, None] & live, part.gram / (scale[:, None] * scale), 0.0)
        gram.diagonal().fill_(1.0)
        dense = torch.where(live, part.target * scale, 0.0)
        cross = torch.where(live, part.cross / scale, 0.0)
        ridge = ridge_of(gram)
        optimum = _least_squares(gram, cross, dense, ridge)
        return cls(gram[None], scale[None], live[None], optimum, optimum @ gram, dense, ridge)


def _below(tensors: list[Tensor]) -> Tensor:
    """One below the other; a large layer is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _least_squares(gram: Tensor, cross: Tensor, dense: Tensor, ridge: float) -> Tensor:
    # no entry of H is beyond 1, so a row of dense H is known to that many roundings of the sum of its weights
    settled = (dense @ gram - cross).abs().amax(1) <= gamma(4 * len(gram) + 16) * dense.abs().sum(1)
    if bool(settled.all()):
        return dense
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    return torch.where(settled[:, None], dense, torch.cholesky_solve((cross + ridge * dense).T, factor).T)
