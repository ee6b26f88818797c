"""Data-free merging's table and figure 2 (Srinivas, Babu, BMVC 2015): published, as published but run here, and ours.

python -m papers.merging [lenet] [alexnet]        with PYTHONPATH=benchmarks and CONVEXPRUNE_DATA

The network is Caffe's LeNet, trained here; its fc1 has 500 neurons, each with 801 weights in and 10 out. As published:
`GreedyMerging` without data. Ours: the same merges without data by exchange, with data by their Gram matrix, and the
neurons that least squares would miss least, the next layer fitted.
"""

import copy
import json
import pathlib
import subprocess
import sys

import torch
from nettrim.benchmark_utils.lenet import data_folder, table
from torch import nn

import convexprune as cp
from convexprune.datasets import error_rate
from convexprune.solvers.merging.greedy import GreedyMerging
from papers.networks import DOCS, features, fit, mnist_images, parted, trained_caffe_lenet, write_parts

REMOVED = (100, 200, 300, 350, 400, 425, 450, 460, 470, 480)


def problem_of(head, keep, gram=None):
    """The p-median problem of fc1's neurons."""
    incoming = torch.cat([head[0].weight, head[0].bias[:, None]], 1).detach()
    return cp.NeuronMerging(incoming, head[2].weight.detach(), keep=keep, gram=gram)


def cut(head, stays, outgoing=None):
    """A smaller head: only some neurons of fc1, read by `outgoing`, or as before."""
    small = nn.Sequential(
        nn.Linear(head[0].in_features, len(stays)), nn.ReLU(), nn.Linear(len(stays), head[2].out_features)
    )
    with torch.no_grad():
        small[0].weight.copy_(head[0].weight[stays])
        small[0].bias.copy_(head[0].bias[stays])
        small[2].weight.copy_((head[2].weight if outgoing is None else outgoing)[:, stays])
        small[2].bias.copy_(head[2].bias)
    return small.eval()


def least_missed(head, inputs, keeps):
    """For each count the neurons that are left when the least missed goes first, and the next layer's best weights.

    OBS for neurons: with P = G^-1 over the neurons' outputs, neuron j costs |a_j|^2 / P_jj; the others make up for it.
    """
    hidden = head[1](head[0](inputs)).detach().double()
    mean, target = hidden.mean(0), head[2](head[1](head[0](inputs))).detach().double()
    centred = hidden - mean
    gram, cross = centred.T @ centred / len(hidden), (target - target.mean(0)).T @ centred / len(hidden)
    gram += 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    stays, inverse, found = torch.arange(len(gram)), torch.linalg.inv(gram), {}
    while True:
        weights = cross[:, stays] @ inverse
        if len(stays) in keeps:
            full = torch.zeros_like(head[2].weight)
            full[:, stays] = weights.float()
            small = cut(head, stays, full)
            with torch.no_grad():
                small[2].bias.copy_((target.mean(0) - weights @ mean[stays]).float())
            found[len(stays)] = small
            if len(stays) == min(keeps):
                return found
        worst = int((weights.square().sum(0) / inverse.diagonal()).argmin())
        rest = torch.arange(len(stays)) != worst
        column = inverse[rest, worst]
        inverse = inverse[rest][:, rest] - column[:, None] * column / inverse[worst, worst]
        stays = stays[rest]


def obd_order(head, inputs):
    """OBD for neurons: the diagonal alone, E[h_j^2] |a_j|^2, the largest first."""
    hidden = head[1](head[0](inputs)).detach().double()
    return (hidden.square().mean(0) * head[2].weight.detach().double().square().sum(0)).argsort(descending=True)


def ways(head, inputs, removed, merges):
    """For each number of neurons removed, the smaller network of each way."""
    count = head[0].out_features
    order = obd_order(head, inputs)
    surgeon = least_missed(head, inputs, {count - gone for gone in removed})
    for gone in removed:
        keep = count - gone
        problem = problem_of(head, keep)
        x = merges.assignment(keep).double()[:, None]
        stays = problem.survivors(x)
        swapped = cp.solve(problem, cp.Exchange(bound_steps=0)).x
        fitted, _ = cp.merge(
            head, keep, batches=list(inputs.split(1000)), refit=True, solver=cp.Exchange(bound_steps=0)
        )
        yield gone, {
            "published": cut(head, stays, problem.merged(x).float()), "without surgery": cut(head, stays),
            "exchange": cut(head, problem.survivors(swapped), problem.merged(swapped).float()),
            "OBD": cut(head, order[:keep].sort().values), "with data": fitted, "OBS": surgeon[keep],
        }  # fmt: skip


