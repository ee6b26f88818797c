"""The sizes of modules that `compact` changes: those of the dense network, and giving a dense module the new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeGuard

import torch
from torch import Tensor, nn

from convexprune.network.kinds import BATCH_NORMS, CONVOLUTIONS, LINEARS

_MARK: Final = "_dense_sizes"  # of a module of a smaller network: what it is in the dense one
_KINDS: Final[tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], ...]] = (
    (LINEARS, ("in_features", "out_features")),
    (CONVOLUTIONS, ("in_channels", "out_channels", "groups")),
    (BATCH_NORMS, ("num_features",)),
)
_BIAS: Final = "bias"  # 1 where there is one: a constant that is folded may give a module its first
_HELD: Final = ("weight", "bias", "running_mean", "running_var")  # tensors whose shapes follow from the sizes

Sizes = dict[str, int]


def sizes(module: Any) -> Sizes:
    """The sizes of a Linear, a convolution or a batch norm; empty for another module."""
    for kinds, names in _KINDS:
        if isinstance(module, kinds):
            return {**{name: int(getattr(module, name)) for name in names}, _BIAS: int(module.bias is not None)}
    return {}


def mark(small: nn.Module, dense: nn.Module) -> None:
    """Note on each module of `small` that differs its sizes in `dense`; a note that is there already stays."""
    for module, before in zip(small.modules(), dense.modules(), strict=True):
        if sizes(module) != sizes(before) and not hasattr(module, _MARK):
            setattr(module, _MARK, sizes(before))


def changes(model: nn.Module) -> dict[str, dict[str, Sizes]]:
    """Module -> its sizes in the dense network and now, of the modules that `compact` has made smaller."""
    marked = [(name, module) for name, module in model.named_modules() if hasattr(module, _MARK)]
    return {name: {"dense": getattr(module, _MARK), "now": sizes(module)} for name, module in marked}


class Resizing:
    """The modules of a model in the sizes that a file names (what `changes` gave). Before `apply` nothing is changed.

    Raises ValueError naming the module where the model is neither the dense network of the file nor the smaller one.
    """

    def __init__(self, model: nn.Module, named: Any) -> None:
        self._model = model
        known = dict(model.named_modules(remove_duplicate=False))
        self._wanted = dict(_checked(named))
        for name, (dense, now) in self._wanted.items():
            _check_same(name, known.get(name), dense, now)
        self._made = {name: _resized(known[name], now) for name, (_, now) in self._wanted.items()}

    def state(self) -> dict[str, Tensor]:
        """The model's state in the new sizes; what is resized has no numbers yet."""
        made = {id(self._model.get_submodule(name)): tensors for name, tensors in self._made.items()}
        found = dict(self._model.state_dict())
        for path, module in self._model.named_modules(remove_duplicate=False):
            found |= {".".join(filter(None, (path, key))): part for key, part in made.get(id(module), {}).items()}
        return found

    def apply(self) -> None:
        """Give the modules their new sizes."""
        for name, (dense, now) in self._wanted.items():
            module = self._model.get_submodule(name)
            for key, tensor in self._made[name].items():
                setattr(module, key, tensor)
            for key in now.keys() - {_BIAS}:
                setattr(module, key, now[key])
            setattr(module, _MARK, dense)


def _checked(named: Any) -> Iterator[tuple[str, tuple[Sizes, Sizes]]]:
    """The entry of a file, if it is one: sizes that fit each other, none larger than in the dense network."""
    if not isinstance(named, Mapping):
        raise ValueError(f"its compacted modules are {named!r:.80}, no mapping from names to sizes")
    for name, pair in named.items():
        dense, now = (pair.get(key) if isinstance(pair, Mapping) else None for key in ("dense", "now"))
        if not _are_sizes(dense) or not _are_sizes(now) or dense.keys() != now.keys():
            raise ValueError(f"its sizes of {name!r} are {pair!r:.120}, no two mappings from sizes to whole numbers")
        groups = now.get("groups", 1)
        smaller = all(1 <= now[key] <= dense[key] for key in now if key != _BIAS)
        if not smaller or any(value % groups for key, value in now.items() if key.endswith("_channels")):
            raise ValueError(f"its {name!r} cannot be {_told(now)} in place of {_told(dense)}")
        yield name, (dense, now)


def _are_sizes(found: Any) -> TypeGuard[Sizes]:
    return isinstance(found, dict) and _BIAS in found and all(type(value) is int for value in found.values())


def _check_same(name: str, module: nn.Module | None, dense: Sizes, now: Sizes) -> None:
    """Raise ValueError where a module of the model is not the one that the file speaks of."""
    mine = sizes(module)
    if mine.keys() != dense.keys():
        what = "nothing" if module is None else f"a {type(module).__name__}"
        raise ValueError(f"{name!r} has {_told(dense)} in the file's dense network, and is {what} in the model")
    if mine != now and dense not in (mine, getattr(module, _MARK, mine)):
        raise ValueError(f"{name!r} has {_told(dense)} in the file's dense network, and {_told(mine)} in the model")
    for key in _HELD:
        held = module is not None and (key in module._parameters or key in module._buffers)
        if getattr(module, key, None) is not None and not held:
            raise ValueError(
                f"{name!r}: its {key} is computed by a parametrization in the model; make it permanent first"
            )


@torch.inference_mode(False)  # of the caller's: what is made here can be trained
def _resized(module: Any, now: Sizes) -> dict[str, Tensor]:
    """New tensors, without numbers, for a module whose sizes differ."""
    if sizes(module) == now:
        return {}
    out = next(now[key] for key in ("out_features", "out_channels", "num_features") if key in now)
    inside = now.get("in_features", now.get("in_channels", 0) // now.get("groups", 1))
    made: dict[str, Tensor] = {}
    for key in _HELD:
        old = getattr(module, key, None)
        like = module.weight if old is None and key == _BIAS and now[_BIAS] else old
        if like is not None:
            matrix = key == "weight" and like.ndim > 1
            new = torch.empty(
                (out, inside, *like.shape[2:]) if matrix else (out,), dtype=like.dtype, device=like.device
            )
            made[key] = nn.Parameter(new, like.requires_grad) if isinstance(like, nn.Parameter) else new
    return made


def _told(found: Sizes) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if key != _BIAS) or "no sizes"
