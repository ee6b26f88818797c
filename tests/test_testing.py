"""The laws that a foreign problem's test calls: they pass what is right, and name the law that is broken."""

import math
from dataclasses import dataclass

import pytest
import torch
from instances import random_layer
from table import PAIRS, PROBLEMS, RECONSTRUCTIONS, RECONSTRUCTORS, SOLVERS, reconstruction

import convexprune as cp
from convexprune.testing import check_formulation, check_problem, check_solver

SHORT = {"unstructured", "blocks"}  # patterns that the long table is tried on


@dataclass(frozen=True, eq=False)
class Lasso(cp.L1Reconstruction, cp.LayerProblem):
    """A right problem, of which each class below breaks one law."""


def lasso(kind=Lasso):
    return kind(random_layer(5), lam=0.1)


def allocation():
    curves = [cp.Curve(name, [1, 5, 9], [3.0, 1.0, 0.2]) for name in "ab"]
    return cp.SparsityAllocation(curves, 12)


@pytest.mark.parametrize("pattern", ["unstructured", "per_row", "two_of_four", "support", "blocks", "channels"])
def test_problems_that_are_not_convex_pass(pattern):
    problem = reconstruction("bias", pattern)
    point = cp.solve(problem, cp.Magnitude()).x
    check_problem(problem, points=[point], witness=(problem.target, torch.ones(8)), draws=4)


def test_problems_over_other_things_than_layers_pass():
    draw = torch.Generator().manual_seed(0)
    merging = cp.NeuronMerging(torch.randn(8, 4, generator=draw), torch.randn(3, 8, generator=draw), keep=4)
    found = cp.solve(merging, cp.Exchange())
    check_problem(merging, points=[found.x], witness=found.witness, draws=4)
    found = cp.solve(allocation())
    check_problem(allocation(), points=[found.x], witness=found.witness, draws=4)
    budget = cp.ErrorBudget(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5.0, 6.0]), 1.5)
    found = cp.solve(budget)
    check_problem(budget, points=[found.x], witness=found.witness, draws=4)


@pytest.mark.parametrize(("solver", "problem"), PAIRS)
def test_convex_solvers_pass(solver, problem):
    check_solver(SOLVERS[solver][0](), PROBLEMS[problem](), gap=1e-4)


@pytest.mark.parametrize(("solver", "pattern"), [pair for pair in RECONSTRUCTIONS if pair[1] in SHORT])
def test_reconstructors_pass(solver, pattern):
    check_solver(RECONSTRUCTORS[solver][0](), reconstruction("bias", pattern))


def shifted(by):
    return lambda self, x: cp.L1Reconstruction.value(self, x) + by(x)


def bound(change):
    return lambda self, witness: change(cp.L1Reconstruction.lower_bound(self, witness), self, witness)


