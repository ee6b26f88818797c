"""Where a command takes its model and its samples from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from convexprune.extras import extras

if TYPE_CHECKING:
    from torch import Tensor, nn

    from convexprune.command.folder import Folder
    from convexprune.command.samples import Windows

SAMPLES: Final = "A text, an npz file of the model's inputs, or module:function that returns batches"


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say which windows of a text are taken."""
    numbers = {
        "batch": (1, 16, "Samples run at once."),
        "length": (2, 256, "Tokens of a window."),
        "first": (0, 0, "Number of the first window."),
        "windows": (1, 128, "Windows of a text."),
    }
    for name, (least, default, words) in numbers.items():
        kind = click.IntRange(min=least)
        command = click.option(f"--{name}", type=kind, default=default, show_default=True, help=words)(command)
    return command


def of_one_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a model is loaded, on which windows it runs, and where."""
    folder = click.Path(path_type=Path)
    command = click.option("--device", default="cpu", show_default=True, help="Where the model runs.")(command)
    command = options(command)
    command = click.option("--tokenizer", type=folder, help="Folder of the tokenizer; default: MODEL.")(command)
    words = "File of cp.save, such as pruned.safetensors, that goes into MODEL."
    command = click.option("--weights", type=folder, help=words)(command)
    return click.option("--class", "kind", help="Class of transformers to load it as; default: the config's.")(command)


def check_device(name: str) -> None:
    """Raise ValueError where torch has no such device here, or it is one without numbers."""
    import torch

    try:
        found = torch.zeros(1, device=name).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if found == "meta":
        raise ValueError(f"--device {name}: tensors have no numbers there; give cpu, or cuda")


@dataclass(frozen=True)
class Source:
    """A transformers folder, or module:function that returns a model.

    kind       a class of transformers
    weights    a safetensors file that goes into the model
    tokenizer  folder of another tokenizer
    """

    name: str
    kind: str | None = None
    weights: Path | None = None
    other_tokenizer: Path | None = None

    @cached_property
    def folder(self) -> Folder | None:
        """The folder, or None for a function."""
        from convexprune.command.folder import Folder

        return None if not Path(self.name).exists() and ":" in self.name else Folder(Path(self.name))

    def ready(self) -> int:
        """Import what loads the model; returns the bytes that this process has then."""
        from convexprune.network.memory import resident

        with extras():
            import matplotlib.figure  # noqa: F401   for the report's page
        if self.folder is not None:
            self.folder.kind(self.kind)
        return resident()

    def model(self) -> nn.Module:
        """The model, in evaluation mode."""
        from convexprune.command.samples import called
        from convexprune.network import load
        from convexprune.network.forward import check_model

        made = called(self.name) if self.folder is None else self.folder.model(self.kind)
        check_model(made, f"what {self.name} returns")
        model: nn.Module = made
        if self.weights is not None:
            load(model, self.weights)
        return model.eval()

    def on(self, device: str) -> nn.Module:
        """The model on a device; raises ValueError where there is no such device."""
        check_device(device)
        self.ready()
        return self.model().to(device)

    @property
    def shard(self) -> int:
        """Bytes of the largest file of a folder's weights."""
        return max((each.stat().st_size for each in self.folder.files), default=0) if self.folder is not None else 0

    def skeleton(self) -> nn.Module:
        """Of a folder the model without weights."""
        assert self.folder is not None
        return self.folder.skeleton(self.kind)

    def samples(self, source: str, model: nn.Module, windows: Windows) -> Iterable[Any]:
        """The batches of a text, an npz file or a function."""
        from convexprune.command.samples import samples

        return samples(source, model, self._tokenizer, windows)

    def moved(self, source: str | None, model: nn.Module, windows: Windows, device: str) -> list[Any] | None:
        """The batches on a device; None of no source."""
        from convexprune.command.samples import moved

        return None if source is None else [moved(batch, device) for batch in self.samples(source, model, windows)]

    def labelled(self, source: str, model: nn.Module, windows: Windows) -> tuple[Iterable[Any], list[Tensor] | None]:
        """The batches, and the labels where an npz file has them."""
        from convexprune.command.samples import LABELS

        batches = list(self.samples(source, model, windows))
        if not all(isinstance(batch, dict) and LABELS in batch for batch in batches):
            return batches, None
        labels = [batch.pop(LABELS) for batch in batches]
        return [next(iter(batch.values())) if len(batch) == 1 else batch for batch in batches], labels

    @property
    def _tokenizer(self) -> Callable[[], Any] | None:
        from convexprune.command.folder import tokenizer_in

        if self.other_tokenizer is not None:
            return partial(tokenizer_in, self.other_tokenizer)
        return None if self.folder is None else self.folder.tokenizer
