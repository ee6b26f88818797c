"""What was done, for people and programs: text, JSON, one HTML page."""

from convexprune.report.merges import MergeReport
from convexprune.report.report import Link, NetworkError, Report, Settings, described

__all__ = ["Link", "MergeReport", "NetworkError", "Report", "Settings", "described"]
