"""The papers' networks: built, trained from scratch with a fixed seed, and kept as safetensors between runs.

python -m papers.networks          trains all of them, with PYTHONPATH=benchmarks; a later call only loads
"""

import copy
import math
import os
import pathlib
import time
from collections import OrderedDict

import torch
from nettrim.benchmark_utils.lenet import data_folder
from torch import nn

import convexprune as cp
from convexprune.datasets import error_rate, mnist

CACHE = pathlib.Path(os.environ.get("CONVEXPRUNE_PAPERS", pathlib.Path(__file__).parents[2] / "outputs" / "papers"))
DOCS = pathlib.Path(__file__).parents[2] / "docs"
SPIRAL_WIDTHS = (50, 75, 125, 175, 200)
SPIRAL_POINTS = 10_000


def caffe_lenet():
    """conv20-conv50-fc500-fc10 of Caffe, 431,080 parameters: 5x5 kernels, max pooling, one ReLU, behind fc1."""
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 20, 5), pool1=nn.MaxPool2d(2), conv2=nn.Conv2d(20, 50, 5), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(), fc1=nn.Linear(800, 500), relu=nn.ReLU(), fc2=nn.Linear(500, 10),
    ))  # fmt: skip


def wide_lenet():
    """conv32-conv64-fc512-fc10 of Net-Trim's manual: 5x5 kernels that keep the size, so fc1 reads 3,136 numbers."""
    return nn.Sequential(OrderedDict(
        conv1=nn.Conv2d(1, 32, 5, padding=2), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 5, padding=2), relu2=nn.ReLU(), pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(), drop1=nn.Dropout(0.25), fc1=nn.Linear(3136, 512), relu3=nn.ReLU(),
        drop2=nn.Dropout(0.25), fc2=nn.Linear(512, 10),
    ))  # fmt: skip


def spiral_network(width, dropout=0.0):
    """2-width-width-2."""
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(2, width), relu1=nn.ReLU(), drop1=nn.Dropout(dropout), fc2=nn.Linear(width, width),
        relu2=nn.ReLU(), drop2=nn.Dropout(dropout), fc3=nn.Linear(width, 2),
    ))  # fmt: skip


def spirals(points=SPIRAL_POINTS, turns=1.5, noise=0.02, seed=0):
    """(points, 2) in [-1, 1]^2 on two nested spirals, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(points) % 2
    radius = 0.1 + 0.9 * torch.rand(points, generator=generator)
    angle = 2 * math.pi * turns * radius + math.pi * y
    x = radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + noise * torch.randn(points, 2, generator=generator), y


def mnist_images(folder):
    """MNIST as (n, 1, 28, 28)."""
    data = mnist(folder / "mnist.npz")
    square = lambda x: x.reshape(-1, 1, 28, 28)  # noqa: E731
    return square(data.x_train), data.y_train, square(data.x_test), data.y_test


def parted(model):
    """What comes before fc1, and a copy of the fully connected layers: Linear "0", ReLU "1", Linear "2"."""
    parts = dict(model.named_children())
    names = list(parts)
    before, after = names[: names.index("fc1")], names[names.index("fc1") :]
    head = [copy.deepcopy(parts[name]) for name in after if not isinstance(parts[name], nn.Dropout)]
    return nn.Sequential(*(parts[name] for name in before)).eval(), nn.Sequential(*head).eval()


@torch.no_grad()
def features(body, x):
    """What the fully connected layers read."""
    return torch.cat([body(part) for part in x.split(1000)])


def fit(model, x, y, epochs, *, rate=1e-3, batch=128, l1=0.0, seed=0, dense=None, steps=None):
    """Train in place with Adam, its rate falling to 0 along a cosine; returns the model in evaluation mode.

    l1     weight of the sum of absolute weights in the loss
    dense  the network before pruning: what was pruned from it stays zero
    steps  so many steps, in place of epochs
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    total = steps or epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
    keeper = cp.MaskKeeper(model, optimiser, dense=dense) if dense is not None else None
    model.train()
    done = 0
    while done < total:
        for rows in torch.randperm(len(x), generator=generator).split(batch)[: total - done]:
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            if l1:
                loss = loss + l1 * sum(p.abs().sum() for p in model.parameters() if p.ndim > 1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            done += 1
    if keeper is not None:
        keeper.close()
    return model.eval()


def cached(name, build, train):
    """The network of this name from the cache; trained, with seed 0, and put there where it is not in it."""
    from safetensors.torch import load_file, save_file

    path = CACHE / f"{name}.safetensors"
    torch.manual_seed(0)
    model = build()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    model = train(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model


def trained_caffe_lenet(folder):
    x, y, *_ = mnist_images(folder)
    return cached("caffe_lenet", caffe_lenet, lambda model: fit(model, x, y, 3))


def trained_wide_lenet(folder):
    """On 55,000 images, with the manual's dropout; 600 steps of Adam on 100 images (the manual: 2,001 on 200)."""
    x, y, *_ = mnist_images(folder)
    train = lambda model: fit(model, x[:55_000], y[:55_000], 0, batch=100, steps=600)  # noqa: E731
    return cached("wide_lenet", wide_lenet, train)


def trained_spirals(width, l1=0.0):
    """With dropout 0.1; with l1 as well, weights that it brought below 1e-3 are 0."""
    x, y = spirals()

    def train(model):
        model = fit(model, x, y, 15, rate=3e-3, l1=l1)
        for weight in model.parameters():
            if l1:
                weight.data[weight.abs() < 1e-3] = 0
        return model

    return cached(f"spirals_{width}{'_l1' if l1 else ''}", lambda: spiral_network(width, 0.1), train)


def all_spirals():
    """(width, with l1, network) of the paper's table."""
    return [(w, bool(l1), trained_spirals(w, l1)) for w in SPIRAL_WIDTHS for l1 in (0.0, 1e-4)]


def write_parts(paper, parts, names, folder=DOCS / "papers"):
    """Run the named parts, each a function that returns Markdown, and write each to docs/papers/<paper>_<part>.md."""
    for name in names or parts:
        begun, spent = time.perf_counter(), sum(os.times()[:4])
        text = parts[name]()
        wall, cpu = time.perf_counter() - begun, sum(os.times()[:4]) - spent
        command = f"python -m papers.{paper} {name}"
        text += f"\n\n`{command}` (with `PYTHONPATH=benchmarks`): {cpu:.0f} CPU seconds, {wall:.0f} s.\n"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{paper}_{name}.md").write_text(text)
        print(text, flush=True)


def main():
    x, y = spirals()
    for width, l1, model in all_spirals():
        print(f"spirals {width}{' l1' if l1 else ''}: error {100 * error_rate(model, x, y):.2f}%", flush=True)
    folder = data_folder()
    *_, x, y = mnist_images(folder)
    for train in (trained_caffe_lenet, trained_wide_lenet):
        print(f"{train.__name__}: error {100 * error_rate(train(folder), x, y):.2f}%", flush=True)


if __name__ == "__main__":
    main()
