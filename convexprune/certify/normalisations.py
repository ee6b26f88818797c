"""LayerNorm, RMSNorm and GroupNorm: what divides a row by its own norm, as one step or written out in a forward.

Of a row u of N entries, less its mean where the norm is centred, they make

    gamma sqrt(N) u / s(u) + beta,   s(u) = sqrt(|u|^2 + N eps)

which are the first N entries of (u, sqrt(N eps)) over its norm. By Dunkl and Williams, American Mathematical Monthly
71, 1964, || x / |x| - y / |y| || <= 2 |x - y| / (|x| + |y|). So a row's change grows by at most

    2 sqrt(N) max |gamma| / (s(u) + s(v))

and over all rows by the largest of these. s(u) and s(v) are those of the rows that the two networks were seen to make.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from convexprune.certify.operations import Known, arguments, casts
from convexprune.network.call import Reference
from convexprune.network.kinds import ADDITIONS, CASTS, PRODUCTS, QUOTIENTS
from convexprune.network.recording import Record, Step
from convexprune.rounding import UNIT, gamma, lowered, up


@dataclass(frozen=True)
class Normalisation:
    """One of these steps.

    source   the number of the tensor that it normalises
    width    N
    weight   the number of gamma, where it is a parameter for the entries of a row
    beside   the number of the factor 1 / s(u) where it is written out, which is computed from the source
    """

    source: int
    width: int
    eps: float
    scale: float
    centred: bool
    weight: int | None = None
    beside: int | None = None

    def gain(self, sizes: float) -> float:
        """Of rows whose s(u) + s(v) is at least `sizes`; without eps a row of zeros has none, and it is inf."""
        floor = 2 * math.sqrt(self.width * self.eps) * (1 - 8 * UNIT)
        least = max(sizes, floor)
        if not least > 0:
            return math.inf
        gain = 2 * math.sqrt(self.width) * self.scale / least
        return up(gain, 8 * UNIT * gain)

    def sizes(self, one: Tensor, two: Tensor) -> float:
        """The least s(u) + s(v) of the rows u, v that differ, rounded down; 0 where they are no real numbers."""
        if not (one.is_floating_point() and two.is_floating_point()):
            return 0.0
        both = self._rows(one) + self._rows(two)
        differ = (one != two).reshape(-1, self.width).any(1)
        if not bool(differ.any()):
            return math.inf
        least = float(both[differ].min()) * (1 - 4 * UNIT)
        return least if math.isfinite(least) else 0.0

    def _rows(self, value: Tensor) -> Tensor:
        rows = value.detach().double().reshape(-1, self.width)
        lost = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        if self.centred:
            # a mean is off by gamma_N |u| / sqrt(N), an entry by that and its own rounding
            lost = gamma(2 * self.width + 8) * torch.linalg.vector_norm(rows, dim=1)
            rows = rows - rows.mean(1, keepdim=True)
        norms = lowered(torch.linalg.vector_norm(rows, dim=1), self.width + 4) - lost
        return lowered((norms.clamp(min=0).square() + self.width * self.eps).sqrt(), 8)


def normalisations(record: Record, known: Known) -> dict[int, Normalisation]:
    """Those of a record, by the number of what they make."""
    makers = {number: step for step in record.steps for number in step.makes}
    found = {}
    for step in record.steps:
        if len(step.makes) != 1 or len(step.sizes) != 2 or step.call is None or step.layer is not None:
            continue
        try:
            norm = _as_a_step(step, known) if step.operation in _SIGNATURES else _written_out(step, makers)
        except (TypeError, ValueError):  # arguments of another kind: it is no such step
            norm = None
        if norm is not None:
            found[step.makes[0]] = norm
    return found


def _as_a_step(step: Step, known: Known) -> Normalisation | None:
    given = arguments(step, _SIGNATURES[step.operation], known)
    source, size = given["input"], step.sizes[0]
    if step.operation == "group_norm":
        groups, whole = given["num_groups"], math.prod(size[1:])
        width = whole // groups
    else:
        shape = given["normalized_shape"]
        axes = 1 if isinstance(shape, int) else len(shape)
        width = math.prod(size[len(size) - axes :])
        if axes >= len(size):
            return None  # the samples are in its rows
    eps = given["eps"] if given["eps"] is not None else 0.0  # a unit of rounding, which can only help
    scale = _largest(given["weight"])
    if not isinstance(source, Reference) or not _positive(eps) or scale is None or not width:
        return None
    weight = arguments(step, _SIGNATURES[step.operation], lambda number: None)["weight"]
    by_entry = isinstance(weight, Reference) and step.operation != "group_norm"
    centred = step.operation != "rms_norm"
    return Normalisation(source.number, width, float(eps), scale, centred, weight.number if by_entry else None)


def _largest(weight: Any) -> float | None:
    if weight is None:
        return 1.0
    return float(weight.detach().double().abs().max()) if isinstance(weight, Tensor) else None


def _positive(eps: Any) -> bool:
    return isinstance(eps, (int, float)) and 0 <= eps < math.inf


def _written_out(step: Step, makers: Mapping[int, Step]) -> Normalisation | None:
    """x rsqrt(mean(x^2) + eps), or x / sqrt(mean(x^2) + eps), over the last axis."""
    root = "rsqrt" if step.operation in PRODUCTS else "sqrt" if step.operation in QUOTIENTS else None
    if root is None or len(step.reads) != 2:
        return None
    assert step.call is not None
    given = step.call.args
    if step.call.kwargs or len(given) != 2 or not all(isinstance(each, Reference) for each in given):
        return None
    orders = [given, given[::-1]] if root == "rsqrt" else [given]
    for source, factor in orders:
        made = makers.get(factor.number)
        if made is not None and _takes(made, root):
            found = _mean_square(made.reads[0], makers)
            if found and found[0] == _origin(source.number, makers) and found[1] == step.sizes[1]:
                return Normalisation(source.number, step.sizes[1][-1], found[2], 1.0, False, beside=factor.number)
    return None


def _takes(step: Step, root: str) -> bool:
    """Whether it is the root, or x ** -0.5."""
    if step.call is None or len(step.reads) != 1 or step.call.kwargs:
        return False
    given = step.call.args[1:]
    return (step.operation == root and not given) or (
        root == "rsqrt" and step.operation == "pow" and len(given) == 1 and given[0] == -0.5
    )


def _mean_square(number: int, makers: Mapping[int, Step]) -> tuple[int, tuple[int, ...], float] | None:
    """Of mean(x^2) + eps over the last axis: the number of x, its shape, and eps."""
    total = makers.get(number)
    eps, inner = 0.0, number
    if total is not None and total.operation in ADDITIONS:
        assert total.call is not None
        given = total.call.args
        numbers = [each for each in given if _positive(each)]
        if len(given) != 2 or len(numbers) != 1 or len(total.reads) != 1 or total.call.kwargs:
            return None
        eps, inner = float(numbers[0]), total.reads[0]
    mean = makers.get(inner)
    if mean is None or mean.operation != "mean" or len(mean.sizes) != 2 or len(mean.reads) != 1:
        return None
    size, kept = mean.sizes
    square = makers.get(mean.reads[0])
    if len(size) < 2 or kept != (*size[:-1], 1) or square is None or not _squares(square):
        return None
    return _origin(square.reads[0], makers), size, eps


def _squares(step: Step) -> bool:
    if step.call is None or step.call.kwargs or len(set(step.reads)) != 1:
        return False
    given = step.call.args
    if step.operation == "pow":
        return len(given) == 2 and isinstance(given[0], Reference) and _positive(given[1]) and given[1] == 2
    if step.operation == "square":
        return len(given) == 1
    return step.operation in PRODUCTS and len(given) == 2 and len(step.reads) == 2


def _origin(number: int, makers: Mapping[int, Step]) -> int:
    """The tensor of the same numbers, but for rounding, that casts made this one of."""
    step = makers.get(number)
    while step is not None and step.operation in CASTS and len(step.reads) == 1 and casts(step):
        number = step.reads[0]
        step = makers.get(number)
    return number


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: Any = True
) -> None: ...


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> None: ...


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: Any = True
) -> None: ...


_SIGNATURES: Final[Mapping[str, Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
}
