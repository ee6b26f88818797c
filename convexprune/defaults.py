"""Which solver a problem gets when the caller names none."""

from __future__ import annotations

from convexprune.problems import (
    ErrorBudget,
    L1Reconstruction,
    NetTrim,
    NeuronMerging,
    OptimalBrainSurgeon,
    Reconstruction,
    SparsityAllocation,
    StackedReconstruction,
)
from convexprune.solve import set_default
from convexprune.solvers import ADMM, Balanced, ClosedForm, GreedyMerging, Groupwise, MinimalCore, WaterFilling

set_default(NetTrim, ADMM)
set_default(L1Reconstruction, ADMM)
set_default(OptimalBrainSurgeon, ClosedForm)
set_default(Reconstruction, Balanced)
set_default(StackedReconstruction, lambda: Groupwise(Balanced(), exact=10))
set_default(SparsityAllocation, MinimalCore)
set_default(NeuronMerging, GreedyMerging)
set_default(ErrorBudget, WaterFilling)
