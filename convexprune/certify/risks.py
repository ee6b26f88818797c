"""Risks: what one sample loses by pruning, a number between two limits that are known before any sample is seen.

PredictionChanged  1 if the prediction is another one, else 0
AccuracyLost       (dense network right) - (pruned network right), in {-1, 0, 1}
OutputError        min(|zhat - z|^2, clip)
OutputDivergence   min(KL(softmax z || softmax zhat), clip)
TokensChanged      of a sequence, the share of places whose most likely next token is another one
ExcessLogLoss      of a sequence, the rise of the mean log-loss of its tokens, cut at -clip and clip

The samples of a language model are its sequences: the tokens of one are not independent. A loss is what is computed
here, in float64, from the outputs of the two networks as they ran.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from convexprune.network.forward import tensors_in
from convexprune.network.identity import MASK
from convexprune.network.predict import Rule, changed, check_rule, predictions, rule_name
from convexprune.options import check_options, function, optional, positive

Pick = Callable[[Any], Tensor]  # a tensor that belongs to a batch


class Risk(Protocol):
    """A small frozen object. `losses` are between `low` and `high`; `zero_one`: they are 0 or 1 and nothing else."""

    @property
    def low(self) -> float:
        """The least loss."""

    @property
    def high(self) -> float:
        """The largest loss."""

    @property
    def zero_one(self) -> bool:
        """Whether every loss is 0 or 1."""

    @property
    def name(self) -> str:
        """What is lost, in a few words."""

    def losses(self, dense: Tensor, pruned: Tensor, batch: Any) -> Tensor:
        """(samples,), float64: the losses of a batch, from the outputs (samples, ...) of the two networks."""


@dataclass(frozen=True)
class PredictionChanged:
    """1 where the pruned network predicts something else.

    Args:
        predict: How an output is a prediction, as in `certify_unseen`.

    Example:
        >>> import torch, convexprune as cp
        >>> cp.PredictionChanged().losses(torch.eye(2), torch.tensor([[2.0, 1.0], [2.0, 1.0]]), None)
        tensor([0., 1.], dtype=torch.float64)
    """

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    zero_one: ClassVar[bool] = True

    predict: Rule | None = None

    def __post_init__(self) -> None:
        check_rule(self.predict)

    @property
    def name(self) -> str:
        """As in reports."""
        return "predictions that change"

    def losses(self, dense: Tensor, pruned: Tensor, batch: Any) -> Tensor:
        """0 or 1."""
        return changed(dense, pruned, self.predict).double()


@dataclass(frozen=True)
class AccuracyLost:
    """1 where only the dense network is right, -1 where only the pruned one is, else 0: the mean is accuracy lost.

    Args:
        labels: A function from a batch to its labels; None takes the second entry of a tuple, or "labels" of a dict.
        predict: How an output is a prediction, as in `certify_unseen`; a sample is right if all of it is.
    """

    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0
    zero_one: ClassVar[bool] = False

    labels: Pick | None = None
    predict: Rule | None = None

    def __post_init__(self) -> None:
        check_options(self, labels=optional(function("a function from a batch to its labels")))
        check_rule(self.predict)

    @property
    def name(self) -> str:
        """As in reports."""
        return "accuracy lost"

    def losses(self, dense: Tensor, pruned: Tensor, batch: Any) -> Tensor:
        """-1, 0 or 1. Raises ValueError where there are no labels, or not one for each prediction."""
        labels = _labels(batch) if self.labels is None else self.labels(batch)
        return self._right(dense, labels) - self._right(pruned, labels)

    def _right(self, outputs: Tensor, labels: Any) -> Tensor:
        found = predictions(outputs, self.predict)
        if not isinstance(labels, Tensor) or labels.numel() != found.numel():
            shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
            rule = rule_name(self.predict, tuple(outputs.shape))
            raise ValueError(f"labels are {shape}, predictions ({rule}) {tuple(found.shape)}; give one for each")
        same = found == labels.to(found.device).reshape(found.shape)
        return same.reshape(len(found), -1).all(1).double()


@dataclass(frozen=True)
class OutputError:
    """min(|zhat - z|^2, clip), the squared change of a sample's outputs.

    Raises ValueError for a clip that is not above 0. Choose it before looking at the samples.
    """

    low: ClassVar[float] = 0.0
    zero_one: ClassVar[bool] = False

    clip: float

    def __post_init__(self) -> None:
        check_options(self, clip=positive)

    @property
    def high(self) -> float:
        """The clip."""
        return float(self.clip)

    @property
    def name(self) -> str:
        """As in reports."""
        return f"squared output error (clipped at {self.clip:g})"

    def losses(self, dense: Tensor, pruned: Tensor, batch: Any) -> Tensor:
        """In [0, clip]."""
        return (pruned.double() - dense.double()).square().reshape(len(dense), -1).sum(1).clamp(max=self.high)


@dataclass(frozen=True)
class OutputDivergence:
    """min(KL(softmax z || softmax zhat), clip) over the last axis, in nats; of a sequence the mean over its places.

    Args:
        clip: In nats.
        mask: As of `TokensChanged`.
    """

    low: ClassVar[float] = 0.0
    zero_one: ClassVar[bool] = False

    clip: float
    mask: Pick | None = None

    def __post_init__(self) -> None:
        check_options(self, clip=positive, mask=optional(function("a function from a batch to a mask")))

    @property
    def high(self) -> float:
        """The clip."""
        return float(self.clip)

    @property
    def name(self) -> str:
        """As in reports."""
        return f"KL divergence of the outputs (clipped at {self.clip:g})"

    def losses(self, dense: Tensor, pruned: Tensor, batch: Any) -> Tensor:
        """In [0, clip]."""
        before, after = (outputs.double().log_softmax(-1) for outputs in (dense, pruned))
        each = (before.exp() * (before - after)).sum(-1)
        if each.ndim > 1:
            each = _mean(each, _mask(batch, self.mask, each))
        return each.clamp(0, self.high)


@dataclass(frozen=True)
class TokensChanged:
    """The share of a sequence's places at which the most likely next token is another one.

    Args:
        mask: A function from a batch to a bool tensor (sequences, places), True at the places that count; None takes
            the "attention_mask" of a dict, and else all places.
    """

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    zero_one: ClassVar[bool] = False

    mask: Pick | None = None

    def __post_init__(self) -> None:
        check_options(self, mask=optional(function("a function from a batch to a mask")))

    @property
    def name(self) -> str:
        """As in reports."""
        return "next tokens that change"

    def losses(self, dense: Tensor, pruned: Tensor, batch: Any) -> Tensor:
        """In [0, 1]."""
        different = predictions(dense, "tokens") != predictions(pruned, "tokens")
        return _mean(different.double(), _mask(batch, self.mask, different))


@dataclass(frozen=True)
class ExcessLogLoss:
    """By how much the mean log-loss of a sequence's tokens rises, in nats a token, cut at -clip and clip.

    Each place predicts the token at the next one.

    Args:
        clip: In nats.
        tokens: A function from a batch to the tokens (sequences, places); None takes a tensor itself, the first entry
            of a tuple, or "input_ids" of a dict.
        mask: As of `TokensChanged`: the tokens that count.
    """

    zero_one: ClassVar[bool] = False

    clip: float
    tokens: Pick | None = None
    mask: Pick | None = None

    def __post_init__(self) -> None:
        wanted = optional(function("a function from a batch to a tensor"))
        check_options(self, clip=positive, tokens=wanted, mask=wanted)

    @property
    def low(self) -> float:
        """-clip."""
        return -float(self.clip)

    @property
    def high(self) -> float:
        """The clip."""
        return float(self.clip)

    @property
    def name(self) -> str:
        """As in reports."""
        return f"rise of the log-loss a token (cut at {self.clip:g})"

    def losses(self, dense: Tensor, pruned: Tensor, batch: Any) -> Tensor:
        """In [-clip, clip]. Raises ValueError where there is not one token for each place."""
        tokens = _tokens(batch) if self.tokens is None else self.tokens(batch)
        if not isinstance(tokens, Tensor) or dense.ndim != 3 or tuple(tokens.shape) != tuple(dense.shape[:2]):
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(
                f"tokens are {shape}, outputs {tuple(dense.shape)}; a log-loss needs a token for each place"
            )
        if tokens.shape[1] < 2:
            raise ValueError("a sequence of one token predicts none; give longer ones")
        mask = _mask(batch, self.mask, tokens)[:, 1:]
        rise = _log_loss(pruned, tokens) - _log_loss(dense, tokens)
        return _mean(rise, mask).clamp(self.low, self.high)


def check_risk(risk: Any) -> None:
    """Raise TypeError for what is no risk."""
    needed = ("low", "high", "zero_one", "name", "losses")
    if isinstance(risk, type) or not all(hasattr(risk, key) for key in needed) or not callable(risk.losses):
        raise TypeError(
            f"risk is {risk!r}; give one such as PredictionChanged(), or an object with {', '.join(needed)}"
        )


def _log_loss(outputs: Tensor, tokens: Tensor) -> Tensor:
    """(sequences, places - 1): -log of the probability of each next token."""
    logs = outputs[:, :-1].double().log_softmax(-1)
    return -logs.gather(-1, tokens[:, 1:, None].to(logs.device).long())[..., 0]


def _mean(each: Tensor, mask: Tensor) -> Tensor:
    """(samples,): the mean over the places that count; 0 where none does."""
    weight = mask.to(each.device).double()
    return (torch.where(mask.to(each.device), each, 0.0) * weight).sum(1) / weight.sum(1).clamp(min=1)


def _mask(batch: Any, pick: Pick | None, like: Tensor) -> Tensor:
    """(samples, places) bool, like a tensor of that shape."""
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    known = first.get(MASK) if isinstance(first, Mapping) else None
    found: Any = known if pick is None else pick(batch)
    if found is None and pick is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    if not isinstance(found, Tensor) or found.shape != like.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the mask is {shape}; it must be a tensor {tuple(like.shape)}, one entry for each place")
    return found.bool()


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping) and "labels" in batch:
        return batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise ValueError(
        "the batches have no labels; give (inputs, labels), or AccuracyLost(labels=...), a function of one"
    )


def _tokens(batch: Any) -> Any:
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(first, Mapping) and "input_ids" in first:
        return first["input_ids"]
    if isinstance(first, Mapping):
        raise ValueError("the batches have no 'input_ids'; give ExcessLogLoss(tokens=...), a function of a batch")
    return next(tensors_in(first))
