"""What a pruning run did: a row for each layer, the network's error, and the settings that reproduce it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import Tensor

from convexprune.layer import Layer
from convexprune.report.row import HEADINGS, WORDS, Moments, Row, number, percent
from convexprune.report.shares import Shares
from convexprune.solution import Certificate, Status, TracePoint
from convexprune.whole_file import write_whole


@dataclass(frozen=True)
class Link:
    """|| Yhat_l - Y_l ||_F of one layer of the network: what is guaranteed, and what was measured."""

    name: str
    guaranteed: float
    measured: float


@dataclass(frozen=True)
class NetworkError:
    """|| Yhat - Y ||_F between the outputs of the pruned and the dense network, over the calibration samples.

    measured    by running both; None where the model's output is not one tensor
    guaranteed  proven from the layers' errors (see `bounds`); None with a `reason`
    scale       ||Y||_F of the dense network
    rules       what each rule of propagation guarantees, by its name
    layers      the same along the way, where there is a guarantee
    wanted      what the guaranteed error had to be within, where it was asked for
    """

    measured: float | None
    guaranteed: float | None
    scale: float | None
    reason: str = ""
    rules: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[Link, ...] = ()
    wanted: float | None = None

    def lines(self) -> tuple[str, ...]:
        """Guaranteed and measured, a sentence each."""
        guaranteed = self._line(self.guaranteed) if self.guaranteed is not None else f"no guarantee: {self.reason}"
        measured = self._line(self.measured) if self.measured is not None else "not measured"
        lines: tuple[str, ...] = (f"network error, guaranteed: {guaranteed}", f"network error, measured:   {measured}")
        if self.wanted is not None:
            lines = (f"network error, wanted:     {self._line(self.wanted)}", *lines)
        if not self.rules or not self.measured:
            return lines
        ratios = ", ".join(f"{rule} {total / self.measured:.3g}" for rule, total in self.rules.items())
        return (*lines, f"guaranteed / measured, by rule: {ratios}")

    def relative(self, error: float | None) -> float | None:
        """An error over ||Y||_F."""
        return None if error is None or not self.scale else error / self.scale

    def _line(self, error: float) -> str:
        relative = self.relative(error)
        return number(error) if relative is None else f"{number(error)} = {percent(relative)} of the outputs' norm"


@dataclass(frozen=True)
class Settings:
    """What it takes to run it again."""

    mode: str
    solver: str
    samples: int  # calibration examples: rows of the batches
    data: str  # SHA-256 of the calibration batches
    dtype: str  # of the model's weights, in which the certificates speak
    seed: int
    threads: int
    torch: str


@dataclass(frozen=True)
class Report:
    """The rows of a run, the network's error, its settings, and what an allocation gave each layer if there was one.

    `print(report)` is the table.
    """

    rows: tuple[Row, ...]
    network: NetworkError
    settings: Settings
    allocation: Shares | None = None

    @property
    def kept(self) -> int:
        """Weights that are not zero, over all layers of the report."""
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        """Weights of all layers of the report."""
        return sum(row.total for row in self.rows)

    @property
    def kept_fraction(self) -> float:
        """kept / total."""
        return self.kept / self.total

    def table(self) -> str:
        """The rows as aligned text, a line each, the names to the left and the figures to the right."""
        lines = [HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if heading in WORDS else cell.rjust(width)
                for heading, cell, width in zip(HEADINGS, line, widths, strict=True)
            ).rstrip()
            for line in lines
        )

    def summary(self) -> tuple[str, ...]:
        """What was kept in all, and the network's guaranteed error beside its measured one."""
        kept = f"kept {self.kept} of {self.total} weights ({self.kept_fraction:.1%})"
        shares = () if self.allocation is None else self.allocation.lines(self.distortion)
        poor = [
            row.moments.line(row.name) for row in self.rows if row.moments and row.moments.rank < row.moments.inputs
        ]
        singular = ("singular Gram matrices: " + "; ".join(poor),) if poor else ()
        return (kept, *self.network.lines(), *shares, *singular)

    @property
    def distortion(self) -> float | None:
        """E|f(x; W) - f(x; W')|^2 over the calibration samples."""
        return None if self.network.measured is None else self.network.measured**2 / max(self.settings.samples, 1)

    def __str__(self) -> str:
        return "\n".join([self.table(), "", *self.summary()])

    def to_json(self) -> str:
        """The report as JSON, traces included, patterns not; numbers that JSON has no word for are strings ("inf")."""
        content = {
            "settings": vars(self.settings),
            "network": _network_to_json(self.network),
            "kept": self.kept,
            "total": self.total,
            "rows": [_row_to_json(row) for row in self.rows],
            "allocation": self.allocation and self.allocation.to_dict(),
        }
        return json.dumps(content, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote, without the weight patterns."""
        content = json.loads(text)
        return cls(
            tuple(_row_from_json(row) for row in content["rows"]),
            _network_from_json(content["network"]),
            Settings(**content["settings"]),
            Shares.from_dict(content["allocation"]) if content.get("allocation") else None,
        )

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()`; the file is there whole or not at all. Raises OSError naming the path."""
        write_whole(path, self.to_json() + "\n")

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained page with the table and the plots. Raises OSError naming the path."""
        from convexprune.report.html import page

        write_whole(path, page(self))


def described(problem: Any) -> str:
    """A problem or a solver in a few words: its class and its fields, arrays by their shape, the layer left out."""
    if not is_dataclass(problem):
        return type(problem).__name__
    words = []
    for entry in fields(problem):
        value = getattr(problem, entry.name)
        if value is None or isinstance(value, Layer):
            continue
        text = f"array {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        words.append(f"{entry.name}={text}")
    return f"{type(problem).__name__}({', '.join(words)})"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: float | str | None) -> float | None:
    return None if value is None else float(value)


def _certificate_to_json(certificate: Certificate) -> dict[str, Any]:
    return {key: _plain(value) for key, value in vars(certificate).items()}


def _certificate_from_json(content: dict[str, Any]) -> Certificate:
    return Certificate(*(float(content[key]) for key in ("value", "bound", "violation")))


def _network_to_json(network: NetworkError) -> dict[str, Any]:
    content = {key: _plain(value) for key, value in vars(network).items()}
    rules = {key: _plain(value) for key, value in network.rules.items()}
    return content | {
        "rules": rules,
        "layers": [{k: _plain(v) for k, v in vars(link).items()} for link in network.layers],
    }


def _network_from_json(content: dict[str, Any]) -> NetworkError:
    measured, guaranteed, scale = (_read(content[key]) for key in ("measured", "guaranteed", "scale"))
    links = (
        Link(link["name"], float(link["guaranteed"]), float(link["measured"])) for link in content.get("layers", [])
    )
    rules = {key: float(value) for key, value in content.get("rules", {}).items()}
    wanted = _read(content.get("wanted"))
    return NetworkError(measured, guaranteed, scale, content["reason"], rules, tuple(links), wanted)


def _row_to_json(row: Row) -> dict[str, Any]:
    content = {key: _plain(value) for key, value in vars(row).items() if key not in ("pattern", "errors")}
    proof = row.certificate
    return content | {
        "total": row.total,
        "kept_fraction": row.kept_fraction,
        "status": row.status and row.status.name,
        "certificate": proof and _certificate_to_json(proof) | {"relative_gap": _plain(proof.relative_gap)},
        "moments": row.moments and {key: _plain(value) for key, value in vars(row.moments).items()},
        "trace": [{"seconds": point.seconds} | _certificate_to_json(point.certificate) for point in row.trace],
    }


def _row_from_json(content: dict[str, Any]) -> Row:
    proof = content["certificate"]
    return Row(
        name=content["name"],
        shape=tuple(content["shape"]),
        kept=content["kept"],
        status=None if content["status"] is None else Status[content["status"]],
        certificate=None if proof is None else _certificate_from_json(proof),
        error=_read(content["error"]),
        problem=content["problem"],
        iterations=content["iterations"],
        seconds=content["seconds"],
        wanted=content.get("wanted"),
        repairs=content.get("repairs", False),
        module=content.get("module", content["name"]),
        moments=_moments_from_json(content.get("moments")),
        trace=tuple(TracePoint(point["seconds"], _certificate_from_json(point)) for point in content["trace"]),
    )


def _moments_from_json(content: dict[str, Any] | None) -> Moments | None:
    return None if content is None else Moments(**{**content, "condition": float(content["condition"])})
