"""Ctrl-C between the lines: an interrupt stops a model's forward pass, never what puts the model back as it was.

Inside `deferred()` SIGINT waits, except while `interruptible()` is on; it is delivered at the end. Only the main thread
gets signals, so elsewhere both do nothing.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _State:
    """Of the main thread."""

    depth = 0
    open = False  # whether an interrupt may be delivered now
    waiting: tuple[Any, ...] | None = None
    before: Any = None  # the handler that was there


_state = _State()


def _handle(*signalled: Any) -> None:
    if not _state.open:
        _state.waiting = signalled
        return
    _state.open = False  # what follows puts things back
    _deliver(_state.before, signalled)
    _state.open = True


def _deliver(handler: Callable[..., Any] | int | None, signalled: tuple[Any, ...]) -> None:
    if callable(handler):
        handler(*signalled)
    elif handler == signal.SIG_DFL:
        raise KeyboardInterrupt


@contextmanager
def deferred() -> Iterator[None]:
    """SIGINT waits until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _state.depth == 0:
        _state.before = signal.getsignal(signal.SIGINT)
        if _state.before is None:  # not set from Python: it stays as it is
            yield
            return
        signal.signal(signal.SIGINT, _handle)
    _state.depth += 1
    was_open, _state.open = _state.open, False
    try:
        yield
    finally:
        _state.open = was_open
        _state.depth -= 1
        if _state.depth == 0:
            waiting, _state.waiting = _state.waiting, None
            signal.signal(signal.SIGINT, _state.before)
            if waiting is not None:
                _deliver(_state.before, waiting)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside `deferred()`, SIGINT is delivered at once in this block, and what waited before it."""
    if _state.depth == 0 or threading.current_thread() is not threading.main_thread():
        yield
        return
    was_open, _state.open = _state.open, True
    try:
        if _state.waiting is not None:
            waiting, _state.waiting = _state.waiting, None
            _handle(*waiting)
        yield
    finally:
        _state.open = was_open
