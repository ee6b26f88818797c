"""One layer at a time: the presets beside ADMM and the column sweep in the same run, and beside published figures.

python benchmarks/reconstruction_layers.py --data DIR --peers FILE

DIR/layers holds files with `weight` (out, in) and `gram` = E[x x^T]; FILE (optional) is a JSON of errors and seconds of
other code, {"unstructured": {layer: {sparsity: {method: {"error": .., "seconds": ..}}}}, "nm_2_4": {layer: ..}}.
Errors are relative: value / E|y|^2, with no damping.
"""

import argparse
import json
import math
import pathlib

import numpy as np
import torch
from nettrim.benchmark_utils.lenet import data_folder, table

import convexprune as cp

REFERENCES = {"ADMM": cp.ADMM(), "ColumnSweep": cp.ColumnSweep()}
PRESETS = {"Fast": cp.Fast(), "Balanced": cp.Balanced(), "Best": cp.Best()}
SPARSITIES = (0.5, 0.7, 0.9)


def layers(folder):
    for path in sorted((folder / "layers").glob("*.npz")):
        with np.load(path) as arrays:
            yield (
                path.stem,
                cp.Layer.from_moments(
                    torch.from_numpy(arrays["weight"]), torch.from_numpy(arrays["gram"]), name=path.stem
                ),
            )


def cases(layer, peers):
    """(label, pattern, what others reached) of a layer."""
    total = layer.weight.numel()
    for sparsity in SPARSITIES:
        pattern = cp.Unstructured(total - round(sparsity * total))
        yield f"{sparsity:.0%}", pattern, peers["unstructured"].get(layer.name, {}).get(str(sparsity), {})
    if layer.weight.shape[1] % 4 == 0:
        yield "2:4", cp.NM(2, 4), peers["nm_2_4"].get(layer.name, {})


def measured(problem, solver, repeats):
    """(relative error, median seconds) of a solver; its counts must be exact."""
    solutions = sorted((cp.solve(problem, solver) for _ in range(repeats)), key=lambda s: s.seconds)
    certificate = solutions[0].certificate
    assert certificate.violation == 0
    return certificate.value / problem.layer.energy, solutions[repeats // 2].seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--peers", type=pathlib.Path, default=None)
    parser.add_argument("--layers", nargs="+", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    peers = json.loads(options.peers.read_text()) if options.peers else {"unstructured": {}, "nm_2_4": {}}
    rows, ratios = [], {name: [] for name in PRESETS}
    for name, layer in layers(data_folder(options.data)):
        if options.layers and name not in options.layers:
            continue
        for label, pattern, others in cases(layer, peers):
            problem = cp.Reconstruction(layer, pattern)
            cp.solve(problem, cp.Magnitude())
            found = {key: measured(problem, s, options.repeats) for key, s in {**REFERENCES, **PRESETS}.items()}
            best = min((peer["error"] for peer in others.values()), default=found["ADMM"][0])
            for key in PRESETS:
                ratios[key].append(found[key][0] / best)
            published = f"{best:.4g}" if others else "-"
            rows.append([name, label, published, *(f"{error:.4g} in {s:.3f}" for error, s in found.values())])
            print(rows[-1], flush=True)
    print(table(["layer", "sparsity", "best published", *(f"{key}, s" for key in (*REFERENCES, *PRESETS))], rows))
    for key, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        print(f"{key}: error over the best published, geometric mean {mean:.3f}, worst {max(values):.3f}")


if __name__ == "__main__":
    main()
