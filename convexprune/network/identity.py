"""Whether two samples are one: by the input's numbers, wherever they stand in a batch and whatever goes with them.

A sample is the same in another batch, dtype, order of keys or wrapping, with labels or without, and with other padding
where the batch has an attention mask. A copy that was changed, such as a flipped image, is another sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from convexprune.network.calibration import digests

MASK: Final = "attention_mask"
BESIDE: Final = (MASK, "labels", "label", "token_type_ids", "position_ids", "next_sentence_label")  # no inputs


def identities(batch: Any) -> Iterator[bytes]:
    """A hash for each sample; raises ValueError where the tensors of the input do not have a row for each."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(first, Mapping):
        yield from digests(batch)
        return
    inputs = {key: value for key, value in first.items() if key not in BESIDE and isinstance(value, Tensor)} or first
    mask = first.get(MASK)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        yield from digests(inputs)
        return
    sizes = {len(value) if isinstance(value, Tensor) and value.ndim else 0 for value in inputs.values()}
    if sizes != {len(mask)}:
        raise ValueError(f"the tensors of a batch have {sorted({*sizes, len(mask)})} rows; each must have one a sample")
    for row, keep in enumerate(mask.bool()):
        yield from digests({key: _unpadded(value[row], keep)[None] for key, value in inputs.items()})


def _unpadded(sample: Tensor, keep: Tensor) -> Tensor:
    """What the mask keeps of a sample's places, if it has as many."""
    if sample.ndim and len(sample) == len(keep):
        return sample[torch.as_tensor(keep, device=sample.device)]
    return sample
