"""Nothing is dropped silently: an option or a start that cannot count is refused, and what ran is what is reported."""

import dataclasses
import inspect

import pytest
import torch
from instances import random_layer
from table import PROBLEMS, RECONSTRUCTORS, SOLVERS, reconstruction, some
from torch import nn

import convexprune as cp
from convexprune import solvers
from convexprune.forms import adapted
from convexprune.patterns import PerRow, Unstructured
from convexprune.problem import can_start
from convexprune.problems import L1Reconstruction, NetTrim, OptimalBrainSurgeon, Reconstruction
from convexprune.solution import Attempt, Status
from convexprune.solve import solve
from convexprune.solvers import (
    ADMM,
    CVXPY,
    Balanced,
    Best,
    BestOf,
    Bounded,
    ClosedForm,
    ExactOBS,
    Exchange,
    Fast,
    GreedyMerging,
    Groupwise,
    Magnitude,
    Refit,
    RisingPenalty,
    SwapSearch,
    Then,
    WorkingSet,
)


@pytest.fixture(scope="module")
def pruning():
    return Reconstruction(random_layer(), Unstructured(0.5))


@pytest.fixture(scope="module")
def lasso():
    return L1Reconstruction(random_layer(), 0.1)


# options of ADMM where ADMM is RisingPenalty


@pytest.mark.parametrize(
    "option",
    [{"eps_rel": 1e-12}, {"eps_abs": 1e-3}, {"alpha": 1.0}, {"finish": None}, {"handover": 0.1},
     {"finish": WorkingSet(max_iter=9)}, {"eps_rel": 1e-12, "alpha": 1.0, "finish": None}],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda s: s, Refit, Bounded, lambda s: BestOf(Magnitude(), s)])
def test_an_option_that_does_not_apply_is_refused(pruning, lasso, option, wrap):
    name = next(entry.name for entry in dataclasses.fields(ADMM) if entry.name in option)
    said = rf"ADMM\({name}=.*{name} does not apply .* name RisingPenalty with its own options"
    with pytest.raises(ValueError, match=said):
        solve(pruning, wrap(ADMM(**option)))
    assert solve(lasso, ADMM(**option)).solver.startswith("ADMM(")  # where it applies it is taken


def test_what_ran_is_what_is_reported(pruning, lasso):
    ran = "RisingPenalty(grow=1.0, rho=0.1, rises=(1.3, 1.2, 1.1), every=3, max_iter=7, time_limit=9.0, "
    found = solve(pruning, ADMM(max_iter=7, time_limit=9.0, dtype=torch.float64))
    assert found.solver == f"{ran}device='cpu', dtype=torch.float64)"
    assert found.iterations == 7
    assert found.certificate == solve(pruning, RisingPenalty(max_iter=7, dtype=torch.float64)).certificate
    assert solve(pruning, Refit(ADMM())).solver.startswith("Refit(inner=RisingPenalty(")
    assert solve(pruning, Then(ADMM(), SwapSearch())).solver.startswith("Then(first=RisingPenalty(")
    assert solve(pruning, BestOf(Magnitude(), ADMM())).solver.startswith("BestOf(solvers=(Magnitude(), RisingPenalty(")
    assert solve(pruning, Bounded(ADMM())).solver.startswith("Bounded(inner=RisingPenalty(")
    # the finish stops by ADMM's rule, whatever its own default says
    assert "finish=WorkingSet(eps_abs=1e-06, eps_rel=0.0003," in solve(lasso, ADMM(eps_rel=3e-4)).solver
    assert solve(lasso).solver == solve(lasso, ADMM()).solver


@pytest.mark.parametrize(
    ("finish", "options", "said"),
    [
        ({"eps_rel": 1e-9}, {}, r"finish has eps_rel=1e-09, but ADMM's eps_rel counts: ADMM\(eps_rel=1e-09\)"),
        ({"eps_abs": 1e-9}, {"eps_abs": 1e-8}, "finish has eps_abs=1e-09"),
        ({"device": "cpu:0"}, {}, "finish has device='cpu:0'"),
        (None, {"handover": 0.2}, "handover is 0.2, but there is no finish"),
    ],
)
def test_options_of_the_finish_that_cannot_count_are_refused(finish, options, said):
    with pytest.raises(ValueError, match=said):
        ADMM(finish=None if finish is None else WorkingSet(**finish), **options)


