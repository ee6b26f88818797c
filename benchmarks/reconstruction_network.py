"""Whole networks by Reconstruction, layer after layer: no labels, no retraining unless it is said.

python benchmarks/reconstruction_network.py --part lenet --data DIR      LeNet-300-100 at 6.7/20/65 and 1/4/54 % kept
python benchmarks/reconstruction_network.py --part resnet                ResNet-20, every 3x3 convolution alike
python benchmarks/reconstruction_network.py --part minilm --model DIR    a sentence encoder's 36 Linear layers

DIR holds the data files, default $CONVEXPRUNE_DATA; --model is a transformer's folder, tokenizer included.
"""

import argparse
import resource
import time

import torch
from nettrim.benchmark_utils.lenet import data_folder, images, table
from nettrim.benchmark_utils.resnet import cifar10, resnet20
from reconstruction.benchmark_utils import minilm

import convexprune as cp
from convexprune.datasets import error_rate, mnist, trained_lenet300

SOLVERS = {
    "magnitude": cp.Magnitude(),
    "activation_magnitude": cp.ActivationMagnitude(),
    "column_sweep": cp.ColumnSweep(),
    "layerwise_obs": cp.LayerwiseOBS(),
    "exact_obs": cp.ExactOBS(),
    "admm": cp.ADMM(),
    "fast": cp.Fast(),
    "balanced": cp.Balanced(),
    "best": cp.Best(),
}
LENET = {"6.7/20/65": (0.067, 0.20, 0.65), "1/4/54": (0.01, 0.04, 0.54)}


def pruned(model, batches, pattern_of, solver, damping, importance=None, **options):
    """The pruned network, its report, the seconds; pattern_of(layer) is a pattern, importance(layer) its outputs'."""

    def build(layer):
        counts = None if importance is None else importance(layer)
        return cp.Reconstruction(layer.damped(damping), pattern_of(layer), importance=counts)

    begun = time.perf_counter()
    network, report = cp.prune(model, batches, build, solver, **options)
    return network, report, time.perf_counter() - begun


def kept(report):
    """The kept fraction of all weights that a problem was stated for."""
    rows = [row for row in report.rows if row.certificate]
    return sum(row.kept for row in rows) / sum(row.total for row in rows)


def percent(fraction):
    return f"{100 * fraction:.2f}%"


def lenet(folder, options):
    model, data = trained_lenet300(folder / "lenet300.npz"), mnist(folder / "mnist.npz")
    batches = list(images(folder, options.images or 60_000).split(10_000))
    print(f"LeNet-300-100, dense test error {100 * error_rate(model, data.x_test, data.y_test):.2f}%")
    behind = {"fc1": model.fc2, "fc2": model.fc3}

    def importance(layer):
        """An output matters as much as the next layer makes of it."""
        return behind[layer.name].weight.detach().norm(dim=0) if layer.name in behind else None

    rows = []
    for name in options.solvers:
        for label, fractions in LENET.items():
            pattern = dict(zip(("fc1", "fc2", "fc3"), fractions, strict=True))
            network, report, seconds = pruned(
                model,
                batches,
                lambda layer, p=pattern: cp.Unstructured(p[layer.name]),
                SOLVERS[name],
                options.damping,
                importance,
                mode=options.mode,
            )
            before, after = percent(error_rate(network, data.x_test, data.y_test)), "-"
            if options.steps:
                retrain(network, model, data, options.steps)
                after = percent(error_rate(network, data.x_test, data.y_test))
            rows.append([name, label, percent(kept(report)), before, after, f"{seconds:.0f}"])
            print(rows[-1], flush=True)
    head = ["solver", "kept, by layer", "kept", "test error", f"after {options.steps} steps", "seconds"]
    print(table(head, rows))


