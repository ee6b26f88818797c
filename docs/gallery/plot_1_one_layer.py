"""
One layer: formulate and solve
==============================

Net-Trim asks for the sparsest weights, in the L1 norm, whose outputs stay in a ball around the dense layer's:

.. math::

    \\min_U \\|U\\|_1 \\quad\\text{subject to}\\quad \\|(X U^\\top - Y)_\\Omega\\|_F \\le \\epsilon \\|Y\\|_F,\\qquad
    (X U^\\top)_{\\Omega^c} \\le 0

:math:`X` are the layer's inputs, :math:`Y` its outputs after ReLU, and :math:`\\Omega` is where :math:`Y > 0`. This
is a convex program: any point can be proven to be within some gap of the optimum.
"""

import matplotlib.pyplot as plt
import torch

import convexprune as cp
from convexprune import datasets

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
data = datasets.digits()
model = datasets.train(datasets.lenet300(64, (100, 40)), data.x_train, data.y_train)
print(f"{len(data.x_train)} images, test error {datasets.error_rate(model, data.x_test, data.y_test):.2%}")

# %%
# ``capture`` runs the network on calibration data and keeps what the layer reads.

(layer,) = cp.capture(model, [data.x_train], names="fc2", keep_inputs=True)
print(layer.name, tuple(layer.weight.shape), layer.activation, tuple(layer.inputs.shape))

# %%
# State the problem, then solve it. Without a second argument ``solve`` takes the problem's default solver, here
# ``ADMM()``.

problem = cp.NetTrim(layer, epsilon=0.05)
solution = cp.solve(problem)
print(solution.status.value)
print(solution.certificate)
print(f"relative gap {solution.certificate.relative_gap:.1e}")
kept = (solution.x[:, :-1] != 0).double().mean()  # the last column is the bias
print(f"weights kept: {kept:.1%}")

# %%
# The certificate was computed by the problem, not by the solver: ``value`` is the objective, ``bound`` a number that no
# feasible point can go below, ``violation`` how far the point is from feasible. Another solver must agree: its optimum
# lies between the two. General solvers need longer, so give them only six neurons and 400 samples.

few = cp.Layer.from_samples(layer.weight[:6], layer.inputs[:400], layer.bias[:6])
others = {"ADMM": cp.ADMM(), "Clarabel": cp.CVXPY("CLARABEL"), "SCS": cp.CVXPY("SCS", eps_abs=1e-7, eps_rel=1e-7)}
for name, solver in others.items():
    found = cp.solve(cp.NetTrim(few, epsilon=0.05), solver)
    proof = found.certificate
    print(f"{name:8} {proof.value:.6f} >= optimum >= {proof.bound:.6f}  violation {proof.violation:.0e}")

# %%
# How much sparsity does a larger ball buy? Each point of the curve is an optimum, to the gap that the certificate
# states.

levels = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
solutions = [cp.solve(cp.NetTrim(layer, epsilon)) for epsilon in levels]
print(f"largest gap: {max(each.certificate.relative_gap for each in solutions):.0e}")

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(levels, [100 * float((each.x[:, :-1] != 0).double().mean()) for each in solutions], "o-", color="#1f5f8b")
axes.set_xscale("log")
axes.set_xticks(levels, [f"{level:.0%}" for level in levels])
axes.minorticks_off()
axes.set_ylim(0)
axes.set_xlabel("change of the layer's outputs allowed, relative")
axes.set_title("Weights kept, %, by the change of the outputs that is allowed", loc="left", fontsize=10)
plt.show()

# %%
# Where the weights were, and where they stay at 5%. A row without any is a neuron that nobody misses.

figure, panels = plt.subplots(2, 1, figsize=(6, 4.6), layout="constrained", sharex=True)
shared = {"cmap": "Greys", "vmin": 0, "vmax": float(layer.weight.abs().quantile(0.98)), "interpolation": "nearest"}
shown = {"Dense weights": layer.weight, "Pruned weights": solution.x[:, :-1]}
for axes, (title, weight) in zip(panels, shown.items(), strict=True):
    axes.imshow(weight.abs(), **shared)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("neuron")
panels[1].set_xlabel("input")
plt.show()
