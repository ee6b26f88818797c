"""Moments about the mean of what layers read and aim at, over any number of batches, with what rounding did to them.

With a centre c that the first rows fix (their mean, rounded),

    S = sum (x - c)(x - c)^T,    s = sum (x - c),    Cov = S / n - (s / n)(s / n)^T,    mean = c + s / n

whatever c is. x - c rounds relative to itself, so nothing cancels that the data has not: S_ii is at most 1 + n / m
times n Cov_ii if m rows made c. Two sums meet by a change of centre, which is exact:

    sum (x - c')(x - c')^T = S + s t^T + t s^T + n t t^T,    t = c - c'

A matrix of moments comes with a `doubt` e: each entry (i, j) is within e_i e_j of its exact value. By Cauchy-Schwarz
doubts of parts add up as squares, e_i^2.
Source: Chan, Golub, LeVeque, The American Statistician 1983 (shifted sums, and the pairwise update); Higham, section
3.3 (running error analysis).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from convexprune.products import OnHost, Products
from convexprune.rounding import UNIT, definite, down, gamma, least_eigenvalue, lowered, product_minus, raised
from convexprune.spectrum import LARGE, largest, smallest

HOST: Final[Products] = OnHost()
FIRST = 256  # rows whose mean is the centre
BEYOND = 1e-4  # relative: moments that are further than this from those of any data are no rounding of float32 sums


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and second moments of x (N,) over `count` samples; layers that read the same tensor share one.

    mean        (N,), within `mean_doubt` of E[x]; None where it is not known: `covariance` is then about 0
    covariance  (N, N): E[(x - E[x])(x - E[x])^T], each entry within doubt_i doubt_j
    size        (N,): no entry of `covariance` is beyond size_i size_j
    noise       (N,): a variance up to it is only rounding, of ours or of whoever computed what was given
    """

    count: int
    mean: Tensor | None
    covariance: Tensor
    doubt: Tensor
    mean_doubt: Tensor
    size: Tensor
    noise: Tensor

    @classmethod
    def given(cls, count: int, gram: Tensor, mean: Tensor | None) -> Moments:
        """Of E[x x^T] and E[x], both exact; what a mean takes off rounds once. An asymmetric matrix is averaged."""
        even = (gram + gram.T) / 2
        none = torch.zeros(len(even), dtype=torch.float64)
        # an average of two different numbers rounds, one of two equal numbers does not
        doubt = none if bool((gram == gram.T).all()) else (gamma(2) * even.abs().amax(1)).sqrt()
        if mean is None:
            return cls(count, None, even, doubt, none, _size(even), doubt.square())
        central = product_minus(mean[:, None], mean[None, :], even)
        # a second moment that is the mean's square exactly is that of a constant
        varies = central.diagonal() != 0
        central = torch.where(varies[:, None] & varies, central, 0.0)
        size = _size(central)
        squares = doubt.square() + gamma(4) * size.square() + gamma(4) * UNIT * mean.square()
        doubt = torch.where(varies, raised(squares).sqrt(), 0.0)
        return cls(count, mean, central, doubt, none, size, gamma(4) * even.diagonal().abs())

    def __repr__(self) -> str:
        """How many samples there were, and of how many inputs."""
        return f"Moments(samples={self.count}, inputs={len(self.covariance)})"

    @property
    def gram(self) -> Tensor:
        """(N, N): E[x x^T]."""
        return self.raw.covariance

    @cached_property
    def raw(self) -> Moments:
        """The same about 0, the mean put back; the layers that share this share that."""
        if self.mean is None:
            return self
        gram = torch.addr(self.covariance, self.mean, self.mean)
        height = (self.size.square() + self.mean.square()).sqrt()
        share = _share(self.mean_doubt, height)
        squares = self.doubt.square() + (2 * share + share**2 + gamma(4)) * height.square()
        doubt = raised(squares).sqrt()
        return Moments(self.count, None, gram, doubt, torch.zeros_like(doubt), raised(height), doubt.square())

    def damped(self, ridge: float) -> Moments:
        """With ridge I added."""
        more = self.covariance.clone()
        more.diagonal().add_(ridge)
        squares = self.doubt.square() + gamma(1) * more.diagonal().abs()
        size = raised((self.size.square() + ridge).sqrt())
        return Moments(self.count, self.mean, more, raised(squares).sqrt(), self.mean_doubt, size, self.noise)

    @cached_property
    def live(self) -> Tensor:
        """(N,) bool: inputs that vary; of one that certainly does not, the row and its doubt are exactly 0."""
        return (self.covariance.diagonal() != 0) | (self.doubt != 0)

    @cached_property
    def root(self) -> Tensor:
        """(N,): roots of the diagonal of G, the covariance; 1 where it is 0."""
        squares = self.covariance.diagonal()
        return torch.where(squares > 0, squares, 1.0).sqrt()

    @property
    def unit(self) -> Tensor:
        """(N, N): G with its diagonal scaled to 1, and the identity for inputs that do not vary. It is not kept."""
        unit = torch.outer(self.root, self.root)
        torch.div(self.covariance, unit, out=unit)
        unit.diagonal()[~self.live] = 1.0
        return unit

    @cached_property
    def spread(self) -> float:
        """By how much eigenvalues of the exact G are off those of `unit` in its units: |E| <= e e^T, so ||E|| <= |e|^2.

        The scaling rounds three times.
        """
        return float(raised((self.doubt / self.root).square().sum(), len(self.root))) + gamma(4) * len(self.root)

    @property
    def curvature(self) -> float:
        """At most the smallest eigenvalue of the exact G in units of `root`; certain, so -inf where it may be 0."""
        return self._least[0]

    @cached_property
    def level(self) -> Tensor:
        """(N,): a d that is one number for all inputs that vary, with the exact G - diag(d) positive semidefinite."""
        # a shade less than the smallest eigenvalue, so that a factorisation shows what is left to be definite
        return self.shrunk((1 - 1e-6) * self._least[1] * self.live.double())

    def shrunk(self, d: Tensor) -> Tensor:
        """(N,): the largest t d, t <= 1, for which the exact G - diag(t d) is certain to be positive semidefinite.

        d (N,) >= 0, and 0 where an input does not vary.
        """
        if not bool(d.any()):
            return d
        # G - t D = (1 - t) G + t (G - D), and the least eigenvalues of the two are known
        whole, least = self.curvature, self._curvature_less(d)
        share = 1.0 if least >= 0 else down(whole / (whole - least), 4 * UNIT) if whole > 0 else 0.0
        return lowered(share * d)

    def _curvature_less(self, d: Tensor) -> float:
        """At most the smallest eigenvalue of the exact G - diag(d), in units of `root`."""
        part = d / self.root.square()
        less = self.unit
        less.diagonal().sub_(part)
        found = definite(less)  # what is definite needs no eigenvalue
        found = found if found > -torch.inf else least_eigenvalue(less)
        return found - self.spread - gamma(6) * (1 + float(part.max()))

    @cached_property
    def _least(self) -> tuple[float, float]:
        """`curvature`, and the smallest eigenvalue of G among inputs that vary, at least 0; from one factorisation."""
        unit, live = self.unit, self.live
        factor, failed = torch.linalg.cholesky_ex(unit)
        # no eigenvalue is above the square of a pivot
        if bool(failed) or not float(factor.diagonal().min()) ** 2 > self.spread:
            return -torch.inf, 0.0
        found = least_eigenvalue(unit, smallest(unit, factor)) - self.spread
        del unit
        if not found > 0 or not bool(live.any()):
            return found, 0.0
        factor *= self.root[:, None]
        if bool(live.all()):
            return found, max(smallest(self.covariance, factor), 0.0)
        return found, max(smallest(self.covariance[live][:, live], factor[live][:, live]), 0.0)

    @cached_property
    def conditioning(self) -> tuple[int, float]:
        """Rank of E[x x^T], and its condition number (inf where it is singular), both at float64's rounding."""
        matrix = self.covariance if self.mean is None else torch.addr(self.covariance, self.mean, self.mean)
        size, least = len(matrix), len(matrix) * 2.0**-52
        if size >= LARGE:
            factor, failed = torch.linalg.cholesky_ex(matrix)
            low, top = (0.0, 1.0) if bool(failed) else (smallest(matrix, factor), largest(matrix))
            if low > least * top:
                return size, top / low
            del factor  # a matrix less to hold
        values = torch.linalg.eigvalsh(matrix)
        top = float(values[-1])
        rank = int((values > least * top).sum())
        return rank, top / float(values[0]) if rank == size else float("inf")


