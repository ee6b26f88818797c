"""Solvers that divide a budget among layers: of weights, or of errors."""
