"""Layers of any size whose Gram matrix has the spectrum of real ones: a few strong directions and a long tail."""

import torch

import convexprune as cp


def simulated(inputs, outputs, seed=0, decay=1.2):
    """Eigenvalues k^-decay in random directions, inputs of unequal scale; weights of unit variance over the inputs."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)).Q
    spectrum = torch.arange(1, inputs + 1, dtype=torch.float64) ** -decay
    scale = torch.exp(0.5 * torch.randn(inputs, generator=generator, dtype=torch.float64))
    root = directions * spectrum.sqrt() * scale[:, None]
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    return cp.Layer.from_moments(weight, root @ root.T, name=f"{outputs}x{inputs}")
