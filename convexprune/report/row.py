"""A row of a report: one layer, as numbers and as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from convexprune.layer import Layer
from convexprune.solution import Certificate, Status, TracePoint

HEADINGS: Final = (
    "layer", "shape", "kept", "gap", "constraints", "objective", "bound", "error", "stopped", "steps", "time",
)  # fmt: skip
WORDS: Final = ("layer", "constraints", "stopped")  # columns set to the left; figures go to the right
TOLERANCE: Final = 1e-6  # a relative violation that rounding to float32 causes in any case
LEGEND: Final = (
    ("kept", "weights that are not zero, as stored (biases not counted)"),
    ("gap", "how far the objective can be above the optimum, proven, relative to it; 100.0% proves nothing"),
    (
        "constraints",
        f"'feasible', or the relative violation: 'feasible to' it up to {TOLERANCE:.0e}, else 'off by' it",
    ),
    ("objective, bound", "the layer's objective, and a number no feasible layer can go below"),
    ("error", "proven limit of the change of the layer's own outputs, ||.||_F over the calibration samples"),
    ("stopped", "why the solver stopped; a layer it could not solve is left dense"),
)
_STOPPED: Final = {
    Status.CONVERGED: "converged",
    Status.UNPROVEN: "not proven optimal",
    Status.MAX_ITER: "iteration limit",
    Status.TIME_LIMIT: "time limit",
    Status.INFEASIBLE: "infeasible",
    Status.NUMERICAL: "numerical trouble",
    None: "not asked for: dense",
}


@dataclass(frozen=True)
class Moments:
    """The damping of a layer's moments, and the rank and condition of the Gram matrix with that damping."""

    damping: float  # as a fraction of the mean diagonal
    rank: int
    inputs: int
    condition: float  # inf where it is singular

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Moments:
        """Of a module's groups: their ranks add up, and the worst condition stands for all."""
        spectra = [layer.spectrum() for layer in layers]
        rank, condition = sum(rank for rank, _ in spectra), max(condition for _, condition in spectra)
        return cls(
            max(layer.damping for layer in layers), rank, sum(layer.weight.shape[1] for layer in layers), condition
        )

    def line(self, name: str) -> str:
        """A sentence."""
        return f"{name}: rank {self.rank} of {self.inputs}, condition {self.condition:.1e}, damping {self.damping:g}"


@dataclass(frozen=True)
class Row:
    """One layer: its weights in the pruned model, and the problem's verdict on exactly these weights.

    certificate, error  for the weights as stored, so they include the rounding to the model's dtype; None if `build`
                        stated no problem
    """

    name: str
    shape: tuple[int, int]  # (out, in): the weights as a matrix
    kept: int  # weights that are not zero; biases are not counted
    status: Status | None = None  # why the solver stopped; None if no problem was stated
    certificate: Certificate | None = None
    error: float | None = None  # limit of || act(X What^T) - Y ||_F over the calibration samples
    problem: str | None = None
    iterations: int = 0
    seconds: float = 0.0
    trace: tuple[TracePoint, ...] = field(default=(), repr=False)
    pattern: Tensor | None = field(default=None, repr=False, compare=False)  # kept fraction, cell by cell of a grid
    wanted: int | None = None  # number of weights that the problem's pattern allows; None without a pattern
    moments: Moments | None = None
    errors: Tensor | None = field(default=None, repr=False, compare=False)  # (out,): `error`, each output's
    repairs: bool = False  # whether `error` is that of the residual sum behind the layer, in the layer's units
    module: str = None  # type: ignore[assignment]  # the name of the module that it is in; the layer's unless given

    refusal: str = ""  # why the solver's point was not written, if so
    solver: str = ""  # what solved the problem, with its options
    note: str = ""  # the solver's, such as a change of precision

    def __post_init__(self) -> None:
        if self.module is None:
            object.__setattr__(self, "module", self.name)

    @property
    def total(self) -> int:
        """Number of weights of the layer."""
        return self.shape[0] * self.shape[1]

    @property
    def kept_fraction(self) -> float:
        """kept / total."""
        return self.kept / self.total if self.total else 0.0

    @property
    def left_dense(self) -> bool:
        """True if the layer was not changed: no problem was stated for it, or the solver found no point."""
        return bool(self.refusal) or self.status in (None, Status.INFEASIBLE, Status.NUMERICAL)

    @property
    def gap(self) -> float | None:
        """The proven relative gap; None where there is none: only a feasible point of a solver has one."""
        if self.certificate is None or self.left_dense or self.certificate.violation > TOLERANCE:
            return None
        return self.certificate.relative_gap

    @property
    def stopped(self) -> str:
        """Why the solver stopped, and whether the layer was left dense."""
        left = ": left dense" if self.left_dense and self.status else ""
        return f"{_STOPPED[self.status]}{left}"

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADINGS."""
        proof = ("-",) * 4
        if self.certificate is not None:
            gap = "-" if self.gap is None else small(self.gap)
            feasible = missed_by(self.certificate.violation)
            proof = (gap, feasible, number(self.certificate.value), number(self.certificate.bound))
        return (
            self.name, f"{self.shape[0]} x {self.shape[1]}", f"{self.kept_fraction:.1%}", *proof, number(self.error),
            self.stopped, str(self.iterations) if self.status else "-",
            f"{self.seconds:.1f} s" if self.status else "-",
        )  # fmt: skip


def number(value: float | None) -> str:
    """Six digits, or a dash."""
    return "-" if value is None else f"{value:.6g}"


def missed_by(violation: float) -> str:
    """Feasible, or how far from it."""
    word = "feasible to" if violation <= TOLERANCE else "off by"
    return f"{word} {small(violation)}" if violation else "feasible"


def small(value: float) -> str:
    """A gap or a violation: 3e-06, or in percent once it is large."""
    return percent(value) if 0.01 <= abs(value) < 10 else f"{value:.0e}" if value else "0"


def percent(value: float) -> str:
    """31.4%, or 2.0e-05 where it is tiny."""
    return f"{value:.1%}" if abs(value) >= 0.001 else f"{value:.1e}"


def literal(name: str) -> str:
    """A name as matplotlib draws it: a pair of dollars would be a formula."""
    return name.replace("$", r"\$")
