"""
Fewer neurons, without data
===========================

Two neurons with nearly the same incoming weights say nearly the same. If :math:`j` joins :math:`i`, the next layer's
weights of :math:`j` are added to those of :math:`i`, and for any activation of slope at most one the output moves by at
most

.. math::

    \\mathbb{E} (z - z')^2 \\le \\mathbb{E}|x|^2 \\; \\langle a_j^2 \\rangle \\, \\|w_i - w_j\\|^2

No data is needed to say who should join whom, and the network really gets smaller.
"""

import matplotlib.pyplot as plt
import torch

import convexprune as cp
from convexprune import datasets

plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
torch.manual_seed(0)
data = datasets.digits()
model = datasets.train(datasets.lenet300(64, (100, 40)), data.x_train, data.y_train)

# %%
# Half of both hidden layers leave.

small, report = cp.merge(model, keep=0.5)
print(report)
print(small)

# %%
# The saliency of each merge, in order: the first ones are nearly free. The bar marks where the published rule would
# stop by itself, without being told a number.

figure, panels = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
for axes, layer in zip(panels, report.layers, strict=True):
    axes.plot(range(1, len(layer.curve) + 1), layer.curve, color="#1f5f8b")
    axes.axvline(layer.cutoff, color="#b5651d", linewidth=1)
    axes.set_title(f"{layer.name}, {layer.neurons} neurons", loc="left", fontsize=10)
    axes.set_xlabel("merges")
figure.suptitle("Saliency of each merge, and where the published rule would stop", x=0, ha="left", fontsize=11)
plt.show()

# %%
# One layer as a problem: which neurons survive, and whom the others join, is a p-median problem. The certificate says
# how far an answer is from the optimum, at most; only the local search ``Exchange`` has multipliers to prove it with.
# Small problems can also be given to an integer-programming solver.

incoming = torch.cat([model.fc2.weight, model.fc2.bias[:, None]], 1)
problem = cp.NeuronMerging(incoming, model.fc3.weight, keep=20)
for name, solver in {"greedy": cp.GreedyMerging(), "exchange": cp.Exchange(), "HiGHS": cp.CVXPY("HIGHS")}.items():
    solution = cp.solve(problem, solver)
    proof = solution.certificate
    print(f"{name:10} saliency {proof.value:.4f}  bound {proof.bound:.4f}  {solution.seconds:6.3f} s")

# %%
# With calibration data the same problem knows which inputs matter, and the next layer can be fitted anew.

shares = [0.9, 0.7, 0.5, 0.3, 0.2]
recipes = {
    "no data": ("#b5651d", {}),
    "with data": ("#7fa8c9", {"batches": [data.x_train]}),
    "with data, refitted": ("#1f5f8b", {"batches": [data.x_train], "refit": True, "solver": cp.Exchange()}),
}
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for name, (colour, options) in recipes.items():
    merged = [cp.merge(model, keep=share, **options)[0] for share in shares]
    errors = [100 * datasets.error_rate(each, data.x_test, data.y_test) for each in merged]
    axes.plot([100 * share for share in shares], errors, "o-", color=colour, label=name, markersize=4)
axes.axhline(100 * datasets.error_rate(model, data.x_test, data.y_test), color="#999999", linewidth=0.8, linestyle=":")
axes.annotate("dense", (20, 100 * datasets.error_rate(model, data.x_test, data.y_test)), (0, 4),
              textcoords="offset points", color="#666666", fontsize=9, ha="right")  # fmt: skip
axes.invert_xaxis()
axes.set_xlabel("neurons kept, %")
axes.set_title("Test error, %, by the share of neurons kept", loc="left", fontsize=10)
axes.set_ylim(0)
axes.legend(frameon=False, loc="upper left")
plt.show()
