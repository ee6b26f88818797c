"""The table of solvers x problems: every solver meets every problem that it can take. A new one adds a row here."""

from instances import cascade_layer, random_layer

from convexprune.problems import L1Reconstruction, NetTrim
from convexprune.solvers import ADMM, CVXPY, WorkingSet

TIGHT = {"eps_abs": 1e-9, "eps_rel": 1e-9}

PROBLEMS = {
    "net_trim": lambda: NetTrim(random_layer(), epsilon=0.1),
    "net_trim_without_bias": lambda: NetTrim(random_layer(1, bias=False), epsilon=0.3),
    "net_trim_slack": lambda: NetTrim(random_layer(2), epsilon=0.05, slack=0.2),
    "net_trim_linear": lambda: NetTrim(random_layer(3, activation=None), epsilon=0.2),
    "net_trim_cascade": lambda: NetTrim.cascade(cascade_layer(4), epsilon=0.1, gamma=1.1),
    "l1_reconstruction": lambda: L1Reconstruction(random_layer(5), lam=0.1),
    "l1_reconstruction_damped": lambda: L1Reconstruction(random_layer(6, samples=4).damped(0.01), lam=0.02),
}
NET_TRIM = [name for name in PROBLEMS if name.startswith("net_trim")]
LASSO = [name for name in PROBLEMS if name.startswith("l1")]

# name: (solver, the problems that it takes)
SOLVERS = {
    "admm": (lambda: ADMM(eps_rel=1e-6), [*NET_TRIM, *LASSO]),
    "working_set": (lambda: WorkingSet(eps_rel=1e-7, margin=0.0), [*NET_TRIM, *LASSO]),
    "clarabel": (lambda: CVXPY("CLARABEL"), [*NET_TRIM, *LASSO]),
    "scs": (lambda: CVXPY("SCS", **TIGHT), [*NET_TRIM, *LASSO]),
    "moreau": (lambda: CVXPY("MOREAU"), [*NET_TRIM, *LASSO]),
    "osqp": (lambda: CVXPY("OSQP", **TIGHT), LASSO),
    "highs": (lambda: CVXPY("HIGHS"), LASSO),
}
PAIRS = [(solver, problem) for solver, (_, problems) in SOLVERS.items() for problem in problems]
