"""Kills a pruning at random moments and goes on: the result is that of a run left alone, bit for bit.

    python benchmarks/kills.py --model MODEL_FOLDER --text TEXT --kills 50

Each round prunes the folder with the command, and is killed now and then (SIGKILL and SIGINT in turn) at a moment
drawn from the time that is left of an undisturbed run; when it ends, every file is compared. Run it in the foreground:
a shell lets background jobs ignore SIGINT.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMED = ("report.html", "report.json")  # they say how long the solvers took


def command(arguments, out):
    return [
        sys.executable, "-m", "convexprune", "prune", arguments.model, "--calibration", arguments.text, "--out",
        str(out), "--windows", str(arguments.windows), "--length", "64", "--batch", "2", "--sparsity", "0.5",
        "--solver", arguments.solver, "--mode", arguments.mode, *arguments.more,
    ]  # fmt: skip


def run(words, limit=None, number=None):
    """Exit code, seconds and output; a limit says when to send the signal of this number."""
    begun = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        output = process.communicate()[0]
    return process.returncode, time.perf_counter() - begun, output


def results(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in TIMED}


def untimed(folder):
    """The report without the seconds."""
    import convexprune as cp

    report = cp.Report.from_json((folder / "report.json").read_text())
    return [(row.name, row.kept, row.error, row.certificate) for row in report.rows], report.network


def killed(words, whole, generator, number):
    """Whether the signal came while the command ran, and what it said; a run that ended well before is complete."""
    code, _, output = run(words, generator.uniform(0, 1.1 * whole), number)
    if code not in (0, -signal.SIGKILL, -signal.SIGINT, 1, 130):
        raise SystemExit(f"exit code {code}\n{output}")
    if code == 1 and "Aborted" not in output and "KeyboardInterrupt" not in output:
        raise SystemExit(f"exit code 1\n{output}")
    return code != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--solver", default="fast")
    parser.add_argument("--mode", default="cascade")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs="*", help="further options of the command, behind --")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        _, whole, output = run(command(arguments, place / "whole"))
        if not (place / "whole" / "report.json").exists():
            raise SystemExit(output)
        wanted = results(place / "whole")
        counts, rounds = {signal.SIGKILL: 0, signal.SIGINT: 0}, 0
        while sum(counts.values()) < arguments.kills:
            out = place / "out"
            shutil.rmtree(out, ignore_errors=True)
            running = True
            while running and sum(counts.values()) < arguments.kills:
                number = (signal.SIGKILL, signal.SIGINT)[sum(counts.values()) % 2]
                running = killed(command(arguments, out), whole, generator, number)
                counts[number] += running
            if running:
                code, _, output = run(command(arguments, out))
                if code:
                    raise SystemExit(f"exit code {code}\n{output}")
            rounds += 1
            found = results(out)
            odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
            if odd or untimed(out) != untimed(place / "whole"):
                raise SystemExit(f"round {rounds}: other files than those of the whole run: {odd or 'the report'}")
            if left := [path.name for path in out.iterdir() if path.name.startswith(".")]:
                raise SystemExit(f"round {rounds}: left behind: {left}")
        words = ", ".join(f"{count} {number.name}" for number, count in counts.items())
        print(f"{words} in {rounds} runs of {whole:.1f} s: every file is the same, and the report but for its seconds")


if __name__ == "__main__":
    main()