def retrain(network, dense, data, steps, seed=0, temperature=2.0):
    """Light retraining, the masks kept: labels and the dense network's outputs, half of the batches shifted a pixel."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    functional = torch.nn.functional
    with cp.MaskKeeper(network, optimizer):
        for _ in range(steps):
            pick = torch.randint(len(data.x_train), (1024,), generator=generator)
            x, y = data.x_train[pick], data.y_train[pick]
            if torch.rand((), generator=generator) < 0.5:
                down, right = torch.randint(-1, 2, (2,), generator=generator).tolist()
                x = x.reshape(-1, 28, 28).roll((down, right), (1, 2)).flatten(1)
            with torch.no_grad():
                wanted = functional.log_softmax(dense(x) / temperature, 1)
            optimizer.zero_grad()
            found = network(x)
            soft = functional.log_softmax(found / temperature, 1)
            distance = functional.kl_div(soft, wanted, log_target=True, reduction="batchmean")
            (0.5 * functional.cross_entropy(found, y) + 0.5 * temperature**2 * distance).backward()
            optimizer.step()
            schedule.step()


def resnet(folder, options):
    model = resnet20(folder)
    x, _ = cifar10(folder, "train", options.images or 1024)
    x_test, y_test = cifar10(folder, "test")
    print(f"ResNet-20, dense accuracy {100 * (1 - error_rate(model, x_test, y_test)):.2f}%")
    rows = []
    for name in options.solvers:
        for sparsity in options.sparsities:
            network, report, seconds = pruned(
                model, list(x.split(128)), lambda layer, s=sparsity: cp.Unstructured(1 - s),
                SOLVERS[name], options.damping, names="*conv*", mode=options.mode,
            )  # fmt: skip
            accuracy = percent(1 - error_rate(network, x_test, y_test))
            solving = sum(row.seconds or 0 for row in report.rows)
            rows.append([name, sparsity, percent(kept(report)), accuracy, f"{seconds:.0f}", f"{solving:.1f}"])
            print(rows[-1], flush=True)
    print(table(["solver", "sparsity", "kept", "accuracy", "seconds", "of them solving"], rows))


def transformer(folder, options):
    encoder = minilm.Encoder(options.model)
    calibration, others = minilm.paragraphs(folder / "wikitext2_valid.txt", options.images or 128, 256)
    batches, held_out = encoder.batches(calibration), encoder.batches(others)
    dense = encoder.embeddings(encoder.model, held_out)
    names = [name for name in encoder.linears() if name.startswith("encoder.")]
    print(f"{len(names)} Linear layers")
    rows = []
    for name in options.solvers:
        for label, pattern in (("50%", cp.Unstructured(0.5)), ("2:4", cp.NM(2, 4))):
            network, report, seconds = pruned(
                encoder.model, cp.Calibration(batches, names, minilm.token_mask), lambda _, p=pattern: p,
                SOLVERS[name], options.damping, mode=options.mode,
            )  # fmt: skip
            cosine = torch.nn.functional.cosine_similarity(encoder.embeddings(network, held_out), dense).mean()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            rows.append(
                [
                    name,
                    label,
                    percent(kept(report)),
                    f"{float(cosine):.4f}",
                    f"{seconds / 60:.1f}",
                    f"{peak:.2f}",
                ]
            )
            print(rows[-1], flush=True)
    print(table(["solver", "pattern", "kept", "mean cosine", "minutes", "peak GB"], rows))


PARTS = {"lenet": lenet, "resnet": resnet, "minilm": transformer}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS], required=True)
    parser.add_argument("--data", default=None)
    parser.add_argument("--model", default=None, help="the sentence encoder's folder")
    parser.add_argument("--solvers", nargs="+", choices=[*SOLVERS], default=["balanced"])
    parser.add_argument("--mode", choices=["cascade", "residual"], default="cascade")
    parser.add_argument("--images", type=int, default=None, help="calibration images or paragraphs")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--damping", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=0, help="steps of light retraining, with labels")
    options = parser.parse_args()
    PARTS[options.part](data_folder(options.data), options)


if __name__ == "__main__":
    main()
