"""Whole networks at a budget: allocation and reconstruction, against the field's rules with the same layer solver.

python benchmarks/allocation_network.py --part resnet --depth 20    all 3x3 convolutions, 1,024 images, no labels
python benchmarks/allocation_network.py --part lenet                LeNet-300-100 at 7% and 1.5% kept in all
python benchmarks/allocation_network.py --part additivity           measured distortion against the curves' sum

--epochs E also distils each network without labels on the same images (a ResNet's mirrored too), in E passes over them.
--data DIR holds the data files, default $CONVEXPRUNE_DATA; --cache DIR keeps the curves between runs.
"""

import argparse
import time

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table
from nettrim.benchmark_utils.resnet import cifar10, resnet

import convexprune as cp
from convexprune.datasets import error_rate, mnist, trained_lenet300

RULES = {
    "exact": None,
    "uniform": cp.Uniform(),
    "uniform_plus": cp.UniformPlus(),
    "erk": cp.ErdosRenyiKernel(),
    "lamp": cp.LAMP(),
    "global_magnitude": cp.GlobalMagnitude(),
}
FINE = (*(round(0.002 * 1.12**step, 5) for step in range(55)), 1.0)
MEASURES = {"output": cp.OutputChange(), "second_order": cp.SecondOrder(), "layer": cp.LayerError()}


def row(name, keep, accuracy, after, report, seconds):
    shares = report.allocation
    return [
        name, f"{keep:.3g}", f"{shares.cost:,.0f} of {shares.budget:,.0f}", accuracy, after,
        f"{shares.certificate.value:.4g}", f"{report.distortion:.4g}", f"{seconds:.0f}",
    ]  # fmt: skip


HEAD = ["allocation", "kept", "weights", "accuracy", "distilled", "predicted", "measured", "seconds"]


def shuffled(*images, size):
    """Batches of all the images in one drawn order."""
    whole = torch.cat(images)
    return list(whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))].split(size))


def distilled(model, network, batches, names, epochs, options, shown):
    """What `shown` says of the network after distillation without labels; nothing without epochs."""
    if not epochs:
        return ""
    student, found = cp.distill(model, network, batches, names, epochs=epochs, hints=options.hints, rate=options.rate)
    print(found, flush=True)
    return shown(student)


def curves_of(model, batches, names, options, levels):
    begun = time.perf_counter()
    cache = f"{options.cache}/{options.part}{options.depth}_{options.measure}" if options.cache else None
    curves = cp.rate_distortion(
        model, batches, names, measure=MEASURES[options.measure], levels=levels, damping=1e-4, cache=cache
    )
    print(f"{len(curves)} curves of {len(levels)} levels in {time.perf_counter() - begun:.0f} s", flush=True)
    return curves


def resnets(folder, options):
    model = resnet(folder, options.depth)
    x, _ = cifar10(folder, "train", 1024)
    x_test, y_test = cifar10(folder, "test")
    print(f"ResNet-{options.depth}, dense accuracy {100 * (1 - error_rate(model, x_test, y_test)):.2f}%")
    curves = curves_of(model, [x[: options.images]], "*conv*", options, (*FINE[8:], *cp.distortion.LEVELS))
    accuracy = lambda network: f"{100 * (1 - error_rate(network, x_test, y_test)):.2f}%"  # noqa: E731
    both = shuffled(x, x.flip(3), size=128)
    rows = []
    for keep in options.keep or (0.2, 0.1, 0.05):
        for name in options.rules:
            begun = time.perf_counter()
            network, report = cp.prune(
                model, list(x.split(128)), None, cp.Balanced(), mode="residual", names="*conv*",
                allocation=cp.Allocation(keep, solver=RULES[name], curves=curves),
            )  # fmt: skip
            seconds = time.perf_counter() - begun
            # as many steps again on the mirrored images
            after = distilled(model, network, both, "*conv*", -(-options.epochs // 2), options, accuracy)
            rows.append(row(name, keep, accuracy(network), after, report, seconds))
            print(rows[-1], flush=True)
    print(table(HEAD, rows))


def lenet(folder, options):
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    batches = list(images(folder, 60_000).split(10_000))
    print(f"LeNet-300-100, dense test error {100 * error_rate(model, data.x_test, data.y_test):.2f}%")
    curves = curves_of(model, batches[:1], None, options, FINE)
    moves = cp.sensitivities(model, batches)

    def build(layer, kept):
        importance = moves[layer.name].clamp(min=1e-6 * float(moves[layer.name].max()))
        return cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(kept), importance=importance)

    error = lambda network: f"{100 * error_rate(network, data.x_test, data.y_test):.2f}%"  # noqa: E731
    small = shuffled(*batches, size=500)
    rows = []
    for keep in options.keep or (0.07, 0.015):
        for name in options.rules:
            begun = time.perf_counter()
            allocation = cp.Allocation(keep, solver=RULES[name], curves=curves)
            network, report = cp.prune(model, batches, build, cp.ADMM(), mode="cascade", allocation=allocation)
            seconds = time.perf_counter() - begun
            after = distilled(model, network, small, None, options.epochs, options, error)
            rows.append(row(name, keep, error(network), after, report, seconds))
            print(rows[-1], flush=True)
    print(table([*HEAD[:3], "test error", *HEAD[4:]], rows))


def additivity(folder, options):
    """Layers pruned together, each from its own dense inputs, against the sum of what each does alone."""
    model = resnet(folder, options.depth)
    x, _ = cifar10(folder, "train", options.images)
    batches = [x]
    curves = curves_of(model, batches, "*conv*", options, (*FINE[8:], *cp.distortion.LEVELS))
    rows, pairs = [], []
    for keep in (0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1):
        for name in ("exact", "uniform", "erk"):
            build = lambda layer, kept: cp.Reconstruction(layer.damped(1e-4), cp.Unstructured(kept))  # noqa: E731
            _, report = cp.prune(
                model, batches, build, cp.Balanced(), names="*conv*",
                allocation=cp.Allocation(keep, solver=RULES[name], curves=curves),
            )  # fmt: skip
            predicted, measured = report.allocation.certificate.value, report.distortion
            pairs.append((keep, predicted, measured))
            rows.append([name, keep, f"{predicted:.4g}", f"{measured:.4g}", f"{measured / predicted:.2f}"])
            print(rows[-1], flush=True)
    print(table(["allocation", "kept", "sum of the curves", "measured", "ratio"], rows))
    logs = torch.tensor([[p, m] for _, p, m in pairs], dtype=torch.float64).log().T
    print(f"correlation of the logarithms over all: {float(torch.corrcoef(logs)[0, 1]):.4f}")


PARTS = {"resnet": resnets, "lenet": lenet, "additivity": additivity}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS], required=True)
    parser.add_argument("--data", default=None)
    parser.add_argument("--depth", type=int, choices=(20, 32), default=20)
    parser.add_argument("--measure", choices=[*MEASURES], default="output")
    parser.add_argument("--images", type=int, default=128, help="images for the curves of a ResNet")
    parser.add_argument("--keep", type=float, nargs="+", default=None)
    parser.add_argument("--rules", nargs="+", choices=[*RULES], default=["exact", "uniform", "erk", "lamp"])
    parser.add_argument("--epochs", type=int, default=0, help="of distillation without labels; 0: none")
    parser.add_argument("--hints", type=float, default=1.0, help="weight of the layers' outputs in it")
    parser.add_argument("--rate", type=float, default=0.01, help="its first step, relative to the weights")
    parser.add_argument("--cache", default=None)
    options = parser.parse_args()
    PARTS[options.part](data_folder(options.data), options)


if __name__ == "__main__":
    main()
