"""The inverse Gram matrix of every support, kept up to date while cells leave and enter in batches.

A bundle of h neurons shares a support S, made of whole cells; a single weight is a cell of one input in a bundle of one
neuron. P = (H_SS)^-1 and W = C_S P are the bundle's least-squares weights. With the inputs q of a cell:

    leaving    q:  W <- W - W_q (P_qq)^-1 P_q:,    P <- P - P_:q (P_qq)^-1 P_q:,    at the cost tr W_q (P_qq)^-1 W_q^T
    entering   A:  Y = P H_SA - I_A,  Z = (H_AA - H_AS P H_SA)^-1,  W <- W - R_A Z Y^T,  P <- P + Y Z Y^T,  R = C - W H

Removals are gathered and applied to P as one matrix product, `BLOCK` at a time: one by one they are memory-bound.
Source: Hassibi, Stork 1993; Frantar, Singh, Alistarh 2022, eq. 4; the block inverse.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from convexprune.layout import Grid
from convexprune.solvers.least_squares.grams import Grams
from convexprune.solvers.least_squares.spd_inverse import spd_inverse

CACHE = 2**21  # bytes
BLOCK = 32  # inputs that leave before P is updated


class SupportInverses:
    """P and W of R bundles in slots: slot j of bundle i holds cell `index[i, j]` where `live[i, j]`.

    grams, one for each bundle, with unit diagonal; cross (R, h, N), mask (R, K) bool. `ridge` (R, 1) is added to the
    diagonal; `spare` slots stay free, so that this number of cells can enter without larger arrays; cells in `pinned`
    (R, K) bool never leave; `grid` says which inputs a cell has, and is None where cell k is input k.
    Raises torch.linalg.LinAlgError where a support's Gram matrix cannot be factored.
    """

    def __init__(
        self,
        grams: Grams,
        cross: Tensor,
        mask: Tensor,
        ridge: Tensor,
        spare: int = 0,
        pinned: Tensor | None = None,
        grid: Grid | None = None,
    ) -> None:
        self.grams, self.cross, self.pinned, self.ridge = grams, cross, pinned, ridge
        self.cells = None if grid is None or grid.group.shape[1] == cross.shape[2] else grid.places
        self.width = 1 if self.cells is None else self.cells[0].shape[1]
        self.count = mask.shape[1]
        self.bundles = torch.arange(len(mask), device=mask.device)
        counts = mask.sum(1)
        held = int(counts.max())
        slots = min(held + spare, self.count)
        self.index = torch.argsort(mask.logical_not(), dim=1, stable=True)[:, :slots]
        self.live = torch.arange(slots, device=mask.device) < counts[:, None]
        self.inverse = self._factored(held * self.width)
        self.pivots = self._pivots()
        self.weights = torch.matmul(self._taken(cross), self.inverse)
        self._moves = cross.new_zeros(len(mask), BLOCK + self.width - 1, slots * self.width)
        self._waiting = 0
        self.worn = False

    def _inputs(self, index: Tensor) -> Tensor:
        """(R, a w): the inputs of the cells (R, a), padding included."""
        return index if self.cells is None else self.cells[0][index].flatten(1)

    def _real(self, index: Tensor, live: Tensor) -> Tensor:
        """(R, a w) bool: which of these are there, for cells (R, a) that are `live`."""
        return live if self.cells is None else (self.cells[1][index] & live[..., None]).flatten(1)

    def _taken(self, values: Tensor) -> Tensor:
        """(R, h, slots w): the values (R, h, N) in their slots."""
        places = self._inputs(self.index)[:, None].expand(-1, values.shape[1], -1)
        return torch.gather(values, 2, places) * self._real(self.index, self.live)[:, None]

    def _factored(self, held: int) -> Tensor:
        """P, zero beyond the first `held` places of each bundle."""
        places, there = self._inputs(self.index), self._real(self.index, self.live)
        bundles, slots = places.shape
        inverse = self.cross.new_empty(bundles, slots, slots)
        inverse[:, held:], inverse[:, :held, held:] = 0, 0
        # a few bundles at a time: what the products read then stays in the cache
        few = max(1, CACHE // (self.cross.element_size() * held * held + 1))
        for begin in range(0, bundles, few):
            which = slice(begin, begin + few)
            index = places[which, :held]
            block = self.grams[which].blocks(index, index)
            real = there[which, :held].to(block.dtype)
            block.mul_(real[:, :, None]).mul_(real[:, None, :])
            block.diagonal(dim1=1, dim2=2).copy_(1 + self.ridge[which] * real)
            inverse[which, :held, :held] = spd_inverse(block).mul_(real[:, :, None]).mul_(real[:, None, :])
        return inverse

    def _pivots(self) -> Tensor:
        """P_qq of each slot: (R, slots), or (R, slots, w, w)."""
        if self.width == 1:
            return self.inverse.diagonal(dim1=1, dim2=2).clone()
        size, width = self.live.shape, self.width
        apart = self.inverse.view(size[0], size[1], width, size[1], width)
        return apart.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).clone()

    @property
    def mask(self) -> Tensor:
        """(R, K) bool: the supports now."""
        blank = torch.zeros(len(self.live), self.count, dtype=torch.int8, device=self.live.device)
        return blank.scatter_add_(1, self.index, self.live.to(torch.int8)).bool()

    @property
    def scattered(self) -> Tensor:
        """(R, h, N): the weights now."""
        there = self._real(self.index, self.live)[:, None]
        places = self._inputs(self.index)[:, None].expand_as(self.weights)
        return torch.zeros_like(self.cross).scatter_add_(2, places, self.weights * there)

    @property
    def costs(self) -> Tensor:
        """(R, slots): increase of the bundle's value when a cell is removed; inf in free slots and where pinned."""
        may = self.live if self.pinned is None else self.live & ~self.pinned.gather(1, self.index)
        if self.width == 1:
            squares = self.weights.square()
            rises = (squares[:, 0] if squares.shape[1] == 1 else squares.sum(1)) / self.pivots
        else:
            weights = self._parted(self.weights)
            root = self._rooted(self.pivots, self.index, self.live)
            rises = torch.linalg.solve_triangular(root, weights, upper=False).square().sum((2, 3))
        return torch.where(may, rises, torch.inf)

    def _rooted(self, pivots: Tensor, index: Tensor, live: Tensor) -> Tensor:
        """Cholesky factors of pivots (R, a, w, w) of cells (R, a); the identity in what is not there."""
        there = self._real(index, live).reshape(*index.shape, self.width).to(pivots.dtype)
        block = pivots * there[..., :, None] * there[..., None, :] + torch.diag_embed(1 - there)
        root: Tensor = torch.linalg.cholesky(block)
        return root

    def _parted(self, values: Tensor) -> Tensor:
        """(R, slots, w, k): the parts of values (R, k, slots w) in each slot."""
        return values.reshape(*values.shape[:2], -1, self.width).permute(0, 2, 3, 1)

    def narrowed(self, which: Tensor) -> SupportInverses:
        """The inverses of the bundles `which` (indices) only."""
        self.settle()
        part = copy.copy(self)
        for name in ("grams", "cross", "ridge", "index", "live", "inverse", "pivots", "weights", "_moves", "pinned"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[which])
        part.bundles = torch.arange(len(which), device=self.cross.device)
        return part

    def leave(self, slots: Tensor, chosen: Tensor) -> None:
        """Remove the cell in `slots` (R,) of each bundle that is `chosen` (R,) bool."""
        if self._waiting >= BLOCK:
            self.settle()
        width, end = self.width, self._waiting + self.width
        moves = self._moves[:, : self._waiting]
        at = slots[:, None] * width + torch.arange(width, device=slots.device)  # (R, w)
        rows = self.inverse[self.bundles[:, None], at]  # (R, w, slots w)
        if self._waiting:
            own = moves.gather(2, at[:, None].expand(-1, self._waiting, -1))
            rows = torch.baddbmm(rows, own.mT, moves, alpha=-1)
        size = self.weights.gather(2, at[:, None].expand(-1, self.weights.shape[1], -1))  # (R, h, w)
        if width == 1:
            root = self.pivots.gather(1, slots[:, None])[..., None].clamp(min=1e-30).sqrt()
            unit, size = torch.where(chosen[:, None, None], rows / root, 0.0), size / root
            self.weights.addcmul_(unit, size, value=-1)
            self.pivots.addcmul_(unit[:, 0], unit[:, 0], value=-1).clamp_(min=1e-30)
        else:
            pivot = self.pivots[self.bundles, slots][:, None]
            cell, live = (each.gather(1, slots[:, None]) for each in (self.index, self.live))
            root = self._rooted(pivot, cell, live & chosen[:, None])[:, 0]
            unit = torch.linalg.solve_triangular(root, rows, upper=False) * chosen[:, None, None]
            self.weights -= torch.linalg.solve_triangular(root, size.mT, upper=False).mT @ unit
            parts = self._parted(unit)
            self.pivots -= parts @ parts.mT
        self._moves[:, self._waiting : end] = unit
        self._waiting = end
        gone = torch.zeros_like(self.live).scatter_(1, slots[:, None], chosen[:, None])
        self.live &= ~gone

    def settle(self) -> None:
        """Apply the removals that wait to P."""
        if self._waiting:
            moves = self._moves[:, : self._waiting]
            self.inverse.baddbmm_(moves.mT, moves, alpha=-1)
            self._waiting = 0

    def _widen(self, slots: int) -> None:
        """Append free slots, up to `slots` in all."""
        more = slots - self.live.shape[1]
        if more > 0:
            self.index, self.live = (nn.functional.pad(each, (0, more)) for each in (self.index, self.live))
            wider = more * self.width
            self.weights = nn.functional.pad(self.weights, (0, wider))
            self.inverse = nn.functional.pad(self.inverse, (0, wider, 0, wider))
            self._moves = self.inverse.new_zeros(len(self.live), self._moves.shape[1], slots * self.width)

    def enter(self, columns: Tensor, chosen: Tensor) -> None:
        """Add cells `columns` (R, a) to each bundle's support where `chosen` (R, a) bool: the first of each row.

        A bundle for which the new block cannot be factored in the working precision takes none of them, and `worn` is
        set: its inverse has lost its digits and wants to be computed afresh.
        """
        self.settle()
        wanted = torch.maximum(self.live.sum(1) + chosen.sum(1), torch.full_like(self.bundles, columns.shape[1]))
        self._widen(int(wanted.max()))
        free = torch.argsort(self.live.to(torch.int8), dim=1, stable=True)[:, : columns.shape[1]]
        live, new = (self._real(*each).to(self.cross.dtype) for each in ((self.index, self.live), (columns, chosen)))
        places, coming = self._inputs(self.index), self._inputs(columns)
        self.inverse.mul_(live[:, :, None]).mul_(live[:, None, :])  # rounding errors of weights that have left
        self.weights.mul_(live[:, None])
        facing = self.grams.blocks(places, coming).mul_(new[:, None])
        lift = torch.matmul(self.inverse, facing)  # P H_SA
        schur = self.grams.blocks(coming, coming).mul_(new[:, :, None]).mul_(new[:, None])
        schur.baddbmm_((facing * live[:, :, None]).mT, lift, alpha=-1)
        schur.diagonal(dim1=1, dim2=2).add_(1 + (self.ridge - 1) * new)
        slope = self.cross.gather(2, coming[:, None].expand(-1, self.cross.shape[1], -1))
        slope = slope - torch.matmul(self.weights, facing)
        root, failed = torch.linalg.cholesky_ex(schur)
        if bool(failed.any()):
            self.worn = True
            fine = failed == 0
            root = torch.where(
                fine[:, None, None], root, torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
            )
            chosen, new, lift = chosen & fine[:, None], new * fine[:, None], lift * fine[:, None, None]
        at = (free[..., None] * self.width + torch.arange(self.width, device=free.device)).flatten(1)
        lift[self.bundles[:, None], at, torch.arange(at.shape[1], device=free.device)] -= new
        half = torch.linalg.solve_triangular(root, lift.mT, upper=False)  # (R, a w, slots w)
        gain = torch.linalg.solve_triangular(root, (slope * new[:, None]).mT, upper=False)  # (R, a w, h)
        self.weights -= torch.matmul(gain.mT, half)
        self.inverse.baddbmm_(half.mT, half)
        self.pivots = self._pivots()
        if self.width == 1:
            self.pivots.clamp_(min=1e-30)
        self.index = self.index.scatter(1, free, torch.where(chosen, columns, self.index.gather(1, free)))
        self.live = self.live.scatter(1, free, self.live.gather(1, free) | chosen)
