"""Net-Trim on LeNet-300-100's fc1 (784 -> 300): seconds, gap, peak memory.

python benchmarks/lenet_fc1.py --images 10000 --data DIR
"""

import argparse
import resource

from nettrim.benchmark_utils.lenet import data_folder, fc1_layer, table

import convexprune as cp


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--gap", type=float, default=1e-3)
    parser.add_argument("--time-limit", type=float, default=None)
    options = parser.parse_args()
    problem = cp.NetTrim(fc1_layer(data_folder(options.data), options.images), epsilon=0.05)
    solution = cp.solve(problem, cp.ADMM(eps_rel=options.gap, time_limit=options.time_limit))
    judged = cp.judge(problem, solution.x.float(), solution.witness)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    row = [options.images, solution.status.name, f"{solution.seconds:.1f}", f"{judged.value:.3f}"]
    row += [f"{judged.relative_gap:.1e}", f"{judged.violation:.1e}", f"{peak:.2f}"]
    print(table(["images", "status", "seconds", "objective", "relative gap", "violation", "peak GB"], [row]))
    for point in solution.trace:
        c = point.certificate
        print(f"  {point.seconds:7.1f} s  value {c.value:.3f}  gap {c.relative_gap:.1e}  violation {c.violation:.1e}")


if __name__ == "__main__":
    main()
