"""One call at a time: what keeps several threads from using together what is made for one.

A call that comes while another runs is refused, it does not wait: a caller who did not know that calls collide is told
what to do instead. Not here: what the calls do.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from mythos_edge.model.errors import UsageError


class Turns:
    """Whose turn it is with one object that is called ``name`` in errors; ``mend`` says what several callers can do."""

    def __init__(self, name: str, mend: str) -> None:
        self.closed = False
        self.call = ""
        """The method that has the turn, or had it last."""
        self.lock = threading.Lock()
        self._name, self._mend = name, mend
        self._thread = 0

    def check_free(self, mend: str = "") -> None:
        """Raises UsageError while a call runs."""
        if self.lock.locked():
            # Such as a callback that uses the session which calls it.
            same = self._thread == threading.get_ident()
            by = f"by the {self.call} that is under way" if same else "by another thread"
            raise UsageError(f"this {self._name} is in use {by}: {mend or self._mend}")

    def begin(self, call: str) -> None:
        """Notes who has the turn. Raises UsageError after the end."""
        if self.closed:
            raise UsageError(f"this {self._name} is closed: open it again")
        self.call, self._thread = call, threading.get_ident()


_Method = TypeVar("_Method", bound=Callable[..., Any])


def in_turn(method: _Method) -> _Method:
    """The method of an object with ``_turns``, refused with a UsageError while another one runs and after the last."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        turns: Turns = self._turns
        turns.check_free()
        # Not acquire(blocking=False): an interrupt that falls right after it would leave the lock taken for good, and
        # none falls between taking and entering here. Of two who both saw it free, the second waits, which is right.
        with turns.lock:
            turns.begin(method.__name__)
            return method(self, *args, **kwargs)

    return cast(_Method, alone)


def last_turn(method: _Method) -> _Method:
    """The method that ends an object: refused while another one runs, and allowed again."""

    @functools.wraps(method)
    def alone(self: Any) -> None:
        turns: Turns = self._turns
        turns.check_free("close it when that call has ended")
        with turns.lock:
            turns.closed = True
            method(self)

    return cast(_Method, alone)
