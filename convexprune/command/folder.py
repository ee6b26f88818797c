"""A transformers folder: the model in it, its tokenizer, and a folder like it for the pruned model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from convexprune.extras import extras
from convexprune.network.sizes import changes

CONFIG: Final = "config.json"
WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".index.json")
SHARD: Final = 50_000_000_000  # bytes of a file at the most, where the source is one file


@dataclass(frozen=True)
class Folder:
    """A folder that transformers' `from_pretrained` reads.

    Raises ValueError where it is none: no folder, no config.
    """

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is no folder; give a transformers folder, or a module:function")
        if not (self.path / CONFIG).is_file():
            raise ValueError(f"{self.path} has no {CONFIG}, so it is no transformers folder")

    @property
    def files(self) -> list[Path]:
        """The weights' files."""
        return sorted(self.path.glob("*.safetensors"))

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says; raises ValueError where it is no JSON object."""
        try:
            content = json.loads((self.path / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path / CONFIG} is no JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.path / CONFIG} is no JSON object")
        return content

    def check_whole(self) -> None:
        """Raise ValueError naming a file of weights that is cut off, or that an index names and is not there."""
        if not self.files:
            raise ValueError(f"{self.path} has no *.safetensors; save the model with save_pretrained first")
        from safetensors import SafetensorError, safe_open

        for index in self.path.glob("*.safetensors.index.json"):
            for name in sorted(set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())):
                if not (self.path / name).is_file():
                    raise ValueError(f"{self.path} lacks {name}, which {index.name} names; copy the model again")
        for place in self.files:
            try:
                with safe_open(place, framework="pt") as file:
                    list(file.keys())
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{place} is no whole safetensors file: {error}; copy the model again") from error

    def kind(self, name: str | None = None) -> Any:
        """The class of transformers that is named, else the config's; raises ValueError where there is none."""
        with extras():
            import transformers

        name = name or next(iter(self.config.get("architectures") or []), "AutoModel")
        found = getattr(transformers, name, None)
        if found is None:
            raise ValueError(f"transformers {transformers.__version__} has no {name!r}; name a class with --class")
        return found

    def model(self, kind: str | None = None) -> nn.Module:
        """The model, in the dtype that it is stored in; `kind` names a class of transformers, None: the config's.

        Raises ValueError, with transformers' words, where it cannot be made.
        """
        self.check_whole()
        maker = self.kind(kind)
        name = maker.__name__
        with _offline():
            try:
                model, said = maker.from_pretrained(self.path, dtype="auto", output_loading_info=True)
            except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: transformers cannot load it as {name}: {_first(error)}") from error
        missing = sorted(said.get("missing_keys", []))
        if missing:
            raise ValueError(
                f"{self.path} lacks {missing[0]!r} and {len(missing) - 1} more weights of {name}; name the class that "
                "was saved with --class"
            )
        made: nn.Module = model.eval()
        return made

    def skeleton(self, kind: str | None = None) -> nn.Module:
        """The model without its weights, of which only the config is read: enough for a plan."""
        from transformers import AutoConfig

        maker = self.kind(kind)
        with _offline():
            try:
                config = AutoConfig.from_pretrained(self.path)
                with torch.device("meta"):
                    model = maker(config) if maker.__name__ != "AutoModel" else maker.from_config(config)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self.path}: transformers cannot make it: {_first(error)}") from error
        made: nn.Module = model.to(getattr(config, "dtype", None) or torch.float32).eval()
        return made

    def config_of(self, model: Any) -> Any:
        """The config with which transformers makes a model of the given one's shapes; None where there is none.

        Tried are the model's own config, and those with one number changed that was the width of layers and, where the
        layers agree, is now another.
        """
        widths: dict[int, set[int]] = {}
        for change in changes(model).values():
            for key, before in change["dense"].items():
                widths.setdefault(before, set()).add(change["now"][key])
        tried = [copy.deepcopy(model.config)]
        for key, value in vars(model.config).items():
            if type(value) is int and len(widths.get(value, ())) == 1:
                tried.append(copy.deepcopy(model.config))
                setattr(tried[-1], key, *widths[value])
        return next((config for config in tried if _shapes(_made(type(model), config)) == _shapes(model)), None)

    def tokenizer(self) -> Any:
        """Its tokenizer; raises ValueError where there is none."""
        return tokenizer_in(self.path)

    def save(self, model: Any, out: Path, without: Collection[str] = ()) -> None:
        """Write the model as `from_pretrained` reads it, in shards where the source has shards, and copy the rest.

        without  names of files that are not copied

        Everything is written beside `out` first, and moved into it file by file when it is whole.
        """
        largest = max(place.stat().st_size for place in self.files)
        shard = largest if len(self.files) > 1 else SHARD
        with tempfile.TemporaryDirectory(prefix=".convexprune-", dir=out) as beside:
            with _offline():
                model.save_pretrained(beside, max_shard_size=shard)
            for place in self.path.iterdir():
                if place.name in without:
                    continue
                if place.is_file() and not place.name.endswith(WEIGHTS) and not (Path(beside) / place.name).exists():
                    shutil.copyfile(place, Path(beside) / place.name)
                elif place.is_dir() and not place.name.startswith("."):
                    shutil.copytree(place, Path(beside) / place.name)
            # the config last: without it the folder is no model
            for place in sorted(Path(beside).iterdir(), key=lambda each: each.name == CONFIG):
                target = out / place.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(place, target)


def tokenizer_in(path: Path) -> Any:
    """The tokenizer of a folder; raises ValueError where there is none."""
    with extras():
        from transformers import AutoTokenizer

    if not path.is_dir():
        raise ValueError(f"{path} is no folder with a tokenizer")
    with _offline():
        try:
            return AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(
                f"{path} has no tokenizer that transformers can load ({_first(error)}); calibrate on an npz file, or "
                "give --tokenizer FOLDER"
            ) from error


def _made(kind: Any, config: Any) -> nn.Module | None:
    """The model of a config, without weights; None where transformers makes none."""
    with _offline(), torch.device("meta"):
        try:
            made: nn.Module = kind(config)
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError):
            return None
        return made


def _shapes(model: nn.Module | None) -> dict[str, torch.Size]:
    return {} if model is None else {key: value.shape for key, value in model.state_dict().items()}


def _first(error: BaseException) -> str:
    return (str(error).strip().split("\n") or [""])[0] or type(error).__name__


@contextmanager
def _offline() -> Iterator[None]:
    """transformers asks no network, and writes nothing on the terminal."""
    import transformers

    before = {key: os.environ.get(key) for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
