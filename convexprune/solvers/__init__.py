"""One file for each algorithm; a solver proposes, the problem judges."""

from convexprune.solvers.budget.dynamic_programming import DynamicProgramming
from convexprune.solvers.budget.lagrangian_price import LagrangianPrice
from convexprune.solvers.budget.minimal_core import MinimalCore
from convexprune.solvers.budget.rules import LAMP, ErdosRenyiKernel, GlobalMagnitude, Uniform, UniformPlus
from convexprune.solvers.budget.water_filling import WaterFilling
from convexprune.solvers.combinators import BestOf, Refit, Then
from convexprune.solvers.cvxpy import CVXPY
from convexprune.solvers.factors.alternation import Alternation
from convexprune.solvers.groupwise import Groupwise
from convexprune.solvers.l1.admm import ADMM
from convexprune.solvers.l1.working_set import WorkingSet
from convexprune.solvers.least_squares.bounded import Bounded
from convexprune.solvers.least_squares.branch_and_bound import BranchAndBound
from convexprune.solvers.least_squares.closed_form import ClosedForm
from convexprune.solvers.least_squares.column_sweep import ColumnSweep
from convexprune.solvers.least_squares.exact_obs import ExactOBS, Traces
from convexprune.solvers.least_squares.kkt import KKT
from convexprune.solvers.least_squares.layerwise_obs import LayerwiseOBS
from convexprune.solvers.least_squares.magnitude import ActivationMagnitude, Magnitude
from convexprune.solvers.least_squares.presets import Balanced, Best, Fast
from convexprune.solvers.least_squares.rising_penalty import RisingPenalty
from convexprune.solvers.least_squares.swap_search import SwapSearch
from convexprune.solvers.merging.exchange import Exchange
from convexprune.solvers.merging.greedy import GreedyMerging, Merges

__all__ = [
    "ADMM",
    "CVXPY",
    "KKT",
    "LAMP",
    "ActivationMagnitude",
    "Alternation",
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
    "Groupwise",
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
