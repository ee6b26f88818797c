"""How the products of samples are summed: in float64 on the CPU, in float32 with sums in float64 on an accelerator.

On an accelerator float64 is slow, and the samples stay where they are. With D (r, n), E (r, m) some rows about their
centres in float64, and powers of two s, t that bring their columns' largest entries into [1/2, 1),

    D^T E = diag(s) fl32(fl32(D / s)^T fl32(E / t)) diag(t)

Each entry rounds once, each sum r times in any order: an entry is within gamma_{r + 2} of sum |D_ki E_kj|, at most
sqrt(H_i H_j) with H the sums of squares; gamma is that of float32. What entries and products lose below float32's
range is less than 2^-124 in each term, and r 2^-122 of sqrt(H_i H_j): less than a rounding in all. Scaling by a power
of two is exact.
Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., SIAM 2002, (3.5), (2.8).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from convexprune.rounding import gamma

SINGLE: Final = 2.0**-24  # the unit roundoff of float32
SPAN: Final = 2**21  # numbers of a large matrix that are worked on at a time: in float64 16 MB
APART: Final = 128  # from so many rows on a batch's products are formed apart: the sums before then round once


class Products(Protocol):
    """How rows' products are added up, where the samples are held, and how far off that may be.

    rows    samples that are added at a time
    device  where the products are
    """

    @property
    def rows(self) -> int: ...  # noqa: D102

    @property
    def device(self) -> torch.device: ...  # noqa: D102

    def moved(self, samples: Tensor) -> Tensor:
        """The samples in float64, where their products are made."""

    def share(self, before: float, rows: int) -> float:
        """With `before` of the sums so far, and these rows added: entry (i, j) is within it of sqrt(H_i H_j)."""

    def gather(self, products: Tensor, left: Tensor, right: Tensor) -> None:
        """Add left^T right (n, m) of rows (r, n) and (r, m) to the products."""


@dataclass(frozen=True)
class OnHost:
    """In float64 on the CPU."""

    rows: int = 1024

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def moved(self, samples: Tensor) -> Tensor:
        """On the CPU."""
        return samples.cpu().double()

    def share(self, before: float, rows: int) -> float:
        """Formed apart, a batch's products round n times and the sums before them once; else both round n times."""
        here = gamma(rows + 6)
        return max(before, here) + gamma(2) if rows >= APART else before + here

    def gather(self, products: Tensor, left: Tensor, right: Tensor) -> None:
        """By spans of the products, so that less is held."""
        for some in spans(*products.shape):
            if len(left) >= APART:
                products[some] += left[:, some].T @ right
            else:
                products[some].addmm_(left[:, some].T, right)


@dataclass(frozen=True)
class OnDevice:
    """Products of some rows in float32 where the samples are, and their sums in float64."""

    device: torch.device
    rows: int = 128

    def moved(self, samples: Tensor) -> Tensor:
        """On the device."""
        return samples.to(self.device, torch.float64)

    def share(self, before: float, rows: int) -> float:
        """A batch's products are formed apart in float32; the sums before them round once in float64."""
        return max(before, gamma(rows + 4, SINGLE) + gamma(rows + 6)) + gamma(2)

    def gather(self, products: Tensor, left: Tensor, right: Tensor) -> None:
        """By spans of the products, so that less is held."""
        (a, s), (b, t) = _scaled(left), _scaled(right)
        for some in spans(*products.shape):
            with _in_float32(products.device.type):
                part = a[:, some].T @ b
            products[some] += part.double().mul_(s[some, None]).mul_(t)


def products_on(device: torch.device) -> Products:
    """Those for samples on a device; one without float64 has its samples brought to the CPU."""
    return OnHost() if device.type in ("cpu", "mps") else OnDevice(device)


def spans(rows: int, width: int) -> Iterator[slice]:
    """Slices of the rows of a matrix (rows, width), so few rows in each that an array of them is small."""
    step = max(SPAN // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(r, n) in float32 with the largest of each column in [1/2, 1), and the powers of two (n,) that were taken off."""
    exponents = torch.frexp(rows.abs().amax(0)).exponent.long().clamp(-1000, 1000)
    powers = ((exponents + 1023) << 52).view(torch.float64)  # exactly, on any device
    return (rows / powers).float(), powers


@contextmanager
def _in_float32(device: str) -> Iterator[None]:
    """Matrix products of float32 with all its bits: neither autocast nor a precision that the caller allows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
