"""Calibration: the samples that a network is judged on, and which of their rows count.

Whoever takes batches takes a `Calibration` or plain batches. Every whole pass over it is hashed sample by sample, in no
order, so that it knows whether a later pass gave the same samples: a guarantee that was computed over several passes
speaks of one set of samples only then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from convexprune.network.forward import check_batch, check_batches, tensors_in
from convexprune.network.outputs import Which, check_which
from convexprune.options import flag, optional, seed, text, whole

Mask = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Fingerprint:
    """The samples of one pass, whatever their order: how many, and the sum of their hashes modulo 2^256."""

    samples: int = 0
    total: int = 0

    def with_batch(self, batch: Any) -> Fingerprint:
        """The fingerprint of what came before and of a further batch."""
        try:
            hashes = list(digests(batch))
            samples = len(hashes)
        except ValueError:  # the tensors share no axis of samples: the batch is hashed as a whole
            tensors = list(tensors_in(batch))
            hashes = list(digests([[each[None] for each in tensors]]))
            samples = len(tensors[0]) if tensors[0].ndim else 1
        total = self.total + sum(int.from_bytes(each, "big") for each in hashes)
        return Fingerprint(self.samples + samples, total % 2**256)

    @property
    def text(self) -> str:
        """64 hexadecimal digits."""
        return f"{self.total:064x}"


@dataclass
class _Passes:
    """What is known of the whole passes made so far."""

    count: int = 0
    first: Fingerprint | None = None
    other: Fingerprint | None = None  # of the first pass that differed


@dataclass(frozen=True, eq=False)
class Calibration:
    """The calibration samples, and how a layer's rows are taken from them.

    Args:
        batches: tensors, or tuples and lists that begin with the input, or dicts of keyword arguments. They are gone
            through several times; an iterator is read into a list first.
        names: names, fnmatch patterns, and regular expressions behind "re:", of the layers that are meant; None: all.
        mask: batch -> bool tensor (batch, tokens): only the rows where it is True count.
        positions: the largest number of output positions taken from each image of a convolution; None: all.
        seed: draws those positions.
        activations: layer name -> "relu" or None, where what tracing finds is not what you want.
        keep_inputs: whether layers keep the rows that they read; None: those whose problem needs them.
        output: which of the tensors that the model returns is judged: its key, its index, or a function of what is
            returned. None: a lone tensor, else "logits", else the first of floating point.

    Raises:
        TypeError: for batches that are a lone tensor, a mapping or a string, for a mask that is no function, and for
            other fields of a wrong kind.
        ValueError: for `positions` below 1.

    Example:
        >>> import torch
        >>> calibration = Calibration([torch.zeros(3, 2), torch.ones(2, 2)], names="fc*")
        >>> len(calibration), calibration.fingerprint.samples
        (2, 5)
    """

    batches: Iterable[Any]
    names: str | Sequence[str] | None = None
    mask: Mask | None = None
    positions: int | None = None
    seed: int = 0
    activations: Mapping[str, str | None] = field(default_factory=dict)
    keep_inputs: bool | None = None
    output: Which = None
    _passes: _Passes = field(default_factory=_Passes, init=False, repr=False)

    def __post_init__(self) -> None:
        check_batches(self.batches)
        object.__setattr__(self, "names", listed(self.names))
        if self.mask is not None and not callable(self.mask):
            raise TypeError(f"mask is {self.mask!r}; give a function from a batch to a bool tensor (batch, tokens)")
        optional(whole(1))("positions", self.positions)
        seed("seed", self.seed)
        if not isinstance(self.activations, Mapping):
            raise TypeError(f'activations is {self.activations!r}; give a mapping from layer names to "relu" or None')
        for name in self.activations:
            text("a name of `activations`", name)
        optional(flag)("keep_inputs", self.keep_inputs)
        check_which("output", self.output)
        if isinstance(self.batches, Iterator):
            object.__setattr__(self, "batches", list(self.batches))

    @classmethod
    def of(cls, batches: Calibration | Iterable[Any], names: str | Iterable[str] | None = None) -> Calibration:
        """The calibration itself, or plain batches as one; `names`, where given, say which layers are meant."""
        found = batches if isinstance(batches, Calibration) else cls(batches)
        if names is None:
            return found
        chosen = replace(found, names=listed(names))
        object.__setattr__(chosen, "_passes", found._passes)  # the same samples
        return chosen

    def __iter__(self) -> Iterator[Any]:
        """One pass over the batches."""
        seen = Fingerprint()
        for index, batch in enumerate(self.batches):
            check_batch(batch, f"batch {index}")
            yield batch
            seen = seen.with_batch(batch)
        if not seen.samples:
            raise ValueError("no batches; give at least one (an iterator that was used up before gives none)")
        self._noted(seen)

    def __len__(self) -> int:
        """How many batches there are; raises TypeError where they do not say (see `length`)."""
        if self.length is None:
            raise TypeError(f"the batches are a {type(self.batches).__name__}, which does not say how many they are")
        return self.length

    @property
    def length(self) -> int | None:
        """How many batches there are, or None where they do not say."""
        if not isinstance(self.batches, Sized):
            return None
        try:
            return len(self.batches)
        except TypeError:  # a DataLoader over an iterable of unknown length
            return None

    @property
    def first(self) -> Any:
        """The first batch of a pass that goes no further."""
        for batch in self.batches:
            check_batch(batch, "batch 0")
            return batch
        raise ValueError("no batches; give at least one")

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the first whole pass; one is made where there was none."""
        if self._passes.first is None:
            for _ in self:
                pass
        assert self._passes.first is not None
        return self._passes.first

    @property
    def passes(self) -> int:
        """How many whole passes were made."""
        return self._passes.count

    @property
    def unsteady(self) -> str:
        """Why two passes did not give the same samples, or ""."""
        first, other = self._passes.first, self._passes.other
        if first is None or other is None:
            return ""
        if first.samples != other.samples:
            how = f"one pass over the batches gave {first.samples} samples and another {other.samples}"
        else:
            how = f"two passes over the batches gave other samples ({first.samples} in each)"
        return f"{how}; a guarantee needs the same ones: draw and augment them once, into a list"

    def _noted(self, seen: Fingerprint) -> None:
        passes = self._passes
        passes.count += 1
        if passes.first is None:
            passes.first = seen
        elif seen != passes.first and passes.other is None:
            passes.other = seen


