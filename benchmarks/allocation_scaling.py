"""Seconds of each allocation solver against layers, levels and budget, and HiGHS and the published DP beside them.

python benchmarks/allocation_scaling.py                 the table
python benchmarks/allocation_scaling.py --part highs    200 layers x 100 levels at 25 million weights, to the optimum
python benchmarks/allocation_scaling.py --part agree    HiGHS at gap 0 on instances of all sizes
"""

import argparse
import statistics
import time

from allocation.benchmark_utils.curves import simulated
from allocation.benchmark_utils.published import published
from nettrim.benchmark_utils.lenet import table

import convexprune as cp

HIGHS = {"mip_rel_gap": 0, "mip_abs_gap": 0}


def instance(layers, levels, weights, seed=0, share=0.1):
    curves = simulated(layers, levels, weights, seed)
    problem = cp.SparsityAllocation(curves, round(share * sum(curve.total for curve in curves)))
    _ = problem.table  # read once, whoever solves
    return problem


def seconds(problem, solver, repeats=3):
    """The median time, and the last solution."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        attempt = solver.solve(problem)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), attempt


def scaling(options):
    cases = [(50, 100, 25e7), (200, 100, 25e7), (800, 100, 25e7), (200, 25, 25e7), (200, 50, 25e7), (200, 200, 25e7),
             (200, 100, 25e5), (200, 100, 25e9), (1000, 200, 7e10)]  # fmt: skip
    rows = []
    for layers, levels, weights in cases:
        problem = instance(layers, levels, weights)
        cells = [layers, levels, f"{problem.budget:.2g}"]
        for solver in (cp.LagrangianPrice(), cp.MinimalCore(), cp.DynamicProgramming()):
            spent, attempt = seconds(problem, solver)
            proof = cp.judge(problem, attempt.x, attempt.witness)
            cells.append(f"{1e3 * spent:.1f} ms, gap {proof.relative_gap:.0e}")
        rows.append(cells)
        print(cells, flush=True)
    print(table(["layers", "levels", "budget", "LagrangianPrice", "MinimalCore", "DynamicProgramming"], rows))
    rows = []
    for budget in (10_000, 20_000, 40_000, 80_000):
        problem = instance(20, 30, 10 * budget)
        costs = [[int(c) for c in curve.costs] for curve in problem.curves]
        begun = time.perf_counter()
        levels = published(costs, [curve.distortion.tolist() for curve in problem.curves], int(problem.budget))
        theirs = time.perf_counter() - begun
        value = sum(float(curve.distortion[k]) for curve, k in zip(problem.curves, levels, strict=True))
        spent, attempt = seconds(problem, cp.MinimalCore())
        exact, _ = seconds(problem, cp.DynamicProgramming(buckets=None), 1)
        rows.append([int(problem.budget), f"{1e3 * theirs:.0f}", f"{1e3 * exact:.0f}", f"{1e3 * spent:.1f}",
                     f"{value - problem.value(attempt.x):.1e}"])  # fmt: skip
    print(
        table(
            ["budget (20 x 30)", "published DP, ms", "DP, a bucket a unit, ms", "MinimalCore, ms", "difference"], rows
        )
    )


def highs(options):
    for seed in options.seeds:
        problem = instance(200, 100, 25e7, seed)
        ours, attempt = seconds(problem, cp.MinimalCore(), 5)
        mine = cp.judge(problem, attempt.x, attempt.witness)
        theirs = cp.solve(problem, cp.CVXPY("HIGHS", time_limit=options.limit, **HIGHS))
        proof = theirs.certificate
        print(f"seed {seed}: MinimalCore {1e3 * ours:.1f} ms, {mine.value:.9f}, gap {mine.relative_gap:.1e}; HiGHS "
              f"{theirs.seconds:.2f} s ({theirs.status.name}), {proof.value:.9f}, violation {proof.violation:.1e}: "
              f"{theirs.seconds / ours:.0f} times", flush=True)  # fmt: skip


def agree(options):
    worst, count = 0.0, 0
    for layers, levels in ((20, 10), (20, 100), (60, 30), (100, 50)):
        for share in (0.05, 0.2, 0.5):
            for seed in options.seeds:
                problem = instance(layers, levels, 1e6, seed, share)
                mine = cp.solve(problem)
                theirs = cp.solve(problem, cp.CVXPY("HIGHS", time_limit=options.limit, **HIGHS))
                if theirs.status is cp.Status.CONVERGED and theirs.certificate.violation == 0:
                    count += 1
                    worst = max(worst, abs(mine.certificate.value / theirs.certificate.value - 1))
    print(f"{count} instances on which HiGHS ended at gap 0: largest relative difference {worst:.1e}")


PARTS = {"scaling": scaling, "highs": highs, "agree": agree}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS], default="scaling")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=float, default=300, help="seconds for each run of HiGHS")
    options = parser.parse_args()
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
