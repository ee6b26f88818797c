"""Net-Trim on LeNet-300-100's fc2, side by side in one run: ours, the published ADMM in NumPy, conic solvers.

Instance: inputs relu(fc1) of the first MNIST training images / 255, bias as an extra input of 1, epsilon 0.05, V = 0.

    python benchmarks/lenet_fc2.py --data DIR        DIR holds mnist.npz and lenet300.npz; default $CONVEXPRUNE_DATA
"""

import argparse
import time

import torch
from nettrim.benchmark_utils.lenet import data_folder, fc2_layer, table
from nettrim.benchmark_utils.published import published_admm

import convexprune as cp


def ours(problem, repeats=5, **options):
    """The median of some solves with ADMM, judged on the weights rounded to float32 as a model stores them."""
    solutions = [cp.solve(problem, cp.ADMM(**options)) for _ in range(repeats)]
    return judged("convexprune ADMM", problem, sorted(solutions, key=lambda s: s.seconds)[repeats // 2])


def judged(name, problem, solution):
    certificate = cp.judge(problem, solution.x.float(), solution.witness)
    return name, solution.seconds, certificate


def published(problem):
    """The paper's ADMM in float64 NumPy, run to its own stopping rule."""
    arrays = problem.inputs.double().numpy(), problem.outputs.numpy(), problem.active.numpy(), problem.ceiling.numpy()
    begun = time.perf_counter()
    x, witness, steps = published_admm(*arrays, problem.radius)
    seconds = time.perf_counter() - begun
    certificate = cp.judge(problem, torch.from_numpy(x).float(), torch.from_numpy(witness))
    return f"published ADMM, NumPy ({steps} steps)", seconds, certificate


def report(rows):
    base = rows[0][1]
    return table(
        ["solver", "seconds", "times ours", "objective", "relative gap", "violation"],
        [
            [name, f"{s:.2f}", f"{s / base:.1f}", f"{c.value:.5f}", f"{c.relative_gap:.1e}", f"{c.violation:.1e}"]
            for name, s, c in rows
        ],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--part", choices=["whole", "ten", "both"], default="both")
    parser.add_argument("--conic", nargs="*", default=["SCS", "CLARABEL"])
    options = parser.parse_args()
    folder = data_folder(options.data)
    small = cp.NetTrim(fc2_layer(folder, count=1000, neurons=10), epsilon=0.05)
    cp.solve(small)  # warm-up: thread pools and the first factorisations
    if options.part in ("whole", "both"):
        problem = cp.NetTrim(fc2_layer(folder, count=4000), epsilon=0.05)
        print("fc2, 100 neurons, 4,000 images\n" + report([ours(problem, repeats=3), published(problem)]))
    if options.part in ("ten", "both"):
        rows = [ours(small, eps_rel=1e-5)]
        rows += [judged(name, small, cp.solve(small, cp.CVXPY(name))) for name in options.conic]
        print("\nfc2, the first 10 neurons, 1,000 images\n" + report(rows))


if __name__ == "__main__":
    main()
