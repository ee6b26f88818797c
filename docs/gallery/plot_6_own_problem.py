"""
A problem and a solver of your own
==================================

Nothing in convexprune has to change for a new problem or a new solver. This page is one file of another package: a
problem, a solver, and the calls that check both. The problem lets inputs leave as a whole: each input pays a price for
the norm of its weights to all outputs.

.. math::

    \\min_W \\; \\tfrac{1}{2} \\, \\mathbb{E} |W u - y|^2 + \\lambda \\sum_i \\|w_i\\|_2

:math:`u` is what the layer reads, with the constant 1 of the bias; :math:`w_i` is the column of input :math:`i`. This
is the group lasso (Yuan and Lin, JRSS B 2006).
"""

import math
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

import convexprune as cp
from convexprune import datasets
from convexprune.rounding import down, gamma, lowered, raised, total, total_doubt, up
from convexprune.testing import check_formulation, check_problem, check_solver

# %%
# The problem
# -----------
#
# A problem is a frozen dataclass that judges any point ``x``: ``value``, ``violation`` and ``lower_bound``. It has a
# ``shape`` and a ``dense`` point. ``output_errors`` lets ``prune`` carry the error through the network. The moments
# that ``Layer`` gives come with doubts: by how much float64 may have moved them. A value may be rounded to the nearest
# number. A bound is rounded down, by the doubts and by the allowances in ``convexprune.rounding``.


@dataclass(frozen=True, eq=False)
class WholeInputs(cp.LayerProblem):
    """1/2 E|x u - y|^2 + price sum_i ||x_i||_2 over x (M, P); the sum is over the columns."""

    layer: cp.Layer
    price: float
    needs_samples = False  # the moments suffice, so prune need not keep the inputs

    def __post_init__(self):
        if not 0 < self.price < math.inf:
            raise ValueError(f"price is {self.price}; give a finite number > 0")

    @property
    def shape(self):
        return tuple(self.dense.shape)

    @property
    def dense(self):
        return self.layer.affine_weight

    def value(self, x):
        if not bool(torch.isfinite(x).all()):
            return math.inf
        return 0.5 * total(self.layer.squared_errors(x)) + self.price * total(x.detach().double().norm(dim=0))

    def rounding(self, x):
        """By how much ``value`` may be off."""
        left = self.layer.residual(x)
        size = 0.5 * float(left.errors.sum()) + self.price * float(x.detach().double().norm(dim=0).sum())
        return up(0.5 * float(raised(left.error_doubts.sum(), len(x))), gamma(len(x) + 8) * size)

    def violation(self, x):
        return 0.0 if bool(torch.isfinite(x).all()) else math.inf

    def output_errors(self, x):
        return self.layer.error_norms(x)

    def lower_bound(self, witness):
        """For any v with the residual r = y - v u, and any s >= 0 with s ||E[r u_i]||_2 <= price for each input i,

        value(x) >= s E[y r] - s^2 / 2 E|r|^2.  The best s is taken.
        """
        if witness is None:
            return 0.0
        if tuple(witness.shape) != self.shape:
            raise ValueError(f"witness has shape {tuple(witness.shape)}, expected {self.shape}")
        if not bool(torch.isfinite(witness).all()):
            return 0.0
        left = self.layer.residual(witness.detach().double())
        (slopes, slope_doubts), (aligned, aligned_doubts) = left.moments, left.with_targets
        outputs = len(aligned)
        energy = raised((left.errors + left.error_doubts).sum(), outputs)
        steepest = raised((slopes.abs() + slope_doubts).norm(dim=0).max(), outputs + 4)
        best = ((aligned - aligned_doubts).sum() / energy).clamp(min=0)
        s = float(torch.minimum(best, lowered(self.price / steepest)).nan_to_num(nan=0.0))
        terms = s * torch.cat([aligned, -0.5 * s * energy[None]])
        doubt = float(raised(s * aligned_doubts.sum(), outputs)) + gamma(8) * float(terms.abs().sum())
        bound = down(total(terms), total_doubt(terms) + doubt)
        return bound if 0 < bound < math.inf else 0.0

    def to_cvxpy(self):
        import cvxpy

        values, vectors = torch.linalg.eigh(self.layer.affine_gram)
        root = (vectors * values.clamp(min=0).sqrt()).numpy()
        x = cvxpy.Variable(self.shape)
        smooth = 0.5 * cvxpy.sum_squares(x @ root) - cvxpy.sum(cvxpy.multiply(self.layer.affine_cross.numpy(), x))
        priced = self.price * cvxpy.sum(cvxpy.norm(x, axis=0))
        program = cvxpy.Problem(cvxpy.Minimize(smooth + 0.5 * self.layer.energy + priced))
        return cp.Formulation(program, x, lambda: torch.from_numpy(x.value))


