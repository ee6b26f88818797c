"""The graph of a model by torch.fx, where it is the same whatever arguments of forward are left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from convexprune.network.matrices import stack_of


class LayerTracer(fx.Tracer):
    """Looks into no layer, of whatever kind.

    omitting  take the defaults of forward's arguments, instead of something unknown
    """

    def __init__(self, omitting: bool = False) -> None:
        super().__init__()
        self.omitting = omitting

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Also those outside torch.nn."""
        return stack_of(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        """The arguments that forward is traced with."""
        function, given = super().create_args_for_root(root_fn, is_module, concrete_args)
        if self.omitting:
            defaults = _defaults(root_fn)
            given = [defaults.get(part.node.name, part) if isinstance(part, fx.Proxy) else part for part in given]
        return function, given


def traced(model: nn.Module) -> fx.Graph:
    """The graph of a model; raises ValueError where there is none, or where it is not the only one.

    A trace takes each argument as given. Where forward asks whether one is None, it goes one way of several, and what
    the graph says is false of the others.
    """
    if "forward" in vars(model):  # the tracer takes that of the class
        raise ValueError("the model cannot be traced: a forward was set on it; make that a class's method")
    try:
        graph = LayerTracer().trace(model)
        optional = _defaults(type(model).forward)
        other = LayerTracer(omitting=True).trace(model) if optional else graph
    except Exception as error:  # whatever a model's forward does with the tracer's proxies
        raise ValueError(f"the model cannot be traced by torch.fx, so no channels are known: {error}") from error
    if not _alike(graph, other, optional):
        raise ValueError(
            f"the model cannot be traced: forward goes another way without {', '.join(optional)}; give a module whose "
            "forward has no arguments with defaults"
        )
    return graph


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that a call may leave out, and what they then are."""
    given = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in given if each.default is not each.empty}


def _alike(given: fx.Graph, left_out: fx.Graph, optional: dict[str, Any]) -> bool:
    """Whether two graphs do the same with the same, but for what the optional arguments stand for."""
    steps = [[node for node in graph.nodes if node.op != "placeholder"] for graph in (given, left_out)]
    if len(steps[0]) != len(steps[1]):
        return False
    same = dict(zip(*steps, strict=True))

    def match(one: Any, other: Any) -> bool:
        if isinstance(one, fx.Node):
            if one.op == "placeholder":
                return one.target in optional or (isinstance(other, fx.Node) and one.target == other.target)
            return same.get(one) is other
        if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
            return len(one) == len(other) and all(map(match, one, other))
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(match(one[key], other[key]) for key in one)
        return bool(type(one) is type(other) and one == other)

    return all(
        one.op == other.op and one.target == other.target and match(one.args, other.args)
        and match(one.kwargs, other.kwargs)
        for one, other in same.items()
    )  # fmt: skip
