"""Solvers of the L1 problems: Net-Trim and L1Reconstruction."""
