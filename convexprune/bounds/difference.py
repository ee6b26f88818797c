"""Bound the difference between a pruned ReLU network and the dense one over a whole set of inputs, not only at samples.

Three methods bound linear functions of the two networks' outputs, such as their difference: intervals, a linear
relaxation, and a mixed-integer program, which is exact. `relaxation` has the mathematics of the first two.

Source: Tjeng, Xiao, Tedrake, ICLR 2019, for the mixed-integer program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from convexprune.bounds.input_sets import Ball, Box, above, times
from convexprune.bounds.relaxation import ChainPair, Hidden, Rows, by_intervals, by_planes, hidden_layers, ordered
from convexprune.extras import extras
from convexprune.options import having, optional, text
from convexprune.rounding import raised, up

if TYPE_CHECKING:
    import cvxpy as cp

TOLERANCE: Final = 1e-9  # the finest that HiGHS takes
# by default HiGHS stops at a relative gap of 1e-4; small tolerances limit how far the big-M constraints are violated
TIGHT: Final = {
    "HIGHS": {"mip_rel_gap": 0.0, "mip_abs_gap": TOLERANCE, "mip_feasibility_tolerance": TOLERANCE,
              "primal_feasibility_tolerance": TOLERANCE, "dual_feasibility_tolerance": TOLERANCE},
}  # fmt: skip


class Method(Protocol):
    """A way to bound both networks over a set."""

    def maximum(self, pair: ChainPair, around: Box | Ball, rows: Rows) -> Tensor:
        """An upper bound, (samples, rows), of each function of the outputs z_L, zhat_L over each sample's set."""
        ...


@dataclass(frozen=True, eq=False)
class DifferenceBounds:
    """lower <= zhat_L - z_L <= upper, each (samples, outputs), for every x of the sample's set."""

    lower: Tensor
    upper: Tensor

    @property
    def largest(self) -> Tensor:
        """A bound of max_k |zhat_k - z_k|, (samples,)."""
        return torch.maximum(self.lower.abs(), self.upper.abs()).amax(1)


@dataclass(frozen=True)
class IntervalPropagation:
    """Intervals of z, zhat and delta, layer by layer: cheap, and loose where layers are wide.

    gamma's interval is exact for the intervals of any two of z, zhat and delta (fact 1), and the three are intersected.
    Source: Paulsen, Wang, Wang, ICSE 2020.
    """

    def maximum(self, pair: ChainPair, around: Box | Ball, rows: Rows) -> Tensor:
        """As `Method`."""
        return by_intervals(pair, around, hidden_layers(pair, around, by_intervals), rows)


@dataclass(frozen=True)
class LinearRelaxation:
    """Every neuron between two planes, substituted from the outputs back to x, for both networks together.

    A function a y + c gamma = (a - c) y + c yhat of one neuron can be bounded in two ways, each sound:

    together  y between its chord and a line through 0 (CROWN), gamma between the chord over delta of its largest value
              for each delta (fact 2, convex: the chord is above) and that of its least (fact 3, concave: below)
    apart     y and yhat each between their own lines; exact if both are stable. If one is stable, only the other is
              relaxed: dense inactive gamma = relu(zhat), dense active max(delta, -z), pruned inactive -relu(z),
              pruned active min(zhat, delta)

    Each neuron of each function takes the way whose widest gap is smaller. The intervals of every layer are computed
    the same way and intersected with those of `IntervalPropagation`, so this method is never looser.
    Source: Zhang et al., NeurIPS 2018; Paulsen, Wang, Wang, ICSE 2020, for a relaxation of the difference.
    """

    def maximum(self, pair: ChainPair, around: Box | Ball, rows: Rows) -> Tensor:
        """As `Method`."""
        return by_planes(pair, around, hidden_layers(pair, around, by_planes), rows)


