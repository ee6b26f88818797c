"""Which of a model's outputs is meant, where it makes several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Output = str | int | Callable[[Any], Tensor]


def check_output(which: Output | None) -> None:
    """Raise TypeError for what names no output."""
    if which is None or callable(which) or isinstance(which, str):
        return
    if isinstance(which, bool) or not isinstance(which, int):
        raise TypeError(f"output is {which!r}; give a key such as 'logits', a position such as 0, or a function")


def chosen_output(outputs: Any, which: Output | None) -> Tensor:
    """The one tensor that is meant: the outputs themselves, an entry of a mapping or a tuple, an attribute.

    Raises ValueError, with the names that there are, where that is not one tensor.
    """
    found: Any = outputs
    if callable(which):
        found = which(outputs)
    elif isinstance(which, str):
        found = outputs.get(which) if isinstance(outputs, Mapping) else getattr(outputs, which, None)
    elif which is not None:
        several = isinstance(outputs, (tuple, list)) and -len(outputs) <= which < len(outputs)
        found = outputs[which] if several else None
    if isinstance(found, Tensor) and found.ndim:
        return found
    if isinstance(found, Tensor):
        raise ValueError("the output is a single number; it must have a row for each sample")
    raise ValueError(f"output={which!r} is not one tensor of the model's outputs; {_there(outputs)}")


def _there(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"say which is meant: output={' or '.join(repr(key) for key in outputs)}"
    if isinstance(outputs, (tuple, list)):
        return f"say which is meant: output=0 to output={len(outputs) - 1}"
    return f"they are a {type(outputs).__name__}: name an attribute of it, or give a function that takes the tensor out"
