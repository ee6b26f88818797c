"""What print and a console show of a layer and of a solution: sizes and the verdict, never matrices."""

import math
from dataclasses import replace

import pytest
import torch

from convexprune.layer import Layer
from convexprune.patterns import Unstructured
from convexprune.problems import L1Reconstruction, NetTrim, Reconstruction
from convexprune.solution import Certificate, Status
from convexprune.solve import solve
from convexprune.solvers import ADMM


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Layer.from_samples(draw(30, 60), draw(200, 60).relu(), draw(30), name="fc1")


def test_a_layer_shows_shapes(layer):
    text = str(layer)
    assert repr(layer) == text
    assert len(text.splitlines()) <= 10
    assert "tensor" not in text
    for words in (
        "name='fc1'",
        "weight=(30, 60)",
        "bias=(30,)",
        "samples=200",
        "activation='relu'",
        "inputs=(200, 60)",
    ):
        assert words in text
    assert "damping" not in text
    assert "damping=0.5" in str(layer.damped(0.5))
    assert "bias=None" in str(Layer.from_moments(torch.ones(1, 2), torch.eye(2)))


@pytest.mark.parametrize(
    "build",
    [
        lambda layer: NetTrim(layer, 0.1),
        lambda layer: L1Reconstruction(layer, 0.1),
        lambda layer: Reconstruction(layer, Unstructured(0.3)),
    ],
)
def test_a_solution_shows_the_verdict(layer, build):
    solution = solve(build(layer))
    text, proof = str(solution), solution.certificate
    assert len(text.splitlines()) <= 10
    assert "tensor" not in text + repr(solution)
    kept = int((solution.x != 0).sum())
    for words in (
        "30 x 61", f"{kept:,} of 1,830", solution.solver, solution.status.value, f"value {proof.value:.6g}",
        f"bound {proof.bound:.6g}", f"relative gap {proof.relative_gap:.1e}",
    ):  # fmt: skip
        assert words in text
    assert repr(solution) == f"Solution(30 x 61, {solution.status.name}, {proof}, solver={solution.solver})"


def test_a_solution_says_whether_it_is_feasible(layer):
    solution = solve(NetTrim(layer, 0.1), ADMM(max_iter=1, finish=None))
    feasible = replace(solution, certificate=Certificate(2.0, 1.0, 0.0), note="")
    assert str(feasible).splitlines()[2].endswith("relative gap 5.0e-01, feasible")
    off = replace(solution, certificate=Certificate(2.0, 1.0, 1e-9), note="the reason")
    assert str(off).splitlines()[2].endswith("violation 1.0e-09")
    assert str(off).splitlines()[1].endswith("; the reason")
    lost = replace(solution, status=Status.NUMERICAL, certificate=Certificate(math.inf, -math.inf, math.inf))
    assert "bound -inf" in str(lost)