@dataclass(frozen=True)
class Exact:
    """The exact maximum, up to the solver's tolerances, by a mixed-integer program; for a few dozen unstable neurons.

        max  d' z_L + c' (zhat_L - z_L)   over x in the box, and for each unstable neuron, with a in {0, 1},
             y >= z,  y >= 0,  y <= u a,  y <= z - l (1 - a)          l <= z <= u by `IntervalPropagation`

    Every variable, row and the objective are in units of their own size, the solver's dual bound is what is taken, and
    its tolerance is added for every row and column, times what the two networks' outputs are in those units, which
    may cancel: a multiplier that much off moves the bound by no more. Never above what `LinearRelaxation` gives.

    solver  CVXPY's name of a solver for mixed-integer linear programs that reports its dual bound

    Raises ValueError for a `Ball` and for a solver that is not installed, RuntimeError if the solver does not report an
    optimum and a bound of it.
    Source: Tjeng, Xiao, Tedrake, ICLR 2019, equations (4) to (6).
    """

    solver: str = "HIGHS"

    def __post_init__(self) -> None:
        text("solver", self.solver)

    def maximum(self, pair: ChainPair, around: Box | Ball, rows: Rows) -> Tensor:
        """As `Method`: one program for each sample and row."""
        if not isinstance(around, Box):
            raise ValueError("Exact takes a Box: a Ball's program is not linear; use LinearRelaxation")
        self._check_installed()
        seen = hidden_layers(pair, around, by_intervals)
        most, least = (LinearRelaxation().maximum(pair, around, each) for each in (rows, rows.opposite()))
        sizes, (z, zhat) = torch.maximum(most.abs(), least.abs()), _outputs(pair, around, seen)
        found = most.clone()
        for sample in range(len(around.center)):
            dense, pruned, constraints = _program(pair, around, seen, sample)
            for row in range(rows.dense.shape[1]):
                size = float(sizes[sample, row])
                if size > 0:
                    d, c = (part[min(sample, len(part) - 1), row] / size for part in rows)
                    terms = 1.0 + float((d - c).abs() @ z[sample] + c.abs() @ zhat[sample])
                    objective = (d - c).numpy() @ dense + c.numpy() @ pruned
                    bound = up(self._largest(objective, constraints, terms) * size)
                    found[sample, row] = min(bound, float(most[sample, row]))
        return found

    def _check_installed(self) -> None:
        with extras():
            import cvxpy as cp

        installed = cp.installed_solvers()
        if self.solver.upper() not in installed:
            raise ValueError(f"solver {self.solver!r} is not installed; CVXPY finds {', '.join(installed)}")

    def _largest(self, objective: Any, constraints: list[Any], terms: float) -> float:
        """The solver's upper bound of an objective of such terms, with its tolerance for each row and column."""
        with extras():
            import cvxpy as cp

        program = cp.Problem(cp.Maximize(objective), constraints)
        try:
            program.solve(solver=self.solver, **TIGHT.get(self.solver.upper(), {}))
        except (cp.SolverError, ValueError) as error:  # CVXPY cannot unpack what has no status
            raise RuntimeError(f"{self.solver} did not solve the program: {error}") from error
        if program.status != "optimal":
            raise RuntimeError(f"{self.solver} reports {program.status!r}, not an optimum; try a smaller radius")
        stats: Any = program.solver_stats.extra_stats
        beyond = 0.0
        if program.is_mixed_integer():
            if not hasattr(stats, "mip_dual_bound"):
                raise RuntimeError(f"{self.solver} reports no dual bound, so nothing is certain; use HIGHS")
            # it minimises the opposite, and leaves the constant out
            beyond = max(float(stats.objective_function_value) - float(stats.mip_dual_bound), 0.0)
        counted = program.size_metrics
        parts = counted.num_scalar_variables + counted.num_scalar_eq_constr + counted.num_scalar_leq_constr
        return float(program.value) + beyond + 4 * TOLERANCE * float(parts) * terms


def difference_bounds(pair: ChainPair, around: Box | Ball, method: Method | None = None) -> DifferenceBounds:
    """Bounds of zhat_L - z_L over each sample's set, by `LinearRelaxation` unless another method is given."""
    optional(having("maximum", "LinearRelaxation()"))("method", method)
    _check_fit(pair, around)
    each = torch.eye(pair.outputs, dtype=torch.float64)[None]
    rows = Rows(torch.zeros_like(each), each)
    both = Rows(*(torch.cat(parts, 1) for parts in zip(rows, rows.opposite(), strict=True)))
    upper, below = _most(pair, around, method, both).chunk(2, 1)
    return DifferenceBounds(*ordered(-below, upper))


def cannot_change(pair: ChainPair, around: Box | Ball, method: Method | None = None) -> Tensor:
    """Which samples (samples,) provably have the same largest output in both networks for every x of the set.

    Let t be the largest output of the dense network at the center; z_t - z_k > 0 and zhat_t - zhat_k > 0 are shown for
    every k != t. False proves nothing: a network may change its prediction within the set, or the bound is too loose.
    """
    _check_fit(pair, around)
    z, _ = pair.run(around.center)
    top = z.argmax(1)
    each = torch.eye(pair.outputs, dtype=torch.float64)
    behind = each[None] - each[top][:, None]  # z_k - z_t
    return _negative(pair, around, method, behind, z, each[top].bool())


def keeps_signs(pair: ChainPair, around: Box | Ball, method: Method | None = None) -> Tensor:
    """(samples,) bool: where each output of both networks provably has the sign of the dense one's at the center.

    One logit, or several labels at once: s z_k > 0 and s zhat_k > 0, s = sign z_k(center), for every k and every x.
    """
    _check_fit(pair, around)
    z, _ = pair.run(around.center)
    against = -torch.diag_embed(torch.where(z > 0, 1.0, -1.0).double())  # -s z_k
    return _negative(pair, around, method, against, z, torch.zeros_like(z, dtype=torch.bool))


def _negative(
    pair: ChainPair, around: Box | Ball, method: Method | None, rows: Tensor, z: Tensor, but: Tensor
) -> Tensor:
    """(samples,) bool: where the rows (samples, rows, outputs) of both outputs are provably below 0, `but` for some."""
    both = Rows(torch.cat([rows, rows], 1), torch.cat([torch.zeros_like(rows), rows], 1))
    most = torch.maximum(*_most(pair, around, method, both).chunk(2, 1))
    settled: Tensor = (most.masked_fill(but, -math.inf) < 0).all(1)
    return settled


