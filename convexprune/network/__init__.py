"""The one place that touches a torch model: capture layers from it, write weights back into it."""

from convexprune.network.capture import capture
from convexprune.network.chain import Chain, chain
from convexprune.network.write import load, read, save, write

__all__ = ["Chain", "capture", "chain", "load", "read", "save", "write"]
