"""Forms are declared by name: a solver takes what a problem's own class says it is, and nothing that only looks so."""

import copy
import pickle
from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pytest
import torch
from instances import random_layer
from table import PROBLEMS, SOLVERS, some
from torch import nn

import convexprune as cp
from convexprune.forms import (
    BallProblem,
    BudgetProblem,
    EqualityQuadratic,
    Form,
    GroupedLeastSquares,
    KnapsackProblem,
    LassoProblem,
    MergingProblem,
    PerspectiveProblem,
    SparseLeastSquares,
    StackedProblem,
    adapted,
    declared,
)
from convexprune.layer import Layer
from convexprune.patterns import Unstructured
from convexprune.problem import Formulation, Problem, check_problem
from convexprune.problems import L1Reconstruction, NetTrim, OptimalBrainSurgeon, Reconstruction
from convexprune.prune import prune
from convexprune.solution import Attempt, Certificate, Status
from convexprune.solve import default_solver, set_default, solve
from convexprune.solvers import ADMM, CVXPY, ClosedForm, Magnitude, WorkingSet

L1 = lambda: L1Reconstruction(random_layer(), 0.1)  # noqa: E731


@dataclass(frozen=True, eq=False)
class ElasticNet:
    """A lasso with a ridge, written without the package: it has gram, cross and lam, and is no lasso."""

    layer: Layer
    lam: float
    ridge: float
    forms = ()

    @property
    def shape(self):
        return tuple(self.layer.affine_weight.shape)

    @property
    def dense(self):
        return self.layer.affine_weight

    @property
    def gram(self):
        return self.layer.affine_gram

    @property
    def cross(self):
        return self.layer.affine_cross

    def value(self, x):
        smooth = 0.5 * float(self.layer.squared_errors(x).sum())
        return smooth + self.lam * float(x.abs().sum()) + self.ridge * float(x.square().sum())

    def violation(self, x):
        return 0.0

    def output_errors(self, x):
        return self.layer.error_norms(x)

    def lower_bound(self, witness):
        return 0.0

    def to_cvxpy(self):
        import cvxpy

        root = torch.linalg.cholesky(self.gram).numpy()
        x = cvxpy.Variable(self.shape)
        smooth = 0.5 * cvxpy.sum_squares(x @ root) - cvxpy.sum(cvxpy.multiply(self.cross.numpy(), x))
        price = self.lam * cvxpy.sum(cvxpy.abs(x)) + self.ridge * cvxpy.sum_squares(x)
        return Formulation(cvxpy.Problem(cvxpy.Minimize(smooth + 0.5 * self.layer.energy + price)), x, lambda: None)


@dataclass(frozen=True)
class Proximal:
    """A user's solver of lassos with a ridge: proximal gradient steps, FISTA's restarted."""

    steps: int = 4000

    def solve(self, problem, start=None):
        x = y = torch.zeros(problem.shape, dtype=torch.float64)
        rate = 1 / (float(torch.linalg.eigvalsh(problem.gram)[-1]) + 2 * problem.ridge)
        for step in range(self.steps):
            slope = y @ problem.gram - problem.cross + 2 * problem.ridge * y
            before, x = x, nn.functional.softshrink(y - rate * slope, rate * problem.lam)
            y = x + step / (step + 3) * (x - before)
        return Attempt(x, None, Status.CONVERGED, self.steps)


def test_what_only_looks_like_a_lasso_is_not_taken_for_one():
    """With its `gram, cross, lam` ADMM used to return 19.83 where the optimum is 9.75."""
    problem = ElasticNet(random_layer(), 0.1, 5.0)
    optimum = solve(problem, CVXPY("CLARABEL")).certificate.value
    for solver in (ADMM(), WorkingSet(), cp.BestOf(ADMM(), WorkingSet())):
        with pytest.raises(TypeError, match="ElasticNet declares no form; if it is of one, name it among its bases"):
            solve(problem, solver)
    with pytest.raises(TypeError, match="no default solver for ElasticNet"):
        solve(problem)
    # a solver and a problem of one's own need nothing of ours
    assert solve(problem, Proximal()).certificate.value == pytest.approx(optimum, rel=1e-6)


