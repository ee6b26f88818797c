"""Solvers that divide a budget of weights, or of errors, among layers."""
