"""Net-Trim's tables (Aghasi et al., NIPS 2017 and SIMODS 2020): published, as published but run here, and our best.

python -m papers.net_trim [spirals] [widths] [caffe] [lenet] [convolutions] [recovery]

with PYTHONPATH=benchmarks and CONVEXPRUNE_DATA.

As published: the paper's program solved by the authors' ADMM for so many steps; it returns a sparse point that need not
be feasible. Ours: the same program by `ADMM`, judged; and our best, which need not be Net-Trim at all.
"""

import copy
import math
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from nettrim.benchmark_utils.lenet import data_folder, table
from nettrim.benchmark_utils.published import published_admm
from torch import nn

import convexprune as cp
from convexprune.datasets import error_rate
from convexprune.network import write
from papers.networks import (
    DOCS,
    all_spirals,
    features,
    mnist_images,
    parted,
    spirals,
    trained_caffe_lenet,
    trained_spirals,
    trained_wide_lenet,
    write_parts,
)

NONZERO = 1e-6  # what the authors' code counts as a weight
WIDTHS = {  # nonzeros before -> after of the paper, without and with l1
    50: ("99/2483/100 -> 98/467/54", "58/1604/95 -> 54/342/46"),
    75: ("149/5594/150 -> 149/710/72", "96/2867/135 -> 90/651/62"),
    125: ("250/15529/250 -> 247/3477/96", "126/5316/226 -> 95/751/60"),
    175: ("349/30395/350 -> 348/1743/116", "171/9580/320 -> 136/906/61"),
    200: ("400/39668/399 -> 399/1991/113", "134/8700/382 -> 109/606/70"),
}
LENET_KEPT = {"0": 108_967 / 1_605_632, "2": 493 / 5_120}  # of fc1 and fc2, in the paper
EPSILONS = (0.02, 0.01, 0.005, 0.0025, 0.001)


@dataclass(frozen=True)
class Judged:
    """A layer that was pruned: the problem's verdict on the stored weights."""

    name: str
    seconds: float
    certificate: cp.Certificate


def published(model, batches, names, build, cascade, rho=100.0, steps=1000, dtype=torch.float64):
    """The network pruned layer by layer with the authors' ADMM, and what the problems say of its points."""
    pruned, found = copy.deepcopy(model), []
    for name in names:
        source = pruned if cascade else model
        (layer,) = cp.capture(source, batches, [name], dense=model if cascade else None, keep_inputs=True)
        problem = build(layer)
        arrays = [part.to(dtype).numpy() for part in (problem.inputs, problem.outputs)]
        begun = time.process_time()
        x, witness, _ = published_admm(
            *arrays, problem.active.numpy(), problem.ceiling.to(dtype).numpy(), problem.radius, rho, steps
        )
        spent = time.process_time() - begun
        x = torch.from_numpy(x)
        x = torch.where(x.abs() > NONZERO, x, 0.0).float()
        found.append(Judged(name, spent, cp.judge(problem, x, torch.from_numpy(witness))))
        write(pruned, name, x.double())
    return pruned, found


def nonzeros(network):
    """The nonzero weights of each layer, biases aside."""
    return [int((module.weight != 0).sum()) for module in network.modules() if hasattr(module, "weight")]


def shown(counts):
    return "/".join(map(str, counts))


@torch.no_grad()
def discrepancy(model, pruned, batches):
    """||Yhat - Y||_F / ||Y||_F of the networks' outputs."""
    dense, ours = (torch.cat([network(x) for x in batches]) for network in (model, pruned))
    return float((ours - dense).norm() / dense.norm())


def trimmed(model, batches, build, mode, names=None, **options):
    """Ours: the same program by ADMM with its finish."""
    return cp.prune(model, batches, build, cp.ADMM(**options), mode=mode, names=names)


