"""How a network's output is a prediction: what it means that a prediction changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from torch import Tensor

Rule = str | Callable[[Tensor], Tensor]


def classes(outputs: Tensor) -> Tensor:
    """(samples, classes) -> (samples,): the class with the largest output."""
    return outputs.argmax(1)


def sign(outputs: Tensor) -> Tensor:
    """(samples,) or (samples, 1) -> (samples,): whether the one logit is above 0."""
    return outputs.reshape(len(outputs)) > 0


def labels(outputs: Tensor) -> Tensor:
    """(samples, labels) -> the same shape: each label whose logit is above 0."""
    return outputs > 0


def tokens(outputs: Tensor) -> Tensor:
    """(samples, tokens, vocabulary) -> (samples, tokens): the token with the largest output at each place."""
    return outputs.argmax(-1)


RULES: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "classes": classes, "sign": sign, "labels": labels, "tokens": tokens
}  # fmt: skip
_AXES: Final = {"classes": (2,), "sign": (1, 2), "labels": (2,), "tokens": (3,)}


def rule_name(rule: Rule | None, shape: tuple[int, ...]) -> str:
    """The name of the rule for outputs of this shape, (samples, ...); "classes" or "sign" where the shape tells.

    Several labels at once look like classes: they have to be named. Raises ValueError for a rule that is none, one that
    does not fit the shape, and for a shape that does not tell; TypeError for what is no name and no function.
    """
    if callable(rule):
        return getattr(rule, "__name__", type(rule).__name__)
    if rule is None:
        if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1):
            return "sign"
        if len(shape) == 2:
            return "classes"
        raise ValueError(f"outputs of shape {shape} do not tell what is predicted; name it: predict='tokens', say")
    if not isinstance(rule, str):
        raise TypeError(f"predict is {rule!r}; give one of {', '.join(map(repr, RULES))}, or a function of the outputs")
    if rule not in RULES:
        raise ValueError(f"predict is {rule!r}; it must be one of {', '.join(map(repr, RULES))}, or a function")
    single = len(shape) == 2 and shape[1] == 1
    if len(shape) not in _AXES[rule] or (rule == "sign" and len(shape) == 2 and not single):
        raise ValueError(f"predict={rule!r} does not fit outputs of shape {shape}")
    if rule == "classes" and single:
        raise ValueError(f"predict='classes' of one output {shape} is always the same class; use 'sign'")
    return rule


def predictions(outputs: Tensor, rule: Rule | None = None) -> Tensor:
    """What the outputs (samples, ...) predict, a row for each sample; see `rule_name` for the rule."""
    name = rule_name(rule, tuple(outputs.shape))
    found = rule(outputs) if callable(rule) else RULES[name](outputs)
    if not isinstance(found, Tensor) or not found.ndim or len(found) != len(outputs):
        raise ValueError(f"predict={name} must give a tensor with a row for each of {len(outputs)} samples")
    return found


def changed(dense: Tensor, pruned: Tensor, rule: Rule | None = None) -> Tensor:
    """(samples,) bool: where anything of the prediction is another one."""
    before, after = predictions(dense, rule), predictions(pruned, rule)
    different: Tensor = (before != after).reshape(len(dense), -1).any(1)
    return different


def check_rule(rule: Rule | None) -> None:
    """Raise ValueError or TypeError for what is no rule, before any output is known."""
    if isinstance(rule, str) and rule in RULES:
        return
    if rule is not None and not callable(rule):
        rule_name(rule, (1, 2))
