"""Where the layers' problems are solved: here, in other processes, or on other machines.

A backend gets pure tasks, a problem and a solver each, and gives solutions in their order. What it gives is not
believed: `prune` writes the point and lets the problem judge again what was written, with the solution's witness.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, Protocol, runtime_checkable

import torch

from convexprune.extras import extras
from convexprune.options import text, whole
from convexprune.problem import LayerProblem, Solver
from convexprune.solution import Solution
from convexprune.solve import Proposal, proposed, solve

AHEAD: Final = 2  # tasks for each worker that are held in memory at once
TRIES: Final = 3  # how often each task is begun, where workers die

ORDERLY: Final = ("loky", "threading", "sequential")  # give each result when it is there; the others all at the end


@dataclass(frozen=True, eq=False)
class Task:
    """A problem for a solver.

    layer  the name that an error gets
    """

    layer: str
    problem: LayerProblem
    solver: Solver

    def run(self) -> Solution:
        """Solve it; an error says whose problem it was."""
        with self._named():
            return solve(self.problem, self.solver)

    def proposed(self) -> Proposal:
        """Run the solver, without a certificate; an error says whose problem it was."""
        with self._named():
            return proposed(self.problem, self.solver)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError, MemoryError) as error:
            error.add_note(f"This was layer {self.layer!r}.")
            raise


@runtime_checkable
class Backend(Protocol):
    """Runs tasks that do not depend on each other.

    Example:
        >>> import convexprune as cp
        >>> isinstance(cp.InProcess(), cp.Backend), isinstance(cp.Joblib(jobs=2), cp.Backend)
        (True, True)
    """

    def solutions(self, tasks: Iterable[Task]) -> Iterator[Solution]:
        """The solutions, in the order of the tasks, which are taken one by one and may hold large arrays."""


@dataclass(frozen=True)
class InProcess:
    """One task after the other, in this process.

    Example:
        >>> import torch, convexprune as cp
        >>> layer = cp.Layer.from_samples(torch.eye(3), torch.eye(3), name="fc")
        >>> tasks = [cp.Task("fc", cp.Reconstruction(layer, cp.Unstructured(2)), cp.Magnitude())]
        >>> [int((solution.x != 0).sum()) for solution in cp.InProcess().solutions(tasks)]
        [2]
    """

    def solutions(self, tasks: Iterable[Task]) -> Iterator[Solution]:
        """Each as it is asked for."""
        for task in tasks:
            yield task.run()


@dataclass(frozen=True)
class Joblib:
    """Tasks in several processes, or on several machines, by joblib.

    torch's threads are divided among the workers of this machine. A worker that dies (killed, out of memory) loses its
    task alone: that and what was beside it is given to fresh workers, as often as three times for each task.

    Args:
        jobs: How many tasks run at once; -1 for one on each core.
        engine: joblib's name of what runs them: "loky" for processes of this machine, "dask" for a cluster (`client`
            says which), "ray" behind `ray.util.joblib.register_ray()`, or what else was registered with joblib.
        threads: torch's threads in each worker; None divides this process's own among the jobs.
        options: Further keyword arguments of joblib.parallel_config.

    Raises:
        ValueError: For a number of jobs below 1 other than -1.
        ImportError: Where joblib is not installed, with what to install.

    Example:
        >>> import convexprune as cp
        >>> cp.Joblib(jobs=4).engine
        'loky'
    """

    jobs: int = -1
    engine: str = "loky"
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.jobs != -1:
            whole(1)("jobs", self.jobs)
        text("engine", self.engine)
        if self.threads is not None:
            whole(1)("threads", self.threads)
        with extras():
            import joblib  # noqa: F401   before the work begins

    @property
    def workers(self) -> int:
        """How many tasks run at once."""
        return self.jobs if self.jobs > 0 else os.cpu_count() or 1

    def solutions(self, tasks: Iterable[Task]) -> Iterator[Solution]:
        """In order; a few tasks for each worker are under way at once."""
        threads = self.threads or max(1, torch.get_num_threads() // self.workers)
        waiting = iter(tasks)
        while wave := list(islice(waiting, AHEAD * self.workers)):
            for _ in range(TRIES * len(wave)):  # a worker that dies takes those beside it along
                solved = 0
                try:
                    for solution in self._run(wave, threads):
                        solved += 1
                        yield solution
                    break
                except _worker_died():
                    wave = wave[solved:]
            else:
                raise RuntimeError(
                    f"layer {wave[0].layer!r}: workers die of it, or beside it, again and again; is there memory for "
                    f"{self.workers} at once? Use fewer jobs"
                )

    def _run(self, tasks: list[Task], threads: int) -> Iterator[Solution]:
        from joblib import Parallel, delayed, parallel_config

        calls = [delayed(_in_worker)(task, threads) for task in tasks]
        order = "generator" if self.engine in ORDERLY else "list"
        with parallel_config(backend=self.engine, n_jobs=self.workers, **self.options):
            yield from Parallel(return_as=order)(calls)


def _in_worker(task: Task, threads: int) -> Solution:
    torch.set_num_threads(threads)
    return task.run()


def _worker_died() -> tuple[type[BaseException], ...]:
    """What the engines that are loaded raise of it."""
    from concurrent.futures import BrokenExecutor

    from joblib.externals.loky.process_executor import TerminatedWorkerError

    distributed = sys.modules.get("distributed")  # gives up on a task by itself, after several workers
    return TerminatedWorkerError, BrokenExecutor, *(() if distributed is None else (distributed.KilledWorker,))
