"""Running sums of what layers read and aim at, over any number of batches."""

from __future__ import annotations

import torch
from torch import Tensor


class InputMoments:
    """Running float64 sums of x x^T and x; layers that read the same tensor share one."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.mean = torch.zeros(width, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add samples x (n, in), float64."""
        self.count += len(x)
        self.gram.addmm_(x.T, x)
        self.mean += x.sum(0)

    def finished(self) -> InputMoments:
        """The means instead of the sums, E[x x^T] and E[x], computed once so that layers can share the arrays."""
        done = InputMoments(0)
        n = max(self.count, 1)
        done.count, done.gram, done.mean = self.count, self.gram / n, self.mean / n
        return done


class TargetMoments:
    """Running float64 sums of y x^T, y and y^2, for targets that are not the layer's own outputs (a cascade)."""

    def __init__(self, out: int, width: int) -> None:
        self.count = 0
        self.cross = torch.zeros(out, width, dtype=torch.float64)
        self.mean = torch.zeros(out, dtype=torch.float64)
        self.energies = torch.zeros(out, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add samples x (n, in) and y (n, out), both float64."""
        self.count += len(x)
        self.cross.addmm_(y.T, x)
        self.mean += y.sum(0)
        self.energies += y.square().sum(0)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: int = 8192) -> Tensor:
    """x W^T + b in float64, a block of rows at a time so that x may stay in float32."""
    out = torch.empty(len(x), len(weight), dtype=torch.float64)
    for start in range(0, len(x), rows):
        out[start : start + rows] = x[start : start + rows].double() @ weight.T
    return out if bias is None else out.add_(bias)