def test_options_of_the_finish_that_agree_are_taken(lasso):
    solver = ADMM(eps_rel=1e-9, finish=WorkingSet(eps_rel=1e-9, margin=0.0))
    assert solve(lasso, solver).certificate.relative_gap <= 1e-9
    assert dataclasses.replace(ADMM(eps_rel=1e-4), eps_rel=1e-8).eps_rel == 1e-8
    with pytest.raises(TypeError, match="finish is ADMM"):
        ADMM(finish=ADMM())


# starts


ROWS = [(make, PROBLEMS[takes[0]]) for make, takes in SOLVERS.values()]
ROWS += [(make, lambda: reconstruction("bias", "unstructured")) for make, _ in RECONSTRUCTORS.values()]


def test_a_solver_says_that_it_cannot_start_exactly_where_it_reads_none():
    """`starts` is True of a solver whose code reads its start, and False of one whose code does not."""
    for name in solvers.__all__:
        kind = getattr(solvers, name)
        if not hasattr(kind, "solve") or name in ("ADMM", "Refit", "Then", "BestOf", "Bounded", "Groupwise"):
            continue
        body = inspect.getsource(kind.solve).split(":", 1)[1].split('"""')[-1]
        assert ("start" in body) == getattr(kind, "starts", True), name


@pytest.mark.parametrize(("make", "state"), ROWS, ids=[*SOLVERS, *(f"{name}_" for name in RECONSTRUCTORS)])
def test_a_start_is_used_or_refused(make, state):
    problem = state()
    solver = adapted(make(), problem)
    if isinstance(solver, ADMM | WorkingSet | SwapSearch):
        assert solve(problem, solver, start=problem.dense).status in (Status.CONVERGED, Status.MAX_ITER)
    else:
        with pytest.raises(ValueError, match="cannot begin from a start; leave `start` out, or name a solver that can"):
            solve(problem, solver, start=problem.dense)


@dataclasses.dataclass(frozen=True)
class Echo:
    """Returns the start, or says that there was none."""

    def solve(self, problem, start=None):
        x = torch.zeros(problem.shape, dtype=torch.float64) if start is None else start
        return Attempt(x, None, Status.CONVERGED, 1, note="no start" if start is None else "")


@dataclasses.dataclass(frozen=True)
class Deaf(Echo):
    """Cannot begin from a start."""

    starts = False


def test_a_foreign_solver_gets_its_start_unless_it_says_no(pruning):
    assert torch.equal(solve(pruning, Echo(), start=pruning.dense).x, pruning.dense)
    with pytest.raises(ValueError, match="Deaf cannot begin from a start"):
        solve(pruning, Deaf(), start=pruning.dense)