def lenet_part(removed=REMOVED, count=5000, steps=200, model=None, data=None, figure=True):
    """Error against neurons removed, by merging and by removal; the saliency curve and its histogram's mode."""
    x, y, x_test, y_test = mnist_images(data_folder()) if data is None else data
    model = trained_caffe_lenet(data_folder()) if model is None else model
    body, head = parted(model)
    inputs, tests = features(body, x[: 4 * count]), features(body, x_test)
    error = lambda network: 100 * error_rate(network, tests, y_test)  # noqa: E731
    whole = sum(p.numel() for p in model.parameters())
    each = head[0].in_features + 1 + head[2].out_features
    merges = GreedyMerging().merges(problem_of(head, 1))
    cutoff = merges.published_cutoff()
    rows, lines = [], {}
    for gone, networks in ways(head, inputs[:count], sorted({*removed, cutoff}), merges):
        found = {name: error(network) for name, network in networks.items()}
        tuned = fit(copy.deepcopy(networks["OBS"]), inputs, y[: len(inputs)], 0, batch=200, steps=steps)
        found["trained"] = error(tuned)
        lines[gone] = found
        mark = " (the published cut-off)" if gone == cutoff else ""
        rows.append([f"{gone}{mark}", f"{gone * each / whole:.1%}", *(f"{value:.2f}" for value in found.values())])
        print(rows[-1], flush=True)
    if figure:
        draw(lines, merges, cutoff, DOCS / "_static" / "papers_merging.png")
    names = ["neurons removed", "parameters removed", "as published", "without surgery", "ours: exchange", "OBD",
             "ours: data, exchange, least squares", "ours, best: OBS, least squares", f"and {steps} steps"]  # fmt: skip
    return (
        f"{table(names, rows)}\n\nTest error in percent; dense {error(head):.2f}, {whole:,} parameters. Published: up "
        "to 85% of the parameters removed without significant loss. The first three ways see no data; the others the "
        f"first {count:,} training images, the last one labels of {len(inputs):,} as well."
    )


def draw(lines, merges, cutoff, path):
    """The paper's figure 2: error and saliency against neurons removed, and the histogram of saliencies."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    gone = sorted(lines)
    for name, style in (("published", "o-"), ("without surgery", "s--"), ("OBD", "^:"), ("OBS", "d-")):
        left.plot(gone, [lines[n][name] for n in gone], style, markersize=3, label=name)
    left.set_yscale("log")
    left.set_xlabel("neurons removed of 500")
    left.set_ylabel("test error, %")
    left.legend(frameon=False, fontsize=7)
    beside = left.twinx()
    beside.plot(range(1, len(merges.saliency) + 1), merges.saliency, color="0.6", linewidth=0.8)
    beside.set_yscale("log")
    beside.set_ylabel("saliency of the merge (grey)", color="0.5")
    values = merges.saliency.numpy()
    right.hist(values[values < 4 * float(merges.saliency.median())], bins=40, color="0.6")
    right.axvline(float(values[min(cutoff, len(values) - 1)]), color="k", linestyle=":")
    right.set_xlabel("saliency; dotted: the mode, where the paper stops")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)


def alexnet_part(shapes=((4096, 9216), (4096, 4096))):
    """AlexNet's fully connected shapes with random weights: seconds and memory of the greedy down to half."""
    script = pathlib.Path(__file__).parents[1] / "merging.py"
    rows = []
    for neurons, width in shapes:
        command = [sys.executable, str(script), "--part", "one", "--sizes", str(neurons), str(width)]
        done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append([f"{neurons} x {width}", "about 35% of all parameters", "not run: no ImageNet here",
                     f"{done['seconds']:.1f} s, {done['peak']:.2f} GB"])  # fmt: skip
    head = ["AlexNet's layer (neurons x inputs)", "published", "error", "random weights, down to half: time and memory"]
    return f"{table(head, rows)}\n\nThe table needs AlexNet's weights and ImageNet's validation images."


PARTS = {"lenet": lenet_part, "alexnet": alexnet_part}

if __name__ == "__main__":
    write_parts("merging", PARTS, sys.argv[1:])
