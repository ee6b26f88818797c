"""What was done, for people and programs: text, JSON, one HTML page."""

from convexprune.report.merging import MergeReport
from convexprune.report.run import Link, NetworkError, Report, Settings, described

__all__ = ["Link", "MergeReport", "NetworkError", "Report", "Settings", "described"]
