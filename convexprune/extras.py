"""Packages that are installed by extras: what is missing is said in a sentence that helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

EXTRAS: Final = {
    "cvxpy": "cvxpy", "scipy": "cvxpy", "rich": "report", "click": "report", "matplotlib": "report",
    "joblib": "parallel", "dask": "dask", "distributed": "dask", "transformers": "hub", "tokenizers": "hub",
}  # fmt: skip


@contextmanager
def extras() -> Iterator[None]:
    """Around imports of packages that may be missing; raises ImportError naming the package, and how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        raise ModuleNotFoundError(
            f"{package} is not installed, which is needed here: pip install 'convexprune[{EXTRAS[package]}]'",
            name=error.name,
        ) from error
