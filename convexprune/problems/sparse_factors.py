"""A layer as the product of two sparse matrices.

    minimise  E|A (B u) + b - y|^2   over A (M, r), B (r, N) with at most k nonzeros together, and any b
           =  tr(W G W^T) - 2 <C, W> + energy,   W = A B, for the best b

G and C are those of `Reconstruction`. With A = I it is that problem, so nothing is lost but A's ones; with a small r
it is a low-rank factorisation, with r > M a sparse matrix plus a low-rank one. It is not convex, but in each factor it
is sparse least squares: A, beside B, sees a layer with Gram matrix B G B^T and cross moments C B^T; B, beside A, has
the Hessian (A^T A) x G (Kronecker product).
Source: Boza, Macko, ICLR 2025 (double sparse factorization), eq. 2, there with G = I after a scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from convexprune.forms import FactoredLeastSquares
from convexprune.layer import Layer, check_layer
from convexprune.moments import Moments
from convexprune.options import optional, whole
from convexprune.patterns import Unstructured
from convexprune.problem import Formulation, Misfit
from convexprune.problems.reconstruction import Reconstruction
from convexprune.rounding import down, gamma, least_eigenvalue, raised, up


@dataclass(frozen=True, eq=False)
class SparseFactors(FactoredLeastSquares):
    """The best approximation of a layer by the product of two sparse matrices.

    A point is both factors, one above the other, the bias as the last column: [[A, b], [B^T, 0]], (M + N, r) or, with a
    bias, (M + N, r + 1). `factors` takes it apart, `product` is the layer's weights that it stands for. It is no point
    of the layer's own shape, so `factorise` writes it back, not `prune`.

    Args:
        layer: Its moments are all that the problem reads.
        keep: How many entries of A and B together may be nonzero: a count (an int), or a share of the layer's weights.
        inner: r, the number of rows of B; None: the smaller of M and N, with which every W is a product.

    Raises:
        ValueError: For a `keep` or an `inner` that does not fit the layer.

    Source:
        Boza, Macko, ICLR 2025, eq. 2.

    Example:
        >>> import torch, convexprune as cp
        >>> weight = torch.outer(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, -1.0, 1.0, -1.0]))
        >>> problem = cp.SparseFactors(cp.Layer.from_moments(weight, torch.eye(4)), keep=8, inner=1)
        >>> solution = cp.solve(problem)  # a matrix of rank 1 has 16 weights, its two factors have 8
        >>> round(solution.certificate.value, 6), solution.certificate.violation
        (0.0, 0.0)
    """

    needs_samples: ClassVar[bool] = False  # whether it reads Layer.inputs

    layer: Layer
    keep: float | int
    inner: int | None = None

    def __post_init__(self) -> None:
        check_layer(self.layer)
        name = self.layer.name
        optional(whole(1))(f"layer {name!r}: inner", self.inner)
        pattern = Unstructured(self.keep)
        try:
            pattern.quota((self.target.shape[0], self.target.shape[1]))
        except ValueError as error:
            raise Misfit(f"layer {name!r}: {error}") from error

    @property
    def target(self) -> Tensor:
        """(M, N): the dense layer's weights."""
        return self.layer.weight

    @property
    def width(self) -> int:
        """r."""
        return min(self.target.shape) if self.inner is None else self.inner

    @property
    def count(self) -> int:
        """The largest number of nonzeros."""
        return Unstructured(self.keep).quota((self.target.shape[0], self.target.shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        """(M + N, r), or (M + N, r + 1) where the layer has a bias."""
        return self.target.shape[0] + self.target.shape[1], self.width + (self.layer.bias is not None)

    @cached_property
    def dense(self) -> Tensor:
        """The dense layer as a point: I and W, or W and I; the nearest of rank r where r is smaller than both."""
        (out, into), width = self.target.shape, self.width
        if width < min(out, into):
            top = torch.linalg.eigh(self._outputs).eigenvectors[:, -width:]
            return self.joined(top, top.T @ self.target)
        one, other = torch.eye(min(out, into), dtype=torch.float64), self.target
        left, right = (one, other) if out <= into else (other, one)
        return self.point(left, right, self.layer.bias)

    @property
    def gram(self) -> Tensor:
        """G (N, N)."""
        return self._whole.gram

    @property
    def cross(self) -> Tensor:
        """C (M, N)."""
        return self._whole.cross

    def left(self, right: Tensor, count: int) -> Reconstruction:
        """The reconstruction of A (M, r) beside B (r, N)."""
        through = right @ self.gram @ right.T
        cross, none = self.cross @ right.T, torch.zeros(len(self.target), len(right), dtype=torch.float64)
        layer = Layer.from_moments(none, (through + through.T) / 2, cross, self._whole.energies, name=self.layer.name)
        return Reconstruction(layer, Unstructured(count))

    def single(self, count: int) -> Reconstruction:
        """The reconstruction of the layer by one matrix."""
        return Reconstruction(self.layer, Unstructured(count))

    def joined(self, left: Tensor, right: Tensor) -> Tensor:
        """The point of A and B, with the best bias."""
        left, right = left.detach().cpu().double(), right.detach().cpu().double()
        return self.point(left, right, None if self.layer.bias is None else self.layer.best_bias(left @ right))

    def point(self, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        """The point of A (M, s) and B (s, N), s <= r, and b (M,); None for a layer without a bias."""
        factors = _padded(torch.cat([left, right.T]), (sum(self.target.shape), self.width))
        if bias is None:
            return factors
        return torch.cat([factors, _padded(bias[:, None], (len(factors), 1))], 1)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (M, r) and B (r, N) of a point, float64."""
        x = x.detach().cpu().double()
        return x[: len(self.target), : self.width], x[len(self.target) :, : self.width].T

    def bias(self, x: Tensor) -> Tensor | None:
        """b (M,) of a point, float64; None where the layer has none."""
        return None if self.layer.bias is None else x.detach().cpu().double()[: len(self.target), self.width]

    def product(self, x: Tensor) -> Tensor:
        """(M, P): the layer's weights A B, to the nearest, the bias as the last column."""
        left, right = self.factors(x)
        bias = self.bias(x)
        return left @ right if bias is None else torch.cat([left @ right, bias[:, None]], 1)

    def value(self, x: Tensor) -> float:
        """E|A (B u) + b - y|^2, to the nearest; inf for a point that is not finite."""
        product = self.product(x)
        return self._whole.value(product) if bool(torch.isfinite(x).all()) else math.inf

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        product, blur = self.product(x), self._blur(x)
        errors = raised(self.layer.squared_errors(product).clamp(min=0).sqrt())
        own = self._whole.rounding(product)
        return up(own, float(raised((2 * errors * blur + blur.square()).sum(), len(blur) + 4)))

    def violation(self, x: Tensor) -> float:
        """Nonzeros beyond the count, and under the bias, as a fraction of the layer's weights."""
        if not bool(torch.isfinite(x).all()):
            return math.inf
        out = len(self.target)
        held = sum(int(factor.count_nonzero()) for factor in self.factors(x))
        stray = int(x[out:, self.width :].count_nonzero())
        return (max(held - self.count, 0) + stray) / self.target.numel()

    def product_errors(self, x: Tensor) -> Tensor:
        """(M,): >= || A (B X) + b - Y || over the samples for each output, with what rounding may hide."""
        errors = self.layer.error_norms(self.product(x))
        return raised(errors + math.sqrt(self.layer.samples) * self._blur(x))

    def lower_bound(self, witness: object) -> float:
        """What no product of its rank can be below: the sum of the smallest eigenvalues of K = W G W^T.

        A B has rank at most rho = min(r, k // 2): a row of B counts only with a nonzero in it and in its column of A.
        For any L and t with K + L L^T >= t I, every W' of rank rho leaves at least

            (M - rho) t - |L|_F^2

        of the layer's own outputs. L is made of computed eigenvectors; that t is certain is for a factorisation to say.
        0 where other targets are given, and where a product can be any matrix. No witness is read.
        """
        rank = min(self.width, self.count // 2)
        if self.layer.aimed is not None or rank >= min(self.target.shape):
            return 0.0
        outputs, free = self._outputs, len(self.target) - rank
        values, vectors = torch.linalg.eigh(outputs)
        level = float(values[free - 1])
        lift = vectors * (level - values).clamp(min=0).sqrt()
        paid = float(lift.square().sum()) * (1 + gamma(lift.numel() + 4))
        raised_outputs = outputs + lift @ lift.T
        # what the sum rounds to, and what the moments may be off by: entry (i, j) by at most f_i f_j
        few = gamma(len(lift) + 4) * (paid + float(outputs.diagonal().sum()))
        doubt = few + float(raised(self._output_doubts.square().sum(), len(outputs)))
        height = down(least_eigenvalue(raised_outputs, level), doubt)
        return max(0.0, down(free * height - paid, gamma(8) * (free * height + paid))) if height > 0 else 0.0

    def to_cvxpy(self) -> Formulation:
        """Raises ValueError: the product of two unknowns is not convex. `left(B, count).to_cvxpy()` is its half."""
        raise ValueError(
            f"layer {self.layer.name!r}: SparseFactors multiplies two unknowns, which CVXPY does not take; write down "
            "one half with the other fixed, problem.left(right, count).to_cvxpy()"
        )

    @cached_property
    def _whole(self) -> Reconstruction:
        """The same layer by one matrix: it judges the product."""
        return Reconstruction(self.layer, Unstructured(self.keep))

    @cached_property
    def _outputs(self) -> Tensor:
        """K (M, M): the moments of the layer's own outputs."""
        found = self.target @ self._inputs.covariance @ self.target.T
        return (found + found.T) / 2

    @cached_property
    def _output_doubts(self) -> Tensor:
        """f (M,): every entry of K is within f_i f_j of exact."""
        inputs, few = self._inputs, gamma(2 * self.target.shape[1] + 8)
        blur, reach = self.target.abs() @ inputs.doubt, self.target.abs() @ inputs.size
        return raised((blur.square() + few * reach.square()).sqrt(), self.target.shape[1] + 8)

    @property
    def _inputs(self) -> Moments:
        """Those of the inputs, about the mean where there is a bias."""
        return self.layer.quadratic.inputs

    def _blur(self, x: Tensor) -> Tensor:
        """(M,): at least the root mean square over the samples of what rounding does to an output in `product`."""
        left, right = self.factors(x)
        inputs = raised(self.layer.affine_gram_above.diagonal()[: right.shape[1]].sqrt())
        return raised(gamma(self.width + 2) * (left.abs() @ (right.abs() @ inputs)), sum(right.shape) + 8)


def _padded(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix with zeros below and to the right."""
    found = matrix.new_zeros(shape)
    found[: matrix.shape[0], : matrix.shape[1]] = matrix
    return found
