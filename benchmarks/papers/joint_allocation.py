"""The tables and plots of joint allocation (Xu et al., ICCV 2023): published, as published but run here, and ours.

python -m papers.joint_allocation [time] [oneshot] [variants] [additive] [retrained]

with PYTHONPATH=benchmarks and CONVEXPRUNE_DATA.

As published: the layers' distortions measured at the output with magnitude pruning, an exact knapsack over them, and
magnitude pruning of each layer to its level. Ours: the same knapsack over distortions by least squares, and least
squares in each layer, the residual sums repaired. The paper's own dynamic program has a column for every weight.
"""

import statistics
import sys
import time

import torch
from allocation.benchmark_utils.curves import simulated
from allocation.benchmark_utils.published import published as published_program
from nettrim.benchmark_utils.lenet import data_folder, table
from nettrim.benchmark_utils.resnet import cifar10, resnet

import convexprune as cp
from convexprune.datasets import error_rate
from papers.networks import CACHE, DOCS, write_parts

LEVELS = (0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.35, 0.55, 0.8, 1.0)
RULES = {"uniform": cp.Uniform(), "ERK": cp.ErdosRenyiKernel(), "LAMP": cp.LAMP()}
IMAGENET = (
    "| ImageNet | published | here |\n| --- | --- | --- |\n"
    "| ResNet-50, one-shot at 58% | 75.59 (dense 76.14) | not run: no data here |\n"
    "| ResNet-50 without data at 50% | 75.13 | not run: no data here |\n\n"
    "With ImageNet both are `rate_distortion(model, batches, measure=OutputChange())` and "
    "`prune(model, batches, allocation=Allocation(0.42, curves=curves))`, the second with "
    "`random_inputs((3, 224, 224))`."
)
SPARSITIES = (0.5, 0.7)


def time_part(cases=((20, 30), (40, 30), (80, 30), (20, 60), (20, 120)), budget=20_000, repeats=3):
    """Seconds of the published dynamic program against layers, levels and budget, MinimalCore beside it."""
    rows = []
    for layers, levels, most in [
        *((*case, budget) for case in cases),
        (*cases[0], 2 * budget),
        (*cases[0], 4 * budget),
    ]:
        problem = cp.SparsityAllocation(simulated(layers, levels, 10 * most, 0), most)
        costs = [[int(cost) for cost in curve.costs] for curve in problem.curves]
        begun = time.process_time()
        chosen = published_program(costs, [curve.distortion.tolist() for curve in problem.curves], most)
        theirs = time.process_time() - begun
        value = sum(float(curve.distortion[k]) for curve, k in zip(problem.curves, chosen, strict=True))
        spent = []
        for _ in range(repeats):
            begun = time.process_time()
            attempt = cp.MinimalCore().solve(problem)
            spent.append(time.process_time() - begun)
        ours = statistics.median(spent)
        cells = layers * levels * most
        rows.append([layers, levels, f"{most:,}", f"{1e3 * theirs:.0f}", f"{1e9 * theirs / cells:.2f}",
                     f"{1e3 * ours:.1f}",
                     f"{theirs / ours:.0f}", f"{value - problem.value(attempt.x):.0e}"])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["layers", "levels", "weights kept", "published, CPU ms", "ns a layer, level, weight", "MinimalCore, CPU ms",
            "times", "difference in value"]  # fmt: skip
    return (
        f"{table(head, rows)}\n\nThe claim of linear time holds where the fifth column is flat. On ResNet-50's 25 "
        "million weights that column gives the published program's time; `benchmarks/allocation_scaling.py` has our "
        "large cases."
    )


class Case:
    """A network with calibration images, and the curves by magnitude and by least squares, kept between runs."""

    def __init__(self, model, x, tests, images=48, levels=LEVELS, cache=None):
        self.model, self.tests, self.x = model, tests, x
        self.batches = list(x.split(128))
        self.calibration, self.levels, self.cache = [x[:images]], levels, cache

    def curves(self, solver, measure=None, calibration=None):
        return cp.rate_distortion(
            self.model, calibration or self.calibration, "*conv*", levels=self.levels, solver=solver, damping=1e-4,
            measure=measure or cp.OutputChange(), cache=self.cache,
        )  # fmt: skip

    def accuracy(self, network):
        return 100 * (1 - error_rate(network, *self.tests))

    def pruned(self, keep, curves, rule=None, solver=None):
        """Magnitude in each layer, unless a solver is named: then its least squares, residual sums repaired."""
        mode = "parallel" if solver is None else "residual"
        build = lambda layer, count: cp.Reconstruction(layer.damped(1e-4), cp.Unstructured(count))  # noqa: E731
        return cp.prune(
            self.model, self.batches, build, solver or cp.Magnitude(), mode, names="*conv*",
            allocation=cp.Allocation(keep, solver=rule, curves=curves),
        )  # fmt: skip

    @torch.no_grad()
    def distortion(self, network):
        """Mean and largest squared change of the logits over the calibration images."""
        change = torch.cat([(network(x) - self.model(x)).square().sum(1) for x in self.calibration])
        return float(change.mean()), float(change.max())


def resnet_case(depth=20, count=128, **options):
    folder = data_folder()
    return Case(resnet(folder, depth), cifar10(folder, "train", count)[0], cifar10(folder, "test"),
                cache=str(CACHE / f"curves{depth}"), **options)  # fmt: skip