@dataclass(frozen=True, eq=False)
class CrossMoments:
    """Moments of targets y (M,) with inputs x (N,), as in `Moments`: about the means, or about 0 where mean is None.

    mean        (M,), within `mean_doubt` of E[y]
    variance    (M,), each within doubt_m^2 + relative |variance_m|
    covariance  (M, N), of y and x, each entry within doubt_m input_doubt_i + relative |covariance_mi|
    """

    mean: Tensor | None
    variance: Tensor
    covariance: Tensor
    doubt: Tensor
    input_doubt: Tensor
    mean_doubt: Tensor
    relative: float = 0.0

    def __repr__(self) -> str:
        """How many targets there were, and of how many inputs."""
        targets, inputs = self.covariance.shape
        return f"CrossMoments(targets={targets}, inputs={inputs})"

    @classmethod
    def given(cls, cross: Tensor, energies: Tensor, mean: Tensor | None, inputs: Moments) -> CrossMoments:
        """Of E[y x^T], E[y^2] and E[y], all exact; what the means take off rounds once."""
        none = torch.zeros_like(energies)
        if mean is None or inputs.mean is None:
            return cls(None, energies, cross, none, torch.zeros_like(cross[0]), none)
        central = torch.where(inputs.live, product_minus(mean[:, None], inputs.mean[None, :], cross), 0.0)
        variance = product_minus(mean, mean, energies)
        doubt, input_doubt = raised(2 * UNIT * mean.abs()), raised(2 * UNIT * inputs.mean.abs() * inputs.live)
        return cls(mean, variance, central, doubt, input_doubt, none, gamma(3))

    def rows(self, some: slice) -> CrossMoments:
        """Of some of the targets."""
        mean = None if self.mean is None else self.mean[some]
        return replace(
            self, mean=mean, variance=self.variance[some], covariance=self.covariance[some], doubt=self.doubt[some],
            mean_doubt=self.mean_doubt[some],
        )  # fmt: skip

    def raw(self, inputs: Moments) -> CrossMoments:
        """The same about 0."""
        if self.mean is None or inputs.mean is None:
            return self
        cross = torch.addr(self.covariance, self.mean, inputs.mean)
        energies = self.variance + self.mean.square()
        rows = self.variance.abs() + self.doubt.square() + self.mean.square()
        columns = inputs.size.square() + inputs.mean.square()
        share = max(_share(self.mean_doubt, rows.sqrt()), _share(inputs.mean_doubt, columns.sqrt()))
        more = 2 * share + share**2 + gamma(6)
        row = raised(self.doubt.square() + more * rows).sqrt()
        column = raised(self.input_doubt.square() + more * columns).sqrt()
        return CrossMoments(None, energies, cross, row, column, torch.zeros_like(row), self.relative + gamma(4))

    def damped(self, ridge: float, weight: Tensor) -> CrossMoments:
        """With a ridge around `weight` (M, N): cross + ridge W, energies + ridge |W|^2."""
        norms = weight.square().sum(1)
        more = gamma(weight.shape[1] + 8) * ridge  # |ridge W_mi| is at most sqrt(ridge) |W_m| sqrt(ridge)
        return CrossMoments(
            self.mean,
            self.variance + ridge * norms,
            self.covariance + ridge * weight,
            raised(self.doubt.square() + more * norms).sqrt(),
            raised(self.input_doubt.square() + more).sqrt(),
            self.mean_doubt,
            self.relative + gamma(4),
        )


