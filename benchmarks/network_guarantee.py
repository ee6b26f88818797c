"""The guaranteed error of a pruned network beside its measured one.

python benchmarks/network_guarantee.py

LeNet-300-100 at three sparsities and ResNet-20 at one, in parallel and cascade mode, by Reconstruction; for LeNet also
Theorem 3.2 of L-OBS with the published Frobenius norms and with spectral ones.
"""

import argparse
import math

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20

import convexprune as cp
from convexprune.bounds import theorem_3_2
from convexprune.examples import trained_lenet300


def published(report, network, samples):
    """Theorem 3.2, both norms, over the measured error; rows are in units of || . ||_F over the samples."""
    errors = [row.error**2 / samples for row in report.rows]
    weights = [network.get_submodule(row.name).weight.detach() for row in report.rows]
    measured = report.network.measured / math.sqrt(samples)
    return [theorem_3_2(errors, weights, measured, norm).guaranteed / measured for norm in ("frobenius", "spectral")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=2000)
    options = parser.parse_args()
    folder = data_folder(options.data)
    lenet, x = trained_lenet300(folder / "lenet300.npz"), images(folder, options.images)
    resnet, y = resnet20(folder), cifar10(folder, "train", 256)[0]
    cases = [("LeNet-300-100", lenet, [x], None, keep) for keep in (0.5, 0.2, 0.1)]
    cases.append(("ResNet-20", resnet, list(torch.split(y, 128)), "*conv*", 0.5))
    rows = []
    for name, model, batches, names, keep in cases:
        for mode in ("parallel", "cascade"):
            network, report = cp.prune(
                model, batches, lambda layer, k=keep: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(k)),
                mode=mode, names=names, keep_inputs=False,
            )  # fmt: skip
            found = report.network
            theorem = ["-", "-"]
            if names is None and mode == "parallel":
                theorem = [f"{ratio:.3g}" for ratio in published(report, network, len(x))]
            rows.append([
                name, mode, f"{1 - keep:.0%}", f"{found.guaranteed:.4g}", f"{found.measured:.4g}",
                f"{found.guaranteed / found.measured:.3g}", *theorem,
            ])  # fmt: skip
            print(rows[-1], flush=True)
    head = ["network", "mode", "sparsity", "guaranteed", "measured", "ratio", "Theorem 3.2, Frobenius", "spectral"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
