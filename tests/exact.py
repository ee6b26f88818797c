"""The problems in rational arithmetic, for small layers: what rounding is measured against."""

import functools
import itertools
import math
from decimal import Decimal, getcontext
from fractions import Fraction

import torch

from convexprune.patterns import PerRow

getcontext().prec = 60
SHIFT = 600  # every float here is a whole multiple of 2^-600


def whole(values):
    """Nested lists of integers: the numbers of a tensor, times 2^600."""
    if isinstance(values, list):
        return [whole(value) for value in values]
    top, bottom = float(values).as_integer_ratio()
    assert bottom.bit_length() <= SHIFT
    return top * (2**SHIFT // bottom)


def fraction(number, factors=1):
    """The rational that an integer stands for: a product of so many numbers."""
    return Fraction(number, 2 ** (SHIFT * factors))


def rational(tensor):
    """Nested lists of fractions."""
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.double().tolist()
    return [rational(each) for each in tensor] if isinstance(tensor, list) else Fraction(tensor)


def dot(left, right):
    return sum(a * b for a, b in zip(left, right, strict=True))


@functools.lru_cache(maxsize=2)
def moments(layer):
    """The layer's moments, computed once."""
    return ExactLayer(layer)


class ExactLayer:
    """Second moments (P, P), cross moments (M, P) and energies (M,) of a layer, exactly."""

    def __init__(self, layer):
        self.weight = rational(layer.affine_weight)
        if layer.inputs is None:
            raise ValueError("an exact layer is made of samples")
        rows = whole(layer.affine_inputs.double().tolist())
        n, width = len(rows), len(rows[0])
        weight = whole(layer.affine_weight.tolist())
        if layer.targets is None:
            targets, unit = [[dot(w, x) for w in weight] for x in rows], 2
        else:
            targets, unit = whole(layer.targets.double().tolist()), 1
        self.count, self.rows, self.unit = n, rows, unit
        columns, aims = list(zip(*rows, strict=True)), list(zip(*targets, strict=True))
        self.gram = [[fraction(dot(a, b), 2) / n for b in columns] for a in columns]
        self.cross = [[fraction(dot(y, a), unit + 1) / n for a in columns] for y in aims]
        self.energies = [fraction(dot(y, y), 2 * unit) / n for y in aims]
        self.targets = [[fraction(y, unit) for y in row] for row in targets]
        self.width = width

    def errors(self, x):
        """(M,): E (x_m u - y_m)^2."""
        found = []
        for m, row in enumerate(rational(x)):
            image = [dot(row, g) for g in self.gram]
            found.append(dot(row, image) - 2 * dot(row, self.cross[m]) + self.energies[m])
        return found

    def least(self, m, support):
        """The least error of neuron m with weights on `support` alone, and those weights (P,)."""
        support = list(support)
        matrix = [[self.gram[i][j] for j in support] for i in support]
        found = solve(matrix, [self.cross[m][i] for i in support])
        weights = [Fraction(0)] * self.width
        for i, value in zip(support, found, strict=True):
            weights[i] = value
        return self.energies[m] - dot([self.cross[m][i] for i in support], found), weights


def solve(matrix, right):
    """A solution of a consistent symmetric semidefinite system."""
    n = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    pivots, at = [], 0
    for column in range(n):
        pivot = next((i for i in range(at, n) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[at], rows[pivot] = rows[pivot], rows[at]
        head = rows[at][column]
        rows[at] = [value / head for value in rows[at]]
        for i in range(n):
            if i != at and rows[i][column]:
                factor = rows[i][column]
                rows[i] = [a - factor * b for a, b in zip(rows[i], rows[at], strict=True)]
        pivots.append(column)
        at += 1
    found = [Fraction(0)] * n
    for row, column in enumerate(pivots):
        found[column] = rows[row][n]
    return found


def reconstruction(problem):
    """The least value over the pattern's supports, by trying them all."""
    exact, (out, width) = moments(problem.layer), tuple(problem.target.shape)
    bias = () if problem.layer.bias is None else (width,)
    weights = [Fraction(1)] * out if problem.importance is None else rational(problem.importance)
    least = [
        [
            min(exact.least(m, (*kept, *bias))[0] for kept in itertools.combinations(range(width), k))
            for k in range(width + 1)
        ]
        for m in range(out)
    ]
    each = [[a * value for value in row] for a, row in zip(weights, least, strict=True)]
    quota = problem.pattern.quota((out, width))
    if isinstance(problem.pattern, PerRow):
        return sum(row[quota] for row in each)
    counts = itertools.product(range(width + 1), repeat=out)
    return min(sum(row[k] for row, k in zip(each, ks, strict=True)) for ks in counts if sum(ks) <= quota)


def surgeon(problem):
    """The least value with the removed weights at 0."""
    exact = moments(problem.layer)
    free = [[i for i, gone in enumerate(row) if not gone] for row in problem.removed.tolist()]
    return sum(exact.least(m, support)[0] for m, support in enumerate(free))


def lasso_value(problem, x):
    """1/2 E|x u - y|^2 + lam |x|."""
    size = sum(abs(value) for row in rational(x) for value in row)
    return sum(moments(problem.layer).errors(x)) / 2 + Fraction(problem.lam) * size


def lasso_points(problem, x):
    """Rational points (M, P) near the optimum: on x's support with x's signs, the stationary one; rows of fractions."""
    exact, lam = moments(problem.layer), Fraction(problem.lam)
    rows = []
    for m, row in enumerate(x.tolist()):
        support = [i for i, value in enumerate(row) if value]
        signs = [1 if row[i] > 0 else -1 for i in support]
        right = [exact.cross[m][i] - lam * s for i, s in zip(support, signs, strict=True)]
        matrix = [[exact.gram[i][j] for j in support] for i in support]
        weights = [Fraction(0)] * exact.width
        for i, value in zip(support, solve(matrix, right), strict=True):
            weights[i] = value
        rows.append(weights)
    return rows


class ExactBall:
    """Net-Trim's constraints, exactly: squares of norms are compared."""

    def __init__(self, problem):
        self.problem, layer = problem, problem.layer
        self.rows = rational(problem.inputs)
        if layer.targets is None:
            y = [[dot(w, x) for w in rational(layer.affine_weight)] for x in self.rows]
        else:
            y = rational(layer.targets)
        relu = layer.activation == "relu"
        self.outputs = [[max(value, 0) for value in row] for row in y] if relu else y
        self.active = [[value > 0 or not relu for value in row] for row in y]
        self.scale = sum(value * value for row in self.outputs for value in row)  # squared
        slack = problem.slack
        self.ceiling = rational(slack) if isinstance(slack, torch.Tensor) and slack.ndim == 2 else None
        self.level = Fraction(0) if slack is None or self.ceiling is not None else Fraction(float(slack))

    def left(self, x):
        """Squared error in the ball, the largest excess, and for each neuron |relu(X x_m) - Y_m|^2."""
        weights = rational(x)
        error, excess, errors = Fraction(0), None, [Fraction(0)] * len(weights)
        for p, row in enumerate(self.rows):
            for m, weight in enumerate(weights):
                made = dot(row, weight)
                if self.active[p][m]:
                    error += (made - self.outputs[p][m]) ** 2
                    errors[m] += (made - self.outputs[p][m]) ** 2
                else:
                    over = made - (self.level if self.ceiling is None else self.ceiling[p][m])
                    excess = over if excess is None else max(excess, over)
                    errors[m] += max(made, Fraction(0)) ** 2
        return error, Fraction(-1) if excess is None else excess, errors

    def feasible(self, x):
        error, excess, _ = self.left(x)
        return error <= Fraction(self.problem.epsilon) ** 2 * self.scale and excess <= 0

    def violated(self, x, claimed):
        """Whether the violation of x is certainly not above what is claimed."""
        if math.isinf(claimed):
            return True
        error, excess, _ = self.left(x)
        scale = self.scale or Fraction(1)
        inside = Fraction(claimed) + Fraction(self.problem.epsilon)
        count = max(sum(map(sum, self.active)), 1)
        return error <= inside**2 * scale and (excess <= 0 or excess**2 * count <= Fraction(claimed) ** 2 * scale)


def allocation(problem):
    """The least value within the budget, as the problem's own violation has it; None where nothing fits."""
    limit = Fraction(problem.budget) * (1 + 2 * Fraction(problem.slack))
    best = None
    for choice in itertools.product(*(range(len(problem.curves[group[0]].kept)) for group in problem.groups)):
        cost = value = Fraction(0)
        for group, level in zip(problem.groups, choice, strict=True):
            for index in group:
                cost += Fraction(float(problem.curves[index].costs[level]))
                value += Fraction(float(problem.curves[index].distortion[level]))
        if cost <= limit:
            best = value if best is None else min(best, value)
    return best


def saliencies(problem):
    """(n, n): c(j, i)."""
    w, a = rational(problem.incoming), rational(problem.outgoing)
    gram = None if problem.gram is None else rational(problem.gram)
    weights = [sum(row[j] ** 2 for row in a) / len(a) for j in range(len(w))]

    def apart(left, right):
        step = [x - y for x, y in zip(left, right, strict=True)]
        return dot(step, step) if gram is None else dot(step, [dot(row, step) for row in gram])

    return [[weights[j] * apart(w[j], w[i]) for i in range(len(w))] for j in range(len(w))]


def merging(problem, table):
    """The least summed saliency with `keep` survivors, or the fewest survivors within the limit."""
    n = len(table)

    def least(keep):
        return min(
            sum(min(table[j][i] for i in kept) for j in range(n)) for kept in itertools.combinations(range(n), keep)
        )

    if problem.keep is not None:
        return least(problem.keep)
    return next(k for k in range(1, n + 1) if least(k) <= Fraction(problem.max_saliency))


def budget_value(problem, errors):
    """sum n log(cap / e), to 50 digits."""
    terms = zip(problem.sizes.tolist(), problem.caps.tolist(), errors, strict=True)
    return sum(Decimal(n) * (Decimal(cap) / Decimal(e)).ln() for n, cap, e in terms)


def budget_optimum(problem):
    """A value at most some 1e-40 above the optimum: the price by bisection, its errors made feasible."""
    gains, sizes, caps = (list(map(Decimal, each.tolist())) for each in (problem.gains, problem.sizes, problem.caps))
    goal = Decimal(problem.goal)

    def errors(price):
        found = []
        for g, n, cap in zip(gains, sizes, caps, strict=True):
            found.append(cap if g == 0 or price * g * cap <= n else n / (price * g))
        return found

    def spent(found):
        return sum(g * e for g, e in zip(gains, found, strict=True))

    if spent(caps) <= goal:
        return Decimal(0)
    low, high = Decimal(10) ** -400, Decimal(10) ** 400
    for _ in range(400):
        middle = (low * high).sqrt()
        low, high = (middle, high) if spent(errors(middle)) > goal else (low, middle)
    return budget_value(problem, errors(high))


def norm_at_least(claimed, squared):
    """Whether a float is at least the root of a rational."""
    return math.isinf(claimed) or Fraction(claimed) ** 2 >= squared


def chain_difference(pair, x):
    """zhat_L - z_L at a point x."""
    ends = []
    for weights, biases in ((pair.weights, pair.biases), (pair.pruned_weights, pair.pruned_biases)):
        y = rational(x)
        for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            y = [max(value, Fraction(0)) for value in y] if place else y
            y = [dot(row, y) + b for row, b in zip(rational(weight), rational(bias), strict=True)]
        ends.append(y)
    return [b - a for a, b in zip(*ends, strict=True)]
