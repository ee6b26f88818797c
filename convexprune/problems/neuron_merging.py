"""Which neurons of a layer survive, and whom each of the others joins: a p-median problem.

    minimise  sum_j c(j, x_j)   over x with at most `keep` survivors,    c(j, i) = <a_j^2> ||w_i - w_j||^2

or, given `max_saliency`, as few survivors as possible with that sum at most it. x_j = j for a survivor; a neuron that
joins i leaves, and its outgoing weights a_j are added to a_i. <.> is the mean over the next layer's outputs, w includes
the bias. For h nondecreasing with slope at most 1, one merge changes the next layer's outputs by at most

    E (z_before - z_after)^2 <= E|x|^2 c(j, i)                                                          (Lemma 1)

and all of them together by at most E|x|^2 (sum_j sqrt c(j, x_j))^2, by the triangle inequality. With a Gram matrix G of
the inputs ||w||^2 is w G w^T, and E|x|^2 is 1: tighter, and still certified.
Source: Srinivas, Babu, BMVC 2015, Lemma 1 and eq. 8; the p-median bound is Cornuejols, Fisher, Nemhauser 1977.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from convexprune.extras import extras
from convexprune.forms import MergingProblem
from convexprune.moments import Moments, check_moments
from convexprune.options import number, numbers, optional, whole
from convexprune.problem import Formulation
from convexprune.quadratic import Quadratic
from convexprune.rounding import down, gamma, lowered, raised, total, total_doubt, up

BLOCK = 2**25  # numbers in a block of distances
LARGEST = 400  # neurons whose integer program is written down


@dataclass(frozen=True, eq=False)
class NeuronMerging(MergingProblem):
    """Merge the neurons of a layer.

    incoming      (n, in): a neuron's weights, its bias as the last column
    outgoing      (out, n): what the next layer makes of it
    keep          at most so many survivors; or
    max_saliency  the largest sum of saliencies, with as few survivors as can be
    gram          (in, in): E[x x^T] of the inputs, the constant 1 last where there is a bias; None: no data

    A point x is (n, 1): the number of the survivor that each neuron joins, its own if it survives.
    Raises ValueError for shapes that do not fit, and unless exactly one of keep and max_saliency is given.
    """

    incoming: Tensor
    outgoing: Tensor
    keep: int | None = None
    max_saliency: float | None = None
    gram: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("incoming", "outgoing"):
            numbers(name, getattr(self, name))
            value = getattr(self, name).detach().cpu().double()
            if value.ndim != 2 or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be a matrix of finite numbers")
            object.__setattr__(self, name, value)
        n, width = self.incoming.shape
        if self.outgoing.shape[1] != n:
            raise ValueError(f"outgoing has {self.outgoing.shape[1]} columns for {n} neurons")
        if (self.keep is None) == (self.max_saliency is None):
            raise ValueError("give either keep, the number of survivors, or max_saliency")
        optional(whole(1, n))("keep", self.keep)
        optional(number(0))("max_saliency", self.max_saliency)
        optional(numbers)("gram", self.gram)
        if self.gram is not None and tuple(self.gram.shape) != (width, width):
            raise ValueError(f"gram has shape {tuple(self.gram.shape)}, expected {(width, width)}")
        if self.gram is not None:
            if not bool(torch.isfinite(self.gram).all()):
                raise ValueError("gram holds NaN or inf; give finite numbers")
            check_moments(self.gram.detach().cpu().double())

    @property
    def shape(self) -> tuple[int, int]:
        """(n, 1)."""
        return len(self.incoming), 1

    @property
    def dense(self) -> Tensor:
        """(n, 1): everyone survives."""
        return torch.arange(len(self.incoming), dtype=torch.float64)[:, None]

    @cached_property
    def importance(self) -> Tensor:
        """(n,): <a_j^2>."""
        return self.outgoing.square().mean(0)

    @cached_property
    def features(self) -> Tensor:
        """(n, d): rows whose squared distances are those of the neurons."""
        if self.gram is None:
            return self.incoming
        # in units of the diagonal, so that inputs of all sizes are treated alike
        inputs = self._quadratic.inputs
        values, vectors = torch.linalg.eigh(inputs.unit)
        rows: Tensor = (self.incoming * inputs.root) @ (vectors * values.clamp(min=0).sqrt())
        return rows

    def saliencies(self, x: Tensor) -> Tensor:
        """(n,): c(j, x_j), to the nearest; 0 for survivors."""
        return self._judged(x)[0]

    def survivors(self, x: Tensor) -> Tensor:
        """The numbers of the neurons that x keeps, rising."""
        flat = x.flatten().round().long()
        return (flat == torch.arange(len(flat))).nonzero()[:, 0]

    def merged(self, x: Tensor) -> Tensor:
        """(out, n): the outgoing weights after the merges; 0 for those who left."""
        joined = self._joined(x)
        if joined is None:
            raise ValueError("x names no survivors")
        return torch.zeros_like(self.outgoing).index_add_(1, joined, self.outgoing)

    def change(self, x: Tensor) -> float:
        """(sum_j sqrt c(j, x_j))^2: times E|x|^2, or 1 with a Gram matrix, a limit of the mean square change of z.

        Rounded up.
        """
        saliencies, doubts = self._judged(x)
        roots = float(raised((saliencies + doubts).sqrt()).sum())
        return up(roots * roots, gamma(2 * len(saliencies) + 8) * roots * roots) if roots else 0.0

    def value(self, x: Tensor) -> float:
        """The summed saliency; with `max_saliency` the number of survivors."""
        if self._joined(x) is None:
            return math.inf
        return total(self.saliencies(x)) if self.keep is not None else float(len(self.survivors(x)))

    def rounding(self, x: Tensor) -> float:
        """By how much `value` may be off."""
        saliencies, doubts = self._judged(x)
        return up(float(raised(doubts.sum(), len(doubts))), total_doubt(saliencies)) if self.keep is not None else 0.0

    def violation(self, x: Tensor) -> float:
        """Survivors beyond `keep`, over n; or saliency beyond `max_saliency`, relative; inf if x is no assignment.

        Rounded up.
        """
        if self._joined(x) is None:
            return math.inf
        if self.keep is not None:
            return max(len(self.survivors(x)) - self.keep, 0) / len(x)
        assert self.max_saliency is not None  # by __post_init__
        saliencies, doubts = self._judged(x)
        over = total(torch.cat([saliencies, doubts, torch.tensor([-self.max_saliency], dtype=torch.float64)]))
        if over <= 0:
            return 0.0
        return up(over, gamma(8) * (over + self.max_saliency)) / self.max_saliency if self.max_saliency else math.inf

    def lower_bound(self, witness: Tensor | None) -> float:
        """The Lagrangian bound at multipliers (n,), one for each neuron; any numbers at all are valid.

        With rho_i = sum_j min(0, c(j, i) - v_j):  sum_j v_j + the `keep` smallest rho_i <= value; with `max_saliency`
        the smallest number of survivors for which that does not exceed it. Raises ValueError for another shape.
        """
        if witness is None:
            return 0.0 if self.keep is not None else 1.0
        v = witness.detach().cpu().double().flatten()
        if len(v) != len(self.incoming):
            raise ValueError(f"witness has {len(v)} numbers for {len(self.incoming)} neurons")
        if not bool(torch.isfinite(v).all()):
            return self.lower_bound(None)
        v = v.clamp(min=0)  # a negative one only lowers the bound
        reached, whole = self._reduced(v).sort().values.cumsum(0), total(v)
        bounds = whole + reached - gamma(len(v) + 8) * (whole - reached)
        if self.keep is not None:
            return max(down(float(bounds[self.keep - 1])), 0.0)
        assert self.max_saliency is not None
        fits = bounds <= self.max_saliency
        return float(fits.to(torch.int8).argmax() + 1) if bool(fits.any()) else float(len(v))

    def to_cvxpy(self) -> Formulation:
        """The p-median integer program. Raises ValueError beyond 400 neurons: it has n^2 variables."""
        with extras():
            import cvxpy as cp
        import numpy as np

        n = len(self.incoming)
        if n > LARGEST:
            raise ValueError(
                f"{n} neurons make an integer program of {n * n:,} variables; at most {LARGEST} are written"
            )
        cost = (self.importance[:, None] * _distances(self.features, self.features)).numpy()
        lives, joins = cp.Variable(n, boolean=True, name="lives"), cp.Variable((n, n), nonneg=True, name="joins")
        saliency = cp.sum(cp.multiply(cost, joins))
        rules = [cp.sum(joins, axis=1) == 1, joins <= cp.reshape(lives, (1, n), order="C"), cp.diag(joins) == lives]
        if self.keep is not None:
            program = cp.Problem(cp.Minimize(saliency), [*rules, cp.sum(lives) <= self.keep])
        else:
            program = cp.Problem(cp.Minimize(cp.sum(lives)), [*rules, saliency <= self.max_saliency])
        numbers = np.arange(n, dtype=float)
        return Formulation(program, cp.reshape(joins @ numbers, self.shape, order="C"), lambda: None)

    def _joined(self, x: Tensor) -> Tensor | None:
        """(n,): whom each joins; None unless all join survivors."""
        flat = x.detach().cpu().double().flatten()
        if len(flat) != len(self.incoming) or not bool(torch.isfinite(flat).all()):
            return None
        whole = flat.round()
        # a solver's booleans are only nearly whole
        if bool(((flat - whole).abs() > 1e-3).any() | (whole < 0).any() | (whole >= len(flat)).any()):
            return None
        joined = whole.long()
        return joined if bool((joined[joined] == joined).all()) else None

    @cached_property
    def _quadratic(self) -> Quadratic:
        """(w_i - w_j) G (w_i - w_j) as a function of w_i."""
        assert self.gram is not None
        return Quadratic(self.incoming, Moments.given(1, self.gram.detach().cpu().double(), None), None)

    def _judged(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n,), (n,): c(j, x_j), and by how much each may be off: from differences, so that nothing cancels."""
        joined = self._joined(x)
        if joined is None:
            return torch.full_like(self.importance, math.inf), torch.zeros_like(self.importance)
        if self.gram is None:
            apart = (self.incoming[joined] - self.incoming).square().sum(1)
            doubt = gamma(self.incoming.shape[1] + 6) * apart
        else:
            step = self._quadratic.at(self.incoming[joined])
            apart, doubt = step.values.clamp(min=0), step.doubts
        few = gamma(len(self.outgoing) + 6)
        return self.importance * apart, raised(self.importance * (doubt * (1 + few) + few * apart))

    @cached_property
    def _apart(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows, their images, squares (n,) and doubts (n,): |w_i - w_j|^2 is q_i + q_j - 2 <row_i, image_j>, within
        e_i + e_j.

        Of rows about their mean: distances stay, and cancel less. A sum of three parts with terms of n_i + n_j.
        """
        rows = self.incoming - self.incoming.mean(0)
        roundings = gamma(2 * rows.shape[1] + 20)
        if self.gram is None:
            squares = rows.square().sum(1)
            return rows, rows, squares, raised(2 * roundings * squares, len(rows[0]) + 4)
        inputs = self._quadratic.inputs
        images = rows @ inputs.covariance
        reach, blur = rows.abs() @ inputs.size, rows.abs() @ inputs.doubt
        doubts = 2 * (roundings * reach.square() + blur.square())
        return rows, images, (images * rows).sum(1), raised(doubts, 2 * len(rows[0]) + 8)

    def _reduced(self, v: Tensor) -> Tensor:
        """(n,): rho_i, certainly not above its exact value, in blocks of columns."""
        rows, images, squares, doubts = self._apart
        least = lowered(self.importance, len(self.outgoing) + 4)
        n, found = len(v), []
        size = max(1, BLOCK // n)
        for begin in range(0, n, size):
            part = slice(begin, begin + size)
            sums = (squares - doubts)[:, None] + (squares - doubts)[part]
            distance = torch.addmm(sums, images, rows[part].T, alpha=-2).clamp_(min=0)
            found.append((least[:, None] * distance - v[:, None]).clamp(max=0).sum(0))
        return torch.cat(found) * (1 + gamma(n + 8))


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """(R, O): squared distances."""
    squares = rows.square().sum(1)[:, None] + others.square().sum(1)
    return torch.addmm(squares, rows, others.T, alpha=-2).clamp_(min=0)
