"""Two sparse factors beside one sparse matrix, at the same number of nonzeros.

python benchmarks/sparse_factors.py --data DIR                  two of the widest layers of ResNet-20
python benchmarks/sparse_factors.py --part network --keep 0.1   ResNet-20 whole, layer after layer, no labels

DIR holds resnet20.npz and cifar10.npz, default $CONVEXPRUNE_DATA. Errors are value / E|y|^2 on the calibration images,
seconds are CPU seconds.
"""

import argparse
import time

import numpy as np
import torch
from nettrim.benchmark_utils.lenet import data_folder, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20

import convexprune as cp
from convexprune.datasets import error_rate

SOLVERS = {"Balanced": cp.Balanced(), "Best": cp.Best(), "two factors": cp.Alternation()}


def layers(folder, images, names):
    """Of ResNet-20 those that match, and the files of `layers` that do."""
    x, _ = cifar10(folder, "train", images)
    yield from cp.capture(resnet20(folder), list(x.split(128)), names)


def stored(folder, names):
    for name in names:
        with np.load(folder / "layers" / f"{name}.npz") as arrays:
            weight, gram = torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["gram"])
            yield cp.Layer.from_moments(weight, gram, name=name)


def solved(layer, keep, name):
    """(relative error, CPU seconds); the count must be kept."""
    two = name == "two factors"
    problem = cp.SparseFactors(layer, keep) if two else cp.Reconstruction(layer, cp.Unstructured(keep))
    begun = time.process_time()
    certificate = cp.solve(problem, SOLVERS[name]).certificate
    assert certificate.violation == 0
    return certificate.value / layer.energy, time.process_time() - begun


def compared(folder, options):
    rows = []
    chosen = [*layers(folder, options.images, options.layers), *stored(folder, options.files)]
    for layer in chosen:
        for keep in options.keep:
            found = {name: solved(layer, keep, name) for name in SOLVERS}
            ratio = found["Balanced"][0] / found["two factors"][0]
            figures = [f"{error:.5f} in {seconds:.1f}" for error, seconds in found.values()]
            rows.append([layer.name, f"{keep:.0%}", *figures, f"{ratio:.2f}"])
            print(rows[-1], flush=True)
    print(table(["layer", "kept", *(f"{name}, s" for name in SOLVERS), "Balanced / two"], rows))


def network(folder, options):
    model = resnet20(folder)
    x, _ = cifar10(folder, "train", options.images)
    x_test, y_test = cifar10(folder, "test")
    batches, rows = list(x.split(128)), []
    for keep in options.keep:
        begun = time.process_time()
        one, report = cp.prune(
            model, batches, lambda layer, keep=keep: cp.Reconstruction(layer, cp.Unstructured(keep)), mode="cascade",
            names=options.layers,
        )  # fmt: skip
        middle = time.process_time()
        two, both = cp.factorise(model, batches, keep, names=options.layers)
        seconds = middle - begun, time.process_time() - middle
        pairs = sum(row.problem.startswith("SparseFactors") for row in both.rows)
        for label, made, known, spent in (("one", one, report, seconds[0]), ("two", two, both, seconds[1])):
            accuracy = f"{100 * (1 - error_rate(made, x_test, y_test)):.2f}%"
            rows.append([f"{keep:.0%}", label, f"{known.kept_fraction:.2%}", accuracy, f"{spent:.0f}"])
            print(rows[-1], flush=True)
        print(f"{pairs} of {len(both.rows)} layers are two factors")
    print(f"dense accuracy {100 * (1 - error_rate(model, x_test, y_test)):.2f}%")
    print(table(["keep", "matrices", "kept", "accuracy", "CPU s"], rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--part", choices=["layers", "network"], default="layers")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--layers", default=None, help="pattern of ResNet-20's layers")
    parser.add_argument("--files", nargs="*", default=[], help="names of files in DIR/layers, without .npz")
    parser.add_argument("--keep", type=float, nargs="+", default=None)
    options = parser.parse_args()
    whole = options.part == "network"
    options.layers = options.layers or ("*conv*" if whole else "layer3.[12].conv2")
    options.keep = options.keep or ([0.1, 0.05] if whole else [0.5, 0.3, 0.1])
    (network if whole else compared)(data_folder(options.data), options)


if __name__ == "__main__":
    main()
