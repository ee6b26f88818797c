"""One file for each algorithm; a solver proposes, the problem judges."""

from convexprune.solvers.activation_magnitude import ActivationMagnitude
from convexprune.solvers.admm import ADMM
from convexprune.solvers.bounded import Bounded
from convexprune.solvers.branch_and_bound import BranchAndBound
from convexprune.solvers.closed_form import ClosedForm
from convexprune.solvers.column_sweep import ColumnSweep
from convexprune.solvers.combinators import BestOf, Refit, Then
from convexprune.solvers.cvxpy import CVXPY
from convexprune.solvers.exact_obs import ExactOBS, Traces
from convexprune.solvers.kkt import KKT
from convexprune.solvers.layerwise_obs import LayerwiseOBS
from convexprune.solvers.magnitude import Magnitude
from convexprune.solvers.presets import Balanced, Best, Fast
from convexprune.solvers.rising_penalty import RisingPenalty
from convexprune.solvers.swap_search import SwapSearch
from convexprune.solvers.working_set import WorkingSet

__all__ = [
    "ADMM",
    "CVXPY",
    "KKT",
    "ActivationMagnitude",
    "Balanced",
    "Best",
    "BestOf",
    "Bounded",
    "BranchAndBound",
    "ClosedForm",
    "ColumnSweep",
    "ExactOBS",
    "Fast",
    "LayerwiseOBS",
    "Magnitude",
    "Refit",
    "RisingPenalty",
    "SwapSearch",
    "Then",
    "Traces",
    "WorkingSet",
]
