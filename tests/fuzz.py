"""Certificates against rational arithmetic, on as many random instances as you like: make fuzz ARGS="20000".

Each instance is a number: `python tests/fuzz.py 1 --first 4711 --only net_trim` runs one again. Sizes are small, scales
from 1e-12 to 1e12, means up to 1e7 standard deviations, columns repeated, nearly repeated, constant and zero.
"""

import argparse
import contextlib
import itertools
import math
import random
import time
import warnings
from fractions import Fraction

import exact
import torch

from convexprune.bounds import (
    Ball,
    Box,
    ChainPair,
    Exact,
    IntervalPropagation,
    LinearRelaxation,
    difference_bounds,
)
from convexprune.curve import Curve
from convexprune.layer import Layer
from convexprune.moments import InputMoments, TargetMoments
from convexprune.patterns import PerRow, Unstructured
from convexprune.problems import (
    ErrorBudget,
    L1Reconstruction,
    NetTrim,
    NeuronMerging,
    OptimalBrainSurgeon,
    Reconstruction,
    SparsityAllocation,
)
from convexprune.solvers import ClosedForm, Fast


class Draw:
    """Random numbers of one instance."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integer(self, low, high):
        return self.random.randint(low, high)

    def chance(self, share):
        return self.random.random() < share

    def power(self, low, high):
        """10^t, t uniform."""
        return 10.0 ** self.random.uniform(low, high)

    def scales(self, count, reach=12):
        """Column scales: all 1, all one number, or each its own."""
        kind = self.integer(0, 2)
        if kind == 0:
            return torch.ones(count, dtype=torch.float64)
        if kind == 1:
            return torch.full((count,), self.power(-reach, reach), dtype=torch.float64)
        return torch.tensor([self.power(-reach, reach) for _ in range(count)], dtype=torch.float64)


def samples(draw, n, width):
    """(n, width): columns of many scales and means, some of them alike."""
    x = draw.normal(n, width)
    if draw.chance(0.3):
        x = x.relu()
    if draw.chance(0.2):
        x = x.round()
    if draw.chance(0.5):
        x = x + torch.tensor([draw.power(-2, 7) * draw.chance(0.7) for _ in range(width)], dtype=torch.float64)
    for column in range(width):
        kind = draw.integer(0, 9)
        if kind == 0:
            x[:, column] = 0.0
        elif kind == 1:
            x[:, column] = draw.power(-3, 3)
        elif kind == 2 and column:
            x[:, column] = x[:, draw.integer(0, column - 1)]
        elif kind == 3 and column:
            x[:, column] = x[:, draw.integer(0, column - 1)] * (1 + draw.power(-16, -4) * draw.normal(n))
        elif kind == 4 and column > 1:
            x[:, column] = x[:, 0] - x[:, 1]
    x = x * draw.scales(width)
    return x.float() if draw.chance(0.4) and float(x.abs().max()) < 1e30 else x


def layer(draw, bias=None, width=4, activation=None):
    """A layer of up to 3 neurons, `width` inputs and a dozen samples, added up in batches."""
    n, width, out = draw.integer(1, 12), draw.integer(1, width), draw.integer(1, 3)
    x = samples(draw, n, width)
    weight = draw.normal(out, width) * draw.scales(width)
    if draw.chance(0.3):  # outputs of one size
        weight = draw.normal(out, width) / x.double().square().mean(0).sqrt().clamp(min=1e-12)
    if draw.chance(0.2):
        weight[:, draw.integer(0, width - 1)] = 0.0
    bias = draw.chance(0.6) if bias is None else bias
    shift = draw.normal(out) * draw.power(-3, 3) if bias else None
    targets = None
    if draw.chance(0.4):
        y = x.double() @ weight.T if shift is None else x.double() @ weight.T + shift
        targets = y + draw.power(-9, 1) * float(y.abs().max()) * draw.normal(n, out)
        targets = draw.power(-6, 6) * draw.normal(n, out) if draw.chance(0.2) else targets
    read, aimed = batches(draw, x, targets, out)
    return Layer.from_sums(
        weight, read.finished(), shift, activation, aimed=None if targets is None else aimed, inputs=x, targets=targets
    )


def batches(draw, x, targets, out):
    """The moments of the samples, in batches that one or two runs have added up."""
    runs = [(InputMoments(x.shape[1]), TargetMoments(out, x.shape[1])) for _ in range(draw.integer(1, 2))]
    at = 0
    while at < len(x):
        end = at + draw.integer(1, len(x))
        read, aimed = runs[draw.integer(0, len(runs) - 1)]
        read.add(x[at:end])
        if targets is not None:
            aimed.add(x[at:end], targets[at:end])
        at = end
    read, aimed = runs[0]
    for other, goal in runs[1:]:
        read, aimed = read + other, aimed + goal
    return read, aimed


def witnesses(draw, points):
    """Points near and far from those given."""
    for point in points:
        yield point
        size = float(point.abs().max()) or 1.0
        yield point + draw.power(-15, 0) * size * torch.randn(point.shape, generator=draw.generator).double()
    point = points[0]
    yield point * (1 - draw.power(-16, -1))
    yield draw.power(-9, 9) * torch.randn(point.shape, generator=draw.generator).double()
    yield draw.power(100, 150) * torch.randn(point.shape, generator=draw.generator).double()
    yield torch.full_like(point, draw.random.choice([0.0, math.nan, math.inf, 1e300, 1e-300]))


def check_value(problem, x, true):
    """|value - true| <= rounding; returns the slack."""
    value, doubt = problem.value(x), problem.rounding(x)
    if math.isinf(doubt):
        return 0.0
    off = abs(Fraction(value) - true)
    assert off <= Fraction(doubt), f"value {value!r} is off by {float(off):.3g}, allowed {doubt:.3g}"
    return doubt / float(true) if 1e-300 < true < 1e300 else 0.0


def check_bound(bound, true):
    """bound <= the optimum, or a feasible value; returns the gap."""
    assert not math.isnan(bound)
    if bound == -math.inf:
        return 1.0
    assert Fraction(bound) <= true if bound < math.inf else False, f"bound {bound!r} is above {float(true)!r}"
    return float((true - Fraction(bound)) / true) if true > 0 else 0.0


def check_errors(problem, x):
    """Errors are not below the exact ones."""
    truth = exact.moments(problem.layer)
    for claimed, true in zip(problem.output_errors(x).tolist(), truth.errors(x), strict=True):
        assert exact.norm_at_least(claimed, true * truth.count), (
            f"error {claimed!r} is below {float(true * truth.count) ** 0.5!r}"
        )


def moved(draw, problem):
    """The dense point, and others around it."""
    dense = problem.dense
    noise = draw.normal(*dense.shape)
    return [dense, dense + draw.power(-12, 1) * dense.abs() * noise, dense * (draw.normal(*dense.shape) > 0), noise]


def reconstruction(draw):
    problem = _reconstruction(draw)
    return _quadratic(draw, problem, exact.reconstruction(problem), Fast(dtype=torch.float64))


def _reconstruction(draw):
    base = layer(draw, width=3)
    out, width = base.weight.shape
    pattern = PerRow(draw.integer(0, width)) if draw.chance(0.4) else Unstructured(draw.integer(0, out * width))
    importance = draw.scales(out, 4).abs() if draw.chance(0.3) else None
    return Reconstruction(base, pattern, importance=importance)


def surgeon(draw):
    base = layer(draw)
    shape = base.affine_weight.shape if draw.chance(0.5) else base.weight.shape
    problem = OptimalBrainSurgeon(base, draw.normal(*shape) > draw.random.choice([0.0, 0.7]))
    return _quadratic(draw, problem, exact.surgeon(problem), ClosedForm())


def _quadratic(draw, problem, optimum, solver):
    truth = exact.moments(problem.layer)
    weights = [Fraction(1)] * len(truth.energies)
    if getattr(problem, "importance", None) is not None:
        weights = exact.rational(problem.importance)
    points, doubts = moved(draw, problem), []
    with contextlib.suppress(torch.linalg.LinAlgError):
        points.append(solver.solve(problem).x)
    points = [point for point in points if bool(torch.isfinite(point).all())]
    for x in points:
        true = sum(a * e for a, e in zip(weights, truth.errors(x), strict=True))
        doubts.append(check_value(problem, x, true))
        check_errors(problem, x)
    gaps = [check_bound(problem.lower_bound(w), optimum) for w in (None, *witnesses(draw, points[::-1][:2]))]
    if isinstance(problem, Reconstruction):
        v, diagonal = points[-1], problem.gram.diagonal().abs()
        for d in (problem.diagonal, problem.diagonal * draw.power(-3, 3), diagonal * draw.power(-8, 2)):
            gaps.append(check_bound(problem.lower_bound((v, d)), optimum))
    return max(doubts), min(gaps)


def lasso(draw):
    base = layer(draw)
    size = float(base.affine_cross.abs().max()) or 1.0
    problem = L1Reconstruction(base, size * draw.power(-10, 0.5))
    points = moved(draw, problem)
    found = _descent(problem, points[0])
    points.append(found)
    doubts = [check_value(problem, x, exact.lasso_value(problem, x)) for x in points]
    for x in points:
        check_errors(problem, x)
    best = min(exact.lasso_value(problem, x) for x in points)
    near = torch.tensor([[float(w) for w in row] for row in exact.lasso_points(problem, found)], dtype=torch.float64)
    if bool(torch.isfinite(near).all()):
        best, points = min(best, exact.lasso_value(problem, near)), [*points, near]
    gaps = [check_bound(problem.lower_bound(w), best) for w in witnesses(draw, points[::-1][:3])]
    return max(doubts), min(gaps)


def _descent(problem, x, sweeps=60):
    """Coordinate descent on the lasso."""
    x, gram, cross, lam = x.clone(), problem.gram, problem.cross, problem.lam
    for _ in range(sweeps):
        for i in range(x.shape[1]):
            square = float(gram[i, i])
            pull = cross[:, i] - x @ gram[:, i] + x[:, i] * square
            x[:, i] = pull.sign() * (pull.abs() - lam).clamp(min=0) / square if square > 0 else 0.0
    return x


def net_trim(draw):
    """Dual and primal points of a small cone program from Clarabel, in coordinates of columns of norm 1."""
    base = layer(draw, activation=draw.random.choice(["relu", "relu", None]))
    epsilon = draw.random.choice([0.0, 1e-9, 1e-3, 0.1, 0.5, 1.0])
    slack = draw.random.choice([None, None, 0.0, 0.3, -0.1])
    if slack is not None:
        slack *= float(base.targets_or_dense.abs().max())
    if draw.chance(0.3) and base.targets is not None:
        problem = NetTrim.cascade(base, epsilon, gamma=draw.random.choice([1.0, 1.1]))
        assert problem.violation(problem.dense) == 0 or problem.slack is None
    else:
        problem = NetTrim(base, epsilon, slack)
    truth = exact.ExactBall(problem)
    points = [*moved(draw, problem), torch.zeros(problem.shape, dtype=torch.float64)]
    x, z = _cone(problem) if draw.chance(0.3) else (None, None)
    if x is not None:
        points += [x + t * (problem.dense - x) for t in (0.0, 1e-9, 1e-6, 1e-3, 0.1)]
    best, doubts = None, []
    for point in points:
        claimed = problem.violation(point)
        assert truth.violated(point, claimed), f"violation {claimed!r} is below the exact one"
        value = sum(abs(w) for row in exact.rational(point) for w in row)
        doubts.append(check_value(problem, point, value))
        for claim, true in zip(problem.output_errors(point).tolist(), truth.left(point)[2], strict=True):
            assert exact.norm_at_least(claim, true), f"error {claim!r} is below {float(true) ** 0.5!r}"
        if truth.feasible(point):
            best = value if best is None else min(best, value)
    shape = tuple(problem.outputs.shape)
    tried = [draw.normal(*shape), problem.outputs - problem.inputs.double() @ (0.9 * problem.dense).T]
    tried += [] if z is None else [z]
    gaps = []
    for witness in witnesses(draw, tried[::-1]):
        bound = problem.lower_bound(witness)
        if best is not None:
            gaps.append(check_bound(bound, best))
    return max(doubts), min(gaps, default=1.0)


def _cone(problem):
    import cvxpy as cp

    scale = problem.inputs.double().norm(dim=0)
    scale = torch.where(scale > 0, scale, 1.0)
    size = problem.scale or 1.0
    x = (problem.inputs.double() / scale).numpy()
    y, active = (problem.outputs / size).numpy(), problem.active.numpy()
    price = (scale.min() / scale).numpy()[None]
    u = cp.Variable(problem.shape)
    made, rules = x @ u.T, []
    if active.any():
        rules.append(cp.SOC(cp.Constant(problem.epsilon), (made - y)[active]))
    if not active.all():
        rules.append(made[~active] <= (problem.ceiling / size).expand_as(problem.outputs).numpy()[~active])
    program = cp.Problem(cp.Minimize(cp.sum(cp.multiply(price, cp.abs(u)))), rules)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an inaccurate point is as good as any
            program.solve(solver="CLARABEL")
    except (cp.SolverError, ValueError):
        return None, None
    if u.value is None or any(rule.dual_variables[-1].value is None for rule in rules):
        return None, None
    z = torch.zeros_like(problem.outputs)
    for rule in rules:
        cone = isinstance(rule, cp.SOC)
        dual = torch.from_numpy(rule.dual_variables[-1].value).flatten()
        z[problem.active if cone else ~problem.active] = dual if cone else -dual
    return torch.from_numpy(u.value) / scale * size, z * (1 if bool(torch.isfinite(z).all()) else 0)


def allocation(draw):
    names = [str(index) for index in range(draw.integer(1, 4))]
    curves, tie = [], draw.chance(0.3)
    levels, whole, unit = draw.integer(1, 4), draw.chance(0.4), draw.power(-12, 12)
    for name in names:
        kept = torch.arange(levels, dtype=torch.float64)
        loss = draw.power(-12, 12) * draw.normal(levels)
        cost = draw.normal(levels).abs() * 10
        cost = cost.round() if whole else cost * min(unit, 1e12)
        curves.append(Curve(name, kept, loss.abs() if draw.chance(0.7) else loss, cost, tie="t" if tie else None))
    most = sum(float(curve.costs.max()) for curve in curves)
    problem = SparsityAllocation(curves, draw.random.choice([0.0, 0.3, 0.6, 1.0, draw.random.random()]) * most)
    best, doubts, gaps = exact.allocation(problem), [], []
    for _ in range(4):
        x = torch.tensor([[float(draw.integer(0, levels - 1))] for _ in names], dtype=torch.float64)
        x = x[:1].expand_as(x).clone() if tie else x
        true = sum(Fraction(float(c.distortion[int(k)])) for c, k in zip(curves, x[:, 0], strict=True))
        doubts.append(check_value(problem, x, true))
        cost = sum(Fraction(float(c.costs[int(k)])) for c, k in zip(curves, x[:, 0], strict=True))
        over = (cost - Fraction(problem.budget)) / Fraction(max(problem.budget, 1.0))
        if cost > Fraction(problem.budget) * (1 + 3 * Fraction(problem.slack)):
            assert Fraction(problem.violation(x)) >= over
    slope = draw.power(-12, 12)
    for witness in (None, slope, (slope, draw.power(-12, 13)), (0.0, 1e300), (draw.power(-30, 300), draw.power(-9, 9))):
        bound = problem.lower_bound(witness)
        if best is not None:
            gaps.append(check_bound(bound, best))
            if problem.rounding(problem.dense) and witness is not None:
                gaps.append(check_bound(problem.lower_bound((slope, math.nextafter(float(best), math.inf))), best))
    return max(doubts), min(gaps, default=1.0)


def merging(draw):
    n, width, out = draw.integer(2, 6), draw.integer(1, 4), draw.integer(1, 3)
    rows = samples(draw, n, width).double()
    if draw.chance(0.3):
        rows[-1] = rows[0]
    gram = None
    if draw.chance(0.5):
        x = samples(draw, draw.integer(1, 8), width).double()
        gram = x.T @ x / len(x)
    base = {"incoming": rows, "outgoing": draw.normal(out, n) * draw.scales(n, 4), "gram": gram}
    problem = NeuronMerging(**base, keep=draw.integer(1, n))
    table = exact.saliencies(problem)
    if gram is not None and any(value < 0 for row in table for value in row):
        return 0.0, 1.0  # the stored matrix is not semidefinite: no data has it
    if draw.chance(0.4):
        problem = NeuronMerging(**base, max_saliency=float(sum(map(min, zip(*table, strict=True)))) * draw.power(-2, 2))
    best, doubts = exact.merging(problem, table), []
    for _ in range(4):
        alive = draw.random.sample(range(n), draw.integer(1, n))
        joined = [j if j in alive else draw.random.choice(alive) for j in range(n)]
        x = torch.tensor(joined, dtype=torch.float64)[:, None]
        each = [table[j][i] for j, i in enumerate(joined)]
        doubts.append(check_value(problem, x, sum(each) if problem.keep is not None else Fraction(len(set(joined)))))
        roots = sum((Fraction(value).limit_denominator(10**400) for value in each), Fraction(0))
        assert Fraction(problem.change(x)) >= max(roots, max(each))
        if problem.max_saliency:
            over = sum(each) / Fraction(problem.max_saliency) - 1
            assert Fraction(problem.violation(x)) >= over
    prices = torch.tensor([float(min(row[i] for i in range(n) if i != j)) for j, row in enumerate(table)])
    tried = [prices.double(), torch.tensor([float(max(row)) for row in table], dtype=torch.float64)]
    gaps = [check_bound(problem.lower_bound(v), Fraction(best)) for v in (None, *witnesses(draw, tried))]
    return max(doubts), min(gaps)


def budget(draw):
    count = draw.integer(1, 4)
    each = [torch.tensor([draw.power(-9, 9) for _ in range(count)], dtype=torch.float64) for _ in range(3)]
    each[0] = each[0] * (draw.normal(count) > -1)
    whole = float((each[0] * each[2]).sum())
    problem = ErrorBudget(*each, goal=max(whole * draw.power(-9, 0.5), 1e-20))
    best, doubts = exact.budget_optimum(problem), []
    for _ in range(3):
        x = each[2] * torch.tensor([draw.power(-6, 0.1) for _ in range(count)], dtype=torch.float64)
        x = each[2] * (1 + draw.power(-16, -9) * draw.normal(count)) if draw.chance(0.2) else x
        true = Fraction(exact.budget_value(problem, x.tolist()))
        doubts.append(check_value(problem, x[:, None], true))
        g, cap, e = (exact.rational(part) for part in (problem.gains, problem.caps, x))
        over = [exact.dot(g, e) / Fraction(problem.goal) - 1, *(a / b - 1 for a, b in zip(e, cap, strict=True))]
        assert Fraction(problem.violation(x[:, None])) >= max(over)
    gaps = []
    prices = [
        0.0,
        draw.power(-30, 30),
        1e300,
        1e-300,
        math.nan,
        *(float(n / max(g, 1e-30)) for n, g in zip(each[1], each[0], strict=True)),
    ]
    prices.append(float(each[1].sum()) / problem.goal)
    for price in (None, *prices):
        gaps.append(check_bound(problem.lower_bound(price), Fraction(best) + Fraction(1, 10**30)))
    return max(doubts), min(gaps)


def worst_case(draw):
    """Bounds over a set against points of it, corners most of all; the mixed-integer program now and then."""
    widths = [draw.integer(1, 4) for _ in range(draw.integer(2, 4))]
    unit, shapes = draw.power(-6, 6), list(itertools.pairwise(widths))
    weights = [unit * draw.normal(b, a) for a, b in shapes]
    biases = [unit * draw.power(-3, 3) * draw.normal(b) for _, b in shapes]
    pruned = [w * (draw.normal(*w.shape) > -0.3) if draw.chance(0.8) else w for w in weights]
    others = [b * (1 + draw.power(-16, 0) * draw.chance(0.3)) for b in biases]
    pair, radius = ChainPair(weights, biases, pruned, others), draw.power(-6, 4) * draw.chance(0.9)
    center = draw.normal(1, widths[0]) * draw.power(-4, 4)
    around = Box(center, radius) if draw.chance(0.7) else Ball(center, radius)
    x = torch.cat([center[:, None], around.points(40, draw.generator)], 1)[0]
    z, zhat = pair.run(x)
    seen = zhat - z
    some = torch.cat([seen.argmax(0), seen.argmin(0), torch.zeros(1, dtype=torch.long)]).unique()
    inside = [x[at] for at in some.tolist() if _inside(around, x[at])]
    true = [exact.chain_difference(pair, point) for point in inside]
    methods = [IntervalPropagation(), LinearRelaxation()]
    methods += [Exact()] if draw.chance(0.03) and isinstance(around, Box) else []
    gap = 1.0
    for method in methods:
        try:
            bounds = difference_bounds(pair, around, method)
        except RuntimeError as error:
            assert "HIGHS" in str(error)  # noqa: PT017   the solver says that it has found nothing
            continue
        for low, high, *values in zip(*(b[0].tolist() for b in (bounds.lower, bounds.upper)), *true, strict=True):
            for value in values:
                assert Fraction(low) <= value <= Fraction(high), f"{type(method).__name__}: {float(value)!r} is outside"
            size = max(abs(low), abs(high))
            gap = min(gap, 1 - float(max(map(abs, values), default=0)) / size if size else 0.0)
    return 0.0, gap


def _inside(around, point):
    center, radius = exact.rational(around.center[0]), Fraction(around.radius)
    steps = [abs(a - b) for a, b in zip(exact.rational(point), center, strict=True)]
    return max(steps) <= radius if isinstance(around, Box) else exact.dot(steps, steps) <= radius**2


PROBLEMS = {
    "reconstruction": reconstruction,
    "optimal_brain_surgeon": surgeon,
    "l1_reconstruction": lasso,
    "net_trim": net_trim,
    "sparsity_allocation": allocation,
    "neuron_merging": merging,
    "error_budget": budget,
    "worst_case": worst_case,
}


def _at(values, share):
    return sorted(values)[int(share * (len(values) - 1))] if values else math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", choices=PROBLEMS)
    options = parser.parse_args()
    failed = 0
    for name in [options.only] if options.only else PROBLEMS:
        begun, wrong, doubts, gaps = time.perf_counter(), [], [], []
        for seed in range(options.first, options.first + options.count):
            try:
                doubt, gap = PROBLEMS[name](Draw(seed))
            except AssertionError as error:
                wrong.append(seed)
                print(f"  {name}, seed {seed}: {error}", flush=True)
                continue
            doubts.append(doubt)
            gaps.append(gap)
        failed += len(wrong)
        tight = sum(gap < 1e-6 for gap in gaps) / max(len(gaps), 1)
        last = options.first + options.count - 1
        print(
            f"{name:22} seeds {options.first}..{last}: {len(wrong)} wrong; relative rounding {_at(doubts, 0.5):.0e} "
            f"(median), {_at(doubts, 0.9):.0e} (9 of 10); bound within 1e-6 of the optimum in {tight:.0%}; "
            f"{time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
