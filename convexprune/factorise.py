"""Networks whose layers are one sparse matrix or two, whichever errs less with the same number of nonzeros."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.certify.network_error import unguaranteed
from convexprune.forms import adapted
from convexprune.layer import Layer
from convexprune.network import Calibration, read, write
from convexprune.network.coverage import coverage
from convexprune.network.forward import BatchError, check_model, run
from convexprune.network.names import check_untied
from convexprune.network.sharing import sharing
from convexprune.network.traversal import Traversal
from convexprune.network.two_factors import TwoFactors, check_divisible, put_in_place
from convexprune.patterns import Unstructured
from convexprune.problem import Solver, check_solver
from convexprune.problems import Reconstruction, SparseFactors
from convexprune.pruning.layer_by_layer import UNSOLVED, put
from convexprune.report import Report, Settings
from convexprune.report.progress import Teller, Watcher, checked, watched
from convexprune.report.report import described
from convexprune.report.row import Row
from convexprune.rounding import norm_above
from convexprune.solution import Solution
from convexprune.solve import default_solver, rejudged, solve

UNKNOWN: Final = (
    "some layers are two modules, and the bound of a network goes along the operations of the dense one; the rows hold "
    "for each layer by itself"
)
Share = float | int
Keep = Share | Callable[[Layer], Share | None]


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
@watched
def factorise(
    model: nn.Module,
    batches: Calibration | Iterable[Any],
    keep: Keep,
    solver: Solver | None = None,
    mode: str = "cascade",
    *,
    names: Sequence[str] | str | None = None,
    progress: Watcher = None,
) -> tuple[nn.Module, Report]:
    """Write each layer as one sparse matrix or as the product of two, whichever errs less with as many nonzeros.

    A layer that becomes two is a `TwoFactors`: Linear(no bias) and Linear, or the convolution to r channels and one of
    kernel 1. Its row counts the nonzeros of both, each of which costs as many multiplications as a weight of the layer
    did. The row judges the two factors as they are stored. In a cascade the next layer's inputs are made with their
    product, rounded to the model's dtype.

    Args:
        model: The dense network; never changed.
        batches: The calibration data, as for `prune`.
        keep: How many nonzeros a layer may have: a fraction of its weights or a count, or a function from a layer to
            either; where that returns None the layer stays dense.
        solver: For `SparseFactors`; None: its default. One matrix is found by the default of `Reconstruction`.
        mode: As for `prune`.
        names: Which layers, as in `Calibration`, where that does not say.
        progress: Called with a `Progress` at each step; True draws a bar by rich.

    Returns:
        The copy, and the report on it. Its network error is measured; there is no guarantee, and it says why.

    Raises:
        ValueError: For layers that cannot be two (other kinds than Linear and convolutions, groups, hooks, tied
            weights, weights that the model reads by itself, a model that is one layer), and where `keep` leaves every
            layer dense; else what `capture` and the problems raise.
        TypeError: For what is no model or solver.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> small, report = cp.factorise(model, [torch.randn(40, 8)], keep=0.5)
        >>> report.kept <= 48, small(torch.zeros(2, 8)).shape
        (True, torch.Size([2, 4]))
    """
    check_model(model)
    told = checked(progress)
    if solver is not None:
        check_solver(solver)
    calibration = Calibration.of(batches, names)
    tell = Teller(told, calibration)
    walk = Traversal(model, calibration, mode, tell.captured)
    shares = _shares(walk, keep, solver)
    rows = _walked(walk, shares, solver, tell)
    report = _report(walk, rows, tell)
    return walk.pruned, report


def _shares(walk: Traversal, keep: Keep, solver: Solver | None) -> dict[str, Share]:
    """Layer name -> how much it may keep; raises, before the work begins, for what cannot be."""
    shares: dict[str, Share] = {}
    modules: dict[str, None] = {}
    for module, outlines in walk.outlines():
        for layer in outlines:
            share = keep(layer) if callable(keep) else keep
            if share is not None:
                problem = SparseFactors(layer, share)
                adapted(solver or default_solver(problem), problem)
                shares[layer.name], modules[module] = share, None
    if not shares:
        raise ValueError("nothing was factorised: keep(layer) returned None for every layer; return a share for one")
    check_divisible(walk.pruned, list(modules))
    check_untied(walk.pruned, list(modules))
    _check_runs(walk, list(modules))
    return shares


def _check_runs(walk: Traversal, modules: list[str]) -> None:
    """Raise ValueError where the model itself reads a layer's weights, as nn.TransformerEncoderLayer does."""
    trial = sharing(walk.model).eval()
    for name in modules:
        module = trial.get_submodule(name)
        put_in_place(trial, module, TwoFactors.shaped(module, 1))
    try:
        with torch.random.fork_rng(devices=[]):
            run(trial, next(iter(walk.calibration)))
    except BatchError as error:
        raise ValueError(
            f"with two modules in the place of one, {error}; leave the layers whose weights the model reads by itself "
            "out of `names`"
        ) from error