class Sums:
    """Sums of x - c and of its squares, entry by entry, about a centre c that the first samples fix.

    Sums of products of the entries of two such are within share sqrt(H_i H_j) of exact, sums within share sqrt(n H_i):
    H, the `heights`, is at least the sum of squares, and `share` is counted along the way.
    """

    def __init__(self, width: int, made: Products = HOST) -> None:
        self.made, self.count, self.share = made, 0, 0.0
        zeros = torch.zeros(4, width, dtype=torch.float64, device=made.device)
        self.centre, self.sums, self.squares, self.heights = zeros

    def take(self, x: Tensor) -> Tensor:
        """Add samples x (n, width), float64, and return x - c, whose products are made next."""
        if not self.count:
            self.centre = _centre(x)
        self.count += len(x)
        x = x - self.centre
        self.sums = self.sums + x.sum(0)
        own = x.square().sum(0)
        self.squares, self.heights = self.squares + own, self.heights + own
        self.share = self.made.share(self.share, len(x))
        return x

    def on_host(self) -> Sums:
        """The same on the CPU."""
        found = Sums(0)
        found.count, found.share = self.count, self.share
        found.centre, found.sums = self.centre.cpu(), self.sums.cpu()
        found.squares, found.heights = self.squares.cpu(), self.heights.cpu()
        return found

    def moved(self, centre: Tensor) -> tuple[Sums, Tensor]:
        """The same samples about another centre, and the step t = c - c'."""
        step, n = self.centre - centre, self.count
        found = Sums(len(centre), self.made)
        found.count, found.centre = n, centre
        found.sums = self.sums + n * step
        found.squares = (self.squares + step * (self.sums + found.sums)).clamp(min=0)
        found.heights = raised((self.heights.sqrt() + n**0.5 * step.abs()).square())
        found.share = self.share + gamma(8)
        return found, step

    def __add__(self, other: Sums) -> Sums:
        """Of both, about the one centre that they have."""
        found = Sums(len(self.centre), self.made)
        found.count, found.centre = self.count + other.count, self.centre
        found.sums, found.squares = self.sums + other.sums, self.squares + other.squares
        found.heights = self.heights + other.heights
        found.share = max(self.share, other.share) + gamma(2)
        return found

    def mean(self) -> tuple[Tensor, Tensor]:
        """(width,): c + s / n, and by how much it may be off."""
        n = max(self.count, 1)
        mean = self.centre + self.sums / n
        doubt = gamma(1) * mean.abs() + (self.share + gamma(4)) * (self.heights / n).sqrt()
        return mean, torch.where(self.heights > 0, raised(doubt), 0.0)

    def doubt(self) -> Tensor:
        """(width,): a central moment of entries i and j is within doubt_i doubt_j."""
        share = 4 * self.share * (1 + self.share) + gamma(16)
        return raised(share * self.heights / max(self.count, 1)).sqrt()


