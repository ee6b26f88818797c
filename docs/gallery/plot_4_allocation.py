"""
How much each layer keeps
=========================

Some layers can lose nearly everything, some nearly nothing. Prune each layer alone to several levels, look what the
network's output does, and a budget for the whole network becomes a multiple-choice knapsack:

.. math::

    \\min \\sum_l d_l(k_l) \\quad\\text{subject to}\\quad \\sum_l c_l(k_l) \\le \\text{budget}

It is solved to proven optimality in milliseconds.
"""

import matplotlib.pyplot as plt
import torch

import convexprune as cp
from convexprune import datasets

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
data = datasets.digits()
model = datasets.train(datasets.lenet300(64, (100, 40)), data.x_train, data.y_train)
batches = [data.x_train]

# %%
# A rate-distortion curve for each layer: what it loses at each level.

levels = [step / 50 for step in range(1, 51)]
curves = cp.rate_distortion(model, batches, measure=cp.OutputChange(), levels=levels)
for curve in curves:
    print(f"{curve.name}: {curve.total} weights, {len(curve.kept)} levels")

# %%
# Keep 30% of the weights. Where? Ask the exact solver, and the field's rules.

budget = 0.3 * sum(curve.total for curve in curves)
problem = cp.SparsityAllocation(curves, budget)
rules = (cp.MinimalCore(), cp.Uniform(), cp.ErdosRenyiKernel(), cp.LAMP(), cp.GlobalMagnitude())
chosen = {}
print(f"{'':18} {'distortion':>10} {'bound':>8}  kept of each layer")
for rule in rules:
    name, solution = type(rule).__name__, cp.solve(problem, rule)
    choice = list(zip(curves, solution.x[:, 0].long().tolist(), strict=True))
    chosen[name] = {curve.name: int(curve.kept[level]) for curve, level in choice}
    shares = " ".join(f"{float(curve.fraction[level]):4.0%}" for curve, level in choice)
    proof = solution.certificate
    print(f"{name:18} {proof.value:10.3f} {proof.bound:8.3f}  {shares}")

# %%
# The optimum is the same for all; the rules only bring no price to prove a bound with. The choice, on the curves:

figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for curve, colour in zip(curves, ("#1f5f8b", "#b5651d", "#5a7d2a"), strict=True):
    order = curve.kept.argsort()
    loss = curve.distortion.clamp(min=1e-4)
    axes.plot(100 * curve.fraction[order], loss[order], color=colour, label=curve.name)
    at = (curve.kept == chosen["MinimalCore"][curve.name]).nonzero()[0]
    axes.plot(100 * curve.fraction[at], loss[at], "o", color=colour)
axes.set_yscale("log")
axes.set_ylim(1e-3)
axes.set_xlabel("weights kept of the layer, %")
axes.set_title("Squared change of the network's output, a curve for each layer", loc="left", fontsize=10)
axes.legend(frameon=False)
plt.show()

# %%
# Prune with each allocation. A curve speaks of its layer pruned alone, and the sum of the curves predicts what happens
# in parallel mode. In cascade mode a layer makes good a part of what was lost before it. The curves know nothing of
# that: distortions are smaller there, and the best allocation for the curves need not be the best one.

print(f"{'distortion':18} {'predicted':>9} {'parallel':>9} {'cascade':>9}")
for rule in rules:
    allocation = cp.Allocation(0.3, curves=curves, solver=rule)
    reports = [cp.prune(model, batches, mode=mode, allocation=allocation)[1] for mode in ("parallel", "cascade")]
    figures = [reports[0].allocation.certificate.value, *(report.distortion for report in reports)]
    print(f"{type(rule).__name__:18} " + " ".join(f"{figure:9.3f}" for figure in figures))

# %%
# The whole walk is one call; curves that are not given are measured first.

pruned, report = cp.prune(model, batches, allocation=cp.Allocation(0.3, measure=cp.OutputChange(), levels=levels))
print(report)
print(f"test error {datasets.error_rate(pruned, data.x_test, data.y_test):.2%}")
