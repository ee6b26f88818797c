"""A language model of 260K parameters that tells stories: perplexity of the pruned model, method by method.

    CONVEXPRUNE_DATA=... python benchmarks/stories.py
    CONVEXPRUNE_DATA=... python benchmarks/stories.py --methods balanced-allocated --distill 30

Calibrated on the first 128 windows of 256 tokens, judged on windows 800 to 1000, which nobody has seen.
"""

import argparse
import os
import time
from pathlib import Path

import convexprune as cp
from convexprune.command.folder import Folder
from convexprune.command.samples import Windows, samples

LAYERS = "model.layers.*"
HALF = {
    "magnitude": (cp.Rule(LAYERS, sparsity=0.5, solver="magnitude"), "parallel"),
    "wanda, per row": (cp.Rule(LAYERS, sparsity=0.5, pattern="per-row", solver="activation-magnitude"), "cascade"),
    "sweep": (cp.Rule(LAYERS, sparsity=0.5, solver="column-sweep"), "cascade"),
    "fast": (cp.Rule(LAYERS, sparsity=0.5, solver="fast"), "cascade"),
    "balanced": (cp.Rule(LAYERS, sparsity=0.5, solver="balanced"), "cascade"),
    "balanced, residual": (cp.Rule(LAYERS, sparsity=0.5, solver="balanced"), "residual"),
    "best, residual": (cp.Rule(LAYERS, sparsity=0.5, solver="best"), "residual"),
    "magnitude 2:4": (cp.Rule(LAYERS, pattern="2:4", solver="magnitude"), "parallel"),
    "wanda 2:4": (cp.Rule(LAYERS, pattern="2:4", solver="activation-magnitude"), "cascade"),
    "sweep 2:4": (cp.Rule(LAYERS, pattern="2:4", solver="column-sweep"), "cascade"),
    "balanced 2:4": (cp.Rule(LAYERS, pattern="2:4", solver="balanced"), "cascade"),
    "best 2:4, residual": (cp.Rule(LAYERS, pattern="2:4", solver="best"), "residual"),
    "balanced, allocated": (cp.Rule(LAYERS, solver="balanced"), "residual"),
    "best, allocated": (cp.Rule(LAYERS, solver="best"), "residual"),
}


def perplexity(dense, pruned, held_out):
    return cp.evaluate(dense, pruned, held_out).measures["perplexity, pruned"].value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(HALF), choices=list(HALF))
    parser.add_argument("--distill", type=int, default=0, help="epochs of distill behind each")
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--hints", type=float, default=1.0)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.5, help="of the allocated methods")
    arguments = parser.parse_args()
    data = Path(os.environ["CONVEXPRUNE_DATA"])
    folder = Folder(data / "stories260k")
    model, text = folder.model(), str(data / "stories_valid.txt")
    calibration, held_out = (
        samples(text, model, folder.tokenizer, windows) for windows in (Windows(arguments.windows), Windows(200, 800))
    )
    print(f"dense: {perplexity(model, model, held_out):.2f}")
    curves = None
    for name in arguments.methods:
        rule, mode = HALF[name]
        begun = time.perf_counter()
        allocation = None
        if "allocated" in name:
            if curves is None:
                curves = cp.rate_distortion(model, cp.Calibration(calibration, names=LAYERS), measure=cp.SecondOrder())
            allocation = cp.Allocation(1 - arguments.sparsity, curves=curves)
        pruned, report = cp.prune(
            model, cp.Calibration(calibration, names=LAYERS), cp.Recipe([rule]), mode=mode, allocation=allocation
        )
        seconds = time.perf_counter() - begun
        line = (
            f"{name:22}{report.kept_fraction:6.1%} kept  {perplexity(model, pruned, held_out):7.2f}  {seconds:5.0f} s"
        )
        if arguments.distill:
            begun = time.perf_counter()
            trained, _ = cp.distill(
                model, pruned, cp.Calibration(calibration, names=LAYERS), epochs=arguments.distill, rate=arguments.rate,
                hints=arguments.hints,
            )  # fmt: skip
            more = time.perf_counter() - begun
            line += f"   distilled {perplexity(model, trained, held_out):7.2f}  {more:5.0f} s"
        print(line, flush=True)


if __name__ == "__main__":
    main()
