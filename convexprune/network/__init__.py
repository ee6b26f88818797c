"""The one place that touches a torch model: capture layers from it, write weights back into it."""

from convexprune.network.batch_norm import reestimate_batch_norm
from convexprune.network.calibration import Calibration
from convexprune.network.capture import capture
from convexprune.network.compact import Compaction, compact
from convexprune.network.files import load, read, save, write
from convexprune.network.mask_keeper import MaskKeeper
from convexprune.network.sensitivity import directions, sensitivities

__all__ = [
    "Calibration",
    "Compaction",
    "MaskKeeper",
    "capture",
    "compact",
    "directions",
    "load",
    "read",
    "reestimate_batch_norm",
    "save",
    "sensitivities",
    "write",
]
