"""Samples for a model: windows of a text, arrays of an npz file, or what a function of yours returns."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

LABELS: Final = "labels"  # of an npz file: the classes, which are no input


@dataclass(frozen=True)
class Windows:
    """Which windows of a text: `count` of them from the one of number `first` on, of `length` tokens each."""

    count: int = 128
    first: int = 0
    length: int = 256
    batch: int = 16


def called(path: str) -> Any:
    """What a module:function returns; raises ValueError where there is none."""
    module, _, name = path.rpartition(":")
    if not module or not name:
        raise ValueError(f"{path!r} is no module:function")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{path}: {error}") from error
    except AttributeError:
        raise ValueError(f"{path}: the module {module} has no {name!r}") from None
    if not callable(function):
        raise ValueError(f"{path}: {name} is a {type(function).__name__}; give a function without arguments")
    return function()


def samples(source: str, model: nn.Module, tokenizer: Callable[[], Any] | None, windows: Windows) -> Iterable[Any]:
    """The batches of a source: a text, an npz file, or a module:function that returns batches.

    tokenizer  makes one where the source is a text; None where there is no folder to find one in

    Raises ValueError or OSError, naming the source.
    """
    if not Path(source).exists() and ":" in source:
        return called(source)  # type: ignore[no-any-return]
    place = Path(source)
    if place.is_dir():
        raise ValueError(f"{source} is a folder; give a text, an npz file, or a module:function")
    if zipfile.is_zipfile(place):
        return arrays(place, model, windows.batch)
    text = _text(place)
    if tokenizer is None:
        raise ValueError(
            f"{source} is a text, for which a tokenizer is needed; give --tokenizer FOLDER, or an npz file"
        )
    return texts(text, source, model, tokenizer(), windows)


def arrays(place: Path, model: nn.Module, size: int) -> list[Any]:
    """The arrays of an npz file, cut along their first axis.

    They are keyword arguments by their names; one alone that is none is the input. A single number goes to every batch.
    Numbers with a point come in the dtype of the model.
    """
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)
    try:
        with np.load(place, allow_pickle=False) as file:
            held = {key: torch.as_tensor(file[key]) for key in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{place} is no npz file of numbers: {error}") from error
    single = {key: value.item() for key, value in held.items() if not value.ndim}
    rows = {key: value.to(dtype) if value.is_floating_point() else value for key, value in held.items() if value.ndim}
    lengths = {len(value) for value in rows.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"{place}: its arrays have {sorted(lengths)} rows; each must have one for each sample")
    (length,) = lengths
    named = any(key in _known(model) for key in rows)
    if named or len(rows) > 1:
        for name in held:
            if name not in (*_known(model), LABELS):
                raise ValueError(f"{place}: the model takes no {name!r}; it takes {', '.join(_known(model))}")
    parts = [{key: value[at : at + size] for key, value in rows.items()} for at in range(0, length, size)]
    if not named and len(rows) == 1:
        return [next(iter(part.values())) for part in parts]
    return [{**_uncached(model), **part, **single} for part in parts]


def _known(model: nn.Module) -> list[str]:
    """The arguments of the model's forward that have names."""
    kinds = inspect.signature(model.forward).parameters
    return [name for name, kind in kinds.items() if kind.kind not in (kind.VAR_KEYWORD, kind.VAR_POSITIONAL)]


def _uncached(model: nn.Module) -> dict[str, Any]:
    """What tells a model that writes texts to keep nothing for a next token."""
    return {"use_cache": False} if "use_cache" in _known(model) else {}


def texts(text: str, source: str, model: nn.Module, tokenizer: Any, windows: Windows) -> list[dict[str, Any]]:
    """Windows of the text's tokens, each between the special tokens that the tokenizer puts around a text."""
    before, behind = _around(tokenizer)
    inside = windows.length - len(before) - len(behind)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if inside < 1 or (isinstance(longest, int) and windows.length > longest):
        raise ValueError(f"windows of {windows.length} tokens do not fit the model, which reads at most {longest}")
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    there = len(tokens) // inside
    if there <= windows.first:
        raise ValueError(
            f"{source} has {len(tokens)} tokens, {there} windows of {windows.length}, and the first that is wanted is "
            f"number {windows.first}; give a longer text, or shorter windows with --length"
        )
    stop = min(there, windows.first + windows.count)
    rows = tokens[windows.first * inside : stop * inside].reshape(-1, inside)
    ends = [torch.tensor(part, dtype=torch.long).expand(len(rows), -1) for part in (before, behind)]
    rows = torch.cat([ends[0], rows, ends[1]], 1)
    return [_batch(model, part) for part in torch.split(rows, windows.batch)]


def _batch(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """As the model takes it; one that writes text from another text is to write what it reads."""
    batch: dict[str, Any] = {"input_ids": ids, **_uncached(model)}
    if "decoder_input_ids" in _known(model):
        start = getattr(getattr(model, "config", None), "decoder_start_token_id", None) or 0
        batch["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)
    return batch


def _around(tokenizer: Any) -> tuple[Sequence[int], Sequence[int]]:
    """The special tokens in front of a text and behind it."""
    both = list(tokenizer("")["input_ids"])
    one = list(tokenizer("a")["input_ids"])
    front = 0
    while front < len(both) and front < len(one) and both[front] == one[front]:
        front += 1
    if len(both) > 1 and front == len(both):  # all of them seem to be in front
        return both, []
    return both[:front], both[front:]


def _text(place: Path) -> str:
    try:
        text = place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is neither a text in UTF-8 nor an npz file") from error
    if not text.strip():
        raise ValueError(f"{place} is empty")
    return text


def moved(value: Any, device: str) -> Any:
    """Tensors in nested mappings and sequences, on a device."""
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(moved(part, device) for part in value)
    return value.to(device) if hasattr(value, "to") else value