def test_combinators_pass_a_start_to_those_that_can_use_it(pruning):
    start = pruning.completed(pruning.target * pruning.select(pruning.target.square()))
    for solver in (
        Then(Echo(), Echo()), Refit(Echo()), Bounded(Echo()), BestOf(Deaf(), Echo()), BestOf(Echo()), Groupwise(Echo()),
    ):  # fmt: skip
        found = solve(pruning, solver, start=start)
        assert "no start" not in found.note
        assert (found.x[:, :6] != 0).equal(start[:, :6] != 0)
    for solver in (
        Then(Deaf(), Echo()), Refit(Deaf()), Bounded(Deaf()), BestOf(Deaf(), Magnitude()), Groupwise(Deaf()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="cannot begin from a start"):
            solve(pruning, solver, start=start)
        assert solve(pruning, solver).x is not None


@pytest.mark.parametrize("second", [Magnitude(), Balanced(), Best(), Fast(), ExactOBS(), RisingPenalty(), Deaf()])
def test_then_needs_a_second_that_begins_where_the_first_ends(second):
    with pytest.raises(ValueError, match=f"{type(second).__name__} cannot begin where SwapSearch ends"):
        Then(SwapSearch(), second)
    with pytest.raises(ValueError, match="CVXPY cannot begin where ADMM ends"):
        Then(ADMM(), CVXPY("CLARABEL"))


def test_then_looks_at_what_will_run(pruning, lasso):
    with pytest.raises(ValueError, match="RisingPenalty cannot begin where Magnitude ends"):
        solve(pruning, Then(Magnitude(), ADMM()))
    solution = solve(lasso, Then(ADMM(finish=None, max_iter=40), ADMM(eps_rel=1e-8)))
    assert solution.certificate.relative_gap <= 1e-8


@pytest.mark.parametrize(
    ("start", "error", "said"),
    [
        ([1.0], TypeError, r"start is a list; give a tensor of shape \(4, 7\)"),
        (torch.zeros(4), ValueError, r"start has shape \(4,\), expected \(4, 7\)"),
        (torch.full((4, 7), torch.nan), ValueError, "start holds NaN or inf"),
        (torch.full((4, 7), torch.inf), ValueError, "start holds NaN or inf"),
        (0, TypeError, "start is a int"),
    ],
)
def test_a_start_that_is_none_is_refused(lasso, start, error, said):
    with pytest.raises(error, match=said):
        solve(lasso, ADMM(), start=start)


# what else a solver made of others might keep to itself


def test_the_parts_of_a_solver_are_checked_when_it_is_made():
    for make in (Refit, Bounded, BestOf, Groupwise, lambda s: Then(s, Echo()), lambda s: Then(Echo(), s)):
        with pytest.raises(TypeError, match="'magnitude' is not a solver"):
            make("magnitude")
        with pytest.raises(TypeError, match=r"the solver is the class Magnitude; give an object of it: Magnitude\(\)"):
            make(Magnitude)


def test_the_parts_of_a_solver_must_take_the_problem(lasso, pruning):
    removal = OptimalBrainSurgeon(random_layer(), some(0.5))
    for problem, solver in (
        (lasso, BestOf(ADMM(), Magnitude())),
        (lasso, Then(ADMM(), SwapSearch())),
        (pruning, Refit(ClosedForm())),
        (removal, BestOf(ClosedForm(), GreedyMerging())),
        (NetTrim(random_layer(), 0.1), Then(Magnitude(), WorkingSet())),
        (pruning, Bounded(Exchange())),
    ):
        with pytest.raises(TypeError, match=f"takes .* problems; {type(problem).__name__} is of the form"):
            solve(problem, solver)


class Fails:
    """Ends without a point."""

    def solve(self, problem, start=None):
        return Attempt(problem.dense, None, Status.NUMERICAL, 1, note="it fell")


def test_notes_say_what_did_not_run_and_who_won(pruning):
    assert solve(pruning, Then(Fails(), SwapSearch())).note == "it fell; SwapSearch did not run"
    assert solve(pruning, Then(Echo(), Echo())).note == "no start"
    assert solve(pruning, BestOf(Magnitude(), Refit(Magnitude()))).note == "the point is that of Refit"
    singular = Reconstruction(random_layer(samples=3), PerRow(2))
    assert "no better bound: the Gram matrix is singular" in solve(singular, Bounded(Magnitude())).note
    assert solve(pruning, Bounded(Magnitude())).note == ""


def test_a_report_names_every_solver_that_ran():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3))
    trim = lambda layer: NetTrim(layer, 0.2)  # noqa: E731
    kinds = {"0": trim, "2": lambda layer: Reconstruction(layer, PerRow(2)), "3": trim}
    batches = [torch.randn(30, 6, generator=torch.Generator().manual_seed(1))]
    used = cp.prune(model, batches, lambda layer: kinds[layer.name](layer))[1].settings.solver.split("; ")
    assert [name.partition("(")[0] for name in used] == ["ADMM", "Balanced"]
    used = cp.prune(model, batches, lambda layer: kinds[layer.name](layer), ADMM())[1].settings.solver.split("; ")
    assert [name.partition("(")[0] for name in used] == ["ADMM", "RisingPenalty"]


def test_adapting_twice_changes_nothing(pruning, lasso):
    for problem, solver in ((pruning, Then(ADMM(), SwapSearch())), (lasso, ADMM()), (pruning, cp.ADMM(max_iter=9))):
        once = adapted(solver, problem)
        assert adapted(once, problem) == once
        assert can_start(once) == (problem is lasso)
