"""Rate-distortion curves of any number, shaped like measured ones: falling, mostly convex, noisy."""

import torch

import convexprune as cp


def simulated(layers, levels, weights=250e6, seed=0, noise=0.05):
    """Curves of layers of very unequal size, `weights` in all; each level keeps an integer number of weights."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (2.5 * torch.rand(layers, generator=generator, dtype=torch.float64))
    sizes = (sizes * (weights / sizes.sum())).round().clamp(min=levels)
    share = torch.linspace(0.01, 1, levels, dtype=torch.float64)
    curves = []
    for index, size in enumerate(sizes):
        power = 1 + 2 * torch.rand((), generator=generator, dtype=torch.float64)
        height = 10 ** (0.7 * torch.randn((), generator=generator, dtype=torch.float64))
        loss = height * (1 - share) ** power * torch.exp(-3 * share)
        loss = loss * (1 + noise * torch.rand(levels, generator=generator, dtype=torch.float64))
        curves.append(cp.Curve(f"layer{index}", (share * size).round(), loss, total=int(size)))
    return curves
