"""Laws of the problems: weak duality for any witness, limits, and agreement with CVXPY on value and dual."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import cascade_layer, random_layer
from table import NET_TRIM, PROBLEMS

from convexprune.layer import Layer
from convexprune.problem import judge
from convexprune.problems import L1Reconstruction, NetTrim, OptimalBrainSurgeon
from convexprune.solve import solve
from convexprune.solvers import CVXPY
from convexprune.testing import check_formulation, check_problem

SEEDS = st.integers(0, 2**32 - 1)
LAW = settings(max_examples=20)


def normal(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def feasible(problem):
    """Points that satisfy the constraints where the dense layer does not."""
    return [torch.where(problem.removed, 0.0, problem.dense)] if isinstance(problem, OptimalBrainSurgeon) else []


@pytest.fixture(scope="module")
def solved():
    """Each problem of the table with an optimal dual witness, once."""
    found = {}

    def lookup(name):
        if name not in found:
            problem = PROBLEMS[name]()
            found[name] = problem, solve(problem, CVXPY("CLARABEL")).witness
        return found[name]

    return lookup


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=5)
@given(seed=SEEDS)
def test_weak_duality_for_any_witness_and_any_feasible_point(name, seed, solved):
    problem, witness = solved(name)
    check_problem(problem, points=feasible(problem), witness=witness, draws=3, seed=seed)


@pytest.mark.parametrize("name", PROBLEMS)
def test_cvxpy_states_the_same_problem_and_its_dual_gives_the_optimum(name):
    check_formulation(PROBLEMS[name]())


@pytest.mark.parametrize("witness", [None, math.nan, math.inf, 0.0])
@pytest.mark.parametrize("name", NET_TRIM)
def test_useless_witnesses_give_the_trivial_bound(name, witness):
    problem = PROBLEMS[name]()
    assert problem.lower_bound(None if witness is None else torch.full(problem.outputs.shape, witness)) == 0


def test_a_small_certificate_is_small():
    problem = NetTrim(random_layer(), epsilon=0.1)
    assert judge(problem, problem.dense).violation == 0
    assert judge(problem, problem.dense).bound == 0


# Net-Trim


@pytest.mark.parametrize("activation", ["relu", None])
def test_dense_is_feasible_for_any_epsilon(activation):
    for epsilon in (0.0, 1e-3, 0.5):
        problem = NetTrim(random_layer(activation=activation), epsilon=epsilon)
        # at radius 0 what is left is the rounding of X W^T, which is computed in blocks
        assert problem.violation(problem.dense) <= (1e-15 if epsilon == 0 else 0)


def test_a_huge_epsilon_leaves_nothing():
    problem = NetTrim(random_layer(), epsilon=1.0)
    zero = torch.zeros(problem.shape)
    assert problem.violation(zero) == 0
    assert problem.value(zero) == 0
    assert NetTrim(random_layer(), epsilon=0.99).violation(zero) == pytest.approx(0.01)


def test_a_dead_layer_is_satisfied_by_zero():
    layer = Layer.from_samples(-torch.ones(2, 3), torch.rand(10, 3, generator=torch.Generator().manual_seed(0)))
    problem = NetTrim(layer, epsilon=0.0)
    assert not problem.active.any()
    certificate = judge(problem, torch.zeros(problem.shape), normal(0, (10, 2)))
    assert (certificate.value, certificate.violation, certificate.bound) == (0, 0, 0)
    formulation = problem.to_cvxpy()
    formulation.problem.solve(solver="CLARABEL")
    assert formulation.problem.value == pytest.approx(0, abs=1e-6)


def test_violation_measures_ball_and_inequalities_relative_to_the_output():
    layer = Layer.from_samples(torch.eye(2), torch.tensor([[3.0, -1.0], [4.0, -1.0]]))
    problem = NetTrim(layer, epsilon=0.1)  # Y = (3, 4) in the first neuron, the second is never active
    assert problem.scale == 5
    assert problem.violation(torch.tensor([[0.8, 0.0], [0.0, 1.0]])) == pytest.approx(0.2 - 0.1)
    rms = 5 / math.sqrt(2)
    assert problem.violation(torch.tensor([[1.0, 0.0], [0.0, -0.5]])) == pytest.approx(0.5 / rms)
    assert problem.violation(torch.tensor([[1.0, 0.0], [0.0, 0.5]])) == 0


def test_slack_raises_the_ceiling_as_a_number_or_an_array():
    layer = Layer.from_samples(torch.eye(2), torch.tensor([[3.0, -1.0], [4.0, -2.0]]))
    x = torch.tensor([[1.0, 0.0], [0.0, -0.5]])  # second neuron: 0.5 and 1.0 where the dense layer gives 0
    rms = 5 / math.sqrt(2)
    # 1.0 = V: what cannot be told from an excess is rounded up
    assert NetTrim(layer, 0.0, slack=1.0).violation(x) <= 1e-15
    assert NetTrim(layer, 0.0, slack=1.001).violation(x) == 0
    assert NetTrim(layer, 0.0, slack=0.5).violation(x) == pytest.approx(0.5 / rms)
    by_entry = torch.tensor([[9.0, 0.5], [9.0, 0.75]])
    assert NetTrim(layer, 0.0, slack=by_entry).violation(x) == pytest.approx(0.25 / rms)


@LAW
@given(seed=SEEDS, spread=st.floats(1e-4, 1.0))
def test_output_errors_bound_the_error_after_the_activation(seed, spread):
    """Proposition 1, and its extension to points that are not feasible."""
    for name in NET_TRIM:
        problem = PROBLEMS[name]()
        x = problem.dense + spread * normal(seed, problem.shape)
        produced = problem.inputs @ x.T
        if problem.layer.activation == "relu":
            produced = produced.clamp(min=0)
        assert float((produced - problem.outputs).norm()) <= float(problem.output_errors(x).norm()) * (1 + 1e-12)


def test_output_errors_of_a_feasible_point_are_within_the_radius():
    problem = NetTrim(random_layer(), epsilon=0.1)
    assert float(problem.output_errors(0.99 * problem.dense).norm()) <= problem.radius
    assert float(problem.output_errors(problem.dense).norm()) < 1e-9


def test_cascade_makes_the_dense_layer_feasible_and_risk_takes_that_back():
    layer = cascade_layer()
    problem = NetTrim.cascade(layer, epsilon=0.1, gamma=1.1)
    drift = (problem.inputs @ problem.dense.T - problem.outputs)[problem.active].norm()
    assert problem.radius == pytest.approx(math.sqrt(1.1) * float(drift))
    assert problem.violation(problem.dense) == 0
    assert NetTrim.cascade(layer, 0.1, gamma=1.0, risk=0.5).violation(problem.dense) > 0


def test_cascade_of_a_first_layer_is_the_parallel_problem():
    problem = NetTrim.cascade(random_layer(), epsilon=0.1)
    assert problem.epsilon == 0.1
    assert problem.slack is None


@pytest.mark.parametrize("epsilon", [-0.1, math.nan, math.inf])
def test_bad_epsilon_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        NetTrim(random_layer(), epsilon)


@pytest.mark.parametrize(
    ("slack", "reason"),
    [(torch.zeros(3, 3), "shape"), (math.nan, "NaN"), (torch.full((40, 4), math.inf), "NaN or inf")],
)
def test_bad_slack_is_refused(slack, reason):
    with pytest.raises(ValueError, match=reason):
        NetTrim(random_layer(), 0.1, slack)


def test_bad_gamma_and_risk_are_refused():
    with pytest.raises(ValueError, match="gamma"):
        NetTrim.cascade(random_layer(), 0.1, gamma=0.9)
    with pytest.raises(ValueError, match="risk"):
        NetTrim.cascade(random_layer(), 0.1, risk=1.5)


def test_net_trim_needs_samples():
    layer = random_layer(bias=False)
    with pytest.raises(ValueError, match="without its inputs"):
        NetTrim(Layer.from_moments(layer.weight, layer.gram), 0.1)


# L1 reconstruction


def test_a_huge_lam_makes_zero_optimal_and_certified():
    layer = random_layer()
    lam = float(layer.affine_cross.abs().max())
    problem = L1Reconstruction(layer, lam)
    zero = torch.zeros(problem.shape)
    assert problem.value(zero) == pytest.approx(layer.energy / 2)
    assert judge(problem, zero, zero).relative_gap == pytest.approx(0, abs=1e-12)


def test_a_tiny_lam_makes_the_dense_layer_optimal_and_certified():
    problem = L1Reconstruction(random_layer(), 1e-9)
    certificate = judge(problem, problem.dense, problem.dense)
    assert certificate.value - certificate.bound < 1e-7


def test_l1_has_no_constraints():
    problem = PROBLEMS["l1_reconstruction"]()
    assert problem.violation(1e6 * normal(0, problem.shape)) == 0


def test_l1_output_errors_are_the_error_of_the_samples():
    problem = L1Reconstruction(random_layer(), 0.1)
    x = normal(1, problem.shape)
    layer = problem.layer
    error = float((layer.affine_inputs @ x.T - layer.targets_or_dense).norm())
    assert float(problem.output_errors(x).norm()) == pytest.approx(error)


@pytest.mark.parametrize("lam", [-1.0, math.nan, math.inf])
def test_bad_lam_is_refused(lam):
    with pytest.raises(ValueError, match="lam"):
        L1Reconstruction(random_layer(), lam)
