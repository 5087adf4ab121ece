"""Ctrl-C, SIGTERM and SIGHUP as one thing: a KeyboardInterrupt, by which everything cleans up after itself.

Not here: what is said then (``cli``).
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mythos_edge.model.errors import raise_interrupt

_ASKED_BY = ("SIGINT", "SIGTERM", "SIGHUP")
# Asking again at once must not break off the cleaning up that the first time began.
_PATIENCE_S = 3.0
_last_asked: list[float] = []


def install() -> None:
    """Makes every signal that asks for an end a KeyboardInterrupt; one that is ignored, as under nohup, stays so."""
    for number in [getattr(signal, name) for name in _ASKED_BY if hasattr(signal, name)]:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def caused(error: BaseException) -> bool:
    """Whether an interrupt is behind ``error``.

    A library that is interrupted while it is imported may raise an error of its own instead, which then looks as if
    it were not installed; some drop all trace of what they met.
    """
    try:
        raise_interrupt(error)
    except KeyboardInterrupt:
        return True
    return bool(_last_asked)


@contextmanager
def wished() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is a wish that the function given tells of; the second is a KeyboardInterrupt."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            _interrupt(number, frame)
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    if not _asked_just_now():
        _last_asked[:] = [time.monotonic()]
        raise KeyboardInterrupt


def _asked_just_now() -> bool:
    return bool(_last_asked) and time.monotonic() - _last_asked[0] < _PATIENCE_S
