"""L-OBS' tables (Dong, Chen, Pan, NIPS 2017): published, as published but run here, and our best.

python -m papers.lobs [lenet300] [rounds] [one_layer] [lenet5] [lenet5_iterative]

with PYTHONPATH=benchmarks and CONVEXPRUNE_DATA.

LeNet-300-100 is the network that the authors published; LeNet-5 is trained here. As published: `LayerwiseOBS`, the
layers in parallel, at the paper's share of each layer, and as many steps of retraining with labels. Ours: the same
counts by least squares in a cascade, a neuron counting as much as the network's output moves with it; the same
retraining.
"""

import copy
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from nettrim.benchmark_utils.lenet import data_folder, table

import convexprune as cp
from convexprune.datasets import error_rate, mnist, trained_lenet300
from convexprune.forms import SparseLeastSquares
from convexprune.options import check_options
from papers.networks import fit, mnist_images, trained_caffe_lenet, write_parts

FIRST_300, SECOND_300 = {"fc1": 0.067, "fc2": 0.20, "fc3": 0.65}, {"fc1": 0.01, "fc2": 0.04, "fc3": 0.54}
FIRST_5 = {"conv1": 0.54, "conv2": 0.43, "fc1": 0.06, "fc2": 0.25}
SECOND_5 = {"conv1": 0.20, "conv2": 0.01, "fc1": 0.009, "fc2": 0.08}


@dataclass(frozen=True)
class Random:
    """A baseline: weights drawn by lot stay as they are."""

    takes: ClassVar[type] = SparseLeastSquares
    starts: ClassVar[bool] = False

    seed: int = 0

    def __post_init__(self):
        check_options(self)

    def solve(self, problem, start=None):
        generator = torch.Generator().manual_seed(self.seed)
        mask = problem.select(torch.rand(problem.target.shape, generator=generator))
        return cp.Attempt(problem.completed(problem.target * mask), None, cp.Status.CONVERGED, 1)


@dataclass(frozen=True)
class Task:
    """A network with its labelled images, and how much of them is used."""

    model: torch.nn.Module
    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    count: int = 5000
    batch: int = 256

    @property
    def batches(self):
        return list(self.x[: self.count].split(1000))

    def error(self, network):
        return error_rate(network, self.x_test, self.y_test)

    def pruned(self, shares, solver, network=None):
        """As the paper does it: the layers in parallel, each from the dense network's inputs."""
        build = lambda layer: cp.Reconstruction(layer, cp.Unstructured(shares[layer.name]))  # noqa: E731
        return cp.prune(network or self.model, self.batches, build, solver, names=list(shares))[0]

    def ours(self, shares, network=None, damping=1e-3, solver=None):
        """A cascade, the outputs weighed by how far the network's output moves with them."""
        network = network or self.model
        moves = cp.sensitivities(network, self.batches[:2])

        def build(layer):
            weight = moves[layer.name].clamp(min=1e-6 * float(moves[layer.name].max()))
            return cp.Reconstruction(layer.damped(damping), cp.Unstructured(shares[layer.name]), importance=weight)

        return cp.prune(network, self.batches, build, solver or cp.Balanced(), "cascade", names=list(shares))[0]

    def retrained(self, network, steps):
        """Labels, Adam from 1e-3 to 0; zeros stay zero."""
        return fit(copy.deepcopy(network), self.x, self.y, 0, batch=self.batch, dense=self.model, steps=steps)


