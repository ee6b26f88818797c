"""Net-Trim on LeNet-300-100's fc1 (784 -> 300) over the gap: seconds, what is left of the gap, nonzeros, peak memory.

python benchmarks/lenet_fc1.py --images 10000 --gap 1e-2 1e-3 1e-4 --data DIR
"""

import argparse
import resource
import time

from nettrim.benchmark_utils.lenet import data_folder, fc1_layer, table

import convexprune as cp

HEAD = ["images", "gap asked", "status", "seconds", "CPU", "objective", "gap", "violation", "nonzeros", "peak GB"]


def timed(problem, gap, time_limit):
    """The solution, and the CPU seconds that it took."""
    begun = time.process_time()
    solution = cp.solve(problem, cp.ADMM(eps_rel=gap, time_limit=time_limit))
    return solution, time.process_time() - begun


def row(problem, gap, solution, cpu):
    """Judged on the weights rounded to float32, as a model stores them."""
    judged = cp.judge(problem, solution.x.float(), solution.witness)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    figures = [len(problem.outputs), f"{gap:g}", solution.status.name, f"{solution.seconds:.1f}", f"{cpu:.1f}"]
    figures += [f"{judged.value:.3f}", f"{judged.relative_gap:.1e}", f"{judged.violation:.1e}"]
    return [*figures, f"{int((solution.x != 0).sum()):,}", f"{peak:.2f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--gap", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--time-limit", type=float, default=None)
    options = parser.parse_args()
    problem = cp.NetTrim(fc1_layer(data_folder(options.data), options.images), epsilon=0.05)
    problem.violation(problem.dense)  # what a problem computes once is nobody's time
    solved = [(gap, *timed(problem, gap, options.time_limit)) for gap in options.gap]
    print(table(HEAD, [row(problem, *each) for each in solved]))
    for gap, solution, _ in solved:
        print(f"gap {gap:g}")
        for point in solution.trace:
            at = point.certificate
            print(f"  {point.seconds:7.1f} s  value {at.value:.3f}  gap {at.relative_gap:.1e}  off {at.violation:.1e}")


if __name__ == "__main__":
    main()
