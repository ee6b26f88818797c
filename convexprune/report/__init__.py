"""What was done, for people and programs: text, JSON, one HTML page."""

from convexprune.report.merging import MergeReport
from convexprune.report.run import NetworkError, Report, Settings, described

__all__ = ["MergeReport", "NetworkError", "Report", "Settings", "described"]
