"""Ask for a network error, get a network: LeNet-300-100 by Net-Trim, for several wanted errors.

python benchmarks/network_goal.py
"""

import argparse
import time

from nettrim.benchmark_utils.lenet import data_folder, images, table

import convexprune as cp
from convexprune.datasets import error_rate, mnist, trained_lenet300


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--errors", type=float, nargs="+", default=[0.3, 0.1, 0.03])
    options = parser.parse_args()
    folder = data_folder(options.data)
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    print(f"LeNet-300-100, dense test error {100 * error_rate(model, data.x_test, data.y_test):.2f}%")
    rows = []
    for error in options.errors:
        begun = time.perf_counter()
        network, report = cp.prune_within(model, [images(folder, options.images)], error)
        found = report.network
        rows.append([
            f"{error:.0%}", f"{found.guaranteed / found.scale:.1%}", f"{found.measured / found.scale:.1%}",
            " / ".join(f"{row.kept_fraction:.1%}" for row in report.rows), f"{report.kept_fraction:.1%}",
            f"{100 * error_rate(network, data.x_test, data.y_test):.2f}%", f"{time.perf_counter() - begun:.0f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    print(table(["wanted", "guaranteed", "measured", "kept by layer", "kept", "test error", "seconds"], rows))


if __name__ == "__main__":
    main()
