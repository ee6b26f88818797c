"""ADMM on a GPU: its answers against the CPU's, then seconds on layers up to 4096 x 11008. Simulated data.

    python benchmarks/gpu.py              both parts; without a GPU only small sizes, on the CPU
    python benchmarks/gpu.py --small      small sizes only

Needs torch and convexprune, nothing else. Verdicts are float64 on the CPU whatever the device. Each device is warmed up
by one solve that is not timed.
"""

import argparse
import time

import torch

import convexprune as cp

SMALL = [(64, 32, 512), (128, 64, 512)]  # inputs, outputs, samples
LARGE = [(1024, 1024, 4096), (4096, 4096, 8192), (4096, 11008, 8192)]


def simulated(inputs, outputs, samples, seed=0):
    """A ReLU layer: Gaussian weights, a tenth of them large; nonnegative inputs of decaying scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.where(torch.rand(weight.shape, generator=generator) < 0.1, 1.0, 0.1) / inputs**0.5
    x = torch.randn(samples, inputs, generator=generator).relu() * torch.arange(1, inputs + 1) ** -0.25
    return cp.Layer.from_samples(weight, x)


def solved(problem, solver):
    if solver.device != "cpu":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    solution = cp.solve(problem, solver)
    return solution, time.perf_counter() - begun


def show(*cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells):
    show(*cells)
    show(*["---"] * len(cells))


def compare(sizes, device):
    """float32 steps on the device against float64 steps on the CPU: certified values agree to the gaps."""
    header("inputs x outputs, samples", "on", "seconds", "steps", "value", "relative gap", "violation", "agrees")
    for size in sizes:
        problem = cp.NetTrim(simulated(*size), epsilon=0.05)
        reference, _ = solved(problem, cp.ADMM(dtype=torch.float64))
        for where in dict.fromkeys(["cpu", device]):
            solution, seconds = solved(problem, cp.ADMM(device=where))
            c, r = solution.certificate, reference.certificate
            # both bounds hold, so certified feasible values can differ by their gaps and violations only
            agrees = abs(c.value / r.value - 1) <= c.relative_gap + r.relative_gap + 1e-5
            name = f"{size[0]} x {size[1]}, {size[2]}"
            figures = (f"{c.value:.5f}", f"{c.relative_gap:.1e}", f"{c.violation:.1e}", "yes" if agrees else "NO")
            show(name, where, f"{seconds:.2f}", solution.iterations, *figures)


def timing(sizes, device, steps, limit):
    """Seconds for a fixed number of steps without the finish, the verdicts on the CPU included and shown apart."""
    header("inputs x outputs, samples", "seconds", "of them judging once", "steps", "relative gap", "violation", "GiB")
    for size in sizes:
        problem = cp.NetTrim(simulated(*size), epsilon=0.05)
        torch.cuda.reset_peak_memory_stats()
        solver = cp.ADMM(device=device, max_iter=steps, time_limit=limit, finish=None)
        solution, seconds = solved(problem, solver)
        begun = time.perf_counter()
        c = cp.judge(problem, solution.x, solution.witness)
        judging, memory = time.perf_counter() - begun, torch.cuda.max_memory_allocated() / 2**30
        figures = (f"{seconds:.1f}", f"{judging:.1f}", solution.iterations, f"{c.relative_gap:.1e}")
        show(f"{size[0]} x {size[1]}, {size[2]}", *figures, f"{c.violation:.1e}", f"{memory:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes only")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--time-limit", type=float, default=120.0, help="seconds for each large layer")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(torch.cuda.get_device_name() if device == "cuda" else "no GPU: the same checks on the CPU, small sizes only")
    cp.solve(cp.NetTrim(simulated(16, 8, 64), epsilon=0.05), cp.ADMM(device=device))
    print("\nfloat32 steps against float64 steps on the CPU\n")
    compare(SMALL, device)
    if device == "cuda" and not options.small:
        print(f"\n{options.steps} steps\n")
        timing(LARGE, device, options.steps, options.time_limit)


if __name__ == "__main__":
    main()
