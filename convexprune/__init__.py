"""Prune trained neural networks by solving, for each layer, a problem that is written down, with certificates."""

from convexprune import defaults as defaults
from convexprune.layer import Layer
from convexprune.network import capture, load, save
from convexprune.problem import judge
from convexprune.problems import L1Reconstruction, NetTrim
from convexprune.prune import prune
from convexprune.solution import Certificate, Solution, Status
from convexprune.solve import solve
from convexprune.solvers import ADMM, CVXPY, WorkingSet

__all__ = [
    "ADMM",
    "CVXPY",
    "Certificate",
    "L1Reconstruction",
    "Layer",
    "NetTrim",
    "Solution",
    "Status",
    "WorkingSet",
    "capture",
    "judge",
    "load",
    "prune",
    "save",
    "solve",
]
