"""Reports of a run for people and programs, as text, JSON or one HTML page."""

from convexprune.report.merges import MergeReport
from convexprune.report.report import Link, NetworkError, Report, Settings, described

__all__ = ["Link", "MergeReport", "NetworkError", "Report", "Settings", "described"]
