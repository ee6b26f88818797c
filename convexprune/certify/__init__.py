"""What is proven of a network: its error on the calibration samples, on data not seen, and around samples."""

from convexprune.certify.graph import GraphBound, Propagation
from convexprune.certify.held_out import Unseen, certify_unseen
from convexprune.certify.input_region import WorstCase, worst_case
from convexprune.certify.network_error import network_error

__all__ = ["GraphBound", "Propagation", "Unseen", "WorstCase", "certify_unseen", "network_error", "worst_case"]
