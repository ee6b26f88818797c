"""A folder that holds what a pruning has finished, so that the same call goes on where it was killed.

    run.json        what the run is: hashes of the model, the data and the recipe, the mode, the versions, the threads
    layers/N.safetensors   module by module, in the order of the walk: the weights as stored, and the rows of the report

Every file is written whole or not at all. On the same machine, with as many threads, the network that comes out is bit
for bit that of a run which was not disturbed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from convexprune.layer import Layer
from convexprune.report.plain import from_plain, to_plain
from convexprune.report.row import Row
from convexprune.version import __version__
from convexprune.whole_file import write_whole

RUN: Final = "run.json"
ROWS: Final = "rows"
W: Final = "weights."
B: Final = "biases."
WORDS: Final = {
    "model": "the model's weights are others",
    "data": "the calibration samples are others",
    "recipe": "the recipe states other problems",
    "layers": "other layers are pruned",
    "solver": "the solver is another, or has other options",
    "mode": "the mode is another",
    "seed": "the seed is another",
    "threads": "torch has another number of threads, which rounds otherwise",
    "torch": "torch is of another version",
    "convexprune": "convexprune is of another version",
}


@dataclass(frozen=True)
class Store:
    """What is finished of one run, in a folder.

    Args:
        folder: Made where it is missing. It belongs to one run; another is refused, by what differs.

    Raises:
        TypeError: For what is no path.

    Example:
        >>> import tempfile, torch, convexprune as cp
        >>> model, batches = torch.nn.Linear(8, 4), [torch.randn(20, 8)]
        >>> recipe = lambda layer: cp.Reconstruction(layer, cp.Unstructured(0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     work = cp.Execution(store=folder)
        ...     pruned, report = cp.prune(model, batches, recipe, execution=work)
        ...     again, same = cp.prune(model, batches, recipe, execution=work)  # nothing is solved twice
        >>> torch.equal(pruned.weight, again.weight), report.rows == same.rows
        (True, True)
    """

    folder: Path
    _places: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def opened(self, run: Mapping[str, Any], modules: Sequence[str]) -> Store:
        """The store of this run; raises ValueError, naming what differs, where the folder holds another one."""
        run = {**run, "layers": list(modules), "torch": torch.__version__, "convexprune": __version__}
        found = self._found()
        if found is None:
            self._layers.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / RUN, json.dumps(run, indent=1) + "\n")
        else:
            for left in self._layers.glob(".*.part"):  # of a run that was killed while it wrote
                left.unlink()
            odd = [key for key in run if found.get(key) != json.loads(json.dumps(run[key]))]
            if odd:
                why = "; ".join(WORDS.get(key, key) for key in odd)
                raise ValueError(
                    f"{self.folder} holds another run: {why}. Give that run's arguments to go on with it, or another "
                    "folder"
                )
        return replace(self, _places={module: number for number, module in enumerate(modules)})

    def get(self, module: str) -> tuple[dict[str, Tensor], tuple[Row, ...]] | None:
        """The weights (M, P) of each layer of a module that is finished, and its rows; None where it is not."""
        from safetensors import SafetensorError, safe_open

        place = self._place(module)
        if not place.exists():
            return None
        try:
            with safe_open(place, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
                content = json.loads((file.metadata() or {})[ROWS])
            rows = tuple(_row(each, number, tensors) for number, each in enumerate(content))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{place} is not what a run has written ({error}); remove it to solve that layer anew"
            ) from error
        weights = {key.removeprefix(W): each for key, each in tensors.items() if key.startswith(W)}
        biases = {key.removeprefix(B): each[:, None] for key, each in tensors.items() if key.startswith(B)}
        whole = {key: torch.cat([each, *([biases[key]] if key in biases else [])], 1) for key, each in weights.items()}
        return whole, rows

    def mapped(self, module: str) -> list[Tensor]:
        """The weights (M, N) of a finished module's layers, mapped from its file: memory is taken when they are read.

        What is written into them does not reach the file.
        """
        from safetensors import safe_open

        with safe_open(self._place(module), framework="pt") as file:
            return [file.get_tensor(key) for key in file.keys() if key.startswith(W)]  # noqa: SIM118 (no dict)

    def put(self, module: str, weights: Mapping[str, tuple[Tensor, Tensor | None]], rows: Sequence[Row]) -> None:
        """Write a module that is finished: weights (M, N) and biases (M,), or None, of each of its layers."""
        from safetensors.torch import save

        tensors = {}
        for key, (weight, bias) in weights.items():
            tensors[W + key] = weight.detach().cpu().contiguous()
            if bias is not None:
                tensors[B + key] = bias.detach().cpu().contiguous()
        for number, row in enumerate(rows):
            for key in ("pattern", "errors"):
                if getattr(row, key) is not None:
                    tensors[f"{number}.{key}"] = getattr(row, key).contiguous()
        content = json.dumps([to_plain(row) for row in rows], allow_nan=False)
        write_whole(self._place(module), save(tensors, {ROWS: content, "module": module}))

    @property
    def _layers(self) -> Path:
        return self.folder / "layers"

    def _place(self, module: str) -> Path:
        return self._layers / f"{self._places[module]:05d}.safetensors"

    def _found(self) -> dict[str, Any] | None:
        place = self.folder / RUN
        if not place.exists():
            return None
        try:
            content = json.loads(place.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{place} is no description of a run ({error}); give another folder") from error
        if not isinstance(content, dict):
            raise ValueError(f"{place} is no description of a run; give another folder")
        return content


def _row(content: Any, number: int, tensors: Mapping[str, Tensor]) -> Row:
    row: Row = from_plain(Row, content)
    return replace(row, pattern=tensors.get(f"{number}.pattern"), errors=tensors.get(f"{number}.errors"))


def model_hash(model: nn.Module) -> str:
    """A hash of every tensor of the model's state: names, shapes, dtypes and bits."""
    found = hashlib.blake2b(digest_size=32)
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        found.update(_bits(tensor).digest())
    return found.hexdigest()


def text_hash(text: str) -> str:
    """A hash of a text."""
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def content(value: Any) -> str:
    """A problem, or a part of one, as a text that tells it from others; of a layer only its damping."""
    if isinstance(value, Layer):
        return f"damping={value.damping!r}"
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}:{_bits(value).hexdigest()}"
    if is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(f"{entry.name}={content(getattr(value, entry.name))}" for entry in fields(value))
        return f"{type(value).__name__}({inside})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(content, value))})"
    return repr(value)


def _bits(tensor: Tensor) -> Any:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.blake2b(data, digest_size=32)