class InputMoments:
    """Running sums of x (N,) and x x^T; `a + b` are those of both, whichever samples each has seen."""

    def __init__(self, width: int, made: Products = HOST) -> None:
        self.made, self.entries = made, Sums(width, made)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=made.device)

    @property
    def count(self) -> int:
        """How many samples there were."""
        return self.entries.count

    def add(self, x: Tensor) -> None:
        """Add samples x (n, in)."""
        for start in range(0, len(x), self.made.rows):
            part = self.entries.take(self.made.moved(x[start : start + self.made.rows]))
            self.made.gather(self.products, part, part)

    def __add__(self, other: InputMoments) -> InputMoments:
        """The larger's centre serves both: a move from it would cost precision."""
        first, second = (self, other) if self.count >= other.count else (other, self)
        found = InputMoments(0, self.made)
        moved, step = second.entries.moved(first.entries.centre)
        found.entries = first.entries + moved
        found.products = first.products + second.products
        found.products.addr_(moved.sums, step).addr_(step, second.entries.sums)
        return found

    def finished(self) -> Moments:
        """The moments about the mean, computed once so that layers can share the arrays."""
        n, entries = max(self.count, 1), self.entries.on_host()
        mean, mean_doubt = entries.mean()
        covariance = torch.addr(self.products.cpu(), entries.sums / n, entries.sums, alpha=-1).div_(n)
        doubt = entries.doubt()
        size = raised((covariance.diagonal().clamp(min=0) + 2 * doubt.square()).sqrt())
        return Moments(self.count, mean, covariance, doubt, mean_doubt, size, doubt.square())


class TargetMoments:
    """Running sums of y x^T, y and y^2, for targets that are not the layer's own outputs (a cascade); `a + b` too."""

    def __init__(self, out: int, width: int, made: Products = HOST) -> None:
        self.made, self.inputs, self.targets = made, Sums(width, made), Sums(out, made)
        self.products = torch.zeros(out, width, dtype=torch.float64, device=made.device)

    @property
    def count(self) -> int:
        """How many samples there were."""
        return self.inputs.count

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples x (n, in) and y (n, out)."""
        for start in range(0, len(x), self.made.rows):
            some = slice(start, start + self.made.rows)
            aimed = self.targets.take(self.made.moved(y[some]))
            self.made.gather(self.products, aimed, self.inputs.take(self.made.moved(x[some])))

    def __add__(self, other: TargetMoments) -> TargetMoments:
        """The larger's centres serve both."""
        first, second = (self, other) if self.count >= other.count else (other, self)
        found = TargetMoments(0, 0, self.made)
        x, step = second.inputs.moved(first.inputs.centre)
        y, rise = second.targets.moved(first.targets.centre)
        found.inputs, found.targets = first.inputs + x, first.targets + y
        found.products = first.products + second.products
        found.products.addr_(y.sums, step).addr_(rise, second.inputs.sums)
        return found

    def finished(self) -> CrossMoments:
        """The moments about the means."""
        n, inputs, targets = max(self.count, 1), self.inputs.on_host(), self.targets.on_host()
        mean, mean_doubt = targets.mean()
        covariance = torch.addr(self.products.cpu(), targets.sums / n, inputs.sums, alpha=-1).div_(n)
        variance = ((targets.squares - targets.sums.square() / n) / n).clamp(min=0)
        return CrossMoments(mean, variance, covariance, targets.doubt(), inputs.doubt(), mean_doubt)


