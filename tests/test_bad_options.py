"""Every option of every solver and pattern, and what `solve` and `judge` take, against values that cannot be meant."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
import table
import torch

import convexprune as cp
from convexprune import (
    ADMM,
    CVXPY,
    KKT,
    NM,
    Alternation,
    Balanced,
    Best,
    Blocks,
    Bounded,
    BranchAndBound,
    Channels,
    ColumnSweep,
    DynamicProgramming,
    ExactOBS,
    Exchange,
    Fast,
    GreedyMerging,
    Groupwise,
    LayerwiseOBS,
    Magnitude,
    MinimalCore,
    PerRow,
    RisingPenalty,
    Support,
    SwapSearch,
    Unstructured,
    WorkingSet,
    judge,
    solve,
)  # fmt: skip

NAN, INF = math.nan, math.inf
ABSENT = "cuda:7"  # no machine that runs the tests has eight

# what a kind of option refuses: values of another type, and values out of its range
KINDS = {
    "positive": (["a", None, True, [1.0], 1j], [NAN, 0, -1, INF, -INF]),
    "nonnegative": (["a", None, True, (1.0,), torch.ones(2)], [NAN, -1, INF, -1e-300, -INF]),
    "limit": (["a", True, [1], 1j, b"1"], [NAN, 0, -1, -1e-9, -INF]),  # None and inf: no limit
    "memory": (["a", None, True, [1], 1j], [NAN, 0, -1, -1e-9, -INF]),
    "open2": (["a", None, True, [1.0], 1j], [NAN, 0, 2, -1, INF]),
    "share": (["a", None, True, (0.5,), 1j], [NAN, 0, 1.1, -0.1, INF]),
    "growth": (["a", None, True, [2.0], 1j], [NAN, 0.99, -1, 0, INF]),
    "factors": ([1.3, "abc", None, {1.3, 1.2, 1.1}, 3], [(1.3,), (1.3, 1.2, 1.0), (1.3, 1.2, NAN), (), [2.0] * 4]),
    "shares": ([0.2, "abc", None, {0.1, 0.2}, 3], [(), (0.0,), (0.1, 1), (NAN,), [0.1, -0.1]]),
    "count": (["a", None, True, NAN, 2.5], [0, -1, -7, -(10**30), np.int64(0)]),
    "count0": (["a", None, True, NAN, 2.0], [-1, -2, -7, -(10**30), np.int32(-1)]),
    "buckets": (["a", True, NAN, 2.5, [10]], [0, -1, -7, -(10**30), np.int64(0)]),
    "device": ([3, None, True, 1.5, ["cpu"]], ["gpu", "meta", ABSENT, "", "cpu:x"]),
    "dtype": (["float32", None, 32, float, np.float32],
              [torch.int32, torch.float16, torch.bfloat16, torch.complex64, torch.bool]),
}  # fmt: skip
NAMED = {"eps_abs": "positive", "eps_rel": "positive", "max_iter": "count", "time_limit": "limit", "memory": "memory",
         "device": "device", "dtype": "dtype", "grow": "growth"}  # fmt: skip
OWN = {
    ADMM: {"alpha": "open2", "handover": "positive"},
    WorkingSet: {"max_rounds": "count", "margin": "nonnegative"},
    RisingPenalty: {"rho": "positive", "rises": "factors", "every": "count"},
    SwapSearch: {"rounds": "count0", "enter": "share", "cooling": "share", "pairs": "count0"},
    ColumnSweep: {"damping": "positive", "block": "count"},
    ExactOBS: {},
    LayerwiseOBS: {"alpha": "positive"},
    Fast: {"flops": "positive", "polish": "count0"},
    Balanced: {"rounds": "count0", "limit": "memory"},
    Best: {"rounds": "count0", "pairs": "count0", "limit": "memory"},
    Alternation: {"shares": "shares", "falling": "count", "rounds": "count0", "steps": "count", "seed": "count0"},
    BranchAndBound: {"max_inputs": "count"},
    KKT: {"max_inputs": "count"},
    DynamicProgramming: {"buckets": "buckets"},
    MinimalCore: {},
    GreedyMerging: {"neighbours": "count"},
    Exchange: {"bound_steps": "count0"},
    lambda **option: Bounded(Magnitude(), **option): {"rounds": "count0", "steps": "count"},
    lambda **option: Groupwise(Magnitude(), **option): {"exact": "count0"},
    lambda **option: CVXPY("CLARABEL", **option): {"max_iter": "count", "time_limit": "positive"},
}


def options(make):
    names = [entry.name for entry in dataclasses.fields(make)] if dataclasses.is_dataclass(make) else []
    known = {name: NAMED[name] for name in names if name in NAMED}
    return {**known, **OWN[make]}


def rows():
    for make in OWN:
        for name, kind in options(make).items():
            yield from ((make, name, value, TypeError) for value in KINDS[kind][0])
            yield from ((make, name, value, ValueError) for value in KINDS[kind][1])


@pytest.mark.parametrize(("make", "name", "value", "error"), [*rows()])
def test_a_bad_option_is_named_when_the_solver_is_made(make, name, value, error):
    entry = r"(\[\d\])?"  # of a tuple, the entry that is wrong
    shown = (
        ".*"
        if isinstance(value, tuple | list) and name in ("rises", "shares")
        else f"({re.escape(repr(value))}|{value})"
    )
    with pytest.raises(error, match=f"^{name}{entry} is {shown}[,;] ?(it must|give|which|and torch|on which)"):
        make(**{name: value})


def test_the_table_has_every_option_of_every_solver():
    """What it leaves out are solvers within solvers, which have tests of their own."""
    missing = []
    for name in cp.solvers.__all__:
        kind = getattr(cp.solvers, name)
        if dataclasses.is_dataclass(kind) and hasattr(kind, "solve") and kind in OWN:
            own = {entry.name for entry in dataclasses.fields(kind)} - set(options(kind)) - {"finish"}
            missing += [f"{name}.{option}" for option in sorted(own)]
        elif dataclasses.is_dataclass(kind) and hasattr(kind, "solve"):
            given = {entry.name for entry in dataclasses.fields(kind)}
            if not given <= {"inner", "first", "second", "solvers", "solver", "options", "exact", "rounds", "steps"}:
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: ADMM(np.float64(1e-6), np.float32(1e-5), np.int64(20), np.float64(3.0)),
        lambda: ADMM(time_limit=INF),
        lambda: RisingPenalty(rises=[1.3, 1.2, 1.1], max_iter=np.int32(9)),
        lambda: SwapSearch(rounds=np.int64(2), memory=INF),
        lambda: ExactOBS(device=torch.device("cpu")),
        lambda: ColumnSweep(block=np.uint8(8), damping=1),
        lambda: DynamicProgramming(buckets=None),
        lambda: Unstructured(np.float32(0.5)),
        lambda: Blocks([2, np.int64(2)], np.int64(3)),
    ],
)
def test_numbers_of_numpy_and_lists_are_taken(make):
    make()


@pytest.mark.parametrize("solver", [3, None, b"SCS", ["SCS"], CVXPY])
def test_the_name_of_a_solver_of_cvxpy_is_a_string(solver):
    with pytest.raises(TypeError, match=r"solver is .*; it must be a string"):
        CVXPY(solver)


@pytest.mark.parametrize("finish", ["a", 3, WorkingSet, ADMM(), True])
def test_the_finish_is_a_working_set(finish):
    with pytest.raises(TypeError, match=r"finish is .*; give a WorkingSet\(\), or None"):
        ADMM(finish=finish)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        *((kind, TypeError, rf"keep is {re.escape(repr(keep))}; it must be a fraction in \[0, 1\]")
          for keep in ("0.5", None, True, [0.5], 1j, Unstructured)
          for kind in (lambda keep=keep: Unstructured(keep), lambda keep=keep: PerRow(keep),
                       lambda keep=keep: Channels(keep), lambda keep=keep: Blocks((2, 2), keep))),
        *((kind, ValueError, r"keep is .*; it must be a fraction in \[0, 1\]")
          for keep in (-1, 1.5, NAN, INF, -0.1, np.float64(2.0))
          for kind in (lambda keep=keep: Unstructured(keep), lambda keep=keep: PerRow(keep),
                       lambda keep=keep: Channels(keep), lambda keep=keep: Blocks((2, 2), keep))),
        (lambda: NM("2", "4"), TypeError, "m is '4'; it must be a whole number >= 1"),
        (lambda: NM(2.0, 4), TypeError, "n is 2.0; it must be a whole number from 0 to 4"),
        (lambda: NM(None, 4), TypeError, "n is None"),
        (lambda: NM(True, 4), TypeError, "n is True"),
        (lambda: NM(2, NAN), TypeError, "m is nan"),
        (lambda: NM(5, 4), ValueError, "n is 5; it must be a whole number from 0 to 4"),
        (lambda: NM(-1, 4), ValueError, "n is -1"),
        (lambda: NM(0, 0), ValueError, "m is 0"),
        (lambda: Blocks(2, 0.5), TypeError, "size is 2; it must be a tuple of 2 numbers"),
        (lambda: Blocks("ab", 0.5), TypeError, "size is 'ab'; it must be a tuple of 2 numbers"),
        (lambda: Blocks(None, 0.5), TypeError, "size is None"),
        (lambda: Blocks((2,), 0.5), ValueError, r"size is \(2,\); it must have 2 entries, not 1"),
        (lambda: Blocks((2, 2, 2), 0.5), ValueError, "it must have 2 entries, not 3"),
        (lambda: Blocks((2, 0), 0.5), ValueError, r"size\[1\] is 0; it must be a whole number >= 1"),
        (lambda: Blocks((2.0, 2), 0.5), TypeError, r"size\[0\] is 2.0"),
        (lambda: Blocks((True, 2), 0.5), TypeError, r"size\[0\] is True"),
        (lambda: Support([[True]]), TypeError, r"mask is a list; give a boolean tensor \(out, in\)"),
        (lambda: Support(None), TypeError, "mask is a NoneType"),
        (lambda: Support(np.ones((2, 2), dtype=bool)), TypeError, "mask is a ndarray"),
        (lambda: Support(torch.ones(2, 2)), ValueError, r"mask is torch.float32 \(2, 2\); give a dense boolean"),
        (lambda: Support(torch.ones(2, dtype=torch.bool)), ValueError, r"mask is torch.bool \(2,\)"),
        (lambda: Support(torch.ones(2, 2, dtype=torch.bool).to_sparse()), ValueError, "mask is torch.sparse_coo"),
        (lambda: Support(torch.ones(2, 2, dtype=torch.bool, device="meta")), ValueError, "mask is on the meta device"),
    ],
)  # fmt: skip
def test_a_bad_pattern_is_named_when_it_is_made(make, error, said):
    with pytest.raises(error, match=said):
        make()


# what solve and judge take

PROBLEMS = {
    "ball": table.PROBLEMS["net_trim"],
    "lasso": table.PROBLEMS["l1_reconstruction"],
    "quadratic": table.PROBLEMS["obs_few"],
    "reconstruction": lambda: table.reconstruction("bias", "unstructured"),
}


@pytest.mark.parametrize("call", [solve, lambda problem: judge(problem, torch.zeros(2, 2))])
@pytest.mark.parametrize("problem", [None, 3, "NetTrim", cp.NetTrim, torch.ones(2, 2), [3]])
def test_what_is_no_problem_is_named(call, problem):
    with pytest.raises(TypeError, match=r"is not a problem: it lacks|the problem is the class NetTrim"):
        call(problem)


@pytest.mark.parametrize("state", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda x: x.tolist(), TypeError, r"is a list; give a tensor of shape \(\d"),
        (lambda x: x.numpy(), TypeError, "is a ndarray; give a tensor"),
        (lambda x: 3, TypeError, "is a int; give a tensor"),
        (lambda x: x + 1j, TypeError, "is strided torch.complex128 on cpu; give a dense tensor of real numbers"),
        (lambda x: x.to_sparse(), TypeError, "is sparse_coo torch.float64 on cpu; give a dense tensor"),
        (lambda x: x.to("meta"), TypeError, "is strided torch.float64 on meta; give a dense tensor"),
        (lambda x: x[:, :2], ValueError, r"has shape \(\d+, 2\), expected"),
        (lambda x: x.flatten(), ValueError, r"has shape \(\d+,\), expected"),
        (lambda x: x[None], ValueError, r"has shape \(1, "),
    ],
)
def test_what_is_no_point_is_named(state, change, error, said):
    problem = state()
    with pytest.raises(error, match=f"^x {said}"):
        judge(problem, change(problem.dense))
    with pytest.raises(error, match=f"^start {said}"):
        solve(problem, start=change(problem.dense))


@pytest.mark.parametrize("state", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_point_that_is_not_finite_is_not_feasible(state, value):
    problem = state()
    x = problem.dense.clone()
    x[0, 0] = value
    certificate = judge(problem, x)
    assert certificate.value == certificate.violation == INF
    with pytest.raises(ValueError, match="start holds NaN or inf"):
        solve(problem, start=x)


@pytest.mark.parametrize("state", PROBLEMS.values(), ids=PROBLEMS)
@pytest.mark.parametrize("witness", ["z", {"v": 1}, object(), torch.Tensor, 1j, b"z"])
def test_a_witness_of_another_kind_is_named(state, witness):
    problem = state()
    kind = "the class Tensor" if inspect.isclass(witness) else f"a {type(witness).__name__}"
    with pytest.raises(TypeError, match=f"the witness is {kind}, which {type(problem).__name__} cannot read"):
        judge(problem, problem.dense, witness)
