"""Read and write the weights of one layer of a model, and whole models as one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.network.names import find
from convexprune.whole_file import write_whole

_ALIASES = "aliases"


def read(model: nn.Module, name: str) -> Tensor:
    """(M, P), float64: the weights of a layer as stored, the bias (if there is one) as the last column."""
    return find(model, name).read()


def write(model: nn.Module, name: str, x: Tensor) -> None:
    """Store x (M, P) as the weights (and bias, the last column) of a layer, in the model's dtype, in place.

    Raises ValueError, before anything is touched, for another shape and for numbers not finite in that dtype.
    """
    find(model, name).write(x)


def save(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write the model's state to one safetensors file, whole or not at all.

    A tensor with several names (tied weights) is stored once; its other names are in the metadata as "aliases".

    Args:
        model: The network.
        path: The file. A symbolic link is kept, and an existing file keeps its mode.
        metadata: Values that JSON can hold; each is stored as a JSON string.

    Raises:
        OSError: If the file cannot be written, for example on a full disk. No partial file is left, and an existing
            file stays as it was.
        ValueError: If the metadata has the key "aliases".
        TypeError: If the state holds something other than tensors.

    Example:
        >>> import tempfile, torch, convexprune as cp
        >>> model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cp.save(model, f"{folder}/model.safetensors", {"kept": 0.5})
        ...     metadata = cp.load(other, f"{folder}/model.safetensors")
        >>> metadata, torch.equal(model.weight, other.weight)
        ({'kept': 0.5}, True)
    """
    from safetensors.torch import save as serialised

    if _ALIASES in (metadata or {}):
        raise ValueError(f"metadata: {_ALIASES!r} is kept for tensors that share their storage")
    tensors, aliases = _stored(model)
    entries = {key: json.dumps(value) for key, value in {**(metadata or {}), _ALIASES: aliases}.items()}
    write_whole(path, serialised(tensors, {"format": "pt", **entries}))


def load(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the state that `save` wrote into a model of the same structure.

    Args:
        model: The network; its parameters and buffers are overwritten.
        path: The file.

    Returns:
        The metadata that was given to `save`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If names, shapes or dtypes differ; the model is then as it was.

    Example:
        >>> import tempfile, torch, convexprune as cp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cp.save(torch.nn.Linear(3, 2), f"{folder}/model.safetensors")
        ...     cp.load(torch.nn.Linear(4, 2), f"{folder}/model.safetensors")
        Traceback (most recent call last):
            ...
        ValueError: 'weight' is (2, 3) torch.float32 in the file and (2, 4) torch.float32 in the model
    """
    from safetensors import safe_open

    with safe_open(Path(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        entries = file.metadata() or {}
    metadata = {key: json.loads(value) for key, value in entries.items() if key != "format"}
    for alias, name in metadata.pop(_ALIASES, {}).items():
        tensors[alias] = tensors[name]
    _check_fit(model, tensors)
    model.load_state_dict(tensors)
    return metadata


def _stored(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} is a {type(tensor).__name__}; a safetensors file holds tensors only")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        # a part of a larger storage gets its own: safetensors refuses overlapping tensors
        tensors[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        where = "the file" if odd[0] in own else "the model"
        raise ValueError(f"{odd[0]!r} is not in {where}; load into a model of the same structure")
    for name, tensor in tensors.items():
        mine = own[name]
        if mine.shape != tensor.shape or mine.dtype != tensor.dtype:
            raise ValueError(
                f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in the file and "
                f"{tuple(mine.shape)} {mine.dtype} in the model"
            )
