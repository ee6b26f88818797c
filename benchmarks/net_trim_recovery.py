"""Net-Trim's Theorem 3 by simulation: recovery of a sparse neuron from N(0, 1) samples at epsilon = 0.

python benchmarks/net_trim_recovery.py --inputs 50 100 --figure recovery.svg

For each N and s, the share of trials in which  min ||w||_1  s.t.  X w = y where y > 0,  X w <= 0 elsewhere  returns
w*, against the number of samples, and at the theorem's own count (11 s + 7) mu log N, mu = 2.
"""

import argparse

import numpy as np
from nettrim.benchmark_utils.lenet import table
from scipy.optimize import linprog

from convexprune.bounds import sample_count


def recovered(inputs, sparsity, samples, generator):
    """Whether the linear program returns the neuron that made the outputs."""
    w = np.zeros(inputs)
    w[generator.choice(inputs, sparsity, replace=False)] = generator.standard_normal(sparsity)
    x = generator.standard_normal((samples, inputs))
    y = np.maximum(x @ w, 0)
    active, split = y > 0, np.hstack([x, -x])  # w = u - v, both >= 0
    found = linprog(
        np.ones(2 * inputs), split[~active], np.zeros((~active).sum()), split[active], y[active], method="highs"
    )
    return found.status == 0 and np.abs(found.x[:inputs] - found.x[inputs:] - w).max() < 1e-6 * np.abs(w).max()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[50, 100])
    parser.add_argument("--sparsities", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--figure", default=None, help="an svg or png file")
    options = parser.parse_args()
    generator, rows, curves = np.random.default_rng(0), [], {}
    shares = (0.02, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.3)
    for inputs in options.inputs:
        for sparsity in options.sparsities:
            count = sample_count(sparsity, inputs)
            samples = sorted({max(2, round(share * count)) for share in shares})
            rates = [
                np.mean([recovered(inputs, sparsity, n, generator) for _ in range(options.trials)]) for n in samples
            ]
            whole = sum(recovered(inputs, sparsity, count, generator) for _ in range(options.trials))
            half = next((n for n, rate in zip(samples, rates, strict=True) if rate >= 0.5), None)
            all_ = next((n for n, rate in zip(samples, rates, strict=True) if rate == 1), None)
            rows.append([inputs, sparsity, half, all_, count, f"{whole} of {options.trials}"])
            curves[inputs, sparsity] = (samples, rates, count)
            print(rows[-1], flush=True)
    head = ["N", "s", "samples for half the trials", "for all", "the theorem's count", "recovered at it"]
    print(table(head, rows))
    if options.figure:
        draw(curves, options.figure)


def draw(curves, path):
    """Recovery against samples, the theorem's count as a dotted line."""
    from matplotlib.figure import Figure

    widths = sorted({inputs for inputs, _ in curves})
    figure = Figure(figsize=(4.2 * len(widths), 3.2), layout="constrained")
    for axes, inputs in zip(np.atleast_1d(figure.subplots(1, len(widths))), widths, strict=True):
        for (width, sparsity), (samples, rates, count) in curves.items():
            if width == inputs:
                (line,) = axes.plot(samples, rates, "o-", markersize=3, label=f"s = {sparsity}")
                axes.axvline(count, color=line.get_color(), linestyle=":", linewidth=0.9)
        axes.set_xscale("log")
        axes.set_xlabel("samples; dotted: the theorem's count")
        axes.set_title(f"N = {inputs}", loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
