"""Whole LeNet-300-100 by Net-Trim, parallel and cascade: kept, test error, guaranteed beside measured error.

python benchmarks/lenet_network.py --images 10000 --epsilons 0.02 0.05 0.1 --data DIR
"""

import argparse
import time

from nettrim.benchmark_utils.lenet import data_folder, images, table

import convexprune as cp
from convexprune.datasets import error_rate, mnist, trained_lenet300


def recipe(mode, epsilon, gamma):
    if mode == "parallel":
        return lambda layer: cp.NetTrim(layer, epsilon)
    return lambda layer: cp.NetTrim.cascade(layer, epsilon, gamma)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.02, 0.05, 0.1])
    parser.add_argument("--gamma", type=float, default=1.1)
    parser.add_argument("--modes", nargs="+", default=["parallel", "cascade"])
    options = parser.parse_args()
    folder = data_folder(options.data)
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    batches = [images(folder, options.images)]
    print(f"dense test error {100 * error_rate(model, data.x_test, data.y_test):.2f}%", flush=True)
    head = ["mode", "epsilon", "kept", "test error", "guaranteed", "measured", "worst gap", "violation", "seconds"]
    print(table(head, []), flush=True)
    for mode in options.modes:
        for epsilon in options.epsilons:
            begun = time.perf_counter()
            solver = cp.ADMM(eps_rel=1e-3)
            pruned, report = cp.prune(model, batches, recipe(mode, epsilon, options.gamma), solver, mode=mode)
            seconds = time.perf_counter() - begun
            kept = sum(row.kept for row in report.rows) / sum(row.total for row in report.rows)
            error = error_rate(pruned, data.x_test, data.y_test)
            gap = max(row.certificate.relative_gap for row in report.rows if row.certificate)
            violation = max(row.certificate.violation for row in report.rows if row.certificate)
            row = [mode, epsilon, f"{100 * kept:.1f}%", f"{100 * error:.2f}%"]
            row += [f"{report.network.guaranteed:.1f}", f"{report.network.measured:.1f}"]
            row += [f"{gap:.0e}", f"{violation:.0e}", f"{seconds:.0f}"]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
