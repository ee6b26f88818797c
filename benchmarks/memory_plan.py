"""The plan's memory beside what the command takes at its peak, and its seconds beside the solvers', case by case.

    python benchmarks/memory_plan.py --solvers magnitude fast --shapes width-512 --folders MODEL_FOLDER --text TEXT

A shape is one of `large_model.py`, made here of random weights; a folder needs a text.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from large_model import SHAPES, made

import convexprune as cp


def measured(words):
    """Exit code, gigabytes at the peak of this process alone, and what it said."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        return process.returncode, usage.ru_maxrss * 1024 / 1e9, output.read()


def samples(folder, shape, text, arguments):
    if shape is None:
        return [text]
    ids = np.random.default_rng(0).integers(0, SHAPES[shape]["vocab_size"], (arguments.windows, arguments.length))
    np.savez(folder.parent / "ids.npz", input_ids=ids)
    return [str(folder.parent / "ids.npz")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--solvers", nargs="+", default=["magnitude", "column-sweep", "fast", "balanced"])
    parser.add_argument("--modes", nargs="+", default=["cascade", "parallel"])
    parser.add_argument("--shapes", nargs="*", default=[], choices=SHAPES)
    parser.add_argument("--folders", nargs="*", default=[], type=Path)
    parser.add_argument("--text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("more", nargs="*", help="further options of the command, behind --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        cases = [(folder, None) for folder in arguments.folders]
        for shape in arguments.shapes:
            made(place / shape, shape)
            cases.append((place / shape, shape))
        for folder, shape in cases:
            for solver in arguments.solvers:
                for mode in arguments.modes:
                    out = place / f"{folder.name}-{solver}-{mode}"
                    words = [
                        sys.executable, "-m", "convexprune", "prune", str(folder), "--calibration",
                        *samples(place / "x", shape, arguments.text, arguments), "--out", str(out), "--sparsity",
                        "0.5", "--solver", solver, "--mode", mode, "--windows", str(arguments.windows), "--length",
                        str(arguments.length), "--batch", str(arguments.batch), *arguments.more,
                    ]  # fmt: skip
                    code, peak, output = measured(words)
                    if code:
                        print(folder.name, solver, mode, "failed:", output[-300:])
                        continue
                    line = next(line for line in output.splitlines() if "at the peak" in line)
                    planned = float(line.split()[1])
                    rows = cp.Report.from_json((out / "report.json").read_text()).rows
                    seconds = sum(row.seconds for row in rows if row.seconds)
                    told = next(line for line in output.splitlines() if line.startswith("solvers:"))
                    print(f"{folder.name} {solver} {mode}: planned {planned:.2f} GB, measured {peak:.2f}: "
                          f"{planned / peak:.2f} of it; {told}, took {seconds:.1f} s; {line}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
