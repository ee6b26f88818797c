"""One file for each algorithm; a solver proposes, the problem judges."""

from convexprune.solvers.activation_magnitude import ActivationMagnitude
from convexprune.solvers.admm import ADMM
from convexprune.solvers.allocation_rules import LAMP, ErdosRenyiKernel, GlobalMagnitude, Uniform, UniformPlus
from convexprune.solvers.bounded import Bounded
from convexprune.solvers.branch_and_bound import BranchAndBound
from convexprune.solvers.closed_form import ClosedForm
from convexprune.solvers.column_sweep import ColumnSweep
from convexprune.solvers.combinators import BestOf, Refit, Then
from convexprune.solvers.cvxpy import CVXPY
from convexprune.solvers.dynamic_programming import DynamicProgramming
from convexprune.solvers.exact_obs import ExactOBS, Traces
from convexprune.solvers.exchange import Exchange
from convexprune.solvers.greedy_merging import GreedyMerging, Merges
from convexprune.solvers.kkt import KKT
from convexprune.solvers.lagrangian_price import LagrangianPrice
from convexprune.solvers.layerwise_obs import LayerwiseOBS
from convexprune.solvers.magnitude import Magnitude
from convexprune.solvers.minimal_core import MinimalCore
from convexprune.solvers.presets import Balanced, Best, Fast
from convexprune.solvers.rising_penalty import RisingPenalty
from convexprune.solvers.swap_search import SwapSearch
from convexprune.solvers.water_filling import WaterFilling
from convexprune.solvers.working_set import WorkingSet

__all__ = [
    "ADMM",
    "CVXPY",
    "KKT",
    "LAMP",
    "ActivationMagnitude",
    "Balanced",
    "Best",
    "BestOf",
    "Bounded",
    "BranchAndBound",
    "ClosedForm",
    "ColumnSweep",
    "DynamicProgramming",
    "ErdosRenyiKernel",
    "ExactOBS",
    "Exchange",
    "Fast",
    "GlobalMagnitude",
    "GreedyMerging",
    "LagrangianPrice",
    "LayerwiseOBS",
    "Magnitude",
    "Merges",
    "MinimalCore",
    "Refit",
    "RisingPenalty",
    "SwapSearch",
    "Then",
    "Traces",
    "Uniform",
    "UniformPlus",
    "WaterFilling",
    "WorkingSet",
]
