"""Progress of a long run, as events for the caller; the library never prints.

The events also go to the logger "convexprune": a plan and layers as INFO, batches as DEBUG.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from convexprune.network.calibration import Calibration
from convexprune.network.coverage import Coverage
from convexprune.options import function, optional

LOGGER: Final = logging.getLogger("convexprune")
LOGGER.addHandler(logging.NullHandler())


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

    def __str__(self) -> str:
        """One line."""
        of = f"{self.done} of {self.total}" if self.total is not None else str(self.done)
        return " ".join(filter(None, [self.stage, self.layer, of, self.note.replace("\n", "; ")]))


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
        LOGGER.log(logging.INFO if event.stage in ("plan", "solve") else logging.DEBUG, "%s", event)
        if self.progress is not None:
            self.progress(event)


def check_watcher(progress: Any) -> None:
    """Raise TypeError for what cannot be told how far a run has come."""
    optional(function("a function that takes a `Progress`, such as print"))("progress", progress)
