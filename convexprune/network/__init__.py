"""The one place that touches a torch model: capture layers from it, write weights back into it."""

from convexprune.network.batch_norm import reestimate_batch_norm
from convexprune.network.capture import capture
from convexprune.network.chain import Chain, chain
from convexprune.network.mask_keeper import MaskKeeper
from convexprune.network.write import load, read, save, write

__all__ = ["Chain", "MaskKeeper", "capture", "chain", "load", "read", "reestimate_batch_norm", "save", "write"]
