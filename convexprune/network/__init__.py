"""The one place that touches a torch model: capture layers from it, write weights back into it."""

from convexprune.network.batch_norm import reestimate_batch_norm
from convexprune.network.calibration import Calibration
from convexprune.network.capture import capture
from convexprune.network.compact import Compaction, compact
from convexprune.network.files import load, read, save, write
from convexprune.network.mask_keeper import MaskKeeper
from convexprune.network.matrices import ConvolutionStack, LinearStack, Stack, register_kind
from convexprune.network.sensitivity import directions, sensitivities
from convexprune.network.two_factors import TwoFactors, multiply_out

__all__ = [
    "Calibration",
    "Compaction",
    "ConvolutionStack",
    "LinearStack",
    "MaskKeeper",
    "Stack",
    "TwoFactors",
    "capture",
    "compact",
    "directions",
    "load",
    "multiply_out",
    "read",
    "reestimate_batch_norm",
    "register_kind",
    "save",
    "sensitivities",
    "write",
]
