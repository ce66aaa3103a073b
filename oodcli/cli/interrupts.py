"""Ctrl-C, SIGTERM and SIGHUP. During a loop they stop it between two steps: an exception raised by
a signal inside a step can be lost, for example in torch's compiled code."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_asked: int | None = None
_looping = False


def listen() -> None:
    """Handle the signals that would end the process, except those that its parent ignores."""
    global _asked
    _asked = None
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        usual = (signal.SIG_DFL, signal.default_int_handler)
        if number is not None and signal.getsignal(number) in usual:
            signal.signal(number, _ask)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    again, _asked = _asked is not None, number
    if again or not _looping:  # whoever asks twice does not wait for the step
        stop_if_asked()


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt or SystemExit if a signal has arrived."""
    if _asked == signal.SIGINT:
        raise KeyboardInterrupt
    if _asked is not None:
        raise SystemExit(128 + _asked)


@contextmanager
def loop(advance: Callable[[float], None]) -> Iterator[Callable[[float], None]]:
    """While open, signals wait for the next call of the yielded function, which calls advance."""
    global _looping

    def step(count: float) -> None:
        stop_if_asked()
        advance(count)

    _looping = True
    try:
        stop_if_asked()
        yield step
    finally:
        _looping = False
    stop_if_asked()
