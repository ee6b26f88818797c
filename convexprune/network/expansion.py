"""Make attention and mixtures of experts call their projections, so that what these read and make can be watched.

The function of a module stays what it is. Attention's own function runs on the projected q, k, v with the identity in
place of every projection; a mixture's forward is the plain one of its class, a Linear an expert, whatever its config
says. Each is compared once with what its module makes by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from convexprune.network.forward import tensors_in
from convexprune.network.projections import HEADS, LAST, Projection, projections

PRODUCTS: Final = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
OFF: Final = 2**-5  # of the norm: eight units of bfloat16, which two orders of summation may differ by
_ARGUMENTS: Final = inspect.signature(F.multi_head_attention_forward)
Routes = dict[str, list[list[Any]]]  # mixture -> of each call what it was given behind its input: who goes where


@contextmanager
def expanded(model: nn.Module, noted: Routes | None = None, followed: Routes | None = None) -> Iterator[None]:
    """Have the modules that own projections call them. Within `undisturbed`; the models' numbers stay the same.

    noted     is told how each call of a mixture went
    followed  as noted of another network: the projections see the tokens that it has sent to them, while the model
              goes on with its own
    """
    with ExitStack() as undo:
        for path, module in model.named_modules():
            parts = projections(module)
            if not parts or "forward" in vars(module):
                continue
            expansion: Any
            if isinstance(module, nn.MultiheadAttention):
                expansion = _Attention(path, module, parts)
            else:
                expansion = _Mixture(path, module, parts, noted, followed)
            vars(module)["forward"] = expansion.forward
            undo.callback(vars(module).pop, "forward", None)
        yield


class _Attention(TorchFunctionMode):
    """Calls q_proj, k_proj, v_proj and out_proj around the attention itself."""

    def __init__(self, path: str, module: nn.MultiheadAttention, parts: dict[str, Projection]) -> None:
        super().__init__()
        self.path, self.module, self.parts = path, module, parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, with its projections called."""
        own = type(self.module).forward
        if not _watched((*self.parts.values(), self.module.out_proj)):
            return own(self.module, *args, **kwargs)
        with self:
            made = own(self.module, *args, **kwargs)
        _compare(self.path, self.module, self.parts, lambda: own(self.module, *args, **kwargs), made)
        return made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take attention apart; leave all else as it is."""
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        return self._apart(_ARGUMENTS.bind(*args, **(kwargs or {})).arguments)

    def _apart(self, given: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        read = [given[name] for name in ("query", "key", "value")]
        turned = {id(each): self._turned(each) for each in read}  # what is one tensor stays one
        made = [self._turned(self.parts[name](turned[id(each)])) for name, each in zip(HEADS, read, strict=True)]
        one = torch.eye(self.module.embed_dim, dtype=made[0].dtype, device=made[0].device)
        plain: dict[str, Any] = {f"{name}_weight": one for name in (*HEADS, "out_proj")}
        plain |= dict.fromkeys(("in_proj_weight", "in_proj_bias", "out_proj_bias"))
        plain["use_separate_proj_weight"] = True
        heads = dict(zip(("query", "key", "value"), made, strict=True))
        mixed, weights = F.multi_head_attention_forward(**{**given, **plain, **heads})
        return self._turned(self.module.out_proj(self._turned(mixed))), weights

    def _turned(self, x: Tensor) -> Tensor:
        """Between (tokens, batch, in), in which torch computes, and the axes that the module was given."""
        return x.transpose(0, 1) if self.module.batch_first and x.ndim == 3 else x


class _Mixture(TorchFunctionMode):
    """Calls the projection of each expert that a token goes to."""

    def __init__(
        self, path: str, module: nn.Module, parts: dict[str, Projection], noted: Routes | None, followed: Routes | None
    ) -> None:
        super().__init__()
        self.path, self.module, self.parts, self.noted, self.followed = path, module, parts, noted, followed
        self.weights = {id(getattr(module, part.weight_name)): part.weight_name for part in parts.values()}
        self.plain: Any = type(module).forward.__wrapped__  # type: ignore[attr-defined]
        self.transposed = next(iter(parts.values())).transposed
        self._taken: list[tuple[Any, Projection]] = []  # a slice of a weight, and whose it is
        self._given: list[Any] = []
        self._sent: dict[int, Tensor] = {}  # expert -> its tokens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain one of its class, with the experts called; its own where it is another's routes that count."""
        x, *routing = inspect.signature(self.plain).bind(self.module, *args, **kwargs).args[1:]
        own, watched = type(self.module).forward, _watched(self.parts.values())
        if self.noted is not None:
            self.noted.setdefault(self.path, []).append(routing)
        if self.followed is not None or not watched:
            route = self._next(watched)
            if watched:
                self._apart(x, *route)
            return own(self.module, x, *routing)
        made = self._apart(x, *routing)
        _compare(self.path, self.module, self.parts, lambda: own(self.module, x, *routing), made)
        return made

    def _apart(self, *given: Any) -> Any:
        self._given = list(given)
        try:
            with self:
                return self.plain(self.module, *given)
        finally:  # a pass may end here
            self._taken.clear()

    def _next(self, needed: bool) -> list[Any]:
        """How the other network went in this call."""
        calls = (self.followed or {}).get(self.path)
        if needed and not calls:
            raise ValueError(f"{self.path!r} is called more often in the model than in the dense network")
        return calls.pop(0) if calls else []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note who takes an expert's matrix, and call its projection where a product reads it."""
        kwargs = kwargs or {}
        product = func in PRODUCTS if self.transposed else func is F.linear
        if product and not kwargs and len(args) == 2:
            for weight, projection in self._taken:
                if weight is args[1]:
                    with _unseen():
                        projection.tokens, projection.among = self._tokens(args[0], projection), len(self._given[0])
                    return projection(args[0])
        made = func(*args, **kwargs)
        if func is Tensor.__getitem__ and id(args[0]) in self.weights:
            with _unseen():
                key = f"{self.weights[id(args[0])]}[{int(args[1])}]"
            self._taken.append((made, self.parts[key]))
        return made

    def _tokens(self, x: Tensor, projection: Projection) -> Tensor | None:
        """The tokens whose rows an expert reads: those that go to it, the first of their choices before the second."""
        expert: Any = projection.weight_part
        if projection.weight_name == LAST:  # it reads what the expert made of the same
            return self._sent.get(expert)
        hidden, *routing = self._given
        choices = next((each for each in routing if each.ndim == 2 and not each.is_floating_point()), None)
        self._sent.pop(expert, None)
        if choices is not None:
            tokens = (expert == choices.T).nonzero()[:, 1]
            if torch.equal(hidden[tokens], x):
                self._sent[expert] = tokens
        return self._sent.get(expert)


def _watched(modules: Iterable[nn.Module]) -> bool:
    """Whether anyone looks on."""
    return any(module._forward_hooks for module in modules)


@contextmanager
def _unseen() -> Iterator[None]:
    """No recorder sees what is done here."""
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def _compare(path: str, module: nn.Module, parts: dict[str, Projection], own: Callable[[], Any], made: Any) -> None:
    """Once for each module: raise ValueError where it makes something else by itself."""
    first = next(iter(parts.values()))
    if first.agreed:
        return
    with _unseen(), torch.no_grad():
        pairs = zip(tensors_in(own()), tensors_in(made), strict=True)
        for expected, found in pairs:
            away, size = (each.double().norm() for each in (expected - found, expected))
            if bool(away > OFF * size):
                raise ValueError(
                    f"{path!r}, a {type(module).__name__}, does not compute what its projections do; leave "
                    f"{', '.join(f'{path}.{name}' for name in list(parts)[:3])}, ... out of `names`"
                )
    first.agreed = True
