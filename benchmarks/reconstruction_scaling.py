"""Seconds and peak memory of each solver against the layer's size, with fitted exponents.

python benchmarks/reconstruction_scaling.py --sizes 256 512 1024 --keep 0.3

Layers are square and simulated, with the spectrum of real ones; every case runs in a process of its own, so that its
peak memory is its own.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import time

from nettrim.benchmark_utils.lenet import table
from reconstruction.benchmark_utils.simulated import simulated

import convexprune as cp

SOLVERS = ("Magnitude", "ColumnSweep", "LayerwiseOBS", "Fast", "RisingPenalty", "Balanced", "ExactOBS", "Best")


def one(name, size, keep):
    """Print the seconds, gigabytes and relative error of a solver on one layer, as JSON."""
    problem = cp.Reconstruction(simulated(size, size), cp.Unstructured(keep))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    begun = time.perf_counter()
    attempt = getattr(cp, name)().solve(problem)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    error = problem.value(attempt.x) / problem.layer.energy
    print(
        json.dumps({"seconds": seconds, "peak": peak, "before": before, "error": error, "status": attempt.status.name})
    )


def apart(name, size, keep, limit):
    """The same in a fresh process; None where it takes longer than the limit."""
    command = [sys.executable, __file__, "--one", name, str(size), str(keep)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)


def exponent(sizes, values):
    """The slope of log values against log sizes, by least squares."""
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=SOLVERS)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--limit", type=float, default=600, help="seconds for each case")
    parser.add_argument("--one", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, size, keep = options.one
        one(name, int(size), float(keep))
        return
    rows = []
    for name in options.solvers:
        found = [apart(name, size, options.keep, options.limit) for size in options.sizes]
        known = [(size, f) for size, f in zip(options.sizes, found, strict=True) if f]
        cells = ["too slow" if f is None else f"{f['seconds']:.2f} s, {f['peak']:.2f} GB" for f in found]
        slope = f"{exponent([s for s, _ in known], [f['seconds'] for _, f in known]):.1f}" if len(known) > 1 else "-"
        rows.append([name, *cells, slope, f"{known[-1][1]['error']:.4g}" if known else "-"])
        print(rows[-1], flush=True)
    head = ["solver", *(f"{size} x {size}" for size in options.sizes), "exponent of seconds", "error at the largest"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
