"""Solvers of least squares under a sparsity pattern, and on given supports."""
