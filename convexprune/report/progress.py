"""Progress of a long run, as events for the caller; the library never prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of a run: `done` of `total` steps of this stage.

    stage "capture" and "measure": the steps are calibration batches; "solve": they are layers, `layer` being next.
    "plan" comes once, before anything is solved: `note` says which of the model's weights the layers have.
    """

    stage: str
    layer: str | None  # None where the stage concerns the whole network
    done: int
    total: int | None  # None where the batches do not say how many they are
    note: str = ""
