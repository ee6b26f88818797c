"""The table of solvers x problems: every solver meets every problem that it can take. A new one adds a row here."""

import torch
from instances import cascade_layer, random_layer

from convexprune.forms import BallProblem, EqualityQuadratic, LassoProblem, declared
from convexprune.patterns import NM, Blocks, Channels, PerRow, Support, Unstructured
from convexprune.problems import L1Reconstruction, NetTrim, OptimalBrainSurgeon, Reconstruction
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


def some(share, seed=0, shape=(4, 6)):
    """A boolean mask with about this share of True."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


TIGHT = {"eps_abs": 1e-9, "eps_rel": 1e-9}

PROBLEMS = {
    "net_trim": lambda: NetTrim(random_layer(), epsilon=0.1),
    "net_trim_without_bias": lambda: NetTrim(random_layer(1, bias=False), epsilon=0.3),
    "net_trim_slack": lambda: NetTrim(random_layer(2), epsilon=0.05, slack=0.2),
    "net_trim_linear": lambda: NetTrim(random_layer(3, activation=None), epsilon=0.2),
    "net_trim_cascade": lambda: NetTrim.cascade(cascade_layer(4), epsilon=0.1, gamma=1.1),
    "l1_reconstruction": lambda: L1Reconstruction(random_layer(5), lam=0.1),
    "l1_reconstruction_damped": lambda: L1Reconstruction(random_layer(6, samples=4).damped(0.01), lam=0.02),
    "obs_few": lambda: OptimalBrainSurgeon(random_layer(7), removed=some(0.3)),
    "obs_many": lambda: OptimalBrainSurgeon(random_layer(8, bias=False), removed=some(0.7)),
    "obs_one_mask": lambda: OptimalBrainSurgeon(random_layer(9), removed=some(0.5)[:1].expand(4, -1).clone()),
    "obs_cascade": lambda: OptimalBrainSurgeon(cascade_layer(10), removed=some(0.4)),
}


def of_form(form):
    """The rows whose problems declare this form: a new row meets the solvers of its form."""
    return [name for name, make in PROBLEMS.items() if form in declared(make())]


OBS, NET_TRIM, LASSO = of_form(EqualityQuadratic), of_form(BallProblem), of_form(LassoProblem)

# name: (solver, the problems that it takes)
SOLVERS = {
    "admm": (lambda: ADMM(eps_rel=1e-6), [*NET_TRIM, *LASSO]),
    "working_set": (lambda: WorkingSet(eps_rel=1e-7, margin=0.0), [*NET_TRIM, *LASSO]),
    "clarabel": (lambda: CVXPY("CLARABEL"), [*NET_TRIM, *LASSO]),
    "scs": (lambda: CVXPY("SCS", **TIGHT), [*NET_TRIM, *LASSO]),
    "moreau": (lambda: CVXPY("MOREAU"), [*NET_TRIM, *LASSO]),
    "osqp": (lambda: CVXPY("OSQP", **TIGHT), [*LASSO, *OBS]),
    "clarabel_obs": (lambda: CVXPY("CLARABEL", tol_gap_rel=1e-12, tol_feas=1e-12), OBS),
    "closed_form": (ClosedForm, OBS),
    "kkt": (KKT, OBS),
    "highs": (lambda: CVXPY("HIGHS"), LASSO),
}
PAIRS = [(solver, problem) for solver, (_, problems) in SOLVERS.items() for problem in problems]

# Not convex: no bound closes the gap, so these have laws of their own (test_reconstruction.py). 8 inputs, 5 neurons.
SMALL = {"inputs": 8, "out": 5}
PATTERNS = {
    "unstructured": lambda: Unstructured(0.4),
    "per_row": lambda: PerRow(3),
    "two_of_four": lambda: NM(2, 4),
    "support": lambda: Support(some(0.5, shape=(5, 8))),
    "blocks": lambda: Blocks((1, 2), 0.5),
    "channels": lambda: Channels(3),
}
LAYERS = {
    "plain": lambda: random_layer(20, bias=False, **SMALL),
    "bias": lambda: random_layer(21, **SMALL),
    "cascade": lambda: cascade_layer(22, **SMALL),
    "rank_deficient": lambda: random_layer(23, samples=5, **SMALL),
}
# name: (solver, the patterns that it takes)
RECONSTRUCTORS = {
    "magnitude": (Magnitude, [*PATTERNS]),
    "activation_magnitude": (ActivationMagnitude, [*PATTERNS]),
    "refit": (lambda: Refit(Magnitude()), [*PATTERNS]),
    "layerwise_obs": (LayerwiseOBS, [*PATTERNS]),
    "column_sweep": (ColumnSweep, [*PATTERNS]),
    "admm": (ADMM, [*PATTERNS]),
    "rising_penalty": (RisingPenalty, [*PATTERNS]),
    "fast": (Fast, [*PATTERNS]),
    "exact_obs": (ExactOBS, [*PATTERNS]),
    "swap_search": (SwapSearch, [*PATTERNS]),
    "then": (lambda: Then(RisingPenalty(grow=1.3), SwapSearch()), [*PATTERNS]),
    "balanced": (Balanced, [*PATTERNS]),
    "best": (Best, [*PATTERNS]),
    "best_of": (lambda: BestOf(Fast(), ExactOBS()), [*PATTERNS]),
    "bounded": (lambda: Bounded(Fast()), [*PATTERNS]),
    "branch_and_bound": (BranchAndBound, [*PATTERNS]),
}
RECONSTRUCTIONS = [(solver, pattern) for solver, (_, patterns) in RECONSTRUCTORS.items() for pattern in patterns]


def reconstruction(layer, pattern, always=None):
    """A small problem of the two tables."""
    return Reconstruction(LAYERS[layer](), PATTERNS[pattern](), always)
