"""CPU seconds of the solvers of a reconstruction and of its judge beside the plan's, and a fit of the plan's table.

    python benchmarks/solver_cost.py --solvers magnitude fast --shapes 256x256 512x1024

The table is in units of this machine's speed in float32, which the plan measures too.
"""

import argparse
import time

import numpy as np
import torch
from scipy.optimize import nnls

import convexprune as cp
from convexprune.pruning.plan import JUDGE, cost, flops_a_second
from convexprune.pruning.recipe import SOLVERS
from convexprune.solve import proposed

KEPT = 0.5
SHAPES = ["256x256", "1024x256", "256x1024", "512x512", "768x768", "1024x1024"]


def layer(outputs, inputs):
    """Weights of a random matrix on correlated inputs of decaying variance."""
    generator = torch.Generator().manual_seed(outputs + inputs)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    samples = torch.randn(2 * inputs, inputs, generator=generator, dtype=torch.float64) @ mix
    samples *= torch.logspace(0, -1, inputs, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    return cp.Layer.from_samples(weight, samples, activation=None)


def seconds_of(outputs, inputs, solver):
    """Of the solver, and of a first verdict on its point."""
    begun = [cp.Reconstruction(layer(outputs, inputs), cp.Unstructured(KEPT)) for _ in range(2)]
    start = time.process_time()
    found = proposed(begun[0], SOLVERS[solver]())
    solved = time.process_time() - start
    start = time.process_time()
    found.certified(begun[1])
    return solved, time.process_time() - start


def terms(outputs, inputs):
    """What the table counts in."""
    return [inputs**3, outputs * inputs**2, outputs * (KEPT * inputs) ** 3, outputs * inputs]


def fitted(rows, flops):
    """A line of the table that is right relatively, and by what factor it is off at the most."""
    matrix = np.array(rows, dtype=float) / np.array(flops)[:, None]
    scale = matrix.max(0)
    found = nnls(matrix / scale, np.ones(len(flops)))[0] / scale
    ratio = matrix @ found
    return found, max(ratio.max(), (1 / ratio).max())


def told(name, rows, flops):
    costs, factor = fitted(rows, flops)
    print(f"    {name}: {', '.join(f'{each:.3g}' for each in costs)}, right within a factor {factor:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", default=["magnitude", "column-sweep", "fast", "balanced", "best"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="outputs x inputs")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    seconds_of(64, 64, "fast")  # what is loaded the first time
    judged = []
    for solver in arguments.solvers:
        found = []
        for outputs, inputs in shapes:
            solved, verdict = seconds_of(outputs, inputs, solver)
            speed = flops_a_second()
            found.append(solved * speed)
            judged.append((terms(outputs, inputs), verdict * speed))
            planned = [cost(name, outputs, inputs, KEPT) / speed for name in (solver, JUDGE)]
            print(
                f"{solver} {outputs}x{inputs}: {solved:.3f} s, planned {planned[0]:.3f}; judged in {verdict:.3f} s, "
                f"planned {planned[1]:.3f}; {speed / 1e9:.0f} Gflop/s", flush=True,
            )  # fmt: skip
        told(solver, [terms(*shape) for shape in shapes], found)
    told("judge", *zip(*judged, strict=True))


if __name__ == "__main__":
    main()