# subclasses that change the problem, each in another way
@dataclass(frozen=True, eq=False)
class Capped(L1Reconstruction):
    """A field and a constraint more."""

    cap: float = 0.01

    def violation(self, x):
        return max(0.0, float(x.abs().max()) / self.cap - 1)


class Doubled(L1Reconstruction):
    """Another objective."""

    def value(self, x):
        return 2 * super().value(x)


class Bounded(NetTrim):
    """Another bound."""

    def lower_bound(self, witness):
        return 2 * super().lower_bound(witness)


class Scaled(OptimalBrainSurgeon):
    """Other data: what the form reads no longer is what the value speaks of."""

    @cached_property
    def gram(self):
        return 2 * self.layer.affine_gram


class Chosen(Reconstruction):
    """Other supports."""

    def select(self, scores, grow=1.0):
        return super().select(scores.flip(0), grow).flip(0)


@dataclass(frozen=True, eq=False)
class Renamed(L1Reconstruction):
    """Nothing changed, and nothing said."""


class Grandchild(Capped):
    """Two steps away."""


SUBCLASSES = {
    "a constraint": lambda: Capped(random_layer(), 0.1),
    "an objective": lambda: Doubled(random_layer(), 0.1),
    "a bound": lambda: Bounded(random_layer(), 0.1),
    "data": lambda: Scaled(random_layer(), some(0.5)),
    "supports": lambda: Chosen(random_layer(), Unstructured(0.5)),
    "nothing": lambda: Renamed(random_layer(), 0.1),
    "two steps": lambda: Grandchild(random_layer(), 0.1),
    "at run time": lambda: type("Made", (NetTrim,), {"value": lambda self, x: 0.0})(random_layer(), 0.1),
}


@pytest.mark.parametrize("make", SUBCLASSES.values(), ids=SUBCLASSES)
def test_a_subclass_that_names_no_form_has_none(make):
    problem = make()
    name, parent = type(problem).__name__, type(problem).__mro__[1]
    parent = L1Reconstruction if parent is Capped else parent
    form = parent.__bases__[0]
    assert declared(problem) == ()
    said = rf"{name} declares no form. Its parent {parent.__name__} is of the form {form.__name__}, but a subclass may"
    for solver in (ADMM(), WorkingSet(), ClosedForm(), Magnitude()):
        with pytest.raises(TypeError, match=said):
            solve(problem, solver)
    with pytest.raises(TypeError, match=rf"no default solver for {name}: name one, solve.* name the form among"):
        solve(problem)


def test_a_subclass_that_names_its_form_again_is_taken():
    @dataclass(frozen=True, eq=False)
    class Named(L1Reconstruction, LassoProblem):
        note: str = ""

    problem = Named(random_layer(), 0.1, "ours")
    assert declared(problem) == (LassoProblem,)
    assert solve(problem).certificate == solve(L1()).certificate

    class Again(Named):
        pass

    assert declared(Again(random_layer(), 0.1)) == ()


