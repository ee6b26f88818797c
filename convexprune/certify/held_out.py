"""A certificate for data not seen, from held-out samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.bounds.confidence import clopper_pearson, empirical_bernstein
from convexprune.network.calibration import digests
from convexprune.network.forward import check_batches, run, undisturbed


@dataclass(frozen=True)
class Unseen:
    """Bounds that each hold with `confidence` for one more sample from where the held-out ones came.

    changed       held-out samples whose prediction changed, of `samples`
    changed_most  an upper bound of the probability that a prediction changes
    error         mean of |zhat - z|^2 over the held-out samples, clipped at `clip`
    error_most    an upper bound of its expectation
    """

    samples: int
    confidence: float
    changed: int
    changed_most: float
    error: float
    error_most: float
    clip: float

    def __str__(self) -> str:
        """Two sentences."""
        return (
            f"predictions that change: {self.changed} of {self.samples} held out, at most {self.changed_most:.2%} with "
            f"confidence {self.confidence:g}\n"
            f"squared output error (clipped at {self.clip:.4g}): {self.error:.4g} held out, at most "
            f"{self.error_most:.4g} in expectation"
        )


def certify_unseen(
    model: nn.Module, pruned: nn.Module, held_out: Iterable[Any], used: Iterable[Any], *, clip: float,
    confidence: float = 0.99,
) -> Unseen:  # fmt: skip
    """What the pruned network may do to data not seen, from samples that had no part in the pruning.

    held_out, used  batches as for `prune`; a sample of `used`, the calibration data, among those held out is refused
    clip            the squared error |zhat - z|^2 counts up to this; choose it before looking at the samples

    Raises ValueError for a sample that was used, for no samples, for none that were used (an iterator that has run
    out), and where the outputs are not one (n, classes) tensor of numbers.
    """
    check_batches(held_out)
    check_batches(used)
    known = {digest for batch in used for digest in digests(batch)}
    if not known:
        raise ValueError("no used samples; give the calibration data, so that none of it is among those held out")
    changed, errors = 0, []
    with undisturbed(model, pruned):
        for index, batch in enumerate(held_out):
            samples = list(digests(batch))
            for row, digest in enumerate(samples):
                if digest in known:
                    raise ValueError(
                        f"sample {row} of held-out batch {index} was used to prune; hold out samples that were not"
                    )
            dense, sparse = run(model, batch), run(pruned, batch)
            if not isinstance(dense, Tensor) or dense.ndim != 2 or len(dense) != len(samples):
                raise ValueError("the outputs must be one tensor of a row for each sample")
            if sparse.shape != dense.shape:
                shapes = tuple(sparse.shape), tuple(dense.shape)
                raise ValueError(f"the pruned network's outputs have shape {shapes[0]}, the dense one's {shapes[1]}")
            if bool(dense.isnan().any() | sparse.isnan().any()):
                raise ValueError(f"a network makes NaN of held-out batch {index}")
            changed += int((dense.argmax(1) != sparse.argmax(1)).sum())
            errors.append((sparse.double() - dense.double()).square().sum(1))
    every = torch.cat(errors) if errors else torch.zeros(0)
    most = clopper_pearson(changed, len(every), confidence)
    expected = empirical_bernstein(every, clip, confidence)
    mean = float(every.clamp(max=clip).mean())
    return Unseen(len(every), confidence, changed, most, mean, expected, clip)
