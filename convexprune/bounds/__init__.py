"""The papers' theorems as functions of what was measured: hypotheses in the docstrings, both sides computable."""

from convexprune.bounds.chain import ChainBound, cascade_bound, parallel_bound, slack_product_bound

__all__ = ["ChainBound", "cascade_bound", "parallel_bound", "slack_product_bound"]
