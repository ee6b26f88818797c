"""One file for each algorithm; a solver proposes, the problem judges."""

from convexprune.solvers.admm import ADMM
from convexprune.solvers.cvxpy import CVXPY
from convexprune.solvers.working_set import WorkingSet

__all__ = ["ADMM", "CVXPY", "WorkingSet"]
