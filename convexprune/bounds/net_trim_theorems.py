"""Net-Trim's theorems. X (n, N) are a layer's inputs, Y = relu(X W^T), U the pruned weights; a bias is a column of 1.

Source: Aghasi, Abdi, Nguyen, Romberg, NIPS 2017: Propositions 1, 2 and S.1, Theorems 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convexprune.bounds.statement import Figure, Hypothesis, Statement
from convexprune.extras import extras
from convexprune.rounding import (
    UNIT,
    affine_doubt,
    down,
    exact_dot,
    gamma,
    least_eigenvalue,
    raised,
    total,
    total_doubt,
    up,
)

PAPER = "Net-Trim, NIPS 2017"


def proposition_1(inputs: Tensor, outputs: Tensor, weights: Tensor, radius: float) -> Statement:
    """If U is in the ball where Y > 0 and X U^T <= 0 elsewhere, then || relu(X U^T) - Y ||_F <= radius.

    inputs (n, P), outputs (n, M) = Y >= 0, weights U (M, P). Raises ValueError for other outputs.
    """
    x, y, u = (part.detach().cpu().double() for part in (inputs, outputs, weights))
    if tuple(y.shape) != (len(x), len(u)) or not bool((y >= 0).all()):
        raise ValueError(f"outputs of shape {tuple(y.shape)}: give Y >= 0 of shape {(len(x), len(u))}")
    before, off = x @ u.T, affine_doubt(x, torch.zeros_like(x), u)
    active, away = y > 0, raised(off + UNIT * (before - y).abs())
    distance, above = Figure.norm((before - y)[active], away[active]), _largest(x, u, before, off, ~active)
    measured = Figure.norm(before.relu() - y, away)
    hypotheses = (
        Hypothesis(
            f"||(X U^T - Y)_active||_F = {distance.value:.6g} <= {radius:.6g}", distance.at_most(Figure(radius))
        ),
        Hypothesis(f"X U^T <= 0 where Y = 0: the largest is {above:.2g}", above <= 0),
    )
    return Statement("Proposition 1", PAPER, hypotheses, radius, measured.value, measured.doubt)


def _largest(x: Tensor, u: Tensor, before: Tensor, off: Tensor, where: Tensor) -> float:
    """The largest of some entries of X U^T, with its own sign; 0 if there are none."""
    before = before.clone()
    for row, neuron in (where & (before.abs() <= off)).nonzero().tolist():
        before[row, neuron] = exact_dot(x[row], u[neuron])
    return float(before[where].max()) if bool(where.any()) else 0.0


@dataclass(frozen=True, eq=False)
class LinkNormalised:
    """A ReLU chain in which every weight matrix has ||W_l||_1 = 1, and the factors that it was divided by.

    W_l' = W_l / s_l,   b_l' = b_l / (s_1 ... s_l),   Y_l' = Y_l / (s_1 ... s_l),   s_l = ||W_l||_1, rounded up

    ReLU is positively homogeneous, so outputs and errors of the two networks differ by the factor s_1 ... s_L alone.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> LinkNormalised:
        """Normalise the matrices (out, in) of a chain. Raises ValueError for one that is all zero."""
        scales = tuple(_size(weight.detach().cpu().double(), 8) for weight in weights)
        if 0 in scales:
            raise ValueError(f"weights {scales.index(0)} are all zero; the network behind them is a constant")
        return cls((), (), scales).like(weights, biases)

    def like(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> LinkNormalised:
        """Divide another network's weights, such as the pruned network's, by the factors of this one."""
        found, shifts, total = [], [], 1.0
        for weight, bias, size in zip(weights, biases, self.scales, strict=True):
            total *= size
            found.append(weight.detach().cpu().double() / size)
            shifts.append(None if bias is None else bias.detach().cpu().double() / total)
        return LinkNormalised(tuple(found), tuple(shifts), self.scales)

    @property
    def factor(self) -> float:
        """s_1 ... s_L: an error of the normalised network times this factor is an error of the original network."""
        return math.prod(self.scales)

    def outputs(self, x: Tensor, linear_last: bool = False) -> list[Tensor]:
        """Y_1', ..., Y_L' on inputs (n, in), float64; with `linear_last` the last layer has no ReLU."""
        found = [z for z, _ in self.before(x)]
        return [*(z.relu() for z in found[:-1]), found[-1] if linear_last else found[-1].relu()]

    def before(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The pre-activations of each layer, and by how much each entry may be off."""
        z, found = (x.detach().cpu().double(), torch.zeros(x.shape, dtype=torch.float64)), []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            z = _layer(z[0].relu() if index else z[0], z[1], weight, bias)
            found.append(z)
        return found


def theorem_1(
    dense: LinkNormalised, pruned: LinkNormalised | Sequence[Tensor], biases: Sequence[Tensor | None] | None, x: Tensor,
    errors: Sequence[float], linear_last: bool = False,
) -> Statement:  # fmt: skip
    """Parallel: || Yhat_L - Y_L ||_F <= sum_l eps_l in a link-normalised network; with a linear last layer, Prop. S.1.

    pruned   the layers' pruned weights in the normalised network, ||What_l||_1 <= 1. An optimum of Net-Trim without
             biases satisfies this; with biases it usually does
    errors   eps_l: each layer's error on the dense network's inputs, in the normalised network

    Raises ValueError for pruned weights of other shapes.
    """
    thin = _chain(dense, pruned, biases)
    hypotheses = (*_normal(dense, thin), *_layer_errors(dense, thin, x, errors, linear_last))
    measured = _apart(thin.before(x)[-1], dense.before(x)[-1], linear_last)
    name = "Proposition S.1 (parallel)" if linear_last else "Theorem 1"
    return Statement(name, PAPER, hypotheses, up(math.fsum(errors)), *measured)


def theorem_2(
    dense: LinkNormalised, pruned: LinkNormalised | Sequence[Tensor], biases: Sequence[Tensor | None] | None, x: Tensor,
    first: float, gammas: Sequence[float], linear_last: bool = False,
) -> Statement:  # fmt: skip
    """Cascade: || Yhat_L - Y_L ||_F <= eps_1 sqrt(gamma_2 ... gamma_L) in a link-normalised network.

    first    eps_1
    gammas   gamma_l >= 1 of the layers after the first

    Raises ValueError for another number of them, and for pruned weights of other shapes.
    """
    thin, most = _chain(dense, pruned, biases), min(gammas, default=1.0)
    if len(gammas) != len(dense.weights) - 1:
        raise ValueError(f"{len(gammas)} gammas for {len(dense.weights)} layers; give one for each but the first")
    ours, theirs = thin.before(x), dense.before(x)
    changes = [
        _apart(mine, its, linear_last and index == len(gammas))
        for index, (mine, its) in enumerate(zip(ours, theirs, strict=True))
    ]
    hypotheses = [
        *_normal(dense, None),
        Hypothesis(f"every gamma is at least 1: {most:g}", most >= 1),
        Hypothesis(
            f"the first layer is within eps_1: {changes[0].value:.6g} <= {first:.6g}", changes[0].at_most(Figure(first))
        ),
    ]
    for index, factor in enumerate(gammas, start=1):
        read, off = ours[index - 1]
        now = _layer(read.relu(), off, dense.weights[index], dense.biases[index])
        limit = _allowed(now, theirs[index], linear_last and index == len(gammas)).times(math.sqrt(factor))
        text = f"layer {index + 1} is within its cascade's constraints: {changes[index].value:.6g} <= {limit.value:.6g}"
        hypotheses.append(Hypothesis(text, changes[index].at_most(limit)))
    guaranteed = up(first * math.sqrt(math.prod(gammas)) * (1 + gamma(len(gammas) + 8)))
    name = "Proposition S.1 (cascade)" if linear_last else "Theorem 2"
    return Statement(name, PAPER, tuple(hypotheses), guaranteed, *changes[-1])


def sample_count(sparsity: int, inputs: int, mu: float = 2.0) -> int:
    """Theorem 3: number of N(0, 1) samples that make a `sparsity`-sparse w* the unique optimum at eps = 0.

    n = (11 s + 7) mu log N, with probability at least 1 - N^(1 - mu). Raises ValueError unless mu > 1 and s <= N.
    """
    if not mu > 1:
        raise ValueError(f"mu is {mu}; it must be > 1, or nothing is guaranteed")
    if not 1 <= sparsity <= inputs:
        raise ValueError(f"sparsity is {sparsity}; it must be between 1 and the {inputs} inputs")
    return math.ceil((11 * sparsity + 7) * mu * math.log(inputs))


@dataclass(frozen=True)
class Uniqueness:
    """Proposition 2 for one neuron: the margin of the best dual certificate, and whether it proves uniqueness.

    margin   distance of Lambda from its limits off the supports, less what the solver and rounding may hide
    full     whether the matrix restricted to both supports has full column rank, certainly

    A positive margin and full rank prove uniqueness.
    """

    margin: float
    full: bool

    @property
    def unique(self) -> bool:
        """True if w is proven to be the only optimum."""
        return self.margin > 0 and self.full


def proposition_2(inputs: Tensor, target: Tensor, w: Tensor) -> Uniqueness:
    """Is w (P,) the unique minimiser of ||w||_1 subject to X w = y where y > 0 and X w <= 0 elsewhere?

    It is if some Lambda in the row space of [X_active 0; X_rest -I] has Lambda_i = sign(w_i) on the support of w,
    |Lambda_i| < 1 off it, 0 on the support of the slacks s = X_rest w, > 0 off it, and those columns are independent.
    The largest margin is a linear program. inputs (n, P), target (n,): taken to be relu(X w) in exact arithmetic.

    Its solution meets the equations up to a residual r alone; a step of at most |r| / sigma, sigma the least singular
    value of those columns, mends them, and takes its length times a column's norm from the margin.
    """
    x, y, point = (part.detach().cpu().double() for part in (inputs, target, w))
    active = y > 0
    rest = x[~active]
    slack = torch.tensor([exact_dot(row, point) for row in rest], dtype=torch.float64)
    if bool((slack > 0).any()):
        return Uniqueness(-math.inf, False)
    support, tight = point != 0, slack == 0
    upper = torch.cat([x[active], x.new_zeros(int(active.sum()), len(rest))], 1)
    matrix = torch.cat([upper, torch.cat([rest, -torch.eye(len(rest), dtype=torch.float64)], 1)])
    fixed = torch.cat([support, ~tight])
    wanted = torch.cat([point.sign(), torch.zeros(len(rest), dtype=torch.float64)])
    z = _widest(matrix.numpy(), fixed.numpy(), wanted.numpy(), len(point))
    length = _least_singular_value(matrix[:, fixed])
    if z is None or not length > 0:
        return Uniqueness(-math.inf, length > 0)
    dual, off = matrix.T @ z, affine_doubt(z[None], torch.zeros_like(z[None]), matrix.T)[0]
    residual = Figure.norm((dual - wanted)[fixed], off[fixed])
    step = up(up(residual.value, residual.doubt) / length)
    room = torch.cat([1 - dual[: len(point)].abs(), dual[len(point) :]])
    left = room - raised(off + step * matrix.norm(dim=0), len(matrix) + 8)
    return Uniqueness(min(1.0, float(left[~fixed].min())) if bool((~fixed).any()) else 1.0, True)


def _least_singular_value(columns: Tensor) -> float:
    """A number that it is certainly not below."""
    if not columns.shape[1]:
        return math.inf
    sizes = columns.norm(dim=0)
    least = down(least_eigenvalue(columns.T @ columns), gamma(len(columns) + 4) * float(sizes.square().sum()))
    return down(math.sqrt(least)) if least > 0 else 0.0


def _widest(matrix: Any, fixed: Any, wanted: Any, width: int) -> Tensor | None:
    """The z for which Lambda = z^T M has the largest margin from its limits, up to a solver's tolerances."""
    with extras():
        import cvxpy as cp
    import numpy as np

    z, margin = cp.Variable(len(matrix)), cp.Variable()
    dual, weights = matrix.T @ z, np.arange(len(fixed)) < width
    rules = [margin <= 1]
    if fixed.any():
        rules.append(dual[fixed] == wanted[fixed])
    if (~fixed & weights).any():
        rules.append(cp.abs(dual[~fixed & weights]) <= 1 - margin)
    if (~fixed & ~weights).any():
        rules.append(dual[~fixed & ~weights] >= margin)
    program = cp.Problem(cp.Maximize(margin), rules)
    with np.errstate(invalid="ignore"):  # CVXPY multiplies infinite bounds by zeros
        program.solve(solver="HIGHS")
    return torch.from_numpy(z.value) if program.status == "optimal" else None


def _chain(
    dense: LinkNormalised, pruned: LinkNormalised | Sequence[Tensor], biases: Sequence[Tensor | None] | None
) -> LinkNormalised:
    """The pruned chain, layer by layer of the dense one's shapes."""
    if not isinstance(pruned, LinkNormalised):
        weights = tuple(weight.detach().cpu().double() for weight in pruned)
        shifts = (None,) * len(weights) if biases is None else tuple(biases)
        pruned = LinkNormalised(weights, shifts, (1.0,) * len(weights))
    shapes, theirs = ([tuple(weight.shape) for weight in each.weights] for each in (pruned, dense))
    if shapes != theirs:
        raise ValueError(f"the pruned weights have shapes {shapes}; the dense ones' are {theirs}")
    return pruned


Computed = tuple[Tensor, Tensor]  # pre-activations, and by how much each may be off


def _layer(y: Tensor, off: Tensor, weight: Tensor, bias: Tensor | None) -> Computed:
    shift = 0.0 if bias is None else bias
    return y @ weight.T + shift, affine_doubt(y, off, weight, shift)


def _apart(ours: Computed, theirs: Computed, linear: bool = False) -> Figure:
    """|| Yhat - Y ||_F of two layers' pre-activations, behind the ReLU unless `linear`."""
    one, two = (z if linear else z.relu() for z, _ in (ours, theirs))
    return Figure.norm(one - two, raised(ours[1] + theirs[1] + UNIT * (one - two).abs()))


def _allowed(now: Computed, theirs: Computed, linear: bool) -> Figure:
    """|| D - Y ||_F over the active samples, || relu(D) ||_F over the others: of the dense layer's new outputs D."""
    (z, off), (target, its) = now, theirs
    if linear:
        return _apart(now, theirs, linear=True)
    active = target > 0
    change = torch.where(active, z - target, z.relu())
    away = off + its + UNIT * change.abs()
    unsure = target.abs() <= its  # active or not: it makes this difference
    return Figure.norm(change, raised(away + torch.where(unsure, z.abs() + target.abs() + its, 0.0)))


def _size(weight: Tensor, roundings: int = 0) -> float:
    """At least ||W||_1, so that W divided by it has no more than 1."""
    size = weight.abs()
    return total(size) * (1 + gamma(roundings)) + total_doubt(size)


def _normal(dense: LinkNormalised, thin: LinkNormalised | None) -> tuple[Hypothesis, ...]:
    most = max(map(_size, dense.weights))
    found = [Hypothesis(f"every ||W_l||_1 is 1: {most:.6g} at most", _at_most_one(dense.weights))]
    if thin is not None:
        most = max(map(_size, thin.weights[1:]), default=0.0)
        text = f"no pruned ||What_l||_1 behind the first is above 1: {most:.6g}"
        found.append(Hypothesis(text, _at_most_one(thin.weights[1:])))
    return tuple(found)


def _at_most_one(weights: Sequence[Tensor]) -> bool | None:
    sizes = [weight.detach().abs() for weight in weights]
    verdicts = [Figure(total(size), total_doubt(size)).at_most(Figure(1.0)) for size in sizes]
    return False if False in verdicts else None if None in verdicts else True


def _layer_errors(
    dense: LinkNormalised, thin: LinkNormalised, x: Tensor, errors: Sequence[float], linear_last: bool
) -> list[Hypothesis]:
    theirs = dense.before(x)
    start = x.detach().cpu().double()
    read = [(start, torch.zeros_like(start)), *((z.relu(), off) for z, off in theirs[:-1])]
    found = []
    for index, (weight, bias, error) in enumerate(zip(thin.weights, thin.biases, errors, strict=True)):
        own = _apart(_layer(*read[index], weight, bias), theirs[index], linear_last and index == len(errors) - 1)
        text = f"layer {index + 1} alone is within its eps: {own.value:.6g} <= {error:.6g}"
        found.append(Hypothesis(text, own.at_most(Figure(error))))
    return found
