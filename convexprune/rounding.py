"""What float64 may do to a figure: allowances that are derived, not chosen.

u = 2^-53 is the unit roundoff. A sum or an inner product of n terms, in any order and with or without fused
multiply-add, is off by at most gamma_n times the sum of the absolute terms, gamma_n = n u / (1 - n u). Allowances are
multiplied by sizes that are themselves computed: `gamma(n)` is gamma_n / (1 - gamma_n) = n u / (1 - 2 n u), which
covers that too, as long as a size takes no more than n roundings.

Data that is stored (weights, samples, moments given by a user) is exact. Numbers whose squares leave the range of
float64 (below 1e-150, beyond 1e150) are out of scope.

Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002: Lemmas 3.1 and 3.3 (products of
rounding errors), (3.3) to (3.5) (inner products), section 4.2 (sums), (3.13) (matrix products), Theorems 10.3 and
10.5 (Cholesky); Demmel 1989; Rump, BIT 2006 (positive definiteness verified by Cholesky); Weyl's inequality.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

UNIT: Final = 2.0**-53
TINY: Final = 2.0**-1000  # stands for 0 in a divisor
FEW: Final = 1024  # numbers that are summed one by one


def gamma(roundings: float, unit: float = UNIT) -> float:
    """gamma_n / (1 - gamma_n) for n roundings: an allowance, relative to a computed size; inf where it says nothing."""
    lost = 2 * roundings * unit
    return roundings * unit / (1 - lost) if lost < 1 else math.inf


def down(value: float, by: float = 0.0) -> float:
    """A float at most value - by; -inf where that is no number."""
    found = math.nextafter(value - by, -math.inf)
    return -math.inf if math.isnan(found) else found


def up(value: float, by: float = 0.0) -> float:
    """A float at least value + by; inf where that is no number."""
    found = math.nextafter(value + by, math.inf)
    return math.inf if math.isnan(found) else found


def raised(sizes: Tensor, roundings: float = 4) -> Tensor:
    """Numbers >= 0 that took so many roundings, certainly not below their exact values."""
    return sizes * (1 + gamma(roundings + 1))


def lowered(sizes: Tensor, roundings: float = 4) -> Tensor:
    """Numbers >= 0 that took so many roundings, certainly not above their exact values."""
    return sizes * (1 - gamma(roundings + 1))


def summed(values: Iterable[float], beyond: float) -> float:
    """The sum, rounded once; `beyond` where it is beyond float64, or a partial sum is."""
    try:
        return math.fsum(values)
    except OverflowError:
        return beyond


def total(values: Tensor) -> float:
    """The sum, off by at most 2 u of it if no term is negative, whatever their number.

    Halves are added to halves, and what each addition loses is kept (TwoSum: Knuth; Higham, section 4.3).
    """
    rest, lost = values.detach().flatten().double(), []
    while len(rest) > FEW:
        if len(rest) % 2:
            rest = torch.cat([rest, rest.new_zeros(1)])
        one, other = rest.chunk(2)
        rest = one + other
        back = rest - one
        lost.append(float(((one - (rest - back)) + (other - back)).sum()))
    try:
        return math.fsum([*rest.tolist(), *lost])
    except (OverflowError, ValueError):  # beyond float64, or inf - inf
        return float(values.sum())


def total_doubt(values: Tensor) -> float:
    """By how much `total` may be off: u of the result, and n u^2 log2(n) of the absolute terms."""
    terms = max(values.numel(), 2)
    size = float(values.abs().sum())
    return UNIT * abs(float(values.sum())) + 2 * gamma(terms) * UNIT * (math.log2(terms) + 2) * size


def norm_above(values: Tensor) -> float:
    """At least ||values||_2."""
    return float(values.norm()) * (1 + gamma(values.numel() + 4))


def norm_below(values: Tensor) -> float:
    """At most ||values||_2."""
    return float(values.norm()) * (1 - gamma(values.numel() + 4))


def product_minus(left: Tensor, right: Tensor, whole: Tensor) -> Tensor:
    """whole - left * right, off by at most 2 u of it and u^2 of the product: the product's own rounding is kept.

    Source: Dekker 1971, Veltkamp's splitting.
    """
    product = left * right
    (a, b), (c, d) = _split(left), _split(right)
    lost = ((a * c - product) + a * d + b * c) + b * d
    return (whole - product) - lost


def exact_dot(left: Tensor, right: Tensor) -> float:
    """sum_i left_i right_i, correctly rounded: each product as a sum of two floats, and those added exactly."""
    product = left * right
    return math.fsum([*product.tolist(), *(-product_minus(left, right, product)).tolist()])


def affine_doubt(y: Tensor, off: Tensor, weight: Tensor, bias: Tensor | float = 0.0, unit: float = UNIT) -> Tensor:
    """By how much y W^T + b (n, out) may be off, computed to `unit`, where y (n, in) is off by at most `off`:

    off |W|^T + gamma_{in + 2} ((|y| + off) |W|^T + |b|)
    """
    size, terms = weight.abs(), weight.shape[1] + 2
    lost = terms * unit / (1 - 2 * terms * unit)
    shift = bias.abs() if isinstance(bias, Tensor) else abs(bias)
    return raised(off @ size.T + lost * ((y.abs() + off) @ size.T + shift), terms + 8)


def least_eigenvalue(matrix: Tensor, guess: float | None = None) -> float:
    """A number that the smallest eigenvalue of a symmetric matrix (n, n) is certainly not below.

    A shift s is certain where the Cholesky factorisation of A - s I comes to its end: its factor is exact for a matrix
    whose entries differ by at most gamma_{n+1} / (1 - gamma_{n+1}) sqrt(a_ii a_jj), so by Weyl the smallest eigenvalue
    of A is at least s - gamma(n + 1) trace(A - s I). A `guess` of s, or the eigenvalues of LAPACK, need not be right.
    inf for an empty matrix, -inf where nothing is certain. Only the lower triangle is read.
    """
    if not len(matrix):
        return math.inf
    if not bool(torch.isfinite(matrix).all()):
        return -math.inf
    found = -math.inf if guess is None else _just_below(matrix, guess)
    return found if found > -math.inf else _just_below(matrix, float(torch.linalg.eigvalsh(matrix)[0]))


def _just_below(matrix: Tensor, guess: float) -> float:
    """What `least_eigenvalue` finds at a guess."""
    size = max(float(matrix.diagonal().abs().max()), abs(guess))
    for wider in (4.0, 64.0, 1024.0):
        found = definite(matrix, guess - wider * len(matrix) * UNIT * size)
        if found > -math.inf:
            return found
    return -math.inf


def definite(matrix: Tensor, shift: float = 0.0) -> float:
    """A number that the smallest eigenvalue is certainly not below, by the factorisation of A - shift I alone, or -inf.

    It is shift, less the rounding of the factorisation.
    """
    shifted = matrix.clone()
    shifted.diagonal().sub_(shift)
    if bool(torch.linalg.cholesky_ex(shifted).info):
        return -math.inf
    trace = float(shifted.diagonal().sum())
    return down(shift, gamma(len(matrix) + 4) * trace)


def spectral_norm(matrices: Tensor) -> float:
    """At least the largest ||A||_2 of matrices (..., m, n), real or complex.

    The square of a norm is the largest eigenvalue of the smaller of A A^H and A^H A, and is certain to be at most t
    where t I less that matrix has a Cholesky factor. Its entries are inner products of k terms, off by at most
    gamma_k |a_i| |a_j|: together by gamma_k trace. A complex product counts for four real ones (Higham, Lemma 3.5).
    """
    if not bool(matrices.any()):
        return 0.0
    tall = matrices.shape[-2] >= matrices.shape[-1]
    gram = matrices.mH @ matrices if tall else matrices @ matrices.mH
    real = 4 if matrices.is_complex() else 1
    size, terms = gram.shape[-1], real * max(matrices.shape[-2:])
    trace = float(gram.diagonal(dim1=-2, dim2=-1).real.sum(-1).max())
    guess = float(torch.linalg.eigvalsh(gram).max())
    if not math.isfinite(guess):
        return math.inf
    eye = torch.eye(size, dtype=gram.dtype)
    for wider in (4.0, 64.0, 1024.0):
        most = up(guess, wider * size * UNIT * guess)
        if not bool(torch.linalg.cholesky_ex(most * eye - gram).info.any()):
            return up(math.sqrt(up(most, gamma(real * size + 8) * size * most + gamma(terms + size + 8) * trace)))
    return up(math.sqrt(trace), gamma(terms + size + 8) * math.sqrt(trace))  # by the Frobenius norm


def _split(values: Tensor) -> tuple[Tensor, Tensor]:
    """High and low halves of 26 bits, exactly."""
    wide = values * (2.0**27 + 1)
    high = wide - (wide - values)
    return high, values - high
