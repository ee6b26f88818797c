"""Progress of a long run, as events for the caller, or as a bar where one is asked for; else nothing is printed.

The events also go to the logger "convexprune": a plan and layers as INFO, batches as DEBUG.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, ParamSpec, TypeVar

from convexprune.extras import extras
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


Watcher = Callable[[Progress], None] | Literal[True] | None  # as callers give it
P = ParamSpec("P")
R = TypeVar("R")


def watched(run: Callable[P, R]) -> Callable[P, R]:
    """Let a function that takes a `progress` take True, which draws a bar."""

    @functools.wraps(run)
    def drawing(*args: P.args, **options: P.kwargs) -> R:
        if options.get("progress") is not True:
            return run(*args, **options)
        with drawn() as bar:
            options["progress"] = bar
            return run(*args, **options)

    return drawing


def checked(progress: Any) -> Callable[[Progress], None] | None:
    """The function that is told how far a run has come; raises TypeError for what is none."""
    optional(function("True for a bar, or a function that takes a `Progress`, such as print"))("progress", progress)
    told: Callable[[Progress], None] | None = progress
    return told


@contextmanager
def drawn() -> Iterator[Callable[[Progress], None] | None]:
    """A progress bar on a terminal or in a notebook, nothing on a pipe. Raises ModuleNotFoundError without rich."""
    with extras():
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal and not console.is_jupyter:
        yield None
        return
    with Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda event: bar.update(
            task, description=f"{event.stage} {event.layer or ''}".strip(), completed=event.done, total=event.total
        )
