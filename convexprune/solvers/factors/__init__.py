"""Solvers that write a layer as the product of two sparse matrices."""
