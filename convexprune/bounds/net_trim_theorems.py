"""Net-Trim's theorems. X (n, N) are a layer's inputs, Y = relu(X W^T), U the pruned weights; a bias is a column of 1.

Source: Aghasi, Abdi, Nguyen, Romberg, NIPS 2017: Propositions 1, 2 and S.1, Theorems 1 to 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convexprune.bounds.statement import Hypothesis, Statement
from convexprune.extras import extras

PAPER = "Net-Trim, NIPS 2017"


def proposition_1(inputs: Tensor, outputs: Tensor, weights: Tensor, radius: float) -> Statement:
    """If U is in the ball where Y > 0 and X U^T <= 0 elsewhere, then || relu(X U^T) - Y ||_F <= radius.

    inputs (n, P), outputs (n, M) = Y >= 0, weights U (M, P)
    """
    x, y, u = (part.detach().cpu().double() for part in (inputs, outputs, weights))
    before = x @ u.T
    active = y > 0
    distance = float((before - y)[active].norm())
    above = float(before[~active].max()) if bool((~active).any()) else 0.0
    hypotheses = (
        Hypothesis(f"||(X U^T - Y)_active||_F = {distance:.6g} <= {radius:.6g}", distance <= radius * (1 + 1e-9)),
        Hypothesis(f"X U^T <= 0 where Y = 0: the largest is {above:.2g}", above <= 0),
    )
    return Statement("Proposition 1", PAPER, hypotheses, radius, float((before.relu() - y).norm()))


@dataclass(frozen=True, eq=False)
class LinkNormalised:
    """A ReLU chain in which every weight matrix has ||W_l||_1 = 1, and the factors that it was divided by.

    W_l' = W_l / s_l,   b_l' = b_l / (s_1 ... s_l),   Y_l' = Y_l / (s_1 ... s_l),   s_l = ||W_l||_1

    ReLU is positively homogeneous, so outputs and errors of the two networks differ by the factor s_1 ... s_L alone.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> LinkNormalised:
        """Normalise the matrices (out, in) of a chain. Raises ValueError for one that is all zero."""
        scales = tuple(float(weight.detach().double().abs().sum()) for weight in weights)
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
        y, found = x.detach().cpu().double(), []
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = y @ weight.T if bias is None else y @ weight.T + bias
            if not (linear_last and index == len(self.weights) - 1):
                y = y.relu()
            found.append(y)
        return found


def theorem_1(
    dense: LinkNormalised, pruned: LinkNormalised | Sequence[Tensor], biases: Sequence[Tensor | None] | None, x: Tensor,
    errors: Sequence[float], linear_last: bool = False,
) -> Statement:  # fmt: skip
    """Parallel: || Yhat_L - Y_L ||_F <= sum_l eps_l in a link-normalised network; with a linear last layer, Prop. S.1.

    pruned   the layers' pruned weights in the normalised network, ||What_l||_1 <= 1. An optimum of Net-Trim without
             biases satisfies this; with biases it usually does
    errors   eps_l: each layer's error on the dense network's inputs, in the normalised network
    """
    thin = _chain(pruned, biases)
    hypotheses = (*_normal(dense, thin), *_layer_errors(dense, thin, x, errors, linear_last))
    measured = float((thin.outputs(x, linear_last)[-1] - dense.outputs(x, linear_last)[-1]).norm())
    name = "Proposition S.1 (parallel)" if linear_last else "Theorem 1"
    return Statement(name, PAPER, hypotheses, math.fsum(errors), measured)


