"""Find the activation behind a layer from the recorded operations of a forward pass."""

from __future__ import annotations

from convexprune.network.kinds import COMMUTING_WITH_RELU
from convexprune.network.recording import Record


def activation(record: Record, layer: str) -> str | None:
    """ "relu" if only ReLUs read the layer's output, else None.

    Operations that commute with a ReLU may stand between the layer and the ReLU: reshaping, dropout, max pooling. A
    layer is not rectified if its output is also added to another tensor, normalised, or returned.
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
