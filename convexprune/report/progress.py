"""Progress of a long run, as events for the caller; the library never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from convexprune.network.calibration import Calibration
from convexprune.network.coverage import Coverage
from convexprune.options import function, optional


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


@dataclass(frozen=True)
class Teller:
    """Tells whoever watches how far the run has come."""

    progress: Callable[[Progress], None] | None
    calibration: Calibration

    def planned(self, coverage: Coverage, layers: int) -> None:
        """This is what will be walked."""
        self._tell(Progress("plan", None, 0, layers, "\n".join(coverage.lines())))

    def captured(self, module: str | None, batch: int) -> None:
        """A batch has gone through, as far as this module."""
        self._tell(Progress("capture", module, batch + 1, self.calibration.length))

    def solving(self, module: str, done: int, total: int) -> None:
        """This module is next."""
        self._tell(Progress("solve", module, done, total))

    def measured(self, batch: int) -> None:
        """A batch was measured."""
        self._tell(Progress("measure", None, batch + 1, self.calibration.length))

    def _tell(self, event: Progress) -> None:
        if self.progress is not None:
            self.progress(event)


def check_watcher(progress: Any) -> None:
    """Raise TypeError for what cannot be told how far a run has come."""
    optional(function("a function that takes a `Progress`, such as print"))("progress", progress)