def fewest(model, student, batches, limit, shrink=0.7, epochs=60, rounds=12):
    """The sparsest network within the discrepancy: rounds of least squares with fewer weights, and distillation."""
    best = student
    for _ in range(rounds):
        build = lambda layer: cp.Reconstruction(  # noqa: E731
            layer.damped(1e-6), cp.Unstructured(max(1, int(shrink * int((layer.weight != 0).sum()))))
        )
        smaller, _ = cp.prune(best, batches, build, cp.Balanced(), mode="cascade")
        smaller, _ = cp.distill(model, smaller, batches, epochs=epochs)
        if discrepancy(model, smaller, batches) > limit:
            break
        best = smaller
    return best


def cascade_of(epsilon, risk=1.0, last="fc3", gamma=1.1):
    """The paper's cascade; kappa, the risk coefficient, is on the last layer."""
    return lambda layer: cp.NetTrim.cascade(layer, epsilon, gamma, risk if layer.name == last else 1.0)


def spirals_part(points=1000, steps=500, epochs=60, model=None):
    """2-200-200-2 at the paper's parameters."""
    model = trained_spirals(200) if model is None else model
    batches = list(spirals()[0][:points].split(points // 10))
    build, names = cascade_of(0.01, 0.35), ["fc1", "fc2", "fc3"]
    theirs, found = published(model, batches, names, build, True, steps=steps)
    ours, report = trimmed(model, batches, build, "cascade")
    limit = max(0.046, discrepancy(model, ours, batches))
    best = fewest(model, ours, batches, limit, epochs=epochs)
    violation = max(row.certificate.violation for row in found)
    certificates = [row.certificate for row in report.rows if row.certificate]
    own = max(each.violation for each in certificates)
    gap = max(each.relative_gap for each in certificates)
    figure = lambda network: f"{shown(nonzeros(network))}, {discrepancy(model, network, batches):.3f}"  # noqa: E731
    head = ["what", "published", "as published, here", "ours: the program solved", "ours, best at that discrepancy"]
    rows = [
        ["nonzeros dense", "397/39770/399", *[shown(nonzeros(model))] * 3],
        ["nonzeros, discrepancy", "362/2663/131, 0.046", figure(theirs), figure(ours), figure(best)],
        ["largest violation", "not given", f"{violation:.1e}", f"{own:.1e}, gap {gap:.1e}", "no constraint"],
    ]
    text = (
        f"{points:,} points of the spirals, gamma 1.1, kappa 0.35, epsilon 0.01; as published: {steps:,} steps of ADMM."
    )
    return f"{table(head, rows)}\n\n{text}"


def within(model, batches, limit, prune):
    """The sparsest network over the epsilons whose discrepancy is below the limit; None where none is."""
    for epsilon in EPSILONS:
        network = prune(epsilon)
        if discrepancy(model, network, batches) < limit:
            return network, epsilon
    return None, None


def widths_part(points=500, steps=300, epochs=40, networks=None):
    """Over widths, the cascade at the largest epsilon that keeps the discrepancy below 0.02."""
    batches, names, rows = list(spirals()[0][:points].split(points // 10)), ["fc1", "fc2", "fc3"], []
    for width, l1, model in all_spirals() if networks is None else networks:
        theirs, at = within(
            model, batches, 0.02,
            lambda e, m=model: published(m, batches, names, cascade_of(e), True, steps=steps)[0],
        )  # fmt: skip
        ours, own = within(
            model, batches, 0.02, lambda e, m=model: trimmed(m, batches, cascade_of(e), "cascade", eps_rel=1e-3)[0]
        )
        best = None if ours is None else fewest(model, ours, batches, 0.02, epochs=epochs)
        says = lambda network: "none" if network is None else shown(nonzeros(network))  # noqa: E731
        rows.append([
            f"{width}-{width}", "dropout + l1" if l1 else "dropout", WIDTHS[width][l1] if width in WIDTHS else "-",
            f"{shown(nonzeros(model))} -> {says(theirs)} ({at})", f"{says(ours)} ({own})", says(best),
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = [
        "widths",
        "trained with",
        "published",
        "as published, here (epsilon)",
        "ours, solved (epsilon)",
        "ours, best",
    ]
    return (
        f"{table(head, rows)}\n\nNonzeros of the three layers; relative discrepancy below 0.02 on {points:,} points, "
        f"at the largest epsilon of {', '.join(map(str, EPSILONS))} that keeps it there."
    )


def tuned(head, x, y, dense, steps):
    """The manual's fine-tuning of what is left: plain gradient descent, 200 images a step, rate 0.01."""
    network = copy.deepcopy(head)
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
    with cp.MaskKeeper(network, optimiser, dense=dense):
        for _ in range(steps):
            rows = torch.randint(len(x), (200,), generator=generator)
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimiser.step()
    return network


def reconstructed(head, batches, counts):
    """Ours, best: least squares with exactly so many weights in each layer."""
    build = lambda layer: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(counts[layer.name]))  # noqa: E731
    return cp.prune(head, batches, build, cp.RisingPenalty(), mode="cascade")[0]


def lenet_part(model=None, data=None, count=5000, tune_on=55_000, steps=300, tune=2001, limit=900.0):
    """The fully connected layers of LeNet at epsilon 0.15, before and after the manual's fine-tuning."""
    x, y, x_test, y_test = mnist_images(data_folder()) if data is None else data
    body, head = parted(trained_wide_lenet(data_folder()) if model is None else model)
    inputs, tests = features(body, x[:tune_on]), features(body, x_test)
    batches, options = list(inputs[:count].split(1000)), {"eps_rel": 1e-2, "time_limit": limit, "finish": None}
    build = lambda layer: cp.NetTrim(layer, 0.15)  # noqa: E731
    theirs, found = published(head, batches, ["0", "2"], build, False, 1.0, steps, torch.float32)
    ours, report = trimmed(head, batches, build, "parallel", **options)
    cascade = copy.deepcopy(ours)  # its first layer is the parallel one
    (last,) = cp.capture(ours, batches, ["2"], dense=head, keep_inputs=True)
    write(cascade, "2", cp.solve(cp.NetTrim.cascade(last, 0.15), cp.ADMM(**options)).x)
    counts = {name: round(share * head.get_submodule(name).weight.numel()) for name, share in LENET_KEPT.items()}
    ways = {
        "as published, here": (theirs, [each.certificate for each in found]),
        "ours: parallel, feasible": (ours, [row.certificate for row in report.rows]),
        "ours: cascade, gamma 1.1": (cascade, None), "ours, best": (reconstructed(head, batches, counts), None),
    }  # fmt: skip
    accuracy = lambda network: f"{100 * (1 - error_rate(network, tests, y_test)):.2f}"  # noqa: E731
    rows = [["published", "1605621/5120 -> 108967/493", "99.21", "98.48", "98.92", "879.2 for 817.5", "not given"]]
    for name, (network, proof) in ways.items():
        after = accuracy(tuned(network, inputs, y[: len(inputs)], head, tune))
        says = ["-", "-"] if proof is None else [
            f"{max(each.violation for each in proof):.1e}", f"{max(each.relative_gap for each in proof):.1e}"
        ]  # fmt: skip
        sizes = f"{shown(nonzeros(head))} -> {shown(nonzeros(network))}"
        rows.append([name, sizes, accuracy(head), accuracy(network), after, *says])
        print(rows[-1], flush=True)
    titles = ["what", "nonzeros fc1/fc2", "accuracy", "pruned", "fine-tuned", "largest violation", "largest gap"]
    return (
        f"{table(titles, rows)}\n\nEpsilon 0.15; {count:,} training images for the pruning (the paper: 55,000), "
        f"{steps} steps of the authors' ADMM with rho 1, {tune:,} steps of the manual's fine-tuning (2,001 there) on "
        f"{len(inputs):,} images with the convolutions held. Violations are relative to the norm of the outputs. Ours, "
        "best: least squares with exactly the paper's share of weights in each layer."
    )


def caffe_part():
    """The same on Caffe's LeNet, whose fc1 reads 800 numbers: what a processor alone does in minutes."""
    return lenet_part(trained_caffe_lenet(data_folder()), count=5000, tune_on=20_000, tune=500, limit=600.0)


def convolutions_part(count=150, epsilons=(0.02, 0.05, 0.15), limit=120.0, model=None, data=None):
    """The paper skips the convolutions: what pruning them as well does."""
    *_, x_test, y_test = full = mnist_images(data_folder()) if data is None else data
    model = trained_wide_lenet(data_folder()) if model is None else model
    batches, rows = list(full[0][:count].split(50)), []
    for epsilon in epsilons:
        network, report = trimmed(
            model, batches, lambda layer, e=epsilon: cp.NetTrim(layer, e), "parallel", ["conv1", "conv2"],
            eps_rel=1e-2, time_limit=limit, finish=None,
        )  # fmt: skip
        kept = [f"{row.kept:,} of {row.total:,}" for row in report.rows]
        proof = [row.certificate for row in report.rows]
        least = cp.prune(
            model, batches, lambda layer, r=report: cp.Reconstruction(
                layer.damped(1e-3), cp.Unstructured(next(row.kept for row in r.rows if row.name == layer.name))
            ), mode="cascade", names=["conv1", "conv2"],
        )[0]  # fmt: skip
        accuracy = [f"{100 * (1 - error_rate(each, x_test, y_test)):.2f}" for each in (model, network, least)]
        rows.append([
            epsilon, *kept, *accuracy, f"{max(c.violation for c in proof):.1e}",
            f"{max(c.relative_gap for c in proof):.1e}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["epsilon", "conv1 kept", "conv2 kept", "dense", "Net-Trim", "least squares, as many", "violation", "gap"]
    return (
        f"{table(head, rows)}\n\nBoth convolutions pruned in parallel on {count} images, every position a row; no "
        "fine-tuning."
    )


def recovery_part(inputs=(25, 50, 100), sparsities=(2, 4, 8), trials=10, figure=True):
    """Samples at which half of the trials recover the neuron, in units of Theorem 3 and of s log(N/s)."""
    from net_trim_recovery import draw, recovered

    from convexprune.bounds import sample_count

    generator, rows, curves = np.random.default_rng(0), [], {}
    for width in inputs:
        for sparsity in sparsities:
            unit, theorem = sparsity * math.log(width / sparsity), sample_count(sparsity, width)
            samples = sorted({max(2, round(step * unit)) for step in np.arange(1.0, 13.0, 1.0)})
            rates = [np.mean([recovered(width, sparsity, n, generator) for _ in range(trials)]) for n in samples]
            half = next((n for n, rate in zip(samples, rates, strict=True) if rate >= 0.5), None)
            if width == max(inputs) or width == 50:
                curves[width, sparsity] = (samples, rates, theorem)
            share = ["-", "-"] if half is None else [f"{half / unit:.1f}", f"{half / theorem:.3f}"]
            rows.append([width, sparsity, half, *share, theorem])
            print(rows[-1], flush=True)
    if figure:
        (DOCS / "_static").mkdir(exist_ok=True)
        draw(curves, DOCS / "_static" / "papers_recovery.png")
    head = ["N", "s", "samples for half the trials", "/ (s log(N/s))", "/ Theorem 3's count", "Theorem 3's count"]
    return (
        f"{table(head, rows)}\n\n{trials} trials each, epsilon 0, N(0, 1) inputs. If O(s log(N/s)) is the order, the "
        "fourth column is flat; Theorem 3's count is (11 s + 7) mu log N with mu = 2."
    )


PARTS = {
    "spirals": spirals_part, "widths": widths_part, "caffe": caffe_part, "lenet": lenet_part,
    "convolutions": convolutions_part, "recovery": recovery_part,
}  # fmt: skip

if __name__ == "__main__":
    write_parts("net_trim", PARTS, sys.argv[1:])
