"""Report of a pruning run: a row for each layer, the network's error, and the settings that reproduce the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final

from torch import Tensor

from convexprune.layer import Layer
from convexprune.network.coverage import Coverage
from convexprune.report import blocks as by_block
from convexprune.report.plain import from_plain, to_plain
from convexprune.report.risk_path import RiskPath
from convexprune.report.row import HEADINGS, WORDS, Row, number, percent
from convexprune.report.shares import Shares
from convexprune.version import __version__
from convexprune.whole_file import write_whole

LISTED: Final = 6  # layers that a line of the summary names
SCHEMA: Final = 1  # of a report's JSON; a text without one was written before 0.2.0, in the same layout


@dataclass(frozen=True)
class Link:
    """|| Yhat_l - Y_l ||_F of one layer in the pruned network: guaranteed and measured."""

    name: str
    guaranteed: float
    measured: float


@dataclass(frozen=True)
class NetworkError:
    """|| Yhat - Y ||_F between the outputs of the pruned and the dense network, over the calibration samples.

    measured    from running both networks; None if the model returns no tensor
    guaranteed  proven from the layers' errors (see `bounds`); None if there is no guarantee, with the `reason`
    scale       ||Y||_F of the dense network
    rules       the guaranteed error by each rule of propagation, by name
    layers      the errors at each layer, if there is a guarantee
    wanted      the goal for the guaranteed error, if there was one
    """

    measured: float | None
    guaranteed: float | None
    scale: float | None
    reason: str = ""
    rules: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[Link, ...] = ()
    wanted: float | None = None

    def lines(self) -> tuple[str, ...]:
        """Sentences on the guaranteed and the measured error."""
        guaranteed = self._line(self.guaranteed) if self.guaranteed is not None else f"no guarantee: {self.reason}"
        measured = self._line(self.measured) if self.measured is not None else "not measured"
        lines: tuple[str, ...] = (f"network error, guaranteed: {guaranteed}", f"network error, measured:   {measured}")
        if self.wanted is not None:
            lines = (f"network error, wanted:     {self._line(self.wanted)}", *lines)
        if not self.rules or not self.measured:
            return lines
        ratios = ", ".join(f"{rule} {total / self.measured:.3g}" for rule, total in self.rules.items())
        return (*lines, f"guaranteed / measured, by rule: {ratios}")

    @property
    def says_nothing(self) -> bool:
        """Whether the guarantee is above 100% of the outputs' norm, which a network that returns 0 would have."""
        relative = self.relative(self.guaranteed)
        return relative is not None and relative > 1

    def relative(self, error: float | None) -> float | None:
        """An error divided by ||Y||_F; None if that is 0 or unknown."""
        return None if error is None or not self.scale else error / self.scale

    def _line(self, error: float) -> str:
        relative = self.relative(error)
        return number(error) if relative is None else f"{number(error)} = {percent(relative)} of the outputs' norm"


@dataclass(frozen=True)
class Settings:
    """The settings that reproduce a run."""

    mode: str
    solver: str
    samples: int  # calibration examples: rows of the batches
    data: str  # SHA-256 of the calibration batches
    dtype: str  # of the model's weights, in which the certificates speak
    seed: int
    threads: int
    torch: str
    version: str = __version__  # of convexprune


