"""Optimal Brain Surgeon: closed form = KKT = OSQP, exact constants, bounds (the laws of test_problems.py hold too)."""

from dataclasses import dataclass

import exact
import pytest
import torch
from instances import cascade_layer, random_layer
from table import OBS, PROBLEMS, some

from convexprune.forms import EqualityQuadratic
from convexprune.layer import Layer
from convexprune.problems import OptimalBrainSurgeon, increase, saliencies
from convexprune.solution import Status
from convexprune.solve import solve
from convexprune.solvers import CVXPY, KKT, ClosedForm


@pytest.mark.parametrize("name", OBS)
def test_closed_form_is_the_kkt_system_and_osqp(name):
    problem = PROBLEMS[name]()
    x = solve(problem, ClosedForm()).x
    torch.testing.assert_close(x, solve(problem, KKT()).x, rtol=1e-10, atol=1e-10)
    tight = solve(problem, CVXPY("OSQP", eps_abs=1e-10, eps_rel=1e-10, max_iter=100000)).x
    torch.testing.assert_close(x, tight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_saliency_is_the_exact_increase_of_one_removal(bias):
    layer = random_layer(1, bias=bias)
    exact = saliencies(layer)
    for q in range(exact.shape[1]):
        removed = torch.zeros(exact.shape, dtype=torch.bool)
        removed[:, q] = True
        errors = layer.squared_errors(solve(OptimalBrainSurgeon(layer, removed)).x)
        torch.testing.assert_close(exact[:, q], errors, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(increase(layer, removed), exact[:, q])


def test_increase_of_a_set_is_the_value_of_the_optimum():
    layer = random_layer(2)
    problem = OptimalBrainSurgeon(layer, some(0.5))
    assert float(increase(layer, problem.removed).sum()) == pytest.approx(solve(problem).certificate.value)


def test_the_optimum_certifies_itself():
    for layer in (random_layer(3), cascade_layer(4)):
        certificate = solve(OptimalBrainSurgeon(layer, some(0.4))).certificate
        assert certificate.violation == 0
        assert certificate.relative_gap <= 1e-9


def test_neurons_with_the_same_mask_and_none_removed():
    layer = random_layer(5)
    whole = solve(OptimalBrainSurgeon(layer, torch.zeros(4, 6, dtype=torch.bool)))
    torch.testing.assert_close(whole.x, layer.affine_weight)
    empty = solve(OptimalBrainSurgeon(layer, torch.ones(4, 6, dtype=torch.bool)))
    torch.testing.assert_close(empty.x[:, 6], layer.target_mean)
    assert (empty.x[:, :6] == 0).all()


def test_a_singular_gram_matrix():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2], x[:, 4] = 0.0, x[:, 5]
    layer = Layer.from_samples(torch.ones(3, 6), x, activation=None)
    removed = torch.zeros(3, 6, dtype=torch.bool)
    removed[:, 4] = True
    solution = solve(OptimalBrainSurgeon(layer, removed))
    assert solution.certificate.value == pytest.approx(0, abs=1e-9 * layer.energy)  # its twin takes over
    assert solve(OptimalBrainSurgeon(layer, removed), KKT()).status in (Status.NUMERICAL, Status.CONVERGED)
    with pytest.raises(ValueError, match="singular"):
        saliencies(layer)
    assert torch.isfinite(saliencies(layer.damped(1e-3))).all()


def test_zero_inputs_cost_nothing_and_leave_the_bound_alone():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 3] = 0.0
    layer = Layer.from_samples(torch.ones(4, 6), x, torch.ones(4))
    removed = torch.cat([some(0.5), torch.zeros(4, 1, dtype=torch.bool)], 1)
    certificate = solve(OptimalBrainSurgeon(layer, removed)).certificate
    assert certificate.relative_gap <= 1e-9
    assert float(increase(layer, removed).sum()) == pytest.approx(certificate.value)
    assert (saliencies(layer)[:, 3] == 0).all()


def test_a_singular_gram_matrix_has_the_trivial_bound():
    x = torch.ones(20, 4, dtype=torch.float64)
    problem = OptimalBrainSurgeon(Layer.from_samples(torch.ones(2, 4), x), torch.eye(4, dtype=torch.bool)[:2])
    for seed in range(5):
        v = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert problem.lower_bound(v) == 0


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="removed is"):
        OptimalBrainSurgeon(random_layer(), torch.zeros(4, 6))
    with pytest.raises(ValueError, match="removed is"):
        OptimalBrainSurgeon(random_layer(), torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="KKT is for up to"):
        solve(OptimalBrainSurgeon(random_layer(), some(0.5)), KKT(max_inputs=3))


@dataclass(frozen=True, eq=False)
class Ridge(EqualityQuadratic):
    """|x - t|^2 under a metric, some weights removed: a form of one's own that states no pieces."""

    gram: torch.Tensor
    dense: torch.Tensor
    removed: torch.Tensor

    shape = property(lambda self: tuple(self.dense.shape))
    cross = property(lambda self: self.dense @ self.gram)

    def value(self, x):
        step = x - self.dense
        return float(((step @ self.gram) * step).sum())

    def violation(self, x):
        return float(x[self.removed].abs().sum())

    def lower_bound(self, witness):
        return 0.0

    def to_cvxpy(self):
        raise NotImplementedError


@pytest.mark.parametrize("solver", [ClosedForm(), KKT()])
def test_a_quadratic_of_ones_own_is_solved_as_it_stands(solver):
    layer = random_layer(11, bias=False)
    theirs = OptimalBrainSurgeon(layer, some(0.4))
    ours = Ridge(layer.gram, layer.weight, theirs.removed)
    torch.testing.assert_close(solve(ours, solver).x, solve(theirs, solver).x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [ClosedForm(), KKT()])
def test_converged_means_proven_optimal(solver):
    """Layers whose bias is removed, with means up to a million times what the inputs vary by."""
    statuses = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        mean = 10 ** float(6 * torch.rand(1, generator=generator, dtype=torch.float64))
        x = torch.randn(60, 5, generator=generator, dtype=torch.float64) + mean
        weight = torch.randn(3, 5, generator=generator)
        removed = torch.rand(3, 6, generator=generator) < 0.4
        removed[:, 5] = True
        problem = OptimalBrainSurgeon(Layer.from_samples(weight, x, torch.randn(3, generator=generator)), removed)
        found = solve(problem, solver)
        least = float(exact.surgeon(problem))
        assert found.certificate.bound <= least <= found.certificate.value * (1 + 1e-12)
        assert found.certificate.value <= least * (1 + 1e-4)
        proven = found.certificate.relative_gap <= 1e-6
        assert (found.status is Status.CONVERGED) == proven
        assert found.status in (Status.CONVERGED, Status.UNPROVEN)
        assert ("does not show" in found.note) != proven
        statuses.add(found.status)
    assert len(statuses) == 2


def test_a_singular_layer_is_unproven_and_a_damped_one_is_proven():
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 4] = x[:, 5]
    layer = Layer.from_samples(torch.ones(3, 6), x, activation=None)
    for solver in (ClosedForm(), KKT()):
        found = solve(OptimalBrainSurgeon(layer, some(0.4)[:3]), solver)
        assert found.status in (Status.UNPROVEN, Status.NUMERICAL)
        assert solve(OptimalBrainSurgeon(layer.damped(1e-6), some(0.4)[:3]), solver).status is Status.CONVERGED
