"""One file for each problem: the formula first, then value, violation, lower_bound, to_cvxpy."""

from convexprune.problems.error_budget import ErrorBudget
from convexprune.problems.l1_reconstruction import L1Reconstruction
from convexprune.problems.net_trim import NetTrim
from convexprune.problems.neuron_merging import NeuronMerging
from convexprune.problems.optimal_brain_surgeon import OptimalBrainSurgeon, increase, saliencies
from convexprune.problems.reconstruction import Reconstruction
from convexprune.problems.sparse_factors import SparseFactors
from convexprune.problems.sparsity_allocation import SparsityAllocation
from convexprune.problems.stacked import Stacked, StackedReconstruction, stacked

__all__ = [
    "ErrorBudget",
    "L1Reconstruction",
    "NetTrim",
    "NeuronMerging",
    "OptimalBrainSurgeon",
    "Reconstruction",
    "SparseFactors",
    "SparsityAllocation",
    "Stacked",
    "StackedReconstruction",
    "increase",
    "saliencies",
    "stacked",
]
