"""ResNet-20: every convolution captured and written back exactly, then one pruned by L1Reconstruction.

python benchmarks/resnet20.py --data DIR        DIR holds resnet20.npz and cifar10.npz; default $CONVEXPRUNE_DATA
"""

import argparse

import torch
from nettrim.benchmark_utils.lenet import data_folder, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20

import convexprune as cp
from convexprune.datasets import error_rate
from convexprune.network import write


@torch.no_grad()
def written_back(model, layers, x):
    """The largest change of the output, relative, once each layer's weights are solved from what was captured of it.

    What is written is C G^+ = E[y x^T] E[x x^T]^+, with y the convolution's own outputs as torch computed them: an
    unfolding or a write-back that does not match the convolution would show. Where the inputs do not span the space,
    the stored weights fill the rest.
    """
    before = model(x)
    for layer in layers:
        solved = torch.linalg.pinv(layer.affine_gram, hermitian=True, rtol=1e-10)
        rest = torch.eye(len(solved), dtype=torch.float64) - solved @ layer.affine_gram
        write(model, layer.name, layer.affine_cross @ solved + layer.affine_weight @ rest)
    return float((model(x) - before).abs().max() / before.abs().max())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--layer", default="layer3.1.conv1")
    parser.add_argument("--strengths", type=float, nargs="+", default=[1e-3, 1e-2, 0.1], help="lam / max |E[y x]|")
    options = parser.parse_args()
    folder = data_folder(options.data)
    model = resnet20(folder)
    x, _ = cifar10(folder, "train", options.images)
    batches = list(x.split(64))
    x_test, y_test = cifar10(folder, "test")
    print(f"dense accuracy on x_test {100 * (1 - error_rate(model, x_test, y_test)):.2f}%")

    convolutions = cp.capture(model, batches[:1], "*conv*", dense=model)
    change = written_back(resnet20(folder), convolutions, x_test[:256])
    print(f"{len(convolutions)} convolutions captured and written back: output changed by {change:.1e}, relative\n")

    rows = []
    for strength in options.strengths:

        def build(layer, strength=strength):
            return cp.L1Reconstruction(layer, strength * float(layer.affine_cross.abs().max()))

        pruned, report = cp.prune(model, batches, build, names=[options.layer])
        (row,) = report.rows
        certificate, accuracy = row.certificate, 100 * (1 - error_rate(pruned, x_test, y_test))
        figures = [f"{100 * row.kept_fraction:.1f}%", f"{certificate.value:.6f}", f"{certificate.bound:.6f}"]
        figures += [f"{certificate.relative_gap:.1e}", f"{accuracy:.2f}%", f"{row.seconds:.2f}"]
        rows.append([strength, *figures])
    print(f"{options.layer}, {options.images} images")
    print(table(["lam / max |E[y x]|", "kept", "value", "bound", "relative gap", "accuracy", "seconds"], rows))


if __name__ == "__main__":
    main()