@dataclass(frozen=True, eq=False)
class _Answer:
    """What a layer becomes.

    pair  None where one matrix errs less
    """

    problem: Reconstruction | SparseFactors
    solution: Solution
    pair: TwoFactors | None = None


def _walked(walk: Traversal, shares: dict[str, Share], solver: Solver | None, tell: Teller) -> list[Row]:
    """Every layer solved and written: as products while the walk goes on, and then as the pairs themselves."""
    rows, pairs = [], {}
    for group in walk.groups(()):
        for module, layers in group:
            tell.solving(module, walk.modules.index(module), len(walk.modules))
            for layer in layers:
                if layer.name not in shares:
                    rows.append(_dense(layer, read(walk.pruned, layer.name)))
                    continue
                answer = _solved(layer, shares[layer.name], solver, walk.pruned.get_submodule(module))
                walk.own([module])
                rows.append(_written(walk, layer, answer, Unstructured(shares[layer.name])))
                if answer.pair is not None:
                    pairs[module] = answer.pair
    walk.own()
    for module, pair in pairs.items():
        put_in_place(walk.pruned, walk.pruned.get_submodule(module), pair)
    return rows


def _solved(layer: Layer, share: Share, solver: Solver | None, module: nn.Module) -> _Answer:
    """The better of one matrix and two; the two as they are once they are stored."""
    one, two = Reconstruction(layer, Unstructured(share)), SparseFactors(layer, share)
    single, found = solve(one), solve(two, solver)
    if found.status in UNSOLVED or found.certificate.violation > 0:
        return _Answer(one, single)
    pair = TwoFactors.of(module, *two.factors(found.x), two.bias(found.x))
    found = rejudged(found, two, two.point(*pair.factors()))
    if single.status in UNSOLVED or found.certificate.value < single.certificate.value:
        return _Answer(two, found, pair)
    return _Answer(one, single)


def _written(walk: Traversal, layer: Layer, answer: _Answer, pattern: Unstructured) -> Row:
    """The row of a layer whose weights, one matrix or the product of two, are now in the walk's network."""
    problem, solution, refusal = answer.problem, answer.solution, ""
    if isinstance(problem, SparseFactors):
        write(walk.pruned, layer.name, problem.product(solution.x))
        errors = problem.product_errors(solution.x)
        kept = sum(int(factor.count_nonzero()) for factor in problem.factors(solution.x))
    else:
        refusal = put(walk.pruned, [layer], problem, solution, solution.certificate.violation)
        solution = rejudged(solution, problem, read(walk.pruned, layer.name))
        errors, kept = problem.output_errors(solution.x), int(solution.x[:, : layer.weight.shape[1]].count_nonzero())
    shape = (layer.weight.shape[0], layer.weight.shape[1])
    return Row(
        layer.name, shape, kept, solution.status, solution.certificate, norm_above(errors), described(problem),
        solution.iterations, solution.seconds, solution.trace, wanted=pattern.quota(shape), errors=errors,
        repairs=layer.repairs, module=layer.module, solver=solution.solver, note=solution.note, refusal=refusal,
    )  # fmt: skip


def _dense(layer: Layer, stored: Tensor) -> Row:
    """In a cascade a layer that stays dense has an error: it reads other inputs than its targets were made of."""
    errors = None if layer.aimed is None else layer.error_norms(stored)
    kept = int(stored[:, : layer.weight.shape[1]].count_nonzero())
    return Row(
        layer.name, (layer.weight.shape[0], layer.weight.shape[1]), kept, errors=errors, module=layer.module,
        error=None if errors is None else norm_above(errors), repairs=layer.repairs,
    )  # fmt: skip


def _report(walk: Traversal, rows: list[Row], tell: Teller) -> Report:
    fingerprint, dtype = walk.calibration.fingerprint, next(walk.model.parameters()).dtype
    used = dict.fromkeys(row.solver for row in rows if row.solver)
    settings = Settings(
        walk.mode, "; ".join(used), fingerprint.samples, fingerprint.text, str(dtype).removeprefix("torch."),
        walk.calibration.seed, torch.get_num_threads(), torch.__version__,
    )  # fmt: skip
    covered = coverage(walk.model, walk.modules, walk.chosen.stacks, walk.survey.record.parameters)
    return Report(tuple(rows), unguaranteed(walk, UNKNOWN, tell.measured), settings, None, covered)
