"""Which tensor of all that a model returns is its output: errors are measured on it, and guarantees speak of it.

One rule for all: what the caller names, by a key, an index or a function; else a lone tensor, else the one called
"logits", else the first of floating-point numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

from convexprune.network.forward import tensors_in

Which = str | int | Callable[[Any], Tensor] | None
LOGITS: Final = "logits"


def check_which(name: str, value: Any) -> None:
    """Raise TypeError for what names no output."""
    if isinstance(value, bool) or not (value is None or isinstance(value, (str, int)) or callable(value)):
        raise TypeError(
            f"{name} is {value!r}; give a key such as 'logits', an index, or a function of what is returned"
        )


def output_of(returned: Any, which: Which = None) -> Tensor | None:
    """The output among what a model returned; None where nothing is named and no tensor is there.

    Raises ValueError where `which` names nothing, TypeError where it names no tensor.
    """
    if which is not None:
        return _named(returned, which)
    tensors = list(tensors_in(returned))
    if len(tensors) == 1:
        return tensors[0]
    held = returned.get(LOGITS) if isinstance(returned, Mapping) else getattr(returned, LOGITS, None)
    if isinstance(held, Tensor):
        return held
    return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def sure_output(returned: Any, which: Which = None) -> Tensor:
    """The output; raises ValueError where there is none."""
    found = output_of(returned, which)
    if found is None:
        raise ValueError(
            f"the model returned a {type(returned).__name__} without a tensor; say by `output` of the Calibration "
            "where its output is"
        )
    return found


def _named(returned: Any, which: Any) -> Tensor:
    try:
        if callable(which):
            found = which(returned)
        elif isinstance(which, str) and not isinstance(returned, Mapping):
            found = getattr(returned, which)
        else:
            found = returned[which]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        keys = f"; its keys are {', '.join(map(repr, returned))}" if isinstance(returned, Mapping) else ""
        kind = type(returned).__name__
        raise ValueError(f"output is {which!r}, which the {kind} that the model returns does not have{keys}") from error
    if not isinstance(found, Tensor):
        raise TypeError(f"output is {which!r}: it is a {type(found).__name__}, not a tensor")
    return found
