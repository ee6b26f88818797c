"""Batch-norm statistics measured anew, for whoever asks: pruning itself never touches them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from convexprune.network.forward import run, undisturbed
from convexprune.network.kinds import BATCH_NORMS

STATISTICS = ("running_mean", "running_var")


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running mean and variance of every batch-norm layer by their averages over the batches, in place.

    Everything else, training mode included, stays as it was; so do the statistics when a batch fails. A pruned network
    is not always the better for it: measure.
    Raises ValueError where there is no batch norm with running statistics, or no batch.
    """
    norms = [
        module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    ]
    if not norms:
        raise ValueError("the model has no batch norm with running statistics: there is nothing to re-estimate")
    momenta = [norm.momentum for norm in norms]
    with undisturbed(model):  # a failure leaves the statistics as they were
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True  # a plain average over the batches
            count = sum(1 for batch in batches if run(model, batch) is not None)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        if not count:
            raise ValueError("no batches; give at least one")
        found = [{key: norm.get_buffer(key).clone() for key in STATISTICS} for norm in norms]
    for norm, statistics in zip(norms, found, strict=True):
        for key, value in statistics.items():
            norm.get_buffer(key).copy_(value)
