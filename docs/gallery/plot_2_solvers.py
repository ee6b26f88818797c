"""
Compare solvers
===============

Keep a fifth of a layer's weights and make the smallest error with them:

.. math::

    \\min_W \\; \\mathbb{E} \\, |W x - y|^2 \\quad\\text{subject to}\\quad \\|W\\|_0 \\le k

This is not convex. There are many ways to a good point, from sorting the weights to searching for swaps, and since the
problem keeps the score, they can be compared in a few lines.
"""

import matplotlib.pyplot as plt
import torch

import convexprune as cp
from convexprune import datasets
from convexprune.solution import Attempt

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
data = datasets.digits()
model = datasets.train(datasets.lenet300(64, (100, 40)), data.x_train, data.y_train)
(layer,) = cp.capture(model, [data.x_train], names="fc2")

# %%
# A solver is a small object; its options are its fields, and solvers can be made of solvers.

solvers = {
    "magnitude": cp.Magnitude(),
    "magnitude, refitted": cp.Refit(cp.Magnitude()),
    "activations": cp.Refit(cp.ActivationMagnitude()),
    "column sweep": cp.ColumnSweep(),
    "exact OBS": cp.ExactOBS(),
    "ADMM": cp.ADMM(),
    "ADMM, then swaps": cp.Then(cp.RisingPenalty(), cp.SwapSearch()),
    "Balanced": cp.Balanced(),
    "Best": cp.Best(),
}
problem = cp.Reconstruction(layer, cp.Unstructured(0.2))
found = {name: cp.solve(problem, solver) for name, solver in solvers.items()}
print(f"{'':20} {'error':>8} {'violation':>10} {'ms':>6}")
for name, solution in found.items():
    proof = solution.certificate
    print(f"{name:20} {proof.value / layer.energy:8.3%} {proof.violation:10.0e} {1000 * solution.seconds:6.1f}")

# %%
# Good supports matter more the fewer weights there are.

kept = [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
drawn = {"magnitude": "#b5651d", "magnitude, refitted": "#d9a066", "ADMM": "#7fa8c9", "Best": "#1f5f8b"}
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, colour in drawn.items():
    problems = [cp.Reconstruction(layer, cp.Unstructured(share)) for share in kept]
    errors = [cp.solve(each, solvers[name]).certificate.value / layer.energy for each in problems]
    axes.plot([100 * share for share in kept], errors, "o-", color=colour, label=name, markersize=4)
axes.set_yscale("log")
axes.invert_xaxis()
axes.set_xlabel("weights kept, %")
axes.set_title("Relative squared error of each solver, by the weights kept", loc="left", fontsize=10)
axes.legend(frameon=False)
plt.show()

# %%
# How far is the best of them from the optimum? There is a lower bound, but it says little where the Gram matrix is
# badly conditioned, as here. Some damping makes it say more (it is part of the data, and thus the same for every
# solver), and ``Bounded`` looks for a good witness of it.

damped = layer.damped(0.03)
for share in (0.8, 0.5, 0.2):
    proof = cp.solve(cp.Reconstruction(damped, cp.Unstructured(share)), cp.Bounded(cp.Best(), rounds=6)).certificate
    print(f"{share:.0%} kept: {proof.value:.3f} >= optimum >= {proof.bound:.3f}")

# %%
# For neurons with few inputs branch and bound finds the optimum. (Its bound is no better: a search leaves no witness
# behind that the problem could check.)

torch.manual_seed(1)
x = torch.randn(300, 12) @ torch.randn(12, 12)
small = cp.Layer.from_samples(torch.randn(4, 12), x, activation=None)
for solver in (cp.Magnitude(), cp.Best(), cp.BranchAndBound()):
    proof = cp.solve(cp.Reconstruction(small, cp.PerRow(4)), solver).certificate
    print(f"{type(solver).__name__:15} {proof.value:9.3f}, bound {proof.bound:.3f}")

# %%
# A solver cannot make itself look good. This one returns the dense weights and claims to have converged; the problem
# sees that they are not sparse:


class Liar:
    """Keeps everything."""

    def solve(self, problem, start=None):
        return Attempt(problem.dense, None, cp.Status.CONVERGED, 1)


print(cp.solve(problem, Liar()).certificate)