@dataclass(frozen=True)
class Report:
    """The rows of a run, the network's error, the settings, and the shares of the allocation if there was one.

    `print(report)` is the table.
    """

    rows: tuple[Row, ...]
    network: NetworkError
    settings: Settings
    allocation: Shares | None = None
    coverage: Coverage | None = None  # which of the model's weights the layers have
    path: RiskPath | None = None  # the levels that were tested, if a risk on data not seen was wanted
    afterwards: str = ""  # what was done to the weights behind all that is reported, if anything

    @property
    def kept(self) -> int:
        """Number of nonzero weights in all layers of the report."""
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        """Number of weights in all layers of the report."""
        return sum(row.total for row in self.rows)

    @property
    def kept_fraction(self) -> float:
        """kept / total."""
        return self.kept / self.total if self.total else 0.0

    @property
    def model_kept_fraction(self) -> float | None:
        """The share of all the model's weights that is kept; what no row has is kept whole."""
        if self.coverage is None or not self.coverage.total:
            return None
        return 1 - (self.total - self.kept) / self.coverage.total

    @property
    def problems(self) -> dict[str, int]:
        """The problems that were stated, with their options (epsilon, pattern, ...), and the number of their rows."""
        return dict(Counter(row.problem for row in self.rows if row.problem))

    def share(self) -> str:
        """A sentence on what is kept: of the layers that a problem was stated for, and of the model."""
        asked = [row for row in self.rows if row.status is not None] or self.rows
        kept, total = sum(row.kept for row in asked), sum(row.total for row in asked)
        which = "weights" if len(asked) == len(self.rows) else "weights that were to be pruned"
        found = f"kept {kept} of {total} {which} ({kept / total if total else 0:.1%})"
        of_model = self.model_kept_fraction
        if of_model is None or self.coverage is None or self.coverage.total == total:
            return found
        return f"{found}, {of_model:.1%} of the model's {self.coverage.total}"

    def table(self) -> str:
        """The rows as aligned text, one line each, names on the left and numbers on the right."""
        return _aligned([HEADINGS, *(row.cells() for row in self.rows)], WORDS)

    def overview(self) -> str:
        """The table; of a network with many layers, a line for each of its blocks."""
        if len(self.rows) <= by_block.MANY:
            return self.table()
        lines = [by_block.HEADINGS, *(block.cells() for block in by_block.blocks(self.rows))]
        return f"{_aligned(lines, by_block.WORDS)}\n\n{len(self.rows)} layers; report.table() has a line for each"

    def summary(self) -> tuple[str, ...]:
        """Sentences on the weights kept, and on the network's guaranteed and measured error."""
        covered = () if self.coverage is None else self.coverage.lines()
        shares = () if self.allocation is None else self.allocation.lines(self.distortion)
        path = () if self.path is None else self.path.lines()
        poor = [
            row.moments.line(row.name) for row in self.rows if row.moments and row.moments.rank < row.moments.inputs
        ]
        damped = [row.moments.line(row.name) for row in self.rows if row.moments and row.moments.damping]
        refused = tuple(f"left dense: {row.name}: {row.refusal}" for row in self.rows if row.refusal)
        singular = ("singular Gram matrices: " + _listed(poor, "; "),) if poor else ()
        ridges = ("damped Gram matrices: " + _listed(damped, "; "),) if damped else ()
        notes = dict.fromkeys(row.note for row in self.rows if row.note)
        said = (f"{note}: {_listed([row.name for row in self.rows if row.note == note], ', ')}" for note in notes)
        later = (self.afterwards,) if self.afterwards else ()
        network = (*self.network.lines(), *self.remarks())
        return (self.share(), *later, *covered, *refused, *network, *path, *shares, *singular, *ridges, *said)

    def remarks(self) -> tuple[str, ...]:
        """A sentence on a guarantee that says nothing."""
        if not self.network.says_nothing:
            return ()
        advice = '; mode="cascade" judges each layer on what reaches it' if self.settings.mode == "parallel" else ""
        return (f"the guarantee says nothing: a network that returns 0 would have an error of 100%{advice}",)

    @property
    def distortion(self) -> float | None:
        """E|f(x; W) - f(x; W')|^2 over the calibration samples."""
        return None if self.network.measured is None else self.network.measured**2 / max(self.settings.samples, 1)

    def __str__(self) -> str:
        return "\n".join([self.overview(), "", *self.summary()])

    def _repr_html_(self) -> str:
        """The table and the summary, for a notebook."""
        from convexprune.report.html import excerpt

        return excerpt(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, texts and numbers, traces included, patterns not.

        "rows" has a flat dict for each layer but for its certificate, moments and trace: `pandas.json_normalize` reads
        it. Numbers that JSON has no word for are texts ("inf").
        """
        content = {"schema": SCHEMA, **to_plain(self), "kept": self.kept, "total": self.total}
        content["rows"] = [*map(_row_to_plain, self.rows)]
        return content

    def to_json(self) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote, without the weight patterns.

        Raises ValueError for a text that is no report, naming the missing or wrong entry, and for another schema.
        """
        content = _parsed(text)
        rows, settings = content.get("rows"), content.get("settings")
        if isinstance(rows, list):
            content["rows"] = [*map(_row_with_certificates, rows)]
        if isinstance(settings, dict):
            content["settings"] = {"version": "before 0.2.0", **settings}
        try:
            report: Report = from_plain(cls, content)
        except ValueError as error:
            raise ValueError(f"the text is no pruning report: {error}") from error
        return report

    def plot(self, what: str = "kept", ax: Any = None) -> Any:
        """Draw on matplotlib's axes, and return them.

        Args:
            what: "kept", the share of weights kept by layer; "gap", the proven gap by layer, where a point is feasible;
                "errors", the guaranteed and the measured change of the outputs of each layer.
            ax: The axes; None draws on those of a new figure.

        Raises:
            ValueError: For another word, and where there are no errors by layer.
        """
        from convexprune.report.pictures import drawn

        return drawn(self, what, ax)

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()`; the file is there whole or not at all. Raises OSError naming the path."""
        write_whole(path, self.to_json() + "\n")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with the table and the plots. Raises OSError naming the path."""
        from convexprune.report.html import page

        write_whole(path, page(self))


def _listed(entries: Sequence[str], between: str) -> str:
    """The first entries, and the number of the others."""
    more = [f"and {len(entries) - LISTED} more"] if len(entries) > LISTED else []
    return between.join([*entries[:LISTED], *more])


def _aligned(lines: Sequence[Sequence[str]], words: Sequence[str]) -> str:
    """Lines of cells under their headings, those of `words` on the left and numbers on the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if heading in words else cell.rjust(width)
            for heading, cell, width in zip(lines[0], line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def described(problem: Any) -> str:
    """A problem or a solver in a few words: its class and its fields, arrays by their shape, without the layer."""
    if not is_dataclass(problem):
        return type(problem).__name__
    words = []
    for entry in fields(problem):
        value = getattr(problem, entry.name)
        if value is None or isinstance(value, Layer):
            continue
        text = f"array {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        if entry.name == "parts":  # the groups of a module, all of one kind
            text = f"{len(value)} x {described(value[0])}"
        words.append(f"{entry.name}={text}")
    return f"{type(problem).__name__}({', '.join(words)})"


def _row_to_plain(row: Row) -> dict[str, Any]:
    """A row, with numbers derived from its fields; each point of the trace holds the numbers of its certificate."""
    content = to_plain(row) | {"total": row.total, "kept_fraction": row.kept_fraction}
    if row.certificate is not None:
        content["certificate"]["relative_gap"] = to_plain(row.certificate.relative_gap)
    trace = [{"seconds": point["seconds"], **point["certificate"]} for point in content["trace"]]
    return {**content, "trace": trace}


def _row_with_certificates(row: Any) -> Any:
    """A row in the shape of `Row`: the numbers of each point of the trace become its certificate."""
    if not isinstance(row, dict) or not isinstance(row.get("trace"), list):
        return row
    trace = [{**point, "certificate": point} if isinstance(point, dict) else point for point in row["trace"]]
    return {**row, "trace": trace}


def _parsed(text: str) -> dict[str, Any]:
    """The JSON object of a text, of a schema that is known here."""
    if not isinstance(text, str):
        raise TypeError(f"a report is read from the text of its JSON file; got a {type(text).__name__}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = f"not JSON ({error})" if text.strip() else "empty"
        raise ValueError(
            f"the text of the report is {what}; give the content of a file that save_json wrote"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"the text is no pruning report: it is a JSON {type(content).__name__}, expected an object")
    schema = content.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise ValueError(
            f"the report has schema {schema!r}, and convexprune {__version__} reads schema {SCHEMA}; read it with the "
            "version that wrote it"
        )
    return content
