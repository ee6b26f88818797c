"""Neuron merging and compaction: seconds, quality, whole networks, and the speed of what gets smaller.

python benchmarks/merging.py --part scaling     seconds and gigabytes of the greedy, 256 to 16,384 neurons
python benchmarks/merging.py --part quality     greedy and exchange against HiGHS' optimum on 100 small cases
python benchmarks/merging.py --part lenet       LeNet-300-100, no data: test error against neurons removed
python benchmarks/merging.py --part latency     pruned and merged networks compacted: parameters and CPU seconds
"""

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20

import convexprune as cp
from convexprune.datasets import error_rate, mnist, trained_lenet300


def layer(neurons, width, outputs=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(neurons, width, generator=generator), torch.randn(outputs, neurons, generator=generator)


def scaling(folder, options):
    rows = []
    for neurons, width in [*((n, n) for n in options.sizes), (4096, 9216)]:
        command = [sys.executable, __file__, "--part", "one", "--sizes", str(neurons), str(width)]
        done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append([f"{neurons} x {width}", f"{done['seconds']:.2f}", f"{done['peak']:.2f}"])
        print(rows[-1], flush=True)
    print(table(["neurons x inputs", "seconds, down to half", "peak GB"], rows))


def one(folder, options):
    neurons, width = options.sizes
    incoming, outgoing = layer(neurons, width)
    begun = time.perf_counter()
    cp.GreedyMerging().solve(cp.NeuronMerging(incoming, outgoing, keep=neurons // 2))
    seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))


def quality(folder, options):
    ratios = {"greedy": [], "exchange": [], "bound": [], "random": [], "magnitude": []}
    for seed in range(100):
        incoming, outgoing = layer(20, 6, 4, seed)
        problem = cp.NeuronMerging(incoming, outgoing, keep=5 + seed % 10)
        best = cp.solve(problem, cp.CVXPY("HIGHS", mip_rel_gap=0)).certificate.value
        ratios["greedy"].append(cp.solve(problem, cp.GreedyMerging()).certificate.value / best)
        found = cp.solve(problem, cp.Exchange()).certificate
        ratios["exchange"].append(found.value / best)
        ratios["bound"].append(found.bound / best)
        apart = (problem.features[:, None] - problem.features).square().sum(2)
        norms = problem.importance * problem.features.square().sum(1)
        shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
        for name, order in (("random", shuffled), ("magnitude", norms.argsort(descending=True))):
            kept = order[: problem.keep]
            x = kept[apart[:, kept].argmin(1)].double()[:, None]
            x[kept, 0] = kept.double()
            ratios[name].append(problem.value(x) / best)
    rows = [[name, f"{statistics.median(r):.3f}", f"{max(r):.3f}", f"{min(r):.3f}"] for name, r in ratios.items()]
    print(table(["over HiGHS' optimum", "median", "largest", "smallest"], rows))


def lenet(folder, options):
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    batches = list(images(folder, 5000).split(1000))
    wrong = lambda net: f"{100 * error_rate(net, data.x_test, data.y_test):.2f}%"  # noqa: E731
    print(f"LeNet-300-100, dense test error {wrong(model)}")
    rows = []
    for share in (None, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        merged, report = cp.merge(model, share)
        with_data, _ = cp.merge(model, share, batches=batches)
        fitted, _ = cp.merge(model, share, batches=batches, refit=True, solver=cp.Exchange(bound_steps=0))
        before, after = report.compaction.parameters
        rows.append([
            "published cut-off" if share is None else f"{100 - 100 * share:.0f}%", f"{1 - after / before:.1%}",
            wrong(merged), wrong(without_surgery(model, report)), wrong(with_data), wrong(fitted),
        ])  # fmt: skip
        print(rows[-1], flush=True)
    print(table(["neurons removed", "parameters removed", "no data", "without surgery", "Gram-weighted",
                 "exchange, least squares"], rows))  # fmt: skip


def without_surgery(model, report):
    """The same neurons removed, their outgoing weights not added to anybody's."""
    cut = copy.deepcopy(model)
    for row in report.layers:
        maker, reader = (cut.get_submodule(name) for name in (row.name, {"fc1": "fc2", "fc2": "fc3"}[row.name]))
        incoming = torch.cat([maker.weight, maker.bias[:, None]], 1).detach()
        problem = cp.NeuronMerging(incoming, reader.weight.detach(), keep=row.survivors)
        stays = problem.survivors(cp.solve(problem).x)
        with torch.no_grad():
            gone = torch.ones(row.neurons, dtype=torch.bool).index_fill_(0, stays, False)
            reader.weight[:, gone] = 0
    return cut


def seconds(model, x, repeats):
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            begun = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def latency(folder, options):
    dense, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    x = images(folder, 10_000)
    cases = []
    trim, _ = cp.prune(dense, list(x.split(5000)), lambda layer: cp.NetTrim(layer, 0.1))
    cases.append(("LeNet, Net-Trim epsilon 0.1", dense, trim, x, data))
    to_budget, _ = cp.prune(dense, list(x.split(5000)), mode="cascade", allocation=cp.Allocation(0.03, damping=1e-3))
    cases.append(("LeNet, allocation at 3%", dense, to_budget, x, data))
    cases.append(("LeNet, half of the neurons merged", dense, cp.merge(dense, 0.5)[0], x, data))
    resnet = resnet20(folder)
    images_, _ = cifar10(folder, "train", 256)
    sparse, _ = cp.prune(
        resnet, list(images_.split(128)), mode="residual", names="*conv*",
        allocation=cp.Allocation(0.05, damping=1e-3),
    )  # fmt: skip
    cases.append(("ResNet-20, allocation at 5%", resnet, sparse, images_, None))
    rows = []
    for name, model, pruned, inputs, labelled in cases:
        small, done = cp.compact(pruned, round_to=options.round_to)
        with torch.no_grad():
            change = float((small(inputs[:256]) - pruned(inputs[:256])).abs().max() / pruned(inputs[:256]).abs().max())
        before = sum(p.numel() for p in model.parameters())
        ratios = [
            seconds(model, inputs[:size], n) / seconds(small, inputs[:size], n) for size, n in ((1, 300), (256, 30))
        ]
        wrong = f"{100 * error_rate(small, labelled.x_test, labelled.y_test):.2f}%" if labelled else "-"
        rows.append(
            [name, f"{before:,} -> {done.parameters[1]:,}", f"{change:.0e}", wrong, *(f"{r:.2f}" for r in ratios)]
        )
        print(rows[-1], flush=True)
    print(
        table(
            ["network", "parameters", "largest change", "test error", "dense / compacted, batch 1", "batch 256"], rows
        )
    )


PARTS = {"scaling": scaling, "one": one, "quality": quality, "lenet": lenet, "latency": latency}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS], required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--round-to", type=int, default=1, help="channels left are a multiple of this, for latency")
    parser.add_argument("--data", default=None)
    options = parser.parse_args()
    folder = None if options.part in ("scaling", "one", "quality") else data_folder(options.data)
    PARTS[options.part](folder, options)


if __name__ == "__main__":
    main()
