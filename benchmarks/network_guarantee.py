"""The guaranteed error of a pruned network beside its measured one, and what is certain of data not seen.

python benchmarks/network_guarantee.py
python benchmarks/network_guarantee.py --part unseen     LeNet-300-100 at 90%, 2,000 held-out images, 200 splits

LeNet-300-100 at three sparsities and ResNet-20 at one, in parallel and cascade mode, by Reconstruction: guaranteed over
measured error with the published Frobenius norms, with spectral norms, and channel by channel.
"""

import argparse

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20

import convexprune as cp
from convexprune.datasets import mnist, trained_lenet300


def unseen(folder, options):
    """Predictions that change, from 2,000 images drawn of the test set, against all of it; over random splits."""
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    used = list(images(folder, 10_000).split(5000))
    network, _ = cp.prune(
        model, used, lambda layer: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(0.1)), cp.Best(),
        mode="cascade",
    )  # fmt: skip
    x = data.x_test
    with torch.no_grad():
        clip = float(model(used[0]).square().sum(1).mean())  # the size of the outputs, on data already used
        changed = (model(x).argmax(1) != network(x).argmax(1)).double()
    true = float(changed.mean())
    generator, covered, beside = torch.Generator().manual_seed(0), 0, 0
    for split in range(options.splits):
        order = torch.randperm(len(x), generator=generator)
        found = cp.certify_unseen(model, network, [x[order[:2000]]], used, clip=clip)
        rest = float(changed[order[2000:]].mean())
        covered, beside = covered + (true <= found.changed_most), beside + (rest <= found.changed_most)
        if split == 0:
            print(f"{found}\nof the whole test set {true:.2%} change, of the images that were not held out {rest:.2%}")
    # what is promised is about what the samples are drawn from; few changes among them leave more for the others
    print(f"the bound held on the whole test set in {covered} of {options.splits} splits, on the others in {beside}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--part", choices=["outputs", "unseen"], default="outputs")
    parser.add_argument("--splits", type=int, default=200)
    options = parser.parse_args()
    folder = data_folder(options.data)
    if options.part == "unseen":
        unseen(folder, options)
        return
    lenet, x = trained_lenet300(folder / "lenet300.npz"), images(folder, options.images)
    resnet, y = resnet20(folder), cifar10(folder, "train", 256)[0]
    cases = [("LeNet-300-100", lenet, [x], None, keep) for keep in (0.5, 0.2, 0.1)]
    cases.append(("ResNet-20", resnet, list(torch.split(y, 128)), "*conv*", 0.5))
    rows = []
    for name, model, batches, names, keep in cases:
        for mode in ("parallel", "cascade") if names is None else ("parallel", "cascade", "residual"):
            _, report = cp.prune(
                model, batches, lambda layer, k=keep: cp.Reconstruction(layer.damped(1e-3), cp.Unstructured(k)),
                mode=mode, names=names,
            )  # fmt: skip
            found = report.network
            rows.append([
                name, mode, f"{1 - keep:.0%}", f"{found.guaranteed:.4g}", f"{found.measured:.4g}",
                *(f"{total / found.measured:.4g}" for total in found.rules.values()),
            ])  # fmt: skip
            print(rows[-1], flush=True)
    head = ["network", "mode", "sparsity", "guaranteed", "measured", "Frobenius", "spectral", "by channel"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
