"""Small random layers, seeded, that the tests share."""

import torch

from convexprune.layer import Layer


def random_layer(seed=0, samples=40, inputs=6, out=4, activation="relu", bias=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(samples, inputs)
    return Layer.from_samples(normal(out, inputs), x, normal(out) if bias else None, activation)


def cascade_layer(seed=0, **sizes):
    """A layer that reads inputs other than the dense network's, and is to give the dense outputs."""
    dense = random_layer(seed, **sizes)
    generator = torch.Generator().manual_seed(seed + 1000)
    now = dense.inputs + 0.1 * torch.randn(dense.inputs.shape, generator=generator, dtype=torch.float64)
    return Layer.from_samples(dense.weight, now, dense.bias, dense.activation, targets=dense.targets_or_dense)
