"""
A certified network
===================

Layers are pruned one at a time; what counts is the network. Each layer's certificate limits its own error, the norms of
the layers behind it limit how that error grows, and so the network's error is known before the pruned network is run.
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
# The recipe is a function from a layer to a problem. In parallel mode every layer is judged on the dense network's
# inputs.

pruned, report = cp.prune(model, batches, lambda layer: cp.NetTrim(layer, epsilon=0.05), mode="parallel")
print(report)

# %%
# In cascade mode a layer reads what the network pruned so far gives it, and aims at the dense network's outputs. The
# errors before it are then already in its own, nothing has to be multiplied, and the guarantee is far nearer.

pruned, report = cp.prune(model, batches, lambda layer: cp.NetTrim.cascade(layer, epsilon=0.05), mode="cascade")
print(report)

# %%
# The last line compares three ways to carry the layers' errors through the network: with the published Frobenius norms,
# with spectral norms, and channel by channel, which is the one that is reported. None is ever below the measured error.
# In cascade mode the two are the same here: the last layer's own error is the network's.

recipes = {
    "parallel": lambda epsilon: lambda layer: cp.NetTrim(layer, epsilon),
    "cascade": lambda epsilon: lambda layer: cp.NetTrim.cascade(layer, epsilon),
}
levels = [0.02, 0.05, 0.1, 0.2]
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for (mode, recipe), colour in zip(recipes.items(), ("#b5651d", "#1f5f8b"), strict=True):
    reports = [cp.prune(model, batches, recipe(epsilon), mode=mode)[1] for epsilon in levels]
    kept = [100 * each.kept_fraction for each in reports]
    errors = [each.network for each in reports]
    axes.plot(kept, [e.guaranteed / e.scale for e in errors], "-", color=colour, label=f"{mode}, guaranteed")
    axes.plot(kept, [e.measured / e.scale for e in errors], "o", color=colour, mfc="white", label=f"{mode}, measured")
axes.set_yscale("log")
ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1]
axes.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
axes.minorticks_off()
axes.invert_xaxis()
axes.set_xlabel("weights kept, %")
axes.set_title("Relative error of the network's output, guaranteed and measured", loc="left", fontsize=10)
axes.legend(frameon=False)
plt.show()

# %%
# All this speaks of the calibration data. For data not seen, hold samples out: none of them took part in the pruning,
# and so they bound, with a stated confidence, how often a prediction changes and how large the error is.

print(cp.certify_unseen(model, pruned, [data.x_test], batches, clip=100.0, confidence=0.99))
dense, sparse = (datasets.error_rate(each, data.x_test, data.y_test) for each in (model, pruned))
print(f"test error, dense {dense:.2%}, pruned {sparse:.2%}")
