"""Prune trained neural networks by solving, for each layer, a problem that is written down, with certificates."""

from convexprune import defaults as defaults
from convexprune.layer import Layer
from convexprune.network import MaskKeeper, capture, load, reestimate_batch_norm, save
from convexprune.patterns import NM, Blocks, PerRow, Support, Unstructured
from convexprune.problem import judge
from convexprune.problems import L1Reconstruction, NetTrim, OptimalBrainSurgeon, Reconstruction
from convexprune.prune import prune
from convexprune.solution import Certificate, Solution, Status
from convexprune.solve import solve
from convexprune.solvers import (
    ADMM,
    CVXPY,
    KKT,
    ActivationMagnitude,
    Balanced,
    Best,
    BestOf,
    Bounded,
    BranchAndBound,
    ClosedForm,
    ColumnSweep,
    ExactOBS,
    Fast,
    LayerwiseOBS,
    Magnitude,
    Refit,
    RisingPenalty,
    SwapSearch,
    Then,
    WorkingSet,
)

__all__ = [
    "ADMM",
    "CVXPY",
    "KKT",
    "NM",
    "ActivationMagnitude",
    "Balanced",
    "Best",
    "BestOf",
    "Blocks",
    "Bounded",
    "BranchAndBound",
    "Certificate",
    "ClosedForm",
    "ColumnSweep",
    "ExactOBS",
    "Fast",
    "L1Reconstruction",
    "Layer",
    "LayerwiseOBS",
    "Magnitude",
    "MaskKeeper",
    "NetTrim",
    "OptimalBrainSurgeon",
    "PerRow",
    "Reconstruction",
    "Refit",
    "RisingPenalty",
    "Solution",
    "Status",
    "Support",
    "SwapSearch",
    "Then",
    "Unstructured",
    "WorkingSet",
    "capture",
    "judge",
    "load",
    "prune",
    "reestimate_batch_norm",
    "save",
    "solve",
]
