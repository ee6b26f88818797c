"""A rate-distortion curve: the cost and the distortion of a layer at each level of pruning."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from convexprune.options import number, optional, text, whole

EXACT = 2**53  # integers up to this are exact in float64


@dataclass(frozen=True, eq=False)
class Curve:
    """The pruning levels of one layer; an allocation chooses one of them.

    Args:
        name: The layer's name.
        kept: Number of weights that each level keeps, (K,), in any order.
        distortion: Distortion of each level, (K,), in any unit that is the same for all layers.
        cost: Cost of each level, (K,), at least 0, such as MACs, bytes or microseconds; None takes `kept`.
        total: Number of weights of the layer; None takes the largest `kept`.
        tie: Label; curves with the same label take the same level, and must have the same number of levels.
        weight: The dense weights (out, in), for the rules that look at them: `ErdosRenyiKernel`, `LAMP` and
            `GlobalMagnitude`.
        kernel: Number of kernel positions of each input channel; 1 for a linear layer.

    Raises:
        ValueError: For a curve without levels, lengths that differ, NaN, negative costs, costs above 2^53, and a total
            below what a level keeps.
        TypeError: For fields of another kind.

    Example:
        >>> import convexprune as cp
        >>> from torch import tensor
        >>> curve = cp.Curve("fc", kept=tensor([10, 50, 100]), distortion=tensor([4.0, 1.0, 0.0]))
        >>> curve.fraction
        tensor([0.1000, 0.5000, 1.0000], dtype=torch.float64)
        >>> curve.between(0.2, 1.0).kept
        tensor([ 50., 100.], dtype=torch.float64)
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
        text("name", self.name)
        optional(whole(0))(f"curve {self.name!r}: total", self.total)
        optional(text)(f"curve {self.name!r}: tie", self.tie)
        whole(1)(f"curve {self.name!r}: kernel", self.kernel)
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
        if bool((self.kept != self.kept.round()).any()):
            raise ValueError(
                f"curve {self.name!r}: kept holds {self.kept.tolist()!r:.80}; give whole numbers of weights"
            )
        if float(self.costs.max()) > EXACT:
            raise ValueError(
                f"curve {self.name!r}: a cost of {float(self.costs.max()):g} is beyond 2^53 and would be rounded; use "
                "a larger unit"
            )
        if self.total is None:
            object.__setattr__(self, "total", int(self.kept.max()))
        elif self.total < float(self.kept.max()):
            most = float(self.kept.max())
            raise ValueError(f"curve {self.name!r}: total is {self.total}, and a level keeps {most:g}")
        if self.weight is not None:
            _check_weight(self.name, self.weight)

    @property
    def costs(self) -> Tensor:
        """The cost of each level (K,), float64."""
        assert self.cost is not None  # by __post_init__
        return self.cost

    @property
    def fraction(self) -> Tensor:
        """The fraction of the layer's weights that each level keeps, (K,)."""
        return self.kept / max(self.total or 0, 1)

    def between(self, least: float = 0.0, most: float = 1.0) -> Curve:
        """The curve with only the levels that keep a fraction in [least, most]. Raises ValueError if there is none."""
        number()("least", least)
        number()("most", most)
        inside = (self.fraction >= least) & (self.fraction <= most)
        if not bool(inside.any()):
            raise ValueError(f"curve {self.name!r}: no level keeps between {least:g} and {most:g} of the layer")
        return replace(self, kept=self.kept[inside], distortion=self.distortion[inside], cost=self.costs[inside])

    def priced(self, each: float) -> Curve:
        """The curve with a cost of `each` for every kept weight: its MACs, its bytes, and so on."""
        number(0)(f"curve {self.name!r}: the price", each)
        return replace(self, cost=self.kept * each)


def _check_weight(name: str, weight: Tensor) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        what = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else f"a {type(weight).__name__}"
        raise TypeError(f"curve {name!r}: weight is {what}; give a floating-point tensor (out, in)")
    if weight.layout != torch.strided or weight.device.type == "meta" or not bool(weight.isfinite().all()):
        raise ValueError(f"curve {name!r}: weight is sparse, on the meta device, or holds NaN or inf")


def _row(name: str, key: str, values: Tensor) -> Tensor:
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"curve {name!r}: {key} is {values!r:.80}; give one number for each level") from error
    if values.is_complex() or values.device.type == "meta":
        raise TypeError(f"curve {name!r}: {key} is {values.dtype} on {values.device}; give real numbers")
    values = values.detach().cpu().to(torch.float64)
    if values.ndim != 1:
        raise ValueError(f"curve {name!r}: {key} has shape {tuple(values.shape)}, expected one value for each level")
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"curve {name!r}: {key} holds NaN or inf; measure that level again or leave it out")
    return values
