"""Go through a network block by block: what a finished block has made is kept, and it need not run again.

A container (a ModuleList, a Sequential) whose children are called one after another, each once in a batch, is a chain;
its children are the blocks. A run for a later layer then puts a stub in the place of every finished block. The stub of
the last one gives what that block has made of the batch. Those before it give a tensor without numbers (`hollow`):
should the code between the blocks read more of them than to hand it on, then that is seen, never a wrong number.

A chain is tried on a batch first. Where the trial goes wrong the chain is none; where something is seen later, in
another batch or in the pruned network, the walk goes on without chains.

So the cost of a cascade is linear in the number of blocks. It holds one block's output of each batch for each
network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from convexprune.network.calibration import Calibration
from convexprune.network.call import same
from convexprune.network.forward import BatchError, Enough, edits, numbered, run, tensors_in, undisturbed
from convexprune.network.hollow import Hollow, Seen

CONTAINERS: Final = (nn.ModuleList, nn.Sequential)
FEWEST: Final = 2  # blocks with layers that a chain has at the least,
INNER: Final = 5  # and one inside a block of another: a shorter one would cost more than it saves
PLAIN: Final = (type(None), bool, int, float, str)  # besides tensors, what a block may return


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
    odd: set[str] = field(default_factory=set)  # children that return what cannot be kept
    writing: set[str] = field(default_factory=set)  # children that change what they are given
    _given: dict[str, list[tuple[Tensor, int | None]]] = field(default_factory=dict)  # and how often it was changed

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look on while the network runs one batch."""
        self.calls.append([])
        with ExitStack() as handles:
            for name in _children(self.model):
                module = self.model.get_submodule(name)
                begun = module.register_forward_pre_hook(partial(self._begun, name), with_kwargs=True)
                handles.callback(begun.remove)
                handles.callback(_hooked(self.model, name, partial(self._made, name)).remove)
            yield
        self._given.clear()

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

    def _begun(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        with torch._C.DisableTorchFunction():  # whoever records the pass is not to see this
            self._given[name] = [(each, edits(each)) for each in tensors_in((args, kwargs))]

    def _made(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        self.calls[-1].append(name)
        with torch._C.DisableTorchFunction():
            made = sum(each.numel() * each.element_size() for each in tensors_in(output))
            if not _keepable(output):
                self.odd.add(name)
            if any(edits(each) != before for each, before in self._given.pop(name, ())):
                self.writing.add(name)
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
        # only a Sequential holds nothing but what the last child made: elsewhere a change may be seen by others
        closed = type(self.model.get_submodule(name)).forward is nn.Sequential.forward
        writing = self.writing.intersection(blocks[:1] if closed else blocks)
        return (
            None if writing or not once or self.odd.intersection(blocks) else Chain(name, tuple(blocks), tuple(holders))
        )


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
        self._shapes: dict[tuple[str, int], Any] = {}  # (block, batch) -> what it has made, without its numbers

    @property
    def finished(self) -> list[str]:
        """The blocks that do not run any more."""
        return [block for chain in self.chains for block in chain.blocks[: self.done[chain.name]]]

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
        """Run the network as far as the end of the chain's first `count` blocks, and keep what the last has made.

        Raises Seen where the network does not come to that end.
        """
        if count > self.done[chain.name]:
            with undisturbed(self.model):
                for index, batch in enumerate(calibration):
                    with numbered(index), self.at(index):
                        self._pass(chain, count, index, batch)
            self.done[chain.name] = count

    def took(self, block: str, index: int, output: Any) -> None:
        """This is what a block has made of a batch."""
        if not _keepable(output):
            raise Seen(block)
        self._shapes[block, index] = tree_map(_hollow, output)
        self.stash.put(self._key(block, index), tree_map(_copied, output))

    def _pass(self, chain: Chain, count: int, index: int, batch: Any) -> None:
        blocks = chain.blocks[self.done[chain.name] : count]

        def after(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
            if name == blocks[-1]:
                self.took(name, index, output)
                raise Enough
            self._shapes[name, index] = tree_map(_hollow, output)

        with ExitStack() as handles:
            for name in blocks:
                handles.callback(_hooked(self.model, name, partial(after, name)).remove)
            try:
                run(self.model, batch)
            except Enough:
                return
        raise Seen(blocks[-1])  # which this network does not call on this batch

    def _key(self, block: str, index: int) -> str:
        """One for a chain: what the block before has made is not needed any more."""
        chain = next(each for each in self.chains if block in each.blocks)
        return f"{self.name}-{self.chains.index(chain)}-{index}"


class _Stub(nn.Module):
    """Stands where a finished block stood, and gives what that has made."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.__dict__["made"], self.__dict__["block"] = made, None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A copy, since what comes next may write to it; no hook, since those have seen it already."""
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


def streamed(model: nn.Module, chains: Sequence[Chain], calibration: Calibration) -> list[Chain]:
    """Those chains behind whose finished blocks everything is the same as if they ran: tried on the first batch."""
    batch, *others = islice(calibration.batches, 2)
    other = others[0] if others else tree_map(_turned, batch)
    course = _Course.of(model, chains, batch)
    kept = list(chains)
    while kept:
        with undisturbed(model), suppress(BatchError):
            run(model, other)  # if a block keeps something for those behind it, that is of this batch now
        odd = _differs(model, kept, batch, course)
        if odd is None:
            break
        kept.remove(odd)
    return kept


@dataclass
class _Course:
    """In which order the blocks begin (True) and end (False), what each reads and makes, and the model's output."""

    line: list[tuple[str, bool]] = field(default_factory=list)
    read: dict[str, list[Tensor]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    output: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, chains: Sequence[Chain], batch: Any) -> _Course:
        """Of a batch."""
        course = cls()
        with undisturbed(model), ExitStack() as handles:
            for name in dict.fromkeys(block for chain in chains for block in chain.blocks):
                module = model.get_submodule(name)
                begun = module.register_forward_pre_hook(partial(course._begun, name), with_kwargs=True)
                handles.callback(begun.remove)
                handles.callback(module.register_forward_hook(partial(course._ended, name)).remove)
            course.output = [*tensors_in(run(model, batch))]
        return course

    def _begun(self, name: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self.line.append((name, True))
        self.read[name] = [tensor.clone() for tensor in tensors_in((args, kwargs))]

    def _ended(self, name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        self.line.append((name, False))
        self.made[name] = tree_map(_copied, output)


def _differs(model: nn.Module, chains: Sequence[Chain], batch: Any, course: _Course) -> Chain | None:
    """The chain whose stubs are seen by what comes behind them.

    The last block goes first: what runs here cannot refresh what an earlier block has kept somewhere.
    """
    owner = {block: chain for chain in chains for block in chain.blocks}
    events = [(name, entered) for name, entered in course.line if name in owner]
    for place in reversed(range(len(events))):
        block, entered = events[place]
        target = events[place + 1] if place + 1 < len(events) else ("", True)
        if entered or not target[1]:
            continue  # the end of an inner block, behind which an outer one ends
        stream = Stream(model, chains, "trial", Stash())
        for name, begun in events[: place + 1]:
            if not begun:
                stream.took(name, 0, course.made[name])
                stream.done[owner[name].name] = owner[name].blocks.index(name) + 1
        if not _runs(stream, batch, target[0], course):
            return owner[block]
    return None


def _runs(stream: Stream, batch: Any, target: str, course: _Course) -> bool:
    """Whether a block, or without one the rest of the model, reads and makes the same with stubs before it."""
    seen: list[Tensor] = []

    def begun(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.extend(tensor.clone() for tensor in tensors_in((args, kwargs)))

    def ended(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.extend(tensors_in(output))
        raise Enough

    def called(_module: nn.Module, _args: Any) -> None:
        raise Seen  # the model has another way to a finished block than by its container

    wanted = [*course.read[target], *tensors_in(course.made[target])] if target else course.output
    with undisturbed(stream.model), ExitStack() as handles:
        for name in stream.finished:
            handles.callback(stream.model.get_submodule(name).register_forward_pre_hook(called).remove)
        handles.enter_context(stream.at(0))
        if target:
            block = stream.model.get_submodule(target)
            handles.callback(block.register_forward_pre_hook(begun, with_kwargs=True).remove)
            handles.callback(block.register_forward_hook(ended).remove)
        try:
            output = run(stream.model, batch)
        except Enough:
            pass
        except (BatchError, Seen):
            return False
        else:
            seen = [] if target else [*tensors_in(output)]
    return not any(isinstance(tensor, Hollow) for tensor in seen) and same(seen, wanted)


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


def _keepable(output: Any) -> bool:
    """Whether copies can stand for what a block returns: tensors and numbers, and no two that share their memory."""
    leaves = tree_leaves(output)
    tensors = [each for each in leaves if type(each) in (Tensor, nn.Parameter)]
    places = {each.untyped_storage().data_ptr() for each in tensors}
    return len(places) == len(tensors) and all(
        type(each) in (Tensor, nn.Parameter) or isinstance(each, PLAIN) for each in leaves
    )


def _hollow(value: Any) -> Any:
    """Without the numbers of a floating tensor; those of other kinds, such as positions, are kept."""
    return Hollow.like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) and not isinstance(value, Hollow) else value


def _turned(value: Any) -> Any:
    """Other samples, of the same shape and kind."""
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    return value.flip(0) if len(value) > 1 else value.flip(-1)