def check_moments(
    gram: Tensor,
    mean: Tensor | None = None,
    cross: Tensor | None = None,
    energies: Tensor | None = None,
    target_mean: Tensor | None = None,
) -> None:
    """Raise ValueError for second moments that no data has, by more than rounding.

    A Gram matrix is symmetric, and |E[a b]| <= sqrt(E[a^2] E[b^2]) for any two of inputs, targets and the constant 1.
    """
    inputs, one = gram.diagonal().clamp(min=0).sqrt(), torch.ones(1, dtype=torch.float64)
    targets = one if energies is None else energies.clamp(min=0).sqrt()
    apart = gram - gram.T
    found = _beyond(apart, BEYOND * torch.outer(inputs, inputs))
    if found is not None:
        i, j = found
        raise ValueError(
            f"gram is not symmetric: entry ({i}, {j}) is {float(gram[i, j]):.6g} and entry ({j}, {i}) is "
            f"{float(gram[j, i]):.6g}, apart by {abs(float(apart[i, j])):.2g}; give E[x x^T]"
        )
    if energies is not None and bool((energies < 0).any()):
        raise ValueError(f"energy holds {float(energies.min()):.6g}; E[y^2] is not negative")
    for key, entries, rows, columns in (
        ("gram", gram, inputs, inputs), ("mean", mean, one, inputs), ("cross", cross, targets, inputs),
        ("target_mean", target_mean, one, targets),
    ):  # fmt: skip
        if entries is None:
            continue
        entries, limits = entries.reshape(len(rows), len(columns)), torch.outer(rows, columns)
        found = _beyond(entries, (1 + BEYOND) * limits)
        if found is not None:
            raise ValueError(
                f"{key} holds {float(entries[found]):.6g} where the second moments allow no more than "
                f"{float(limits[found]):.6g} (Cauchy-Schwarz): no data has these moments; check how they were computed"
            )


def _beyond(entries: Tensor, limits: Tensor) -> tuple[int, int] | None:
    """Where an entry is furthest beyond its limit."""
    over = entries.abs() - limits
    if not bool((over > 0).any()):
        return None
    at = int(over.argmax())
    return at // over.shape[1], at % over.shape[1]


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: int = 8192) -> Tensor:
    """x W^T + b in float64, a block of rows at a time so that x may stay in float32."""
    out = torch.empty(len(x), len(weight), dtype=torch.float64)
    for start in range(0, len(x), rows):
        out[start : start + rows] = x[start : start + rows].double() @ weight.T
    return out if bias is None else out.add_(bias)


def _centre(x: Tensor) -> Tensor:
    """About the mean; of a column of one number that number, so that what is constant is exactly so."""
    some = x[:FIRST]
    return torch.maximum(torch.minimum(some.mean(0), some.amax(0)), some.amin(0))


def _size(matrix: Tensor) -> Tensor:
    """(N,): s with |A_ij| <= s_i s_j, near the roots of the diagonal where the matrix is one of moments."""
    roots = matrix.diagonal().clamp(min=0).sqrt()
    unit = matrix.abs() / roots[:, None] / roots  # 0 / 0 is NaN, and passed over
    beyond = float(torch.nan_to_num(unit, nan=0.0, posinf=torch.inf).max()) if len(matrix) else 0.0
    if beyond < 2:
        return raised(roots * max(beyond, 1.0) ** 0.5)
    return raised(matrix.abs().amax(1).sqrt())


def _share(part: Tensor, whole: Tensor) -> float:
    """The largest of part_i / whole_i; 0 / 0 is 0."""
    there = part > 0
    return float((part[there] / whole[there]).max()) * (1 + gamma(8)) if bool(there.any()) else 0.0
