"""A certificate for data not seen, from held-out samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convexprune.bounds.confidence import clopper_pearson, empirical_bernstein
from convexprune.network.calibration import Calibration
from convexprune.network.forward import check_batch, check_batches, check_model, numbered, run, undisturbed
from convexprune.network.identity import identities
from convexprune.network.outputs import sure_output
from convexprune.network.predict import Rule, changed, check_rule, rule_name
from convexprune.options import between, positive


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
    predict: str = "classes"  # what a prediction is

    def __str__(self) -> str:
        """Two sentences."""
        return (
            f"predictions ({self.predict}) that change: {self.changed} of {self.samples} held out, at most "
            f"{self.changed_most:.2%} with confidence {self.confidence:g}\n"
            f"squared output error (clipped at {self.clip:.4g}): {self.error:.4g} held out, at most "
            f"{self.error_most:.4g} in expectation"
        )


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def certify_unseen(
    model: nn.Module,
    pruned: nn.Module,
    held_out: Calibration | Iterable[Any],
    used: Calibration | Iterable[Any],
    *,
    clip: float,
    confidence: float = 0.99,
    predict: Rule | None = None,
) -> Unseen:
    """Bound what pruning may change on data not seen, from samples that had no part in the pruning.

    Args:
        model: The dense network.
        pruned: Its pruned copy.
        held_out: Samples that were not used, as a `Calibration` or batches; each sample once. Its `output` says which
            of the tensors that the networks return is judged.
        used: The calibration data of the pruning; a sample of it among `held_out` is refused.
        clip: The squared error |zhat - z|^2 counts up to this number. Choose it before looking at the samples.
        confidence: Each of the two bounds holds with this probability over the draw of the held-out samples.
        predict: How an output is a prediction: "classes" (the largest output), "sign" (of one logit), "labels" (the
            sign of each), "tokens" (the largest output at each place; a sample changes if any of its tokens does), or a
            function of the outputs. None means "sign" for one output a sample, else "classes".

    Returns:
        The counts, the mean error, and an upper bound of each expectation.

    Raises:
        ValueError: For a sample that was used or is held out twice, for no samples, for none that were used (an
            iterator that has run out), and if the outputs are no tensor with a row for each sample.

    Source: Clopper, Pearson 1934; Maurer, Pontil 2009 (empirical Bernstein).

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Linear(4, 3)
        >>> held_out, used = [torch.rand(500, 4)], [torch.rand(20, 4)]
        >>> found = cp.certify_unseen(model, model, held_out, used, clip=1.0)
        >>> found.changed, round(found.changed_most, 4)
        (0, 0.0092)
    """
    check_model(model)
    check_model(pruned, "the pruned model")
    positive("clip", clip)
    between(0, 1)("confidence", confidence)
    check_rule(predict)
    check_batches(held_out)
    check_batches(used)
    which = held_out.output if isinstance(held_out, Calibration) else None
    seen: set[bytes] = set()
    known: set[bytes] = set()
    for index, batch in enumerate(used):
        check_batch(batch, f"used batch {index}")
        known.update(identities(batch))
    if not known:
        raise ValueError("no used samples; give the calibration data, so that none of it is among those held out")
    count, errors, rule = 0, [], ""
    with undisturbed(model, pruned):
        for index, batch in enumerate(held_out):
            check_batch(batch, f"held-out batch {index}")
            samples = list(identities(batch))
            for row, digest in enumerate(samples):
                if digest in known:
                    raise ValueError(
                        f"sample {row} of held-out batch {index} was used to prune; hold out samples that were not"
                    )
                if digest in seen:
                    raise ValueError(f"sample {row} of held-out batch {index} is held out twice; draw each sample once")
                seen.add(digest)
            with numbered(index):
                dense, sparse = (sure_output(run(each, batch), which) for each in (model, pruned))
            if dense.ndim < 1 or len(dense) != len(samples):
                raise ValueError("the outputs must be a tensor of a row for each sample")
            if sparse.shape != dense.shape:
                shapes = tuple(sparse.shape), tuple(dense.shape)
                raise ValueError(f"the pruned network's outputs have shape {shapes[0]}, the dense one's {shapes[1]}")
            if not bool(dense.isfinite().all() & sparse.isfinite().all()):
                raise ValueError(f"a network makes NaN or inf of held-out batch {index}")
            rule = rule_name(predict, tuple(dense.shape))
            count += int(changed(dense, sparse, predict).sum())
            errors.append((sparse.double() - dense.double()).square().reshape(len(dense), -1).sum(1))
    every = torch.cat(errors) if errors else torch.zeros(0)
    most = clopper_pearson(count, len(every), confidence)
    expected = empirical_bernstein(every, clip, confidence)
    mean = float(every.clamp(max=clip).mean())
    return Unseen(len(every), confidence, count, most, mean, expected, clip, rule)
