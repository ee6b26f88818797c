"""How a pruning is carried out: block by block or not, by whom, and where what is finished is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from convexprune.network.traversal import Way
from convexprune.options import flag, having, optional
from convexprune.options import path as check_path
from convexprune.pruning.backends import Backend, InProcess
from convexprune.pruning.store import Store


@dataclass(frozen=True)
class Execution:
    """How the work of `prune` is done. The weights that it finds are the same, to the rounding of other threads.

    Args:
        by_block: In a cascade, do not run finished blocks again; where the model is no chain of blocks, or what
            they make does not fit, the whole model is run.
        scratch: Folder for what the blocks make of the calibration samples; None keeps that in memory.
        backend: Solves the layers that do not depend on each other: `InProcess()` here, `Joblib(...)` in other
            processes or on other machines.
        store: Folder in which each finished layer is kept: the same call goes on where it was killed.

    Raises:
        TypeError: For fields of another kind.

    Example:
        >>> import convexprune as cp
        >>> cp.Execution().by_block, cp.Execution(backend=cp.Joblib(jobs=2)).backend.workers
        (True, 2)
    """

    by_block: bool = True
    scratch: str | os.PathLike[str] | None = None
    backend: Backend = field(default_factory=InProcess)
    store: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        flag("by_block", self.by_block)
        optional(check_path)("scratch", self.scratch)
        optional(check_path)("store", self.store)
        having("solutions", "InProcess() or Joblib(jobs=4)")("backend", self.backend)

    @property
    def way(self) -> Way:
        """Of a cascade through the blocks."""
        return Way(self.by_block, None if self.scratch is None else Path(self.scratch))

    @property
    def kept(self) -> Store | None:
        """Where finished layers are kept."""
        return None if self.store is None else Store(Path(self.store))
