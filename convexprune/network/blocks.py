"""Go through a network block by block: what a finished block has made is kept, and it need not run again.

A container (a ModuleList, a Sequential) whose children are called one after another, each once in a batch, is a chain;
its children are the blocks. A run for a later layer then puts a stub in the place of every finished block. The stub of
the last one gives what that block has made of the batch. Those before it give NaN of the right shape: should the code
between the blocks read more of them than to hand it on, then NaN is seen and refused, never a wrong number.

So the cost of a cascade is linear in the number of blocks. It holds one block's output of each batch for each
network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from convexprune.network.calibration import Calibration
from convexprune.network.call import same
from convexprune.network.forward import BatchError, Enough, numbered, run, tensors_in, undisturbed

CONTAINERS: Final = (nn.ModuleList, nn.Sequential)
FEWEST: Final = 2  # blocks with layers that a chain has at the least,
INNER: Final = 5  # and one inside a block of another: a shorter one would cost more than it saves


@dataclass(frozen=True)
class Chain:
    """A container whose children are called one after another, each once in a batch.

    name     of the container
    blocks   the names of its children, in order, up to the last that has a layer
    holders  those that have layers
    """

    name: str
    blocks: tuple[str, ...]
    holders: tuple[str, ...]

    def count(self, groups: Sequence[Sequence[str]], at: int) -> int:
        """How many of the blocks are finished when the walk comes to the group of this number."""
        owners = [_owner(group[0], self.blocks) for group in groups]
        if not any(owners[:at]):
            return 0
        return next((self.blocks.index(owner) for owner in owners[at:] if owner), len(self.blocks))


@dataclass
class Blocks:
    """What the survey sees of the children of containers: which are called, in what order, and how much they make."""

    model: nn.Module
    calls: list[list[str]] = field(default_factory=list)  # of each batch
    bytes: dict[str, int] = field(default_factory=dict)  # that a child makes of all batches

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look on while the network runs one batch."""
        self.calls.append([])
        with ExitStack() as handles:
            for name in _children(self.model):
                handles.callback(_hooked(self.model, name, partial(self._made, name)).remove)
            yield

    def chains(self, groups: Sequence[Sequence[str]]) -> list[Chain]:
        """The chains, the outer before the inner.

        groups  the layers' modules in the order of the walk; those of a group are captured together
        """
        found: list[Chain] = []
        for name, container in self.model.named_modules():
            if isinstance(container, CONTAINERS):
                chain = self._chain(name, [*container._modules], groups)
                inside = any(_owner(name, outer.blocks) for outer in found)
                if chain is not None and len(chain.holders) >= (INNER if inside else FEWEST):
                    found.append(chain)
        return found

    def held(self, chains: Sequence[Chain]) -> int:
        """Bytes of what the blocks of a network make that are held at once, at the most."""
        return sum(max(self.bytes.get(block, 0) for block in chain.blocks) for chain in chains)

    def _made(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        self.calls[-1].append(name)
        with torch._C.DisableTorchFunction():  # whoever records the pass is not to see this
            made = sum(each.numel() * each.element_size() for each in tensors_in(output))
        self.bytes[name] = self.bytes.get(name, 0) + made

    def _chain(self, name: str, keys: Sequence[str], groups: Sequence[Sequence[str]]) -> Chain | None:
        children = [".".join(filter(None, (name, key))) for key in keys]
        owners = [{_owner(module, children) for module in group} for group in groups]
        if any(len(each) > 1 for each in owners):
            return None  # layers of two blocks read one tensor
        order = [owner for (owner,) in owners if owner is not None]
        holders = list(dict.fromkeys(order))
        left = [one for one, other in pairwise(order) if one != other]
        if not holders or len(left) != len(holders) - 1:
            return None  # the walk comes back to a block that it has left
        blocks = children[: children.index(holders[-1]) + 1]
        if holders != [child for child in blocks if child in holders]:
            return None
        once = all([child for child in calls if child in blocks] == blocks for calls in self.calls)
        return Chain(name, tuple(blocks), tuple(holders)) if once else None


class Stash:
    """What blocks have made of the batches, in memory or in files of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self._held = folder, dict[str, Any]()

    def put(self, key: str, value: Any) -> None:
        """Keep a value in the place of what the key had."""
        self._held[key] = value if self.folder is None else self._mapped(self.folder, key, value)

    def get(self, key: str) -> Any:
        """The value."""
        return self._held[key]

    def _mapped(self, folder: Path, key: str, value: Any) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / f"{key}.pt"
        beside = place.with_suffix(".part")
        torch.save(value, beside)
        beside.replace(place)  # what is mapped of the old file stays
        return torch.load(place, mmap=True, weights_only=False)  # our own file, of a line above


class Stream:
    """One network on all batches, of which the finished blocks do not run any more.

    name   tells the networks of one stash apart
    """

    def __init__(self, model: nn.Module, chains: Sequence[Chain], name: str, stash: Stash) -> None:
        self.model, self.chains, self.name, self.stash = model, tuple(chains), name, stash
        self.done = {chain.name: 0 for chain in chains}  # how many blocks of each are finished
        self._shapes: dict[tuple[str, int], Any] = {}  # (block, batch) -> NaN in the shape of what it has made

    @contextmanager
    def at(self, index: int) -> Iterator[None]:
        """Inside, the finished blocks give what they made of this batch."""
        with ExitStack() as places:
            for chain in reversed(self.chains):  # the inner first: an outer stub hides what is inside
                finished = chain.blocks[: self.done[chain.name]]
                for block in finished[:-1]:
                    places.enter_context(_replaced(self.model, block, _Stub(self._shapes[block, index])))
                for block in finished[-1:]:
                    places.enter_context(_replaced(self.model, block, _Stub(self.stash.get(self._key(block, index)))))
            yield

    def finish(self, chain: Chain, count: int, calibration: Calibration) -> None:
        """Run the network as far as the end of the chain's first `count` blocks, and keep what the last has made."""
        if count > self.done[chain.name]:
            with undisturbed(self.model):
                for index, batch in enumerate(calibration):
                    with numbered(index), self.at(index):
                        self._pass(chain, count, index, batch)
            self.done[chain.name] = count

    def took(self, block: str, index: int, output: Any) -> None:
        """This is what a block has made of a batch."""
        self._shapes[block, index] = tree_map(_nan, output)
        self.stash.put(self._key(block, index), tree_map(_copied, output))

    def _pass(self, chain: Chain, count: int, index: int, batch: Any) -> None:
        blocks = chain.blocks[self.done[chain.name] : count]

        def after(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            if name == blocks[-1]:
                self.took(name, index, output)
                raise Enough
            self._shapes[name, index] = tree_map(_nan, output)

        with ExitStack() as handles:
            for name in blocks:
                handles.callback(_hooked(self.model, name, partial(after, name)).remove)
            with suppress(Enough):
                run(self.model, batch)

    def _key(self, block: str, index: int) -> str:
        """One for a chain: what the block before has made is not needed any more."""
        chain = next(each for each in self.chains if block in each.blocks)
        return f"{self.name}-{self.chains.index(chain)}-{index}"


class _Stub(nn.Module):
    """Stands where a finished block stood, and gives what that has made."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.__dict__["made"], self.__dict__["block"] = made, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A copy, since what comes next may write to it."""
        return tree_map(_copied, self.__dict__["made"])

    def __getattr__(self, name: str) -> Any:
        """What else the model asks of a block."""
        return getattr(self.__dict__["block"], name)


@contextmanager
def _replaced(model: nn.Module, name: str, stub: _Stub) -> Iterator[None]:
    path, _, key = name.rpartition(".")
    parent = model.get_submodule(path)
    block = parent._modules[key]
    assert block is not None  # it has been called
    stub.__dict__["block"] = block
    parent._modules[key] = stub
    try:
        yield
    finally:
        parent._modules[key] = block


def streamed(model: nn.Module, chains: Sequence[Chain], batch: Any) -> list[Chain]:
    """Those chains behind whose finished blocks everything reads the same as if they ran: tried on a batch."""
    line, read, made = _timeline(model, chains, batch)
    kept = list(chains)
    while kept:
        odd = _differs(model, kept, batch, line, read, made)
        if odd is None:
            break
        kept.remove(odd)
    return kept


def _differs(
    model: nn.Module,
    chains: Sequence[Chain],
    batch: Any,
    line: Sequence[tuple[str, bool]],
    read: Mapping[str, list[Tensor]],
    made: Mapping[str, Any],
) -> Chain | None:
    """The chain whose stubs are seen by what comes behind them."""
    stream = Stream(model, chains, "trial", Stash())
    blocks = {block: chain for chain in chains for block in chain.blocks}
    events = [(name, entered) for name, entered in line if name in blocks]
    for place, (block, entered) in enumerate(events):
        if entered:
            continue
        stream.took(block, 0, made[block])
        stream.done[blocks[block].name] = blocks[block].blocks.index(block) + 1
        target = events[place + 1][0] if place + 1 < len(events) else None
        if target is not None and not events[place + 1][1]:
            continue  # the end of an outer block, which is looked at next
        if not _reads(stream, batch, target, None if target is None else read[target]):
            return blocks[block]
    return None


def _reads(stream: Stream, batch: Any, target: str | None, wanted: list[Tensor] | None) -> bool:
    """Whether a block reads what it is to read, with stubs before it; without a block: whether the output is finite."""
    seen: list[Tensor] = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend(tensor.clone() for tensor in tensors_in((args, kwargs)))
        raise Enough

    with undisturbed(stream.model), stream.at(0), ExitStack() as handles:
        if target is not None:
            block = stream.model.get_submodule(target)
            handles.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        try:
            output = run(stream.model, batch)
        except Enough:
            return same(seen, wanted)
        except BatchError:
            return False
    return target is None and all(bool((each == each).all()) for each in tensors_in(output))


def _timeline(
    model: nn.Module, chains: Sequence[Chain], batch: Any
) -> tuple[list[tuple[str, bool]], dict[str, list[Tensor]], dict[str, Any]]:
    """In which order the blocks begin (True) and end (False), what each reads, and what each makes."""
    line: list[tuple[str, bool]] = []
    read: dict[str, list[Tensor]] = {}
    made: dict[str, Any] = {}

    def before(name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        line.append((name, True))
        read[name] = [tensor.clone() for tensor in tensors_in((args, kwargs))]

    def after(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        line.append((name, False))
        made[name] = tree_map(_copied, output)

    with undisturbed(model), ExitStack() as handles:
        for name in dict.fromkeys(block for chain in chains for block in chain.blocks):
            module = model.get_submodule(name)
            handles.callback(module.register_forward_pre_hook(partial(before, name), with_kwargs=True).remove)
            handles.callback(module.register_forward_hook(partial(after, name)).remove)
        run(model, batch)
    return line, read, made


def _hooked(model: nn.Module, name: str, hook: Any) -> RemovableHandle:
    return model.get_submodule(name).register_forward_hook(hook)


def _children(model: nn.Module) -> list[str]:
    """The children of all containers, each once."""
    names = [
        ".".join(filter(None, (path, key)))
        for path, module in model.named_modules()
        if isinstance(module, CONTAINERS)
        for key, child in module._modules.items()
        if child is not None and not isinstance(child, torch.jit.ScriptModule)
    ]
    return list(dict.fromkeys(names))


def _owner(module: str, blocks: Iterable[str]) -> str | None:
    return next((block for block in blocks if module == block or module.startswith(f"{block}.")), None)


def _nan(value: Any) -> Any:
    """NaN in the shape of a floating tensor, without memory; numbers of other kinds, such as positions, are kept."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return torch.full((), torch.nan, dtype=value.dtype, device=value.device).expand(value.shape)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
