"""The version: pyproject.toml reads it from here, and so do `convexprune --version` and the reports."""

__version__ = "0.2.0"
