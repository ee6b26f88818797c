"""A recipe as data: ordered rules that say of each layer by what problem, pattern and solver it is pruned.

    [[rule]]
    layers = "lm_head"
    problem = "dense"

    [[rule]]
    layers = "model.layers.*"
    pattern = "2:4"
    solver = "balanced"

The first rule that matches a layer's name says what happens to it; a layer that none matches stays dense. A recipe is
a function from a layer to its problem, so that `prune(model, batches, recipe)` takes it as it takes yours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from convexprune.layer import Layer
from convexprune.network.names import check_regex, matches
from convexprune.options import number, optional, text
from convexprune.patterns import NM, Blocks, Channels, Pattern, PerRow, Unstructured
from convexprune.problem import LayerProblem, Solver
from convexprune.problems import NetTrim, Reconstruction
from convexprune.solvers import (
    ADMM,
    ActivationMagnitude,
    Balanced,
    Best,
    ColumnSweep,
    ExactOBS,
    Fast,
    LayerwiseOBS,
    Magnitude,
    RisingPenalty,
    SwapSearch,
    WorkingSet,
)

SOLVERS: Final[Mapping[str, Callable[..., Solver]]] = {
    "activation-magnitude": ActivationMagnitude, "admm": ADMM, "balanced": Balanced, "best": Best,
    "column-sweep": ColumnSweep, "exact-obs": ExactOBS, "fast": Fast, "layerwise-obs": LayerwiseOBS,
    "magnitude": Magnitude, "rising-penalty": RisingPenalty, "swap-search": SwapSearch, "working-set": WorkingSet,
}  # fmt: skip
PROBLEMS: Final = ("reconstruction", "net-trim", "dense")
PATTERNS: Final = "unstructured, per-row, channels, N:M as 2:4, or blocks as 4x4"


@dataclass(frozen=True)
class Rule:
    """What happens to the layers that a name or pattern means.

    Args:
        layers: A glob such as "model.layers.*.mlp.*", or a regular expression behind "re:", for the whole name.
        problem: "reconstruction" (least squares under the pattern), "net-trim" (fewest weights within `epsilon`) or
            "dense" (left as it is).
        sparsity: The fraction of the weights that goes; of N:M it follows from the pattern, and with an allocation it
            is the budget's.
        pattern: "unstructured", "per-row", "channels", "2:4" and other N:M, "4x4" and other blocks.
        epsilon: Of net-trim: how far the outputs may move, relative to their norm.
        damping: Added to the Gram matrix's diagonal, as a fraction of its mean.
        solver: Its name, such as "balanced"; None takes the problem's default.
        options: Of the solver.

    Raises:
        ValueError: For a name that is none, naming those there are, and for numbers out of range.
        TypeError: For fields of another kind.

    Example:
        >>> import convexprune as cp
        >>> cp.Rule("lm_head", problem="dense").matches("lm_head"), cp.Rule("re:h[.][0-9]+[.].*").matches("h.10.fc")
        (True, True)
    """

    layers: str = "*"
    problem: str = "reconstruction"
    sparsity: float | None = None
    pattern: str = "unstructured"
    epsilon: float | None = None
    damping: float = 0.0
    solver: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("layers", "problem", "pattern"):
            text(key, getattr(self, key))
        optional(number(0, 1))("sparsity", self.sparsity)
        optional(number(0))("epsilon", self.epsilon)
        number(0)("damping", self.damping)
        self._check_names()
        if self.problem == "net-trim" and (self.epsilon is None or self.sparsity is not None):
            raise ValueError("net-trim takes an epsilon, and no sparsity: it is what comes out")
        if self.problem != "net-trim" and self.epsilon is not None:
            raise ValueError(f"epsilon is an option of net-trim, and the problem is {self.problem!r}")
        if self.problem == "dense" and (self.sparsity, self.solver, self.pattern) != (None, None, "unstructured"):
            raise ValueError("a dense layer has no sparsity, pattern or solver; leave them out")
        if self.nm is not None and self.sparsity is not None:
            raise ValueError(f"the pattern {self.pattern!r} says how many weights stay; leave `sparsity` out")
        self.made_solver()

    def _check_names(self) -> None:
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem is {self.problem!r}; it must be one of {', '.join(PROBLEMS)}")
        plain = self.pattern in ("unstructured", "per-row", "channels")
        if not plain and self.nm is None and self.blocks is None:
            raise ValueError(f"pattern is {self.pattern!r}; it must be one of {PATTERNS}")
        if self.solver is not None and self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}; it must be one of {', '.join(SOLVERS)}")
        check_regex("layers", self.layers)

    @property
    def nm(self) -> tuple[int, int] | None:
        """N and M."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def blocks(self) -> tuple[int, int] | None:
        """Rows and columns of a block."""
        found = re.fullmatch(r"(\d+)x(\d+)", self.pattern)
        return None if found is None else (int(found[1]), int(found[2]))

    def matches(self, name: str) -> bool:
        """Whether the rule is about a layer of this name."""
        return matches(name, self.layers)

    def states(self, layer: Layer, count: int | None = None) -> LayerProblem | None:
        """The layer's problem; of so many weights where an allocation says it."""
        if self.problem == "dense":
            return None
        layer = layer.damped(self.damping) if self.damping else layer
        if self.problem == "net-trim":
            assert self.epsilon is not None  # by __post_init__
            return NetTrim(layer, self.epsilon)
        if self.sparsity is None and count is not None and self.nm is None:
            shape = (int(layer.weight.shape[0]), int(layer.weight.shape[1]))
            units = self.made_pattern(1.0).quota(shape, layer.kernel)  # weights, channels or blocks
            return Reconstruction(layer, self.made_pattern(count * units // (shape[0] * shape[1])))
        return Reconstruction(layer, self.made_pattern(None if self.sparsity is None else 1 - self.sparsity))

    @property
    def counts(self) -> bool:
        """Whether the rule says by itself how many weights of a layer stay."""
        return self.problem == "net-trim" or self.sparsity is not None or self.nm is not None

    def made_pattern(self, keep: float | int | None) -> Pattern:
        """The pattern that keeps such a share, or so many of what it counts."""
        if self.nm is not None:
            return NM(*self.nm)
        if keep is None:
            raise ValueError(
                f"the rule for {self.layers!r} says no sparsity; give one, an N:M pattern, or an allocation"
            )
        if self.blocks is not None:
            return Blocks(self.blocks, keep)
        kinds: dict[str, Callable[..., Pattern]] = {"per-row": PerRow, "channels": Channels}
        return kinds.get(self.pattern, Unstructured)(keep)

    def on(self, device: str) -> Rule:
        """The same, its solver at work on a device: unless it says its own, or has no such option."""
        name = self.solver or {"reconstruction": "balanced", "net-trim": "working-set"}.get(self.problem)
        solver: Any = None if name is None else SOLVERS[name]
        known = [] if solver is None else [entry.name for entry in fields(solver)]
        if "device" not in known:
            return self
        return replace(self, solver=name, options={"device": device, **self.options})

    def made_solver(self) -> Solver | None:
        """The solver with its options, or None for the problem's default."""
        if self.solver is None:
            if self.options:
                raise ValueError(f"options are given to no solver: {', '.join(self.options)}; name the solver")
            return None
        kind: Any = SOLVERS[self.solver]
        known = [entry.name for entry in fields(kind)]
        for key in self.options:
            if key not in known:
                raise ValueError(f"{self.solver} has no option {key!r}; it has {', '.join(known) or 'none'}")
        made: Solver = kind(**self.options)
        return made


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, of which the first that matches a layer holds.

    Args:
        rules: In order.

    Raises:
        TypeError: For what is no rule.
        ValueError: For no rules.

    Example:
        >>> import torch, convexprune as cp
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> recipe = cp.Recipe([cp.Rule("2", problem="dense"), cp.Rule(sparsity=0.5, solver="fast")])
        >>> pruned, report = cp.prune(model, [torch.randn(20, 8)], recipe)
        >>> [(row.name, row.kept) for row in report.rows]
        [('0', 16), ('2', 8)]
    """

    rules: Sequence[Rule]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"a rule is {rule!r}; give Rule(...)")
        if not self.rules:
            raise ValueError("the recipe has no rules")

    def __call__(self, layer: Layer, count: int | None = None) -> LayerProblem | None:
        """What the first matching rule states of a layer."""
        rule = self.rule(layer.name, layer.module)
        return None if rule is None else rule.states(layer, count)

    def on(self, device: str) -> Recipe:
        """The same, the solvers at work on a device."""
        return Recipe([rule.on(device) for rule in self.rules])

    def solver(self, layer: Layer) -> Solver | None:
        """What the first matching rule solves a layer with; None for the problem's default."""
        rule = self.rule(layer.name, layer.module)
        return None if rule is None else rule.made_solver()

    def rule(self, *names: str) -> Rule | None:
        """The first that matches one of the names of a layer."""
        return next((rule for rule in self.rules if any(map(rule.matches, names))), None)

    def check_matches(self, names: Iterable[str]) -> None:
        """Raise ValueError for a rule that matches none of the layers, or none that rules before it leave."""
        names = list(names)
        for rule in self.rules:
            if not any(map(rule.matches, names)):
                shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
                raise ValueError(f"the rule for {rule.layers!r} matches no layer; the layers are {shown or 'none'}")
            if not any(self.rule(name) is rule for name in names):
                raise ValueError(f"the rule for {rule.layers!r} comes behind others that match all its layers")

    def check_allocated(self) -> None:
        """Raise ValueError for a rule that says by itself what an allocation would say too."""
        for rule in self.rules:
            if rule.counts:
                raise ValueError(
                    f"the rule for {rule.layers!r} says by itself how many weights stay; leave the allocation out, or "
                    "the rule's sparsity, epsilon or N:M pattern"
                )

    @classmethod
    def from_toml(cls, content: str, source: str = "the recipe") -> Recipe:
        """The recipe of a TOML text; raises ValueError naming the place of what is unknown or wrong."""
        import tomllib

        try:
            tables = tomllib.loads(content)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{source} is no TOML: {error}") from error
        unknown = sorted(set(tables) - {"rule"})
        if unknown:
            raise ValueError(f"{source}: there is no {unknown[0]!r}; a recipe has [[rule]] tables")
        rules = tables.get("rule", [])
        if not isinstance(rules, list) or not all(isinstance(each, dict) for each in rules):
            raise ValueError(f"{source}: 'rule' is no list of tables; write [[rule]] above each")
        known = [entry.name for entry in fields(Rule)]
        made = []
        for place, table in enumerate(rules):
            odd = sorted(set(table) - set(known))
            if odd:
                raise ValueError(f"{source}, rule {place + 1}: there is no {odd[0]!r}; a rule has {', '.join(known)}")
            try:
                made.append(Rule(**table))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}, rule {place + 1}: {error}") from error
        if not made:
            raise ValueError(f"{source} has no [[rule]]")
        return cls(made)

    def to_toml(self) -> str:
        """The text that `from_toml` reads."""
        return "\n".join(_table(rule) for rule in self.rules)


def _table(rule: Rule) -> str:
    lines = ["[[rule]]"]
    plain = Rule()
    for entry in fields(rule):
        value = getattr(rule, entry.name)
        if entry.name == "layers" or value != getattr(plain, entry.name):
            lines.append(f"{entry.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(part)}" for key, part in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)
