"""A rate-distortion curve: what each level of pruning of a layer costs, and what it loses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

EXACT = 2**53  # integers up to this are exact in float64


@dataclass(frozen=True, eq=False)
class Curve:
    """The levels among which an allocation chooses one for a layer.

    kept        (K,) how many weights each level keeps, in any order
    distortion  (K,) what the level loses; any unit, the same for all layers
    cost        (K,) what it costs, >= 0: weights kept unless told: MACs, bytes, microseconds
    total       how many weights the layer has; the largest `kept` unless told
    tie         curves with the same tie take the same level: they need as many levels
    weight      (out, in): the dense weights, for the rules that look at them (ERK, LAMP, global magnitude)
    kernel      kernel positions behind each input channel; 1 if linear

    Raises ValueError naming the curve for no levels, lengths that differ, NaN, negative costs and costs beyond 2^53.
    """

    name: str
    kept: Tensor
    distortion: Tensor
    cost: Tensor | None = None
    total: int | None = None
    tie: str | None = None
    weight: Tensor | None = None
    kernel: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", _row(self.name, "kept", self.kept))
        object.__setattr__(self, "distortion", _row(self.name, "distortion", self.distortion))
        object.__setattr__(self, "cost", _row(self.name, "cost", self.kept if self.cost is None else self.cost))
        if len(self.kept) == 0:
            raise ValueError(f"curve {self.name!r} has no levels; give at least one")
        for key in ("distortion", "cost"):
            if len(getattr(self, key)) != len(self.kept):
                raise ValueError(
                    f"curve {self.name!r}: {len(getattr(self, key))} values of {key} for {len(self.kept)} levels"
                )
        for key, values in (("kept", self.kept), ("cost", self.costs)):
            if bool((values < 0).any()):
                raise ValueError(f"curve {self.name!r}: {key} has {float(values.min()):g}; it must be >= 0")
        if float(self.costs.max()) > EXACT:
            raise ValueError(
                f"curve {self.name!r}: a cost of {float(self.costs.max()):g} is beyond 2^53 and would be rounded; use "
                "a larger unit"
            )
        if self.total is None:
            object.__setattr__(self, "total", int(self.kept.max()))

    @property
    def costs(self) -> Tensor:
        """(K,), float64."""
        assert self.cost is not None  # by __post_init__
        return self.cost

    @property
    def fraction(self) -> Tensor:
        """(K,): the share of the layer's weights that each level keeps."""
        return self.kept / max(self.total or 0, 1)

    def between(self, least: float = 0.0, most: float = 1.0) -> Curve:
        """Only the levels that keep a fraction in [least, most]. Raises ValueError where none does."""
        inside = (self.fraction >= least) & (self.fraction <= most)
        if not bool(inside.any()):
            raise ValueError(f"curve {self.name!r}: no level keeps between {least:g} and {most:g} of the layer")
        return replace(self, kept=self.kept[inside], distortion=self.distortion[inside], cost=self.costs[inside])

    def priced(self, each: float) -> Curve:
        """The same levels at `each` a kept weight: its MACs (the output positions), its bytes, ..."""
        return replace(self, cost=self.kept * each)


def _row(name: str, key: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    if values.ndim != 1:
        raise ValueError(f"curve {name!r}: {key} has shape {tuple(values.shape)}, expected one value for each level")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"curve {name!r}: {key} holds NaN or inf; measure that level again or leave it out")
    return values
