"""Dividing a budget among the layers: what each loses at each level, and a knapsack over that."""

from convexprune.allocate.allocation import Allocation, macs_per_weight
from convexprune.allocate.rate_distortion import (
    LayerError,
    OutputChange,
    SecondOrder,
    additivity,
    random_inputs,
    rate_distortion,
)

__all__ = [
    "Allocation",
    "LayerError",
    "OutputChange",
    "SecondOrder",
    "additivity",
    "macs_per_weight",
    "random_inputs",
    "rate_distortion",
]
