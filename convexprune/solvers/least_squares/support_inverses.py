"""The inverse Gram matrix of every neuron's support, kept up to date while weights leave and enter in batches.

For a neuron with support S, P = (H_SS)^-1 and w = P c_S are its least-squares weights. With p = P e_q:

    leaving    q:  w <- w - p w_q / P_qq,     P <- P - p p^T / P_qq,         the value rises by w_q^2 / P_qq
    entering   A:  Y = P H_SA - I_A,  Z = (H_AA - H_AS P H_SA)^-1,  w <- w - Y Z r_A,  P <- P + Y Z Y^T,  r = c - H w

Removals are gathered and applied to P as one matrix product, `BLOCK` at a time: one by one they are memory-bound.
Source: Hassibi, Stork 1993; Frantar, Singh, Alistarh 2022, eq. 4; the block inverse.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from convexprune.solvers.least_squares.grams import Grams
from convexprune.solvers.least_squares.spd_inverse import spd_inverse

CACHE = 2**21  # bytes
BLOCK = 32  # removals that wait before P is updated


class SupportInverses:
    """P and w of R neurons in slots: slot j of neuron i holds input `index[i, j]` where `live[i, j]`.

    grams with unit diagonal, cross (R, N), mask (R, N) bool. `ridge` (R, 1) is added to the diagonal; `spare` slots
    are left free, so that so many entries need no larger arrays; weights in `pinned` (R, N) bool never leave.
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
    ) -> None:
        self.grams, self.cross, self.pinned, self.ridge = grams, cross, pinned, ridge
        self.neurons = torch.arange(len(mask), device=mask.device)
        counts = mask.sum(1)
        held = int(counts.max())
        slots = min(held + spare, mask.shape[1])
        self.index = torch.argsort(mask.logical_not(), dim=1, stable=True)[:, :slots]
        self.live = torch.arange(slots, device=mask.device) < counts[:, None]
        self.inverse = self._factored(held)
        self.diagonal = self.inverse.diagonal(dim1=1, dim2=2).clone()
        self.weights = torch.matmul(self.inverse, self._taken(cross)[..., None])[..., 0]
        self._moves = cross.new_zeros(len(mask), BLOCK, slots)
        self._waiting = 0
        self.worn = False

    def _taken(self, values: Tensor) -> Tensor:
        return torch.gather(values, 1, self.index) * self.live

    def _factored(self, held: int) -> Tensor:
        """P, zero beyond the first `held` slots of each neuron."""
        neurons, slots = self.index.shape
        inverse = self.cross.new_empty(neurons, slots, slots)
        inverse[:, held:], inverse[:, :held, held:] = 0, 0
        # a few neurons at a time: what the products read then stays in the cache
        few = max(1, CACHE // (self.cross.element_size() * held * held + 1))
        for begin in range(0, neurons, few):
            which = slice(begin, begin + few)
            index, live = self.index[which, :held], self.live[which, :held]
            block = self.grams[which].blocks(index, index)
            real = live.to(block.dtype)
            block.mul_(real[:, :, None]).mul_(real[:, None, :])
            block.diagonal(dim1=1, dim2=2).copy_(1 + self.ridge[which] * real)
            inverse[which, :held, :held] = spd_inverse(block).mul_(real[:, :, None]).mul_(real[:, None, :])
        return inverse

    @property
    def mask(self) -> Tensor:
        """(R, N) bool: the supports now."""
        blank = torch.zeros_like(self.cross, dtype=torch.int8)
        return blank.scatter_add_(1, self.index, self.live.to(torch.int8)).bool()

    @property
    def scattered(self) -> Tensor:
        """(R, N): the weights now."""
        return torch.zeros_like(self.cross).scatter_add_(1, self.index, self.weights * self.live)

    @property
    def costs(self) -> Tensor:
        """(R, slots): what each weight's removal adds to the neuron's value; inf in free slots and where pinned."""
        may = self.live if self.pinned is None else self.live & ~self.pinned.gather(1, self.index)
        return torch.where(may, self.weights.square() / self.diagonal, torch.inf)

    def narrowed(self, which: Tensor) -> SupportInverses:
        """The inverses of the neurons `which` (indices) only."""
        self.settle()
        part = copy.copy(self)
        for name in ("grams", "cross", "ridge", "index", "live", "inverse", "diagonal", "weights", "_moves", "pinned"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[which])
        part.neurons = torch.arange(len(which), device=self.cross.device)
        return part

    def leave(self, slots: Tensor, chosen: Tensor) -> None:
        """Remove the weight in `slots` (R,) of each neuron that is `chosen` (R,) bool."""
        if self._waiting == BLOCK:
            self.settle()
        moves = self._moves[:, : self._waiting]
        column = self.inverse[self.neurons, slots]
        if self._waiting:
            own = moves.gather(2, slots[:, None, None].expand(-1, self._waiting, 1))
            column = torch.baddbmm(column[:, None], own.mT, moves, alpha=-1)[:, 0]
        pivot = self.diagonal.gather(1, slots[:, None])
        unit = torch.where(chosen[:, None], column / pivot.clamp(min=1e-30).sqrt(), 0.0)
        size = self.weights.gather(1, slots[:, None]) / pivot.clamp(min=1e-30).sqrt()
        self.weights.addcmul_(unit, size, value=-1)
        self.diagonal.addcmul_(unit, unit, value=-1).clamp_(min=1e-30)
        self._moves[:, self._waiting] = unit
        self._waiting += 1
        gone = torch.zeros_like(self.live).scatter_(1, slots[:, None], chosen[:, None])
        self.live &= ~gone

    def settle(self) -> None:
        """Apply the removals that wait to P."""
        if self._waiting:
            moves = self._moves[:, : self._waiting]
            self.inverse.baddbmm_(moves.mT, moves, alpha=-1)
            self._waiting = 0

    def _widen(self, slots: int) -> None:
        """Free slots at the end, until there are so many in all."""
        more = slots - self.live.shape[1]
        if more > 0:
            self.index, self.live = (nn.functional.pad(each, (0, more)) for each in (self.index, self.live))
            self.weights = nn.functional.pad(self.weights, (0, more))
            self.inverse = nn.functional.pad(self.inverse, (0, more, 0, more))
            self._moves = self.inverse.new_zeros(len(self.live), BLOCK, slots)

    def enter(self, columns: Tensor, chosen: Tensor) -> None:
        """Add inputs `columns` (R, a) to each neuron's support where `chosen` (R, a) bool: the first of each row.

        A neuron for which the new block cannot be factored in the working precision takes none of them, and `worn` is
        set: its inverse has lost its digits and wants to be computed afresh.
        """
        self.settle()
        wanted = torch.maximum(self.live.sum(1) + chosen.sum(1), torch.full_like(self.neurons, columns.shape[1]))
        self._widen(int(wanted.max()))
        free = torch.argsort(self.live.to(torch.int8), dim=1, stable=True)[:, : columns.shape[1]]
        live, new = self.live.to(self.cross.dtype), chosen.to(self.cross.dtype)
        self.inverse.mul_(live[:, :, None]).mul_(live[:, None, :])  # rounding errors of weights that have left
        self.weights.mul_(live)
        facing = self.grams.blocks(self.index, columns).mul_(new[:, None])
        lift = torch.matmul(self.inverse, facing)  # P H_SA
        schur = self.grams.blocks(columns, columns).mul_(new[:, :, None]).mul_(new[:, None])
        schur.baddbmm_((facing * live[:, :, None]).mT, lift, alpha=-1)
        schur.diagonal(dim1=1, dim2=2).add_(1 + (self.ridge - 1) * new)
        slope = self.cross.gather(1, columns) - torch.matmul(facing.mT, self.weights[..., None])[..., 0]
        root, failed = torch.linalg.cholesky_ex(schur)
        if bool(failed.any()):
            self.worn = True
            fine = failed == 0
            root = torch.where(
                fine[:, None, None], root, torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
            )
            chosen, new, lift = chosen & fine[:, None], new * fine[:, None], lift * fine[:, None, None]
        lift[self.neurons[:, None], free, torch.arange(free.shape[1], device=free.device)] -= new
        half = torch.linalg.solve_triangular(root, lift.mT, upper=False)  # (R, a, slots)
        gain = torch.linalg.solve_triangular(root, (slope * new)[..., None], upper=False)
        self.weights -= torch.matmul(half.mT, gain)[..., 0]
        self.inverse.baddbmm_(half.mT, half)
        self.diagonal = self.inverse.diagonal(dim1=1, dim2=2).clone().clamp_(min=1e-30)
        self.index = self.index.scatter(1, free, torch.where(chosen, columns, self.index.gather(1, free)))
        self.live = self.live.scatter(1, free, self.live.gather(1, free) | chosen)
