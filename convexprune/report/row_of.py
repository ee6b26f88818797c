"""The row of a report that a module gets, from its layers, its problem and what was stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from convexprune.forms import EqualityQuadratic, GroupedLeastSquares, LassoProblem, SparseLeastSquares, declared
from convexprune.layer import Layer
from convexprune.problem import LayerProblem
from convexprune.problems import Stacked
from convexprune.report.report import described
from convexprune.report.row import Moments, Row
from convexprune.rounding import norm_above
from convexprune.solution import Solution

GRID: Final = (300, 800)  # a weight pattern is drawn on at most this many cells


def row_of(
    layers: Sequence[Layer], stored: Tensor, problem: LayerProblem | None, solution: Solution | None, refusal: str = ""
) -> Row:
    """The row of a module, or of some of its groups.

    layers    the groups that the problem is about, in the order of their rows
    stored    (M, P): what is in the model now
    problem   None where none was stated
    refusal   why nothing was written, or ""
    """
    kept = stored[:, : layers[0].weight.shape[1]] != 0
    row = Row(
        _title(layers), (kept.shape[0], kept.shape[1]), int(kept.sum()), pattern=_grid(kept),
        repairs=layers[0].repairs, module=layers[0].module,
    )  # fmt: skip
    if problem is None or solution is None:
        return replace(row, **_unasked(layers, stored))
    errors = problem.output_errors(stored)
    return replace(
        row,
        status=solution.status,
        certificate=solution.certificate,
        error=float(errors.norm()),
        errors=errors,
        problem=described(problem),
        iterations=solution.iterations,
        seconds=solution.seconds,
        wanted=_wanted(problem, kept),
        moments=_moments(problem),
        trace=solution.trace,
        refusal=refusal,
        solver=solution.solver,
        note=solution.note,
    )


def _unasked(layers: Sequence[Layer], stored: Tensor) -> dict[str, Any]:
    """The errors of a layer that stays dense: in a cascade it reads other inputs than its targets were made of."""
    if any(layer.aimed is None for layer in layers):
        return {}
    parts = torch.split(stored, len(stored) // len(layers))
    errors = torch.cat([layer.error_norms(x) for layer, x in zip(layers, parts, strict=True)])
    return {"error": norm_above(errors), "errors": errors}


def _title(layers: Sequence[Layer]) -> str:
    """The module's name where all its groups are there, else that of the group, or of the groups."""
    first = layers[0]
    if len(layers) == 1:
        return first.name
    if len(layers) == first.groups:
        return first.module
    return f"{first.module}[{','.join(str(layer.group) for layer in layers)}]"


def _wanted(problem: Any, kept: Tensor) -> int | None:
    """How many weights the pattern allows; None for a problem that has none."""
    if GroupedLeastSquares in declared(problem):
        return int(problem.select(torch.ones(kept.shape)).sum())
    return None


def _moments(problem: LayerProblem) -> Moments | None:
    """Damping and conditioning of a problem that is stated in its layers' moments."""
    parts = problem.parts if isinstance(problem, Stacked) else (problem,)
    layers = [getattr(part, "layer", None) for part in parts]
    known = not {SparseLeastSquares, EqualityQuadratic, LassoProblem}.isdisjoint(declared(parts[0]))
    found = [layer for layer in layers if isinstance(layer, Layer)]
    if not known or len(found) < len(layers):
        return None
    return Moments.of(found)


def _grid(kept: Tensor) -> Tensor:
    """The kept fraction in each cell of a grid no finer than the weights."""
    cells = min(kept.shape[0], GRID[0]), min(kept.shape[1], GRID[1])
    return adaptive_avg_pool2d(kept.float()[None], cells)[0]