def digests(batch: Any) -> Iterator[bytes]:
    """A hash of each sample's input: of its numbers, whatever their dtype, the order of the keys and the wrapping.

    Raises ValueError where the tensors of the input do not have a row for each sample.
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    parts = [first[key] for key in sorted(first)] if isinstance(first, Mapping) else first
    tensors = [_numbers(tensor) for tensor in tensors_in(parts)]
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(f"the tensors of a batch have {sorted(sizes)} rows; each must have one for each sample")
    rows = [tensor.reshape(len(tensor), -1).numpy() for tensor in tensors]
    for sample in range(sizes.pop()):
        content = hashlib.sha256()
        for each in rows:
            content.update(each[sample])
        yield content.digest()


def _numbers(tensor: Tensor) -> Tensor:
    """The numbers on the CPU in float64, in one piece; -0.0 is 0.0."""
    return (tensor.detach().cpu().to(torch.float64) + 0.0).contiguous()


def listed(names: Any) -> str | list[str] | None:
    """Names as they may be given; raises TypeError for what is no name and no iterable of names."""
    if names is None or isinstance(names, str):
        return names
    several = isinstance(names, Iterable) and not isinstance(names, (bytes, Mapping, Tensor, nn.Module))
    found = list(names) if several else []
    if not several or not all(isinstance(name, str) for name in found):
        raise TypeError(f"names is {names!r}; give a name, a pattern such as 'fc*', or a list of them")
    return found
