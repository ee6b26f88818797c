"""The levels of a path from dense to sparse that were tested on held-out samples: risk, upper bound and verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from convexprune.report.row import number, percent


@dataclass(frozen=True)
class PathLevel:
    """One network of the path.

    setting    the number of the path: an epsilon, a budget
    measured   the mean loss over the held-out samples
    bound      an upper bound of the expected loss, for this level alone
    certified  whether the bound is at most the risk wanted; the path ends at the first level where it is not
    """

    setting: float
    kept: int
    total: int
    measured: float
    bound: float
    certified: bool


@dataclass(frozen=True)
class RiskPath:
    """What was wanted, and the levels that were tested, from dense to sparse; the last certified one is returned.

    With probability `confidence` over the draw of the held-out samples, no level whose expected loss exceeds `wanted`
    is certified. That holds for all levels together; each level's own bound holds with this confidence alone.
    """

    risk: str
    wanted: float
    confidence: float
    samples: int
    rule: str  # how the upper bounds are computed
    planned: int  # levels of the whole path
    levels: tuple[PathLevel, ...]

    @property
    def certified(self) -> PathLevel | None:
        """The last level that was certified."""
        return next((level for level in reversed(self.levels) if level.certified), None)

    def lines(self) -> tuple[str, ...]:
        """Sentences on what is certified, and on why the path ended."""
        best, last = self.certified, self.levels[-1]
        if best is None:
            return (f"{self.risk}: no level of the path is certified",)
        claim = (
            f"{self.risk}, on data not seen: at most {percent(self.wanted)} with confidence {self.confidence:g}; "
            f"{percent(best.measured)} over {self.samples} held-out samples ({self.rule})"
        )
        if last.certified:
            end = f"all {self.planned} levels of the path are certified; go on to sparser ones"
        else:
            end = (
                f"the next level, {number(last.setting)}, keeps {percent(last.kept / max(last.total, 1))} and is not "
                f"certified: {percent(last.measured)} measured, at most {percent(last.bound)}"
            )
        return (
            claim,
            f"path: level {number(best.setting)}, number {self.levels.index(best) + 1} of {self.planned}; {end}",
        )


def path_plot(figure: Any, path: RiskPath, colours: tuple[str, str, str]) -> None:
    """Risk and upper bound over the share of weights kept, on the left; the shares level by level, on the right."""
    measured, bound, line = colours
    left, right = figure.subplots(1, 2)
    shares = [100 * level.kept / max(level.total, 1) for level in path.levels]
    left.plot(
        shares, [100 * level.bound for level in path.levels], "o-", color=bound, markersize=4, label="upper bound"
    )
    left.plot(shares, [100 * level.measured for level in path.levels], "o-", color=measured, markersize=4,
              label="held out")  # fmt: skip
    left.axhline(100 * path.wanted, color=line, linewidth=0.8, linestyle="--", label="wanted")
    left.invert_xaxis()
    left.set_xlabel("weights kept, %")
    left.set_title(f"{path.risk}, in units of 1/100", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    places = range(1, len(shares) + 1)
    faces = [measured if level.certified else "none" for level in path.levels]
    right.bar(places, shares, color=faces, edgecolor=measured, width=0.6)
    right.set_xlim(0.4, max(path.planned, len(shares)) + 0.6)
    right.set_xlabel("level of the path; filled: certified")
    right.set_title("weights kept, %", loc="left", fontsize=10)