# %%
# The problem is checked by one call in its test. Points and witnesses are drawn at random: no feasible point may lie
# below the bound, whatever the witness. ``check_formulation`` compares the problem with its form in CVXPY.

torch.manual_seed(0)
small = cp.Layer.from_samples(torch.randn(4, 6), torch.randn(40, 6), torch.randn(4))
check_problem(WholeInputs(small, price=0.5))
check_formulation(WholeInputs(small, price=0.5))

# %%
# What a broken law looks like: this bound is 2% too high.


class TooHigh(WholeInputs):
    """A wrong bound."""

    def lower_bound(self, witness):
        return 1.02 * super().lower_bound(witness)


proof = cp.solve(WholeInputs(small, price=0.5), cp.CVXPY("CLARABEL"))
try:
    check_problem(TooHigh(small, price=0.5), points=[proof.x], witness=proof.witness)
except AssertionError as error:
    print(str(error).split(", at the witness")[0])

# %%
# The solver
# ----------
#
# For one column, with the others held, the minimum is known: the least-squares column, shortened. The solver takes one
# column after the other. Its point is also its witness. ``takes`` names the problem: ``solve`` refuses any other.


@dataclass(frozen=True)
class ColumnDescent:
    """Exact minimisation over one column of x after the other, until the certificate's gap is at most `gap`."""

    gap: float = 1e-6
    max_iter: int = 2000
    takes = WholeInputs
    starts = True

    def solve(self, problem, start=None):
        x = problem.dense.clone() if start is None else start.double().clone()
        gram, cross = problem.layer.affine_gram, problem.layer.affine_cross
        for step in range(1, self.max_iter + 1):
            for i in range(x.shape[1]):
                wanted = cross[:, i] - x @ gram[:, i] + gram[i, i] * x[:, i]
                shorter = max(0.0, 1 - problem.price / max(float(wanted.norm()), 1e-300))
                x[:, i] = shorter * wanted / gram[i, i].clamp(min=1e-300)
            if step % 10 == 0 and cp.judge(problem, x, x).meets(self.gap, self.gap):
                return cp.Attempt(x, x, cp.Status.CONVERGED, step)
        return cp.Attempt(x, x, cp.Status.MAX_ITER, self.max_iter)


check_solver(ColumnDescent(), WholeInputs(small, price=0.5), gap=1e-6)

# %%
# In a network
# ------------
#
# ``prune`` takes both like any other, and reports what the problem proves. An input that a layer no longer reads is a
# neuron of the layer before: ``compact`` removes it, and the network is smaller.

data = datasets.digits()
model = datasets.train(datasets.lenet300(64, (100, 40)), data.x_train, data.y_train)


def build(layer):
    return WholeInputs(layer, price=0.005 * float(layer.affine_cross.norm(dim=0).max()))


pruned, report = cp.prune(model, [data.x_train], build, ColumnDescent(gap=0.03), mode="cascade")
print(report)
smaller, removed = cp.compact(pruned)
print(smaller)
print(f"test error {datasets.error_rate(model, data.x_test, data.y_test):.2%} dense, "
      f"{datasets.error_rate(smaller, data.x_test, data.y_test):.2%} pruned")  # fmt: skip

# %%
# The price decides how many inputs stay. Each point is an optimum, to the gap of its certificate.

(layer,) = cp.capture(model, [data.x_train], names="fc2")
most = float(layer.affine_cross.norm(dim=0).max())
shares = [0.002, 0.01, 0.05, 0.2]
kept = []
for share in shares:
    found = cp.solve(WholeInputs(layer, price=share * most), ColumnDescent(gap=0.03))
    kept.append(int((found.x[:, :-1] != 0).any(0).sum()))
figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
axes.plot(shares, kept, "o-", color="#1f5f8b", markersize=4)
axes.set_xscale("log")
axes.set_xlabel("price, as a share of the price that removes all inputs")
axes.set_title(f"Inputs of fc2 that stay, of {layer.weight.shape[1]}, by the price", loc="left", fontsize=10)
axes.spines[["top", "right"]].set_visible(False)
plt.show()
