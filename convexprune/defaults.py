"""Which solver a problem gets when the caller names none, by the form that it declares."""

from __future__ import annotations

from convexprune.forms import (
    BallProblem,
    BudgetProblem,
    EqualityQuadratic,
    FactoredLeastSquares,
    KnapsackProblem,
    LassoProblem,
    MergingProblem,
    SharedPattern,
    SparseLeastSquares,
)
from convexprune.solve import set_default
from convexprune.solvers import (
    ADMM,
    Alternation,
    Balanced,
    ClosedForm,
    GreedyMerging,
    Groupwise,
    MinimalCore,
    WaterFilling,
)

set_default(BallProblem, ADMM)
set_default(LassoProblem, ADMM)
set_default(EqualityQuadratic, ClosedForm)
set_default(SparseLeastSquares, Balanced)
set_default(SharedPattern, lambda: Groupwise(Balanced(), exact=10))
set_default(KnapsackProblem, MinimalCore)
set_default(MergingProblem, GreedyMerging)
set_default(BudgetProblem, WaterFilling)
set_default(FactoredLeastSquares, Alternation)
