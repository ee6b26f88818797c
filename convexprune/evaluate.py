"""A pruned model beside the dense one, on data: what its outputs lose, with confidence intervals over the samples.

For a language model, whose outputs are logits for each token, the samples are the sequences: tokens of one text are
not independent of each other, texts are (nearly).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convexprune.network import Calibration
from convexprune.network.forward import check_model, numbered, run, undisturbed
from convexprune.network.outputs import sure_output

NORMAL: Final = 1.959963984540054  # 97.5% quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean over the samples, with its 95% interval by the normal approximation.

    Args:
        value: The mean.
        low: Lower end.
        high: Upper end.

    Example:
        >>> import convexprune as cp
        >>> str(cp.Estimate(0.5, 0.4, 0.6))
        '0.5 (0.4 to 0.6)'
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"

    def mapped(self, function: Callable[[float], float]) -> Estimate:
        """Of an increasing function of the mean."""
        return Estimate(function(self.value), function(self.low), function(self.high))


@dataclass(frozen=True)
class Evaluation:
    """What was measured, by name: numbers of the dense model, of the pruned one, and of both.

    Args:
        samples: How many there were.
        measures: Name -> estimate.
        kind: "language model", "classifier" or "network".

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Linear(4, 3)
        >>> found = cp.evaluate(model, model, [torch.randn(10, 4)])
        >>> found.kind, found.measures["same class"].value, found.measures["relative output error"].value
        ('classifier', 1.0, 0.0)
    """

    samples: int
    measures: Mapping[str, Estimate]
    kind: str

    def __str__(self) -> str:
        width = max(map(len, self.measures))
        lines = [f"{name.ljust(width)}  {estimate}" for name, estimate in self.measures.items()]
        return "\n".join([f"a {self.kind} on {self.samples} samples, 95% intervals over the samples", *lines])


@torch.inference_mode(False)
def evaluate(
    dense: nn.Module, pruned: nn.Module, batches: Calibration | Iterable[Any], labels: Iterable[Tensor] | None = None
) -> Evaluation:
    r"""Run both models over data and compare their outputs; nothing is changed.

    Of a language model (a batch with "input_ids", outputs (samples, tokens, words)) the perplexities
    $\exp(-\tfrac{1}{T} \sum_t \log p(x_{t+1} \mid x_{\le t}))$, how often both would write the same next token, and
    $KL(p \,\|\, \hat p)$ a token. Of another, the relative output error $\|\hat Y - Y\|_F / \|Y\|_F$, and where the
    outputs are (samples, classes) how often both choose the same class, and with labels both accuracies.

    Args:
        dense: The dense model.
        pruned: The pruned one.
        batches: As of `prune`. A model that writes another sequence than it reads is compared by its outputs alone.
        labels: For each batch the classes (samples,), of a classifier.

    Returns:
        The estimates.

    Raises:
        ValueError: For a model whose outputs hold no floating tensor, and for labels that do not fit.

    Example:
        >>> import torch, convexprune as cp
        >>> dense, pruned = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> "same class" in cp.evaluate(dense, pruned, [torch.randn(10, 4)], [torch.zeros(10)]).measures
        True
    """
    check_model(dense)
    check_model(pruned, "the pruned model")
    calibration, known = Calibration.of(batches), None if labels is None else iter(labels)
    sums: dict[str, list[Tensor]] = {}
    kind = ""
    with undisturbed(dense, pruned), torch.no_grad():
        for index, batch in enumerate(calibration):
            with numbered(index):
                theirs, ours = (
                    sure_output(run(each, batch), calibration.output).detach().clone() for each in (dense, pruned)
                )
            if theirs.shape != ours.shape:
                raise ValueError(f"the outputs have shapes {tuple(theirs.shape)} and {tuple(ours.shape)}")
            tokens = _tokens(batch, theirs)
            if tokens is not None:
                kind, found = "language model", _of_tokens(tokens, theirs, ours)
            else:
                kind, found = _of_outputs(theirs, ours, None if known is None else next(known, None))
            for name, values in found.items():
                sums.setdefault(name, []).append(values)
    return _evaluation(kind, {name: torch.cat(parts) for name, parts in sums.items()})


def _evaluation(kind: str, sums: Mapping[str, Tensor]) -> Evaluation:
    measures: dict[str, Estimate] = {}
    for name, values in sums.items():
        if name in ("size", "tokens"):
            continue
        if name == "error":
            whole = _ratio(values, sums["size"])
            measures["relative output error"] = whole.mapped(lambda share: math.sqrt(max(share, 0.0)))
        elif "loss" in name:
            measures[name.replace("loss", "perplexity")] = _ratio(values, sums["tokens"]).mapped(math.exp)
        else:
            measures[name] = _ratio(values, sums.get("tokens", torch.ones_like(values)))
    return Evaluation(len(next(iter(sums.values()))), measures, kind)


def _ratio(values: Tensor, sizes: Tensor) -> Estimate:
    """sum values / sum sizes over the samples, with the interval of a ratio estimator (by linearisation)."""
    total = float(sizes.sum())
    mean = float(values.sum()) / total if total else math.nan
    rest = values - mean * sizes
    count = len(values)
    spread = math.sqrt(count / max(count - 1, 1) * float(rest.square().sum())) / total if total else math.nan
    return Estimate(mean, mean - NORMAL * spread, mean + NORMAL * spread)


def _tokens(batch: Any, output: Tensor) -> Tensor | None:
    """The tokens that a language model predicts; None for another model."""
    if not isinstance(batch, Mapping) or "decoder_input_ids" in batch or output.ndim != 3:
        return None
    tokens = batch.get("input_ids")
    fits = isinstance(tokens, Tensor) and tokens.shape == output.shape[:2] and int(tokens.max()) < output.shape[2]
    return tokens if fits and output.shape[1] > 1 else None


def _of_tokens(tokens: Tensor, theirs: Tensor, ours: Tensor) -> dict[str, Tensor]:
    """Sums over the tokens of each sequence."""
    dense, pruned = (F.log_softmax(each[:, :-1].float(), 2) for each in (theirs, ours))
    following = tokens[:, 1:, None].to(dense.device)
    found = {
        "loss, dense": -dense.gather(2, following)[..., 0],
        "loss, pruned": -pruned.gather(2, following)[..., 0],
        "same next token": (dense.argmax(2) == pruned.argmax(2)).float(),
        "KL a token, nats": (dense.exp() * (dense - pruned)).sum(2),
        "tokens": torch.ones_like(following[..., 0], dtype=torch.float64),
    }
    return {name: values.double().sum(1).cpu() for name, values in found.items()}


def _of_outputs(theirs: Tensor, ours: Tensor, labels: Tensor | None) -> tuple[str, dict[str, Tensor]]:
    theirs, ours = theirs.double().cpu(), ours.double().cpu()
    found = {
        "error": (ours - theirs).flatten(1).square().sum(1),
        "size": theirs.flatten(1).square().sum(1),
    }
    if theirs.ndim != 2 or theirs.shape[1] < 2:
        return "network", found
    found["same class"] = (ours.argmax(1) == theirs.argmax(1)).double()
    if labels is not None:
        if tuple(labels.shape) != (len(theirs),):
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}; give one class for each of {len(theirs)} samples"
            )
        for name, output in (("dense", theirs), ("pruned", ours)):
            found[f"accuracy, {name}"] = (output.argmax(1) == labels.cpu()).double()
    return "classifier", found
