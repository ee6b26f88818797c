"""Read and write the weights of one layer of a model, and whole models as one safetensors file."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.network.forward import check_model
from convexprune.network.names import find
from convexprune.network.sizes import Resizing, changes
from convexprune.network.two_factors import put_in_place, stored_pairs
from convexprune.options import path as check_path
from convexprune.whole_file import write_whole

_ALIASES, _FORMAT, _COMPACTED = "aliases", "format", "compacted"


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

    A tensor with several names (tied weights) is stored once; its other names are in the metadata as "aliases". Of a
    network that `compact` or `merge` made smaller, the metadata say under "compacted" which modules are smaller than
    they were, and by how much; so `load` takes the dense network.

    Args:
        model: The network.
        path: The file. A symbolic link is kept, and an existing file keeps its mode.
        metadata: Values that JSON can hold; each is stored as a JSON string.

    Raises:
        OSError: If the file cannot be written, for example on a full disk. No partial file is left, and an existing
            file stays as it was.
        ValueError: If the metadata has the key "aliases", "format" or "compacted", or numbers that JSON cannot hold.
        TypeError: If the state holds something other than dense tensors, or the metadata something that JSON cannot.

    Example:
        >>> import tempfile, torch, convexprune as cp
        >>> model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cp.save(model, f"{folder}/model.safetensors", {"kept": 0.5})
        ...     metadata = cp.load(other, f"{folder}/model.safetensors")
        >>> metadata, torch.equal(model.weight, other.weight)
        ({'kept': 0.5}, True)
    """
    check_model(model)
    check_path("path", path)
    entries = _as_json({} if metadata is None else metadata)
    tensors, aliases = _stored(model)
    smaller = changes(model)
    if smaller:
        entries[_COMPACTED] = json.dumps(smaller)
    write_whole(path, serialised(tensors, {"format": "pt", **entries, _ALIASES: json.dumps(aliases)}))


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors as a safetensors file, whose metadata are in order: the same content has the same bytes."""
    from safetensors.torch import save as unordered

    made = bytes(unordered(dict(tensors), dict(metadata)))
    begin = 8 + int.from_bytes(made[:8], "little")
    head = json.loads(made[8:begin])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + made[begin:]


def load(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load the state that `save` wrote into a model of the same structure.

    Where the file holds a network that `compact` or `merge` made smaller, the model may be the dense network: the
    modules that are smaller in the file get the file's sizes, and new parameters (so make optimizers afterwards).
    Where the file holds two factors, of `factorise`, a module of the model that is still one becomes a `TwoFactors`.

    Args:
        model: The network; its parameters and buffers are overwritten.
        path: The file.

    Returns:
        The metadata that was given to `save`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: Naming the file, if it is no whole safetensors file, or if names, shapes or dtypes differ, or if
            the file holds a smaller network of another dense one; the model is then as it was.

    Example:
        >>> import tempfile, torch, convexprune as cp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cp.save(torch.nn.Linear(3, 2), f"{folder}/model.safetensors")
        ...     cp.load(torch.nn.Linear(4, 2), f"{folder}/model.safetensors")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: ...: 'weight' is (2, 3) torch.float32 in the file and (2, 4) torch.float32 in the model
    """
    check_model(model)
    check_path("path", path)
    tensors, entries = _read(Path(path))
    metadata = {key: _parsed(path, key, value) for key, value in entries.items() if key != _FORMAT}
    aliases = metadata.pop(_ALIASES, {})
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise ValueError(f"{path}: its {_ALIASES!r} are no mapping from names to names")
    odd = [name for name in aliases.values() if name not in tensors]
    if odd:
        raise ValueError(f"{path}: its {_ALIASES!r} name the tensor {odd[0]!r}, which is not in it")
    tensors |= {alias: tensors[name] for alias, name in aliases.items()}
    pairs = stored_pairs(model, tensors)
    for module, pair in pairs.items():
        put_in_place(model, module, pair)
    try:
        resizing = Resizing(model, metadata.pop(_COMPACTED, {}))
        _check_fit(resizing.state(), tensors)
    except ValueError as error:
        for module, pair in pairs.items():
            put_in_place(model, pair, module)
        raise ValueError(f"{path}: {error}") from None
    resizing.apply()
    model.load_state_dict(tensors)
    return metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata; raises OSError or ValueError naming the file."""
    from safetensors import SafetensorError, safe_open

    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is not a regular file; give a file that cp.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or not all of one: {error}") from error


def _parsed(path: str | os.PathLike[str], key: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the metadata entry {key!r} is not JSON that can be read: {error}") from error


def _as_json(metadata: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise TypeError(f"metadata is {metadata!r}; give a mapping from strings to values that JSON can hold")
    for key in (_ALIASES, _FORMAT, _COMPACTED):
        if key in metadata:
            raise ValueError(f"metadata: {key!r} is a key of the file format; use another")
    entries = {}
    for key, value in metadata.items():
        try:
            entries[key] = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"metadata: {key!r} is {value!r:.80}, which JSON cannot hold: {error}") from error
    return entries


def _stored(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r} is a {type(tensor).__name__}; a safetensors file holds tensors only")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype == torch.complex128:
            kind = tensor.dtype if tensor.layout == torch.strided else tensor.layout
            raise TypeError(f"{name!r} is {kind}, which a safetensors file cannot hold; convert it first")
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        # a part of a larger storage gets its own: safetensors refuses overlapping tensors
        tensors[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    odd = sorted(own.keys() ^ tensors.keys())
    if odd:
        where = "the file" if odd[0] in own else "the model"
        raise ValueError(f"{odd[0]!r} is not in {where}; load into a model of the same structure")
    for name, tensor in tensors.items():
        mine = own[name]
        if mine.layout != torch.strided:
            raise ValueError(f"{name!r} is {mine.layout} in the model; make it dense first, with .to_dense()")
        if mine.shape != tensor.shape or mine.dtype != tensor.dtype:
            raise ValueError(
                f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in the file and "
                f"{tuple(mine.shape)} {mine.dtype} in the model"
            )
