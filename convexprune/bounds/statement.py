"""A theorem applied to an instance: the hypotheses checked, the guaranteed side and the measured side."""

from __future__ import annotations

from dataclasses import dataclass

ROUNDING = 1e-9  # relative rounding error that float64 may add to either side


@dataclass(frozen=True)
class Hypothesis:
    """A hypothesis of the theorem in words, and whether it holds for the instance."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Statement:
    """`measured` <= `guaranteed`, if the hypotheses hold.

    source  the paper
    """

    name: str
    source: str
    hypotheses: tuple[Hypothesis, ...]
    guaranteed: float
    measured: float

    @property
    def applies(self) -> bool:
        """True if every hypothesis holds; otherwise nothing is guaranteed."""
        return all(hypothesis.holds for hypothesis in self.hypotheses)

    @property
    def true(self) -> bool:
        """True if the inequality holds up to rounding, whether or not the theorem applies."""
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
