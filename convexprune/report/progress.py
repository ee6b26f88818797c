"""Progress of a long run, as events for the caller; the library never prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a run: `done` of `total` steps of this stage.

    A step is a calibration batch in the stage "capture", a layer in "solve", where `layer` is the next one, and in
    "measure" a layer if `layer` names one, else a batch.
    """

    stage: str
    layer: str | None  # None where the stage concerns the whole network
    done: int
    total: int | None  # None if the batches have no length