def _most(pair: ChainPair, around: Box | Ball, method: Method | None, rows: Rows) -> Tensor:
    """A method's bound, and what the doubts of the weights and biases add to it."""
    found, lost = (method or LinearRelaxation()).maximum(pair, around, rows), pair.lost(around.size)
    if lost is None:
        return found
    dense = times((rows.dense - rows.change).abs(), lost[0])
    return above(found + raised(dense + times(rows.change.abs(), lost[1]), 2 * pair.outputs + 8))


def sampled_difference(
    pair: ChainPair, around: Box | Ball, *, points: int = 256, starts: int = 4, steps: int = 30, seed: int = 0
) -> Tensor:
    """The largest |zhat_k - z_k| found in each sample's set, (samples,); no sound bound is below it.

    Tries the center and `points` random points, then `steps` steps of projected gradient ascent from the best `starts`.
    """
    _check_fit(pair, around)
    generator = torch.Generator().manual_seed(seed)
    # the center comes first, moved into the box if it lies outside
    x = around.ascend(around.center[:, None], torch.zeros_like(around.center[:, None]), 0.0)
    x = torch.cat([x, around.points(points, generator)], 1)
    found = _largest_change(pair, x)
    best = found.topk(min(starts, found.shape[1]), 1).indices
    x = x.gather(1, best[..., None].expand(-1, -1, pair.inputs))
    most = found.amax(1)
    for step in range(steps):
        x = around.ascend(x, _slope(pair, x), 1 / (1 + step))
        most = torch.maximum(most, _largest_change(pair, x).amax(1))
    return most


def _largest_change(pair: ChainPair, x: Tensor) -> Tensor:
    z, zhat = pair.run(x)
    return (zhat - z).abs().amax(-1)


def _slope(pair: ChainPair, x: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(_largest_change(pair, x).sum(), x)
    return gradient


def _outputs(pair: ChainPair, around: Box, seen: Sequence[Hidden]) -> list[Tensor]:
    """(samples, outputs): sizes of the terms of z_L, and of zhat_L."""
    ends = []
    for weights, biases, read in (
        (pair.weights, pair.biases, seen[-1].z.relu().size if seen else around.size),
        (pair.pruned_weights, pair.pruned_biases, seen[-1].zhat.relu().size if seen else around.size),
    ):
        ends.append(read @ weights[-1].abs().T + biases[-1].abs())
    return ends


def _program(
    pair: ChainPair, around: Box, seen: Sequence[Hidden], sample: int
) -> tuple[cp.Expression, cp.Expression, list[Any]]:
    """z_L and zhat_L of one sample as CVXPY expressions, and the constraints that define them."""
    with extras():
        import cvxpy as cp

    low, high = around.lower[sample], around.upper[sample]
    place = cp.Variable(pair.inputs)  # from -1 to 1
    x = ((low + high) / 2).numpy() + cp.multiply(((high - low) / 2).numpy(), place)
    constraints = [place >= -1, place <= 1]
    ends = []
    for weights, biases, intervals in (
        (pair.weights, pair.biases, [layer.z for layer in seen]),
        (pair.pruned_weights, pair.pruned_biases, [layer.zhat for layer in seen]),
    ):
        z = weights[0].numpy() @ x + biases[0].numpy()
        for weight, bias, (low, high) in zip(weights[1:], biases[1:], intervals, strict=True):
            y, added = _relu_program(z, low[sample], high[sample])
            constraints += added
            z = weight.numpy() @ y + bias.numpy()
        ends.append(z)
    return ends[0], ends[1], constraints


def _relu_program(z: cp.Expression, low: Tensor, high: Tensor) -> tuple[cp.Expression, list[Any]]:
    """relu(z), exactly, for z between low and high; rows in units of the larger end."""
    with extras():
        import cvxpy as cp

    size = torch.maximum(low.abs(), high.abs())
    unit = torch.where(size > 0, size, 1.0)
    active = cp.Variable(len(low), boolean=True)
    share = cp.Variable(len(low), nonneg=True)
    z = cp.multiply((1 / unit).numpy(), z)
    # a stable neuron's interval ends at 0, which leaves its binary without effect
    l, u = ((each / unit).numpy() for each in (low.clamp(max=0), high.clamp(min=0)))  # noqa: E741
    fixed = [active >= (low >= 0).double().numpy(), active <= ((high > 0) | (low >= 0)).double().numpy()]
    rules = [share >= z, share <= cp.multiply(u, active), share <= z - cp.multiply(l, 1 - active), *fixed]
    return cp.multiply(unit.numpy(), share), rules


def _check_fit(pair: ChainPair, around: Box | Ball) -> None:
    if around.center.shape[1] != pair.inputs:
        raise ValueError(f"the centers have {around.center.shape[1]} entries; the networks read {pair.inputs}")
