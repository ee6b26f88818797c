"""NetTrim over inputs of any scale, on as many random instances as you like: make scales ARGS="1000".

Each instance is a number: `python tests/scales.py 1 --first 4711` solves one again. A layer of 5 neurons, 8 inputs and
60 samples of standard normal numbers, whose columns, samples, inputs or weights are multiplied by powers of ten from
1e-6 to 1e6, uniform in the exponent; every kind with and without a bias and a ReLU, in float64 and float32.
"""

import argparse
import time
from collections import Counter

import torch

from convexprune.layer import Layer
from convexprune.problems import NetTrim
from convexprune.solution import Status
from convexprune.solve import solve

SAMPLES, WIDTH, OUT = 60, 8, 5
KINDS = ("plain", "columns", "rows", "whole", "channel", "rows and columns", "low rank", "low rank columns")


def kind_of(seed):
    return KINDS[seed % len(KINDS)]


def instance(seed):
    """The problem of a number: its kind by turns, then bias, activation and precision by turns of those."""
    generator = torch.Generator().manual_seed(seed)
    kind, turn = kind_of(seed), seed // len(KINDS)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def powers(*shape):
        return 10.0 ** (12 * torch.rand(shape, generator=generator, dtype=torch.float64) - 6)

    x, weight, bias = normal(SAMPLES, WIDTH), normal(OUT, WIDTH), normal(OUT)
    if "low rank" in kind:
        x = normal(SAMPLES, WIDTH // 2) @ normal(WIDTH // 2, WIDTH)
    if "columns" in kind:
        columns = powers(WIDTH)
        x, weight = x * columns, weight / columns
    if "rows" in kind:
        x = x * powers(SAMPLES, 1)
    if kind == "whole":
        inputs, weights = powers(2).tolist()
        x, weight, bias = x * inputs, weight * weights, bias * inputs * weights
    if kind == "channel":
        x[:, 0] *= 1e4
    x = x.float() if turn // 4 % 2 else x
    layer = Layer.from_samples(weight, x, bias if turn % 2 else None, "relu" if turn // 2 % 2 == 0 else None)
    return NetTrim(layer, 0.1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    solved, tried = Counter(), Counter()
    begun = time.perf_counter()
    for seed in range(options.first, options.first + options.count):
        tried[kind_of(seed)] += 1
        problem = instance(seed)
        found = solve(problem)
        if found.status is Status.CONVERGED:
            solved[kind_of(seed)] += 1
            continue
        proof, layer = found.certificate, problem.layer
        print(
            f"  seed {seed}, {kind_of(seed)}, bias {layer.bias is not None}, {layer.activation}, {layer.inputs.dtype}: "
            f"{found.status.name}, relative gap {proof.relative_gap:.1e}, violation {proof.violation:.1e}",
            flush=True,
        )
    for kind in KINDS:
        print(f"{kind:20} {solved[kind]:4} of {tried[kind]:4}")
    print(f"{'all':20} {solved.total():4} of {tried.total():4}; {time.perf_counter() - begun:.0f} s")
    raise SystemExit(solved.total() < 0.99 * tried.total())


if __name__ == "__main__":
    main()