def compared(case, ways, sparsities):
    """A row for each way (curves, rule, solver): accuracy, and the mean and the largest distortion."""
    rows = []
    for name, (curves, rule, solver) in ways.items():
        cells = []
        for sparsity in sparsities:
            network, _ = case.pruned(1 - sparsity, curves, rule, solver)
            mean, most = case.distortion(network)
            cells.append(f"{case.accuracy(network):.2f} ({mean:.3g}; {most:.3g})")
        rows.append([name, *cells])
        print(rows[-1], flush=True)
    head = ["allocation", *(f"{100 * s:.1f}% pruned" for s in sparsities)]
    return (
        f"{table(head, rows)}\n\nAccuracy, in brackets the mean and the largest distortion over "
        f"{len(case.calibration[0])} images; {len(case.levels)} levels a layer (the paper: 1,024 and 100). Dense "
        f"{case.accuracy(case.model):.2f}. No retraining."
    )


def oneshot_part(case=None, sparsities=SPARSITIES):
    """One shot at several sparsities, rule by rule."""
    case = resnet_case() if case is None else case
    magnitude, least = case.curves(cp.Magnitude()), case.curves(cp.Fast())
    ways = {name: (magnitude, rule, None) for name, rule in RULES.items()}
    ways |= {"as published": (magnitude, None, None), "ours": (least, None, cp.Balanced())}
    return f"{compared(case, ways, sparsities)}\n\n{IMAGENET}"


def variants_part(case=None, sparsities=SPARSITIES, shape=(3, 32, 32)):
    """The paper's other two modes: the worst case over the samples, and N(0, 1) inputs in place of data."""
    case = resnet_case() if case is None else case
    blind = cp.random_inputs(shape, len(case.calibration[0]))
    ways = {
        "mean distortion": (case.curves(cp.Magnitude()), None, None),
        "worst case": (case.curves(cp.Magnitude(), cp.OutputChange(worst=True)), None, None),
        "N(0, 1) inputs": (case.curves(cp.Magnitude(), calibration=blind), None, None),
    }
    return compared(case, ways, sparsities)


def additive_part(case=None, keeps=(0.8, 0.6, 0.5, 0.4, 0.3, 0.2), figure=True):
    """The curves of the layers, and the distortion of all of them pruned together against the sum of their own."""
    case = resnet_case() if case is None else case
    curves = case.curves(cp.Magnitude())
    rows = []
    for keep in keeps:
        network, report = case.pruned(keep, curves)
        predicted, (measured, _) = report.allocation.certificate.value, case.distortion(network)
        rows.append([f"{100 - 100 * keep:.0f}%", f"{predicted:.4g}", f"{measured:.4g}", f"{measured / predicted:.2f}"])
        print(rows[-1], flush=True)
    if figure:
        draw(curves, rows, DOCS / "_static" / "papers_allocation.png")
    head = ["pruned", "sum of the layers' distortions", "measured", "ratio"]
    return (
        f"{table(head, rows)}\n\nMagnitude pruning, mean distortion over {len(case.calibration[0])} images: the "
        "paper's plot is of such pairs."
    )


def draw(curves, rows, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, curve in enumerate(curves):
        left.plot(
            1 - curve.fraction, curve.distortion.clamp(min=1e-4), color=str(0.8 * index / len(curves)), linewidth=0.8
        )
    left.set_yscale("log")
    left.set_xlabel("fraction of a layer pruned; black: first layers")
    left.set_ylabel("squared change of the logits")
    predicted, measured = ([float(row[k]) for row in rows] for k in (1, 2))
    right.loglog(predicted, measured, "o-", markersize=3)
    right.loglog(predicted, predicted, color="0.6", linewidth=0.8)
    right.set_xlabel("sum of the layers' distortions")
    right.set_ylabel("measured")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)


def retrained_part(case=None, keep=0.045, epochs=8):
    """At 95.5%: the same distillation behind the published allocation, uniform, and ours."""
    case = resnet_case() if case is None else case
    magnitude, least = case.curves(cp.Magnitude()), case.curves(cp.Fast())
    ways = {
        "uniform": (magnitude, cp.Uniform(), None),
        "as published": (magnitude, None, None),
        "ours": (least, None, cp.Balanced()),
    }
    rows = []
    for name, (curves, rule, solver) in ways.items():
        network, _ = case.pruned(keep, curves, rule, solver)
        student, found = cp.distill(case.model, network, case.batches, "*conv*", epochs=epochs)
        rows.append([name, f"{case.accuracy(network):.2f}", f"{case.accuracy(student):.2f}", found.steps])
        print(rows[-1], flush=True)
    head = ["allocation", "pruned", "distilled", "steps"]
    return (
        f"{table(head, rows)}\n\n{100 - 100 * keep:.1f}% pruned; dense {case.accuracy(case.model):.2f}. Published: "
        "ResNet-32 at 95.5%, pruned and retrained in turns on all 50,000 images: 90.83 of 93.99. Here there are some "
        "thousand images and no augmentation, so the retraining is distillation, the same for all rows: "
        f"{epochs} passes over {len(case.x):,} images."
    )


PARTS = {
    "time": time_part, "oneshot": oneshot_part, "variants": variants_part, "additive": additive_part,
    "retrained": retrained_part,
}  # fmt: skip

if __name__ == "__main__":
    write_parts("joint_allocation", PARTS, sys.argv[1:])
