"""Where the cells of a pattern lie in a layer, derived from the methods that every pattern has.

Cell number c lies where `unfolded(0, 1, 2, ...)` is c, and can never be
kept where `folded` of ones is below 0. In most patterns a cell is a bundle of rows times a set of inputs: one row times
one input, a block's rows times its inputs, all rows times a channel's inputs. The layer is then a grid of B bundles
times K sets, in which cells leave and enter as single weights do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from numbers import Integral

import torch
from torch import Tensor, nn

from convexprune.patterns import KNOWN, Pattern


def check_pattern(pattern: Pattern, shape: tuple[int, int], kernel: int = 1) -> None:
    """Raises TypeError for what is no pattern, ValueError for one that does not fit or whose methods disagree."""
    if isinstance(pattern, type):
        raise TypeError(f"the pattern is the class {pattern.__name__}; give an object of it, such as Unstructured(0.5)")
    lacking = [name for name in ("quota", "folded", "unfolded") if not callable(getattr(pattern, name, None))]
    if lacking:
        # a tensor is many lines
        what, better = ("a tensor", "Support(mask)") if isinstance(pattern, Tensor) else (f"{pattern!r}", "PerRow(0.5)")
        raise TypeError(f"{what} is not a pattern: it lacks {', '.join(lacking)}; give one such as {better}")
    quota = pattern.quota(shape, kernel)
    if not isinstance(quota, Integral) or quota < 0:
        raise ValueError(f"{pattern}: quota is {quota!r}; it must be a count >= 0")
    if type(pattern) in KNOWN:
        return
    sizes = pattern.folded(torch.ones(shape, dtype=torch.float64), kernel)
    if sizes.ndim != 2:
        raise ValueError(f"{pattern}: folded gives {tuple(sizes.shape)}, which is not (groups, cells)")
    numbers = torch.arange(sizes.numel()).reshape(sizes.shape)
    cell = pattern.unfolded(numbers, shape, kernel)
    if tuple(cell.shape) != tuple(shape):
        raise ValueError(f"{pattern}: unfolded gives {tuple(cell.shape)} for a layer of shape {tuple(shape)}")
    # the weights that folded adds up to cell c have mean c and mean square c^2: all of them are numbered c
    sums, squares = (pattern.folded(cell.double() ** power, kernel) for power in (1, 2))
    counts = torch.bincount(cell.flatten(), minlength=sizes.numel()).reshape(sizes.shape)
    wrong = (sums - numbers * counts).abs() + (squares - numbers**2 * counts).abs() > 1e-9 * numbers**2 * counts
    if bool(((sizes >= 0) & (wrong | (sizes != counts) | (counts == 0))).any()):
        raise ValueError(f"{pattern}: unfolded does not give back to each weight the cell that folded adds it to")


@dataclass(frozen=True, eq=False)
class Layout:
    """The cells of a layer (M, N), numbered group by group.

    cell   (M, N) the cell of each weight
    never  (groups, cells) bool: cells that can never be kept
    quota  how many cells each group keeps at most
    """

    cell: Tensor
    never: Tensor
    quota: int

    @classmethod
    def of(cls, pattern: Pattern, shape: tuple[int, int], kernel: int = 1) -> Layout:
        """The layout of a pattern, which `check_pattern` has passed."""
        never = pattern.folded(torch.ones(shape, dtype=torch.float64), kernel) < 0
        numbers = torch.arange(never.numel()).reshape(never.shape)
        return cls(pattern.unfolded(numbers, shape, kernel), never, pattern.quota(shape, kernel))

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return len(self.never)

    @property
    def single(self) -> bool:
        """Whether each cell is one weight."""
        return self.cell.numel() == self.never.numel()

    @property
    def forced(self) -> bool:
        """Whether every group may keep all of its allowed cells, so that there is nothing to choose."""
        return int((~self.never).sum(1).max()) <= self.quota

    @property
    def group(self) -> Tensor:
        """(M, N): the group of each weight."""
        return self.cell // self.never.shape[1]

    @cached_property
    def grid(self) -> Grid | None:
        """The bundles and sets that the cells are made of; None where some cell is no bundle times a set."""
        out, width = self.cell.shape
        if self.single:
            rows, inputs = torch.arange(out), torch.arange(width)
            return Grid(rows, inputs, self.group, ~self.never.flatten()[self.cell])
        inputs, first = _alike(self.cell[0])
        rows, lead = _alike(self.cell[:, 0])
        cells = self.cell[lead][:, first]
        if cells.numel() != self.never.numel() or not torch.equal(cells[rows][:, inputs], self.cell):
            return None
        return Grid(rows, inputs, cells // self.never.shape[1], ~self.never.flatten()[cells])


@dataclass(frozen=True, eq=False)
class Grid:
    """A layer (M, N) as B bundles of at most h rows times K sets of at most w inputs.

    rows     (M,) the bundle of each row
    inputs   (N,) the set of each input
    group    (B, K) the group of each cell
    allowed  (B, K) bool: cells that may be kept
    """

    rows: Tensor
    inputs: Tensor
    group: Tensor
    allowed: Tensor

    @property
    def single(self) -> bool:
        """Whether each cell is one weight."""
        return self.group.numel() == len(self.rows) * len(self.inputs)

    @cached_property
    def apart(self) -> Tensor | None:
        """(B, K): the groups of each bundle numbered from 0, where no group joins two bundles; else None."""
        bundle = torch.arange(len(self.group), device=self.group.device)[:, None].expand_as(self.group)
        owner = torch.zeros(int(self.group.max()) + 1, dtype=torch.long, device=self.group.device)
        owner[self.group.flatten()] = bundle.flatten()
        if not torch.equal(owner[self.group], bundle):
            return None
        ordered, order = self.group.sort(dim=1, stable=True)
        steps = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
        return torch.zeros_like(self.group).scatter_(1, order, nn.functional.pad(steps, (1, 0)))

    @cached_property
    def members(self) -> tuple[Tensor, Tensor]:
        """(B, h): the rows of each bundle, padded with 0, and which of them are real."""
        return _members(self.rows, len(self.group))

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """(K, w): the inputs of each set, padded with 0, and which of them are real."""
        return _members(self.inputs, self.group.shape[1])

    def to(self, device: torch.device) -> Grid:
        """The same on another device."""
        return Grid(*(each.to(device) for each in (self.rows, self.inputs, self.group, self.allowed)))

    def bundled(self, values: Tensor) -> Tensor:
        """(B, h, N): the rows (M, N) of each bundle, padded with zeros."""
        if len(self.group) == len(self.rows):
            return values[:, None]
        index, real = self.members
        return values[index] * real[..., None]

    def unbundled(self, values: Tensor) -> Tensor:
        """(M, N): the inverse of `bundled`."""
        if len(self.group) == len(self.rows):
            return values[:, 0]
        index, real = self.members
        out = values.new_empty(len(self.rows), values.shape[-1])
        out[index[real]] = values[real]
        return out

    def summed(self, values: Tensor) -> Tensor:
        """(R, K): values (R, h, N) of R of the bundles added up over each cell."""
        rows = values[:, 0] if values.shape[1] == 1 else values.sum(1)
        if self.group.shape[1] == len(self.inputs):
            return rows
        return rows.new_zeros(len(rows), self.group.shape[1]).index_add_(1, self.inputs, rows)

    def spread(self, cells: Tensor) -> Tensor:
        """(M, N): the value (B, K) of each weight's cell."""
        return cells if self.single else cells[self.rows][:, self.inputs]

    def holding(self, mask: Tensor) -> Tensor:
        """(B, K) bool: the cells in which a mask (M, N) bool holds any weight."""
        return mask if self.single else self.summed(self.bundled(mask.double())) > 0


def ranks(scores: Tensor, group: Tensor) -> Tensor:
    """The place of each score (n,) in its group (n,), 0 for the largest; ties go to the lower index."""
    order = scores.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]
    begins = torch.bincount(group).cumsum(0).roll(1)
    begins[0] = 0
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group), device=group.device) - begins[group[order]]
    return place


def _alike(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels (n,) numbered from 0 in the order of their first places, and these places."""
    values, numbers = torch.unique(labels, return_inverse=True)
    first = torch.full_like(values, len(labels)).scatter_reduce(0, numbers, torch.arange(len(labels)), "amin")
    return first.argsort().argsort()[numbers], first.sort().values


def _members(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    sizes = torch.bincount(labels, minlength=count)
    real = torch.arange(int(sizes.max()), device=labels.device) < sizes[:, None]
    index = torch.zeros(real.shape, dtype=torch.long, device=labels.device)
    index[real] = labels.argsort(stable=True)
    return index, real
