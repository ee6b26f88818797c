"""The risk of a pruned network, measured on held-out samples, and an upper bound of what it is on data not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.bounds.mean_loss import Betting, Binomial, MeanBound
from convexprune.bounds.statement import Hypothesis, Statement
from convexprune.certify.risks import Risk
from convexprune.network.calibration import Calibration
from convexprune.network.forward import check_batch, numbered, run, undisturbed
from convexprune.network.identity import identities
from convexprune.network.outputs import Which, sure_output
from convexprune.rounding import gamma, total, up


class HeldOut:
    """Held-out samples none of which was used; `output` says which of the model's outputs is meant.

    samples  how many there are

    Raises ValueError for a sample that is among those used or is there twice, for none, and for none that were used.
    """

    def __init__(self, held_out: Calibration | Iterable[Any], used: Iterable[Any], output: Which) -> None:
        self.calibration, self.output = Calibration.of(held_out), output
        known = {each for batch in used for each in identities(batch)}
        if not known:
            raise ValueError("no used samples; give the calibration data, so that none of it is among those held out")
        seen: set[bytes] = set()
        for index, batch in enumerate(self.calibration):
            check_batch(batch, f"held-out batch {index}")
            for row, own in enumerate(identities(batch)):
                if own in known:
                    raise ValueError(
                        f"sample {row} of held-out batch {index} was used to prune; hold out samples that were not"
                    )
                if own in seen:
                    raise ValueError(f"sample {row} of held-out batch {index} is held out twice; draw each sample once")
                seen.add(own)
        self.samples = len(seen)

    def losses(self, model: nn.Module, pruned: nn.Module, risk: Risk) -> Tensor:
        """(samples,), float64: one pass of both networks.

        Raises ValueError for outputs that do not fit, for losses that are not what the risk says, and where this pass
        gave other samples than the first.
        """
        found = []
        with undisturbed(model, pruned):
            for index, batch in enumerate(self.calibration):
                with numbered(index):
                    dense, sparse = (sure_output(run(each, batch), self.output) for each in (model, pruned))
                _check_outputs(dense, sparse, index)
                with torch.no_grad():
                    each = risk.losses(dense, sparse, batch)
                found.append(_checked(each, risk, len(dense)))
        losses = torch.cat(found)
        if self.calibration.unsteady:
            raise ValueError(f"the held-out samples: {self.calibration.unsteady}")
        if len(losses) != self.samples:
            raise ValueError(
                f"the outputs have {len(losses)} rows for {self.samples} samples; they must have one for each"
            )
        return losses

    def statement(
        self, losses: Tensor, risk: Risk, confidence: float, level: float, bound: MeanBound | None = None
    ) -> Statement:
        """`measured`, the mean loss; `guaranteed`, which the expected loss exceeds with probability 1 - confidence.

        bound  None: `Binomial` for losses of 0 and 1, `Betting` for others. Which one is settled before the losses are.
        """
        bound = default_bound(risk) if bound is None else bound
        hypotheses = (
            Hypothesis("the held-out samples are independent draws of what is to come (taken on trust)", True),
            Hypothesis("none of them was used to prune, and none is there twice (by hash)", True),
            Hypothesis("none of them was used to train, nor to choose the path or the risk (taken on trust)", True),
            Hypothesis(
                f"every loss is in [{risk.low:g}, {risk.high:g}]",
                bool(((losses >= risk.low) & (losses <= risk.high)).all()),
            ),
        )
        guaranteed = bounded(losses, risk, confidence, level, bound)
        return Statement(risk.name, type(bound).__name__, hypotheses, guaranteed, total(losses) / len(losses))


def default_bound(risk: Risk) -> MeanBound:
    """By the risk alone."""
    return Binomial() if risk.zero_one else Betting()


def bounded(losses: Tensor, risk: Risk, confidence: float, level: float, bound: MeanBound) -> float:
    """The upper bound in the unit of the loss, rounded up."""
    if risk.low == 0 and risk.high == 1:
        return bound.upper_bound(losses, confidence, level)
    width = risk.high - risk.low
    unit = (losses - risk.low) / width  # off by 3 units of a number up to 1
    unit = torch.where(losses <= risk.low, 0.0, unit + gamma(8)).clamp(0, 1)
    found = bound.upper_bound(unit, confidence, (level - risk.low) / width)
    return min(up(risk.low + width * found, gamma(8) * (abs(risk.low) + width)), risk.high)


def _check_outputs(dense: Tensor, pruned: Tensor, index: int) -> None:
    if pruned.shape != dense.shape:
        shapes = tuple(pruned.shape), tuple(dense.shape)
        raise ValueError(f"the pruned network's outputs have shape {shapes[0]}, the dense one's {shapes[1]}")
    if not bool(dense.isfinite().all() & pruned.isfinite().all()):
        raise ValueError(f"a network makes NaN or inf of held-out batch {index}")


def _checked(losses: Any, risk: Risk, samples: int) -> Tensor:
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (samples,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"the losses of {risk.name!r} are {shape}; expected a tensor ({samples},), one for each sample"
        )
    x = losses.detach().cpu().double()
    if not bool(((x >= risk.low) & (x <= risk.high)).all()) or math.isnan(float(x.sum())):
        raise ValueError(
            f"a loss of {risk.name!r} is not in [{risk.low:g}, {risk.high:g}], as the risk says that it is"
        )
    return x
