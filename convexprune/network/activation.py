"""The activation behind a layer, from what a forward pass did with its output."""

from __future__ import annotations

from convexprune.network.kinds import COMMUTING_WITH_RELU
from convexprune.network.recording import Record


def activation(record: Record, layer: str) -> str | None:
    """ "relu" if a ReLU is all that ever reads the layer's output, else None.

    Between the two may stand what commutes with a ReLU: reshaping, dropout, max pooling. A layer whose output is also
    added to something, normalised, or returned, is not rectified.
    """
    made = [number for step in record.steps if step.layer == layer for number in step.makes]
    return "relu" if made and all(_rectified(record, number) for number in made) else None


def _rectified(record: Record, number: int) -> bool:
    readers = [step for step in record.steps if number in step.reads]
    if number in record.results or not readers:
        return False
    for step in readers:
        commutes = step.layer is None and step.operation in COMMUTING_WITH_RELU and len(step.makes) == 1
        if step.operation != "relu" and not (commutes and _rectified(record, step.makes[0])):
            return False
    return True
