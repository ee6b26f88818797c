"""What a long run tells those who watch: events, never prints."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run has come: `done` of `total` steps of this stage.

    stage "capture" and "measure": the steps are calibration batches; "solve": they are layers, `layer` being next.
    "plan" comes once, before anything is solved: `note` says which of the model's weights the layers have.
    """

    stage: str
    layer: str | None  # None where the stage concerns the whole network
    done: int
    total: int | None  # None where the batches do not say how many they are
    note: str = ""
