"""A theorem on an instance: its hypotheses, checked; the side it guarantees, and the side that was measured."""

from __future__ import annotations

from dataclasses import dataclass

ROUNDING = 1e-9  # relative: what float64 may add to either side


@dataclass(frozen=True)
class Hypothesis:
    """Something that the theorem asks for, in words, and whether it is so here."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Statement:
    """`measured` <= `guaranteed`, if the hypotheses hold.

    source  paper and number
    """

    name: str
    source: str
    hypotheses: tuple[Hypothesis, ...]
    guaranteed: float
    measured: float

    @property
    def applies(self) -> bool:
        """Whether every hypothesis holds: only then is anything guaranteed."""
        return all(hypothesis.holds for hypothesis in self.hypotheses)

    @property
    def true(self) -> bool:
        """Whether the inequality is as the theorem says, up to rounding; also where it does not apply."""
        return self.measured <= self.guaranteed * (1 + ROUNDING) + 1e-300

    @property
    def margin(self) -> float:
        """guaranteed - measured."""
        return self.guaranteed - self.measured

    def __str__(self) -> str:
        """One line for the figures, one for each hypothesis that fails."""
        verdict = "guaranteed" if self.applies else "not guaranteed, the hypotheses fail:"
        lines = [f"{self.name} ({self.source}): {self.measured:.6g} <= {self.guaranteed:.6g}, {verdict}"]
        lines += [f"  fails: {each.text}" for each in self.hypotheses if not each.holds]
        return "\n".join(lines)