def kept(network, shares):
    weights = [network.get_submodule(name).weight for name in shares]
    return sum(int((w != 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def percent(fraction):
    return f"{100 * fraction:.2f}"


def lenet300_task(folder=None, **options):
    folder = data_folder(folder)
    data = mnist(folder / "mnist.npz")
    return Task(
        trained_lenet300(folder / "lenet300.npz"), data.x_train, data.y_train, data.x_test, data.y_test, **options
    )


def lenet5_task(folder=None, **options):
    folder = data_folder(folder)
    return Task(trained_caffe_lenet(folder), *mnist_images(folder), **{"count": 2000, "batch": 64, **options})


HEAD = ["method", "published: kept; error pruned, retrained, steps", "here: kept", "pruned", "retrained", "steps"]


def rows_of(task, shares, cases):
    """A row a case: (label, published, network, steps)."""
    for label, said, network, steps in cases:
        after = percent(task.error(task.retrained(network, steps))) if steps else "-"
        row = [label, said, f"{100 * kept(network, shares):.2f}%", percent(task.error(network)), after, steps or "-"]
        print(row, flush=True)
        yield row


def twice(task, first, second, steps, prune, prune_again):
    """The iterative version: prune, retrain, and prune what came out."""
    return prune_again(second, task.retrained(prune(first), steps))


def gradually(task, first, last, rounds, steps):
    """Ours in more rounds: shares that fall geometrically, each round with its part of the steps."""
    network = task.model
    for turn in range(rounds):
        part = turn / (rounds - 1)
        shares = {name: first[name] ** (1 - part) * last[name] ** part for name in first}
        network = task.ours(shares, network)
        if turn < rounds - 1:
            network = task.retrained(network, steps // (rounds - 1))
    return network


def lenet300_part(task=None, steps=(510, 643)):
    """The rows of LeNet-300-100."""
    task = lenet300_task() if task is None else task
    flat = dict.fromkeys(FIRST_300, 0.08)
    published = lambda shares, network=None: task.pruned(shares, cp.LayerwiseOBS(), network)  # noqa: E731
    cases = [
        ("random", "8%; 85.72, 2.25, 3.5e5", task.pruned(flat, Random()), steps[0]),
        ("magnitude (LWC)", "8%; 81.32, 1.95, 1.4e5", task.pruned(flat, cp.Magnitude()), steps[0]),
        ("OBD, layer by layer", "8%; 86.72, 1.96, 8.1e4", task.pruned(flat, cp.ActivationMagnitude()), steps[0]),
        ("magnitude at L-OBS' shares", "-", task.pruned(FIRST_300, cp.Magnitude()), steps[0]),
        ("L-OBS, as published", "7%; 3.10, 1.82, 510", published(FIRST_300), steps[0]),
        ("ours", "-", task.ours(FIRST_300), steps[0]),
        ("L-OBS iterative, as published", "1.5%; 2.43, 1.96, 643",
         twice(task, FIRST_300, SECOND_300, steps[0], published, published), steps[1]),
        ("ours iterative", "-", twice(task, FIRST_300, SECOND_300, steps[0], task.ours, task.ours), steps[1]),
    ]  # fmt: skip
    return (
        f"{table(HEAD, rows_of(task, FIRST_300, cases))}\n\nError in percent. The authors' own network: "
        f"{percent(task.error(task.model))} here, 1.76 in the paper. Moments of {task.count:,} images; retraining on "
        f"{len(task.x):,}, {task.batch} a step. The baselines' retraining has L-OBS' few steps here, the paper gave "
        "them thousands. DNS (1.8%, 1.99% after 3.4e4 steps) prunes while it trains: not run."
    )


def rounds_part(task=None, rounds=5, steps=(510, 643), batches=(256, 1024)):
    """What the iterative row of LeNet-300-100 falls short by: more rounds, and larger batches in the same steps."""
    task, rows = lenet300_task() if task is None else task, []
    for batch in batches:
        each = replace(task, batch=batch)
        network = gradually(each, FIRST_300, SECOND_300, rounds, steps[0])
        after = each.error(each.retrained(network, steps[1]))
        rows.append([f"{rounds} rounds, {batch} images a step", f"{100 * kept(network, FIRST_300):.2f}%",
                     percent(each.error(network)), percent(after), sum(steps)])  # fmt: skip
        print(rows[-1], flush=True)
    head = ["ours", "kept", "pruned", "retrained", "steps in all"]
    return (
        f"{table(head, rows)}\n\nError in percent. The first shares fall to the last geometrically, with {steps[0]} "
        "steps between the rounds."
    )


def lenet5_part(task=None, steps=740):
    """The one-shot rows of LeNet-5."""
    task = lenet5_task() if task is None else task
    flat = dict.fromkeys(FIRST_5, 0.08)
    cases = [
        ("L-OBS, as published", "7%; 3.21, 1.27, 740", task.pruned(FIRST_5, cp.LayerwiseOBS()), steps),
        ("ours", "-", task.ours(FIRST_5), steps),
        ("OBD, layer by layer", "8%; 86.72, 2.65, 2.9e5", task.pruned(flat, cp.ActivationMagnitude()), 0),
        ("magnitude (LWC)", "8%; 89.55, 1.36, 9.6e4", task.pruned(flat, cp.Magnitude()), 0),
    ]
    return f"{table(HEAD, rows_of(task, FIRST_5, cases))}\n\n{of_lenet5(task)}"


def lenet5_iterative_part(task=None, steps=(740, 841)):
    """The iterative rows of LeNet-5."""
    task = lenet5_task() if task is None else task
    published = lambda shares, network=None: task.pruned(shares, cp.LayerwiseOBS(), network)  # noqa: E731
    cases = [
        ("L-OBS iterative, as published", "0.9%; 2.04, 1.66, 841",
         twice(task, FIRST_5, SECOND_5, steps[0], published, published), steps[1]),
        ("ours iterative", "-", twice(task, FIRST_5, SECOND_5, steps[0], task.ours, task.ours), steps[1]),
    ]  # fmt: skip
    return f"{table(HEAD, rows_of(task, FIRST_5, cases))}\n\n{of_lenet5(task)} DNS (0.9%, 1.36) was not run."


def of_lenet5(task):
    return (
        f"Error in percent; dense {percent(task.error(task.model))} here, 1.27 in the paper. Moments of {task.count:,} "
        f"images; retraining on {len(task.x):,}, {task.batch} a step."
    )


def one_layer_part(task=None, shares=(0.19, 0.074, 0.042, 0.038, 0.034), epsilons=(0.1, 0.2, 0.3)):
    """The middle layer alone (their Table 2), and fc1 alone."""
    task = lenet300_task() if task is None else task
    said = {0.19: "Net-Trim 13.24", 0.074: "Net-Trim 28.45, L-OBS 4.56", 0.042: "Net-Trim 47.69",
            0.038: "L-OBS 10.83", 0.034: "L-OBS 11.34"}  # fmt: skip
    rows = []
    for name, share in [*(("fc2", share) for share in shares), ("fc1", 0.04)]:
        only = {name: share}
        networks = [
            task.pruned(only, solver) for solver in (cp.Magnitude(), cp.ActivationMagnitude(), cp.LayerwiseOBS())
        ]
        networks.append(task.ours(only))
        rows.append(
            [
                name,
                f"{100 * share:.1f}%",
                said.get(share, "keeps its accuracy"),
                *(percent(task.error(n)) for n in networks),
            ]
        )
        print(rows[-1], flush=True)
    trims = []
    for epsilon in epsilons:
        network, report = cp.prune(
            task.model,
            task.batches,
            lambda layer, e=epsilon: cp.NetTrim(layer, e),
            cp.ADMM(eps_rel=1e-3),
            names=["fc2"],
        )
        (row,) = report.rows
        trims.append(
            [
                epsilon,
                f"{100 * kept(network, ['fc2']):.1f}%",
                percent(task.error(network)),
                f"{row.certificate.violation:.0e}",
            ]
        )
        print(trims[-1], flush=True)
    head = ["layer", "kept", "published error", "magnitude", "OBD", "L-OBS, as published", "ours"]
    return (
        f"{table(head, rows)}\n\nError in percent, no retraining, the other layers dense. Net-Trim on fc2, solved and "
        f"feasible:\n\n{table(['epsilon', 'kept', 'error', 'violation'], trims)}"
    )


PARTS = {
    "lenet300": lenet300_part,
    "rounds": rounds_part,
    "one_layer": one_layer_part,
    "lenet5": lenet5_part,
    "lenet5_iterative": lenet5_iterative_part,
}

if __name__ == "__main__":
    write_parts("lobs", PARTS, sys.argv[1:])
