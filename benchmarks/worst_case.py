"""How far pruning can move a network's outputs over boxes around test images, and how tight the bounds are.

python benchmarks/worst_case.py

LeNet-300-100 at three sparsities, 50 test images, boxes of four radii in the max norm, cut to [0, 1]; then networks
small enough for the mixed-integer program.
"""

import argparse
import copy
import time

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table

import convexprune as cp
from convexprune.bounds.difference import Exact, IntervalPropagation
from convexprune.datasets import lenet300, mnist, train, trained_lenet300


def lenet(options):
    """Means over the images of the largest output difference: bounded, found; and the predictions settled."""
    folder = data_folder(options.data)
    model, used = trained_lenet300(folder / "lenet300.npz"), list(images(folder, 5000).split(2500))
    x = mnist(folder / "mnist.npz").x_test[: options.images]
    rows = []
    for keep in (0.5, 0.2, 0.1):
        network, _ = cp.prune(
            model, used, lambda layer, k=keep: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(k)),
            cp.Balanced(), mode="cascade",
        )  # fmt: skip
        for radius in (0.0, 0.005, 0.01, 0.02):
            loose = cp.worst_case(model, network, x, radius, within=(0, 1), method=IntervalPropagation())
            begun = time.perf_counter()
            tight = cp.worst_case(model, network, x, radius, within=(0, 1))
            seconds = time.perf_counter() - begun
            bounds = [float(each.mean()) for each in (loose.largest, tight.largest, tight.found)]
            rows.append([
                f"{1 - keep:.0%}", radius, *(f"{each:.4g}" for each in bounds), f"{bounds[1] / bounds[2]:.2f}",
                f"{float(tight.unchanged.double().mean()):.0%}", f"{float(loose.unchanged.double().mean()):.0%}",
                f"{seconds:.1f}",
            ])  # fmt: skip
            print(rows[-1], flush=True)
    head = ["sparsity", "radius", "intervals", "linear relaxation", "found", "relaxation / found",
            "predictions certified unchanged", "by intervals", "seconds"]  # fmt: skip
    print(table(head, rows))


def tiny(options):
    """6-8-8-3 networks trained on labels by a random rule, half their weights pruned, against the exact program."""
    rows = []
    for radius in (0.05, 0.1, 0.2, 0.4):
        totals, seconds = torch.zeros(4, dtype=torch.float64), 0.0
        for seed in range(options.networks):
            model, network, x = small(seed)
            results = [cp.worst_case(model, network, x, radius, method=IntervalPropagation())]
            results.append(cp.worst_case(model, network, x, radius))
            begun = time.perf_counter()
            results.append(cp.worst_case(model, network, x, radius, method=Exact()))
            seconds += time.perf_counter() - begun
            totals += torch.stack([*(each.largest.mean() for each in results), results[1].found.mean()])
        mean = [float(total) / options.networks for total in totals]
        rows.append([
            radius, *(f"{each:.4g}" for each in mean), f"{mean[1] / mean[2]:.2f}", f"{mean[3] / mean[2]:.3f}",
            f"{seconds / options.networks / 4:.2f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["radius", "intervals", "linear relaxation", "exact", "found", "relaxation / exact", "found / exact",
            "seconds an exact sample"]  # fmt: skip
    print(table(head, rows))


def small(seed):
    """A network, the pruned one, and 4 inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 6, generator=generator)
    labels = (x.square() @ torch.randn(6, 3, generator=generator) + x @ torch.randn(6, 3, generator=generator)).argmax(
        1
    )
    torch.manual_seed(seed)
    model = train(lenet300(6, (8, 8), 3), x, labels, epochs=20, seed=seed)
    network, _ = cp.prune(
        copy.deepcopy(model), [x], lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5)), cp.Balanced(),
        mode="cascade",
    )  # fmt: skip
    return model, network, x[:4]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--networks", type=int, default=5)
    options = parser.parse_args()
    lenet(options)
    tiny(options)


if __name__ == "__main__":
    main()
