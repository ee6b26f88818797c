"""A theorem applied to an instance: the hypotheses checked, the guaranteed side and the measured side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from convexprune.rounding import down, gamma, norm_above, up


class Figure(NamedTuple):
    """A number as it was computed, and by how much the exact one may be away."""

    value: float
    doubt: float = 0.0

    @classmethod
    def norm(cls, change: Tensor, off: Tensor) -> Figure:
        """|| change ||_2 of entries that are each off by at most `off`."""
        value = float(change.norm())
        return cls(value, norm_above(off) + gamma(change.numel() + 8) * value)

    def times(self, factor: float) -> Figure:
        """The number times a factor >= 0 that took a rounding or two."""
        return Figure(self.value * factor, up(self.doubt * factor, gamma(4) * abs(self.value * factor)))

    def at_most(self, limit: Figure) -> bool | None:
        """Whether the exact number is at most another; None where rounding hides it."""
        least, most = (to(self.value, self.doubt) if self.doubt else self.value for to in (down, up))
        low, high = (to(limit.value, limit.doubt) if limit.doubt else limit.value for to in (down, up))
        return True if most <= low else False if least > high else None


@dataclass(frozen=True)
class Hypothesis:
    """A hypothesis of the theorem in words, and whether it holds for the instance; None where rounding hides it."""

    text: str
    holds: bool | None


@dataclass(frozen=True)
class Statement:
    """`measured` <= `guaranteed`, if the hypotheses hold.

    source  the paper
    doubt   by how much the two figures together may be off, as computed
    """

    name: str
    source: str
    hypotheses: tuple[Hypothesis, ...]
    guaranteed: float
    measured: float
    doubt: float = 0.0

    @property
    def applies(self) -> bool:
        """True if every hypothesis certainly holds; otherwise nothing is guaranteed."""
        return all(hypothesis.holds is True for hypothesis in self.hypotheses)

    @property
    def true(self) -> bool:
        """False if the inequality certainly fails, whether or not the theorem applies."""
        return self.measured <= up(self.guaranteed, self.doubt)

    @property
    def margin(self) -> float:
        """guaranteed - measured."""
        return self.guaranteed - self.measured

    def __str__(self) -> str:
        """One line for the figures, one for each hypothesis that is not known to hold."""
        verdict = "guaranteed" if self.applies else "not guaranteed, for the hypotheses:"
        lines = [f"{self.name} ({self.source}): {self.measured:.6g} <= {self.guaranteed:.6g}, {verdict}"]
        lines += [f"  fails: {each.text}" for each in self.hypotheses if each.holds is False]
        lines += [f"  hidden by rounding: {each.text}" for each in self.hypotheses if each.holds is None]
        return "\n".join(lines)
