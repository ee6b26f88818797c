"""Re-estimate batch-norm statistics. `prune` never calls this."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from convexprune.network.calibration import Calibration
from convexprune.network.forward import check_model, numbered, run, undisturbed
from convexprune.network.kinds import BATCH_NORMS

STATISTICS = ("running_mean", "running_var")


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def reestimate_batch_norm(model: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running mean and variance of every batch norm by their averages over the batches, in place.

    Everything else stays as it was, the training mode included. If a batch fails, the statistics stay as they were
    too. Re-estimation does not improve every pruned network: measure.

    Args:
        model: The network.
        batches: Calibration data; every batch has the same weight in the average.

    Raises:
        ValueError: If the model has no batch norm with running statistics, there is no batch, a batch fails, or the
            statistics are not finite.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1)).eval()
        >>> cp.reestimate_batch_norm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> model[0].running_mean, model[0].running_var
        (tensor([4.]), tensor([2.]))
    """
    check_model(model)
    calibration = Calibration.of(batches)
    norms = [
        module for module in model.modules() if isinstance(module, BATCH_NORMS) and module.running_mean is not None
    ]
    if not norms:
        raise ValueError("the model has no batch norm with running statistics: there is nothing to re-estimate")
    if any(norm.get_buffer(key).is_inference() for norm in norms for key in STATISTICS):
        raise ValueError("the model was made in inference mode, so nothing in it can be changed; give a copy.deepcopy")
    momenta = [norm.momentum for norm in norms]
    with undisturbed(model):  # a failure leaves the statistics as they were
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum, norm.training = None, True  # a plain average over the batches
            for index, batch in enumerate(calibration):
                with numbered(index):
                    run(model, batch)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        found = [{key: norm.get_buffer(key).clone() for key in STATISTICS} for norm in norms]
    if not all(bool(value.isfinite().all()) for statistics in found for value in statistics.values()):
        raise ValueError("the batches give NaN or inf as statistics; the model's are as they were")
    for norm, statistics in zip(norms, found, strict=True):
        for key, value in statistics.items():
            norm.get_buffer(key).copy_(value)