BROKEN = {  # what a class says otherwise, and the words of the law that it breaks
    "bound_too_high": ("lower_bound", bound(lambda found, self, w: found + 5.0), "weak duality"),
    "bound_trusts_its_witness": (
        "lower_bound",
        bound(lambda found, self, w: found if w is None else 0.5 * float(w.nan_to_num().square().sum())),
        "weak duality",
    ),
    "bound_is_nan": ("lower_bound", bound(lambda found, self, w: math.nan), "weak duality"),
    "bound_reads_any_shape": ("lower_bound", lambda self, witness: 0.0, "was read"),
    "bound_is_a_tensor": ("lower_bound", bound(lambda found, self, w: torch.tensor(found)), "lower_bound is a Tensor"),
    "value_too_low": ("value", shifted(lambda x: -4.0), "weak duality"),
    "value_in_float32": ("value", shifted(lambda x: 1e-3 * (x.dtype == torch.float32)), "float32 point"),
    "value_is_a_tensor": ("value", shifted(lambda x: torch.tensor(0.0)), "value is a Tensor"),
    "value_of_nan_is_0": ("value", lambda self, x: 0.0, "a point that holds nan"),
    "value_is_nan": ("value", shifted(lambda x: math.nan), "value is NaN"),
    "violation_below_0": ("violation", lambda self, x: -1e-9, "violation is"),
    "nothing_is_feasible": ("violation", lambda self, x: 1.0 if x.isfinite().all() else math.inf, "is feasible"),
    "errors_too_small": ("output_errors", lambda self, x: 0.5 * self.layer.error_norms(x), "change by more"),
    "errors_below_0": ("output_errors", lambda self, x: -self.layer.error_norms(x), "output_errors are"),
    "errors_of_another_shape": ("output_errors", lambda self, x: self.layer.error_norms(x)[:1], "of shape"),
    "shape_of_another_layer": ("shape", property(lambda self: (4, 6)), "dense has shape"),
    "dense_in_float32": ("dense", property(lambda self: self.layer.affine_weight.float()), "float64"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_problem_is_told_which_law(name):
    member, wrong, words = BROKEN[name]
    problem = lasso(type("Broken", (Lasso,), {member: wrong}))
    found = cp.solve(lasso(cp.L1Reconstruction))
    with pytest.raises(AssertionError, match=words):
        check_problem(problem, points=[found.x], witness=found.witness)


def test_a_point_that_changes_is_seen():
    class Changing(Lasso):
        def value(self, x):
            x.data[0, 0] = 0.0
            return super().value(x)

    with pytest.raises(AssertionError, match="changed the point"):
        check_problem(lasso(Changing))


def test_a_problem_that_remembers_is_seen():
    class Remembering(Lasso):
        def violation(self, x):
            self.__dict__["asked"] = self.__dict__.get("asked", 0) + 1
            return float(self.__dict__["asked"])

    with pytest.raises(AssertionError, match="the same point was judged"):
        check_problem(lasso(Remembering))


FORMULATIONS = {
    "another_objective": ("value", shifted(lambda x: 1.0), "the objective of to_cvxpy"),
    "a_loose_bound": ("lower_bound", bound(lambda found, self, w: 0.9 * found), "tight=False"),
    "an_invalid_bound": ("lower_bound", bound(lambda found, self, w: 1.1 * found), "weak duality"),
    "not_feasible_there": ("violation", lambda self, x: 0.1, "optimal for to_cvxpy"),
}


@pytest.mark.parametrize("name", FORMULATIONS)
def test_a_broken_formulation_is_told_which_law(name):
    member, wrong, words = FORMULATIONS[name]
    with pytest.raises(AssertionError, match=words):
        check_formulation(lasso(type("Broken", (Lasso,), {member: wrong})))


def test_a_loose_bound_may_be_allowed():
    check_formulation(lasso(type("Loose", (Lasso,), {"lower_bound": FORMULATIONS["a_loose_bound"][1]})), tight=False)


@dataclass
class Scripted:
    """A solver that does one thing wrong, around one that is right."""

    wrong: str
    calls: int = 0

    def solve(self, problem, start=None):
        found = cp.ADMM().solve(problem)
        if self.wrong == "another point":
            self.__class__.again = not getattr(self.__class__, "again", False)
            found = cp.Attempt(found.x + self.again, found.witness, found.status, 1)
        if self.wrong == "global random numbers":
            torch.rand(1)
        if self.wrong == "its own fields":
            self.calls += 1
        if self.wrong == "dense weights":
            problem.layer.weight.mul_(1.01)
        if self.wrong == "calls CONVERGED":
            found = cp.Attempt(problem.dense, None, cp.Status.CONVERGED, 1)
        if self.wrong == "the start" and start is not None:
            start.zero_()
        if self.wrong == "ended with NUMERICAL":
            found = cp.Attempt(found.x, None, cp.Status.NUMERICAL, 1)
        return found


@pytest.mark.parametrize(
    "wrong",
    ["another point", "global random numbers", "its own fields", "dense weights", "calls CONVERGED", "the start",
     "ended with NUMERICAL"],
)  # fmt: skip
def test_a_broken_solver_is_told_which_law(wrong):
    problem = cp.L1Reconstruction(random_layer(5, bias=False), lam=0.1)
    check_solver(Scripted("nothing"), problem, gap=1e-4)
    with pytest.raises(AssertionError, match=wrong):
        check_solver(Scripted(wrong), problem, gap=1e-4)


def test_wrong_calls_are_refused():
    with pytest.raises(TypeError, match="is not a problem"):
        check_problem(random_layer())
    with pytest.raises(ValueError, match="draws"):
        check_problem(lasso(), draws=0)
    with pytest.raises(ValueError, match="expected"):
        check_problem(lasso(), points=[torch.zeros(2, 2)])
    with pytest.raises(TypeError, match="not a solver"):
        check_solver("admm", lasso())
    with pytest.raises(ValueError, match="gap"):
        check_solver(cp.ADMM(), lasso(), gap=-1.0)