def test_prune_writes_nothing_that_a_solver_of_another_problem_has_found():
    """A subclass with a constraint used to inherit ADMM, and the layer was written "off by 96.8%"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    batches = [torch.randn(30, 6, generator=torch.Generator().manual_seed(1))]
    with pytest.raises(TypeError, match="Capped declares no form"):
        prune(model, batches, lambda layer: Capped(layer, 0.1))
    with pytest.raises(
        TypeError, match="ADMM takes BallProblem or LassoProblem or GroupedLeastSquares problems; Capped"
    ):
        prune(model, batches, lambda layer: Capped(layer, 0.1), ADMM())

    @dataclass(frozen=True)
    class Clamped:
        def solve(self, problem, start=None):
            return Attempt(problem.dense.clamp(-problem.cap, problem.cap), None, Status.CONVERGED, 1)

    _, report = prune(model, batches, lambda layer: Capped(layer, 0.1), Clamped())
    assert [row.certificate.violation for row in report.rows] == [pytest.approx(0, abs=1e-6)] * 2
    assert all(row.moments is None and row.wanted is None for row in report.rows)


def test_what_the_problems_declare():
    assert {name: declared(make())[0] for name, make in PROBLEMS.items()} == {
        name: BallProblem if "net_trim" in name else LassoProblem if "l1" in name else EqualityQuadratic
        for name in PROBLEMS
    }
    problem = Reconstruction(random_layer(), Unstructured(0.5))
    assert declared(problem) == (PerspectiveProblem, SparseLeastSquares, GroupedLeastSquares, StackedProblem)
    assert problem.parts == (problem,)
    assert declared(replace(problem, pattern=Unstructured(0.2))) == declared(problem)
    assert declared(copy.deepcopy(problem)) == declared(problem)
    assert declared(pickle.loads(pickle.dumps(problem))) == declared(problem)
    assert declared(cp.ErrorBudget(*torch.ones(3, 2), 1.0)) == (BudgetProblem,)
    assert declared(cp.NeuronMerging(torch.eye(3), torch.eye(3), keep=2)) == (MergingProblem,)
    assert declared(cp.SparsityAllocation([cp.Curve("a", [1, 2], [1.0, 0.5])], 2)) == (KnapsackProblem,)
    assert declared(None) == declared(object()) == declared(L1Reconstruction) == ()


def test_a_form_is_data_that_a_dataclass_can_hold():
    """Fields, properties and cached properties all state what a form asks for; what is left out is named."""

    @dataclass(frozen=True)
    class Bare(LassoProblem):
        gram: Any
        cross: Any
        lam: float
        dense: Any
        shape: tuple = (4, 7)

        def value(self, x):
            x = x.double()
            return float(0.5 * ((x @ self.gram) * x).sum() - (self.cross * x).sum() + self.lam * x.abs().sum())

        def violation(self, x):
            return 0.0

        def lower_bound(self, witness):
            return -1e300

        def to_cvxpy(self):
            raise NotImplementedError

    known = L1()
    bare = Bare(known.gram, known.cross, known.lam, known.dense)
    found = solve(bare, ADMM(max_iter=400))
    optimum = solve(known).certificate.value - 0.5 * known.layer.energy
    assert found.certificate.value == pytest.approx(optimum, rel=1e-3)


def test_a_problem_that_lacks_what_its_form_asks_for_is_told_what():
    class Forgetful(ElasticNet, LassoProblem):
        lam = LassoProblem.__dict__["lam"]

        def __init__(self):
            object.__setattr__(self, "layer", random_layer())

    with pytest.raises(TypeError, match="Forgetful is not a LassoProblem: it lacks lam"):
        solve(Forgetful(), ADMM())

    class Halfway(LassoProblem):
        def value(self, x):
            return 0.0

    with pytest.raises(TypeError, match="abstract"):
        Halfway()


def test_a_form_and_a_solver_of_ones_own():
    class RidgeProblem(Form):
        @abstractmethod
        def optimum(self):
            """The minimiser."""

    class Ridge(ElasticNet, RidgeProblem):
        def optimum(self):
            damped = self.gram + 2 * self.ridge * torch.eye(len(self.gram))
            return torch.linalg.solve(damped, self.cross.T).T

    @dataclass(frozen=True)
    class Closed:
        takes = RidgeProblem

        def solve(self, problem, start=None):
            return Attempt(problem.optimum(), None, Status.CONVERGED, 1)

    problem = Ridge(random_layer(), 0.0, 1.0)
    assert declared(problem) == (RidgeProblem,)
    found = solve(problem, Closed()).certificate.value
    assert found == pytest.approx(solve(problem, CVXPY("CLARABEL")).certificate.value)
    with pytest.raises(TypeError, match=r"ADMM takes .*; Ridge is of the form RidgeProblem"):
        solve(problem, ADMM())
    with pytest.raises(
        TypeError, match="Closed takes RidgeProblem problems; L1Reconstruction is of the form LassoProb"
    ):
        solve(L1(), Closed())

    # of one class, and of any
    @dataclass(frozen=True)
    class Only(Closed):
        takes = (Ridge, LassoProblem)

    assert solve(problem, Only()).certificate.value == pytest.approx(found)

    class Other(Ridge, RidgeProblem):
        pass

    with pytest.raises(TypeError, match="Only takes Ridge or LassoProblem problems; Other is of the form RidgeProblem"):
        solve(Other(random_layer(), 0.0, 1.0), Only())
    any_of_them = type("AnyOfThem", (Closed,), {"takes": Problem})()
    assert solve(Other(random_layer(), 0.0, 1.0), any_of_them).certificate.value == pytest.approx(found)
    # defaults: of the form, or of exactly this class
    set_default(RidgeProblem, Closed)
    assert isinstance(default_solver(problem), Closed)
    set_default(Ridge, Proximal)
    assert isinstance(default_solver(problem), Proximal)

    class Ridges(Ridge):
        pass

    with pytest.raises(TypeError, match="no default solver for Ridges"):
        default_solver(Ridges(random_layer(), 0.0, 1.0))


def test_nothing_is_evaluated_to_see_what_a_problem_is():
    """isinstance used to build the whole problem on Python 3.11: 0.58 s for a layer of 20,000 samples."""
    problem = NetTrim(random_layer(), 0.1)
    check_problem(problem)
    check_problem(problem, BallProblem)
    adapted(ADMM(), problem)
    assert not {"inputs", "outputs", "active", "ceiling"} & set(vars(problem))

    class Dear(L1Reconstruction, LassoProblem):
        gram = property(lambda self: 1 / 0)

    assert type(adapted(WorkingSet(), Dear(random_layer(), 0.1))) is WorkingSet


class Through:
    """Hands everything on to another problem, which it is not."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_a_problem_that_hands_on_is_a_problem_of_no_form():
    problem = Through(L1())
    assert solve(problem, CVXPY("CLARABEL")).certificate.value == pytest.approx(solve(L1()).certificate.value, rel=1e-5)
    with pytest.raises(TypeError, match="Through declares no form"):
        solve(problem, ADMM())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "NoneType is not a problem: it lacks shape, dense, value, violation, lower_bound, to_cvxpy"),
        ("trim", "str is not a problem: it lacks"),
        (random_layer(), r"Layer is not a problem: it lacks shape, .*; state one of it, such as Reconstruction\(layer"),
        (
            L1Reconstruction,
            r"the problem is the class L1Reconstruction; give an object of it: L1Reconstruction\(\.\.\.\)",
        ),
        (Unstructured(0.5), "Unstructured is not a problem: it lacks"),
        (ADMM(), "ADMM is not a problem: it lacks"),
        (torch.zeros(2, 2), "Tensor is not a problem: it lacks dense, value, violation, lower_bound, to_cvxpy"),
        (nn.Linear(2, 2), "Linear is not a problem: it lacks"),
        (Certificate(1.0, 0.0, 0.0), "Certificate is not a problem: it lacks shape, dense, lower_bound, to_cvxpy"),
        (lambda layer: L1Reconstruction(layer, 0.1), "function is not a problem: it lacks"),
    ],
)
def test_what_is_no_problem_is_told_what_it_lacks(wrong, message):
    with pytest.raises(TypeError, match=message):
        solve(wrong)
    with pytest.raises(TypeError, match=message):
        solve(wrong, ADMM())


def test_prune_says_what_a_problem_lacks_before_it_solves():
    class Unwritable(ElasticNet):
        output_errors = None

    del Unwritable.output_errors
    no_errors = type("NoErrors", (), {k: v for k, v in vars(ElasticNet).items() if k != "output_errors"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4))
    batches = [torch.randn(30, 6, generator=torch.Generator().manual_seed(1))]

    class Never:
        def solve(self, problem, start=None):
            raise AssertionError("the work has begun")

    with pytest.raises(TypeError, match="is not a problem over the weights of a layer: it lacks output_errors"):
        prune(model, batches, lambda layer: no_errors(layer, 0.1, 0.1), Never())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_takes_the_problems_of_its_row_and_no_others(solver, problem):
    """The table's rows are what `takes` says; CVXPY alone asks the program."""
    made, takes = SOLVERS[solver][0](), SOLVERS[solver][1]
    if isinstance(made, CVXPY):
        return
    if problem in takes:
        assert type(adapted(made, PROBLEMS[problem]())) is type(made)
    else:
        with pytest.raises(TypeError, match="problems; "):
            solve(PROBLEMS[problem](), made)