def theorem_2(
    dense: LinkNormalised, pruned: LinkNormalised | Sequence[Tensor], biases: Sequence[Tensor | None] | None, x: Tensor,
    first: float, gammas: Sequence[float], linear_last: bool = False,
) -> Statement:  # fmt: skip
    """Cascade: || Yhat_L - Y_L ||_F <= eps_1 sqrt(gamma_2 ... gamma_L) in a link-normalised network.

    first    eps_1
    gammas   gamma_l >= 1 of the layers after the first
    """
    thin = _chain(pruned, biases)
    ours, theirs = thin.outputs(x, linear_last), dense.outputs(x, linear_last)
    hypotheses = [
        *_normal(dense, None),
        Hypothesis(f"every gamma is at least 1: {min(gammas, default=1.0):g}", min(gammas, default=1.0) >= 1),
        Hypothesis(
            f"the first layer is within eps_1: {float((ours[0] - theirs[0]).norm()):.6g} <= {first:.6g}",
            float((ours[0] - theirs[0]).norm()) <= first * (1 + 1e-9),
        ),
    ]
    for index, gamma in enumerate(gammas, start=1):
        last = linear_last and index == len(gammas)
        bias = dense.biases[index]
        now = ours[index - 1] @ dense.weights[index].T + (0.0 if bias is None else bias)
        active = torch.ones_like(now, dtype=torch.bool) if last else theirs[index] > 0
        radius = math.sqrt(gamma) * float((now - theirs[index])[active].norm())
        slack = 0.0 if last else float((now.relu()[~active]).norm()) ** 2
        limit = math.sqrt(radius**2 + gamma * slack)
        found = float((ours[index] - theirs[index]).norm())
        hypotheses.append(
            Hypothesis(
                f"layer {index + 1} is within its cascade's constraints: {found:.6g} <= {limit:.6g}",
                found <= limit * (1 + 1e-9),
            )
        )
    guaranteed = first * math.sqrt(math.prod(gammas))
    name = "Proposition S.1 (cascade)" if linear_last else "Theorem 2"
    return Statement(name, PAPER, tuple(hypotheses), guaranteed, float((ours[-1] - theirs[-1]).norm()))


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

    margin   distance of Lambda from its limits off the supports
    full     whether the matrix restricted to both supports has full column rank

    A positive margin and full rank prove uniqueness.
    """

    margin: float
    full: bool

    @property
    def unique(self) -> bool:
        """True if w is proven to be the only optimum."""
        return self.margin > 1e-9 and self.full


def proposition_2(inputs: Tensor, target: Tensor, w: Tensor) -> Uniqueness:
    """Is w (P,) the unique minimiser of ||w||_1 subject to X w = y where y > 0 and X w <= 0 elsewhere?

    It is if some Lambda in the row space of [X_active 0; X_rest -I] has Lambda_i = sign(w_i) on the support of w,
    |Lambda_i| < 1 off it, 0 on the support of the slacks s = X_rest w, > 0 off it, and those columns are independent.
    The largest margin is a linear program. inputs (n, P), target (n,).
    """
    with extras():
        import cvxpy as cp
    import numpy as np

    x, y, point = (part.detach().cpu().double().numpy() for part in (inputs, target, w))
    active = y > 0
    rest = x[~active]
    slack = rest @ point
    tight = np.abs(slack) <= 1e-9 * max(float(np.abs(point).sum()), 1e-300)
    support = point != 0
    matrix = np.block([[x[active], np.zeros((int(active.sum()), len(rest)))], [rest, -np.eye(len(rest))]])
    columns = matrix[:, np.concatenate([support, ~tight])]
    full = columns.shape[1] == 0 or int(np.linalg.matrix_rank(columns)) == columns.shape[1]
    z, margin = cp.Variable(len(matrix)), cp.Variable()
    dual = matrix.T @ z
    on_w, on_s = dual[: len(point)], dual[len(point) :]
    rules = [margin <= 1]
    if support.any():
        rules.append(on_w[support] == np.sign(point[support]))
    if (~support).any():
        rules.append(cp.abs(on_w[~support]) <= 1 - margin)
    if (~tight).any():
        rules.append(on_s[~tight] == 0)
    if tight.any():
        rules.append(on_s[tight] >= margin)
    program = cp.Problem(cp.Maximize(margin), rules)
    with np.errstate(invalid="ignore"):  # CVXPY multiplies infinite bounds by zeros
        program.solve(solver="HIGHS")
    return Uniqueness(float(margin.value) if program.status == "optimal" else -math.inf, full)


def _chain(pruned: LinkNormalised | Sequence[Tensor], biases: Sequence[Tensor | None] | None) -> LinkNormalised:
    if isinstance(pruned, LinkNormalised):
        return pruned
    weights = tuple(weight.detach().cpu().double() for weight in pruned)
    shifts = (None,) * len(weights) if biases is None else tuple(biases)
    return LinkNormalised(weights, shifts, (1.0,) * len(weights))


def _normal(dense: LinkNormalised, thin: LinkNormalised | None) -> tuple[Hypothesis, ...]:
    sizes = [float(weight.detach().abs().sum()) for weight in dense.weights]
    found = [Hypothesis(f"every ||W_l||_1 is 1: {max(sizes):.6g} at most", max(sizes) <= 1 + 1e-9)]
    if thin is not None:
        most = max(float(weight.abs().sum()) for weight in thin.weights[1:]) if len(thin.weights) > 1 else 0.0
        found.append(Hypothesis(f"no pruned ||What_l||_1 behind the first is above 1: {most:.6g}", most <= 1 + 1e-9))
    return tuple(found)


def _layer_errors(
    dense: LinkNormalised, thin: LinkNormalised, x: Tensor, errors: Sequence[float], linear_last: bool
) -> list[Hypothesis]:
    theirs = dense.outputs(x, linear_last)
    read = [x.detach().cpu().double(), *theirs[:-1]]
    found = []
    for index, (weight, bias, error) in enumerate(zip(thin.weights, thin.biases, errors, strict=True)):
        y = read[index] @ weight.T + (0.0 if bias is None else bias)
        y = y if linear_last and index == len(errors) - 1 else y.relu()
        own = float((y - theirs[index]).norm())
        text = f"layer {index + 1} alone is within its eps: {own:.6g} <= {error:.6g}"
        found.append(Hypothesis(text, own <= error * (1 + 1e-9)))
    return found
