"""Values inside a stage that somebody may look at, by the part of the model that made them.

A network calls ``observed`` where a part is done. Nothing happens there, unless the call is inside ``watching``: eager
networks then hand over numbers, and the exporter gives the value a name in its graph (``tracing``).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

# Begins the name that a graph gives an observed value, as in ``observed/attention.0``.
PREFIX = "observed/"
Look = Callable[[str, Tensor], Tensor]
_LOOK: ContextVar[Look | None] = ContextVar("look", default=None)


def observed(part: str, value: Tensor) -> Tensor:
    """``value`` itself, shown to who watches as something that ``part`` has made."""
    look = _LOOK.get()
    return value if look is None else look(part, value)


@contextmanager
def watching(look: Look) -> Iterator[None]:
    """Everything observed meanwhile in this context goes through ``look``, which returns what takes its place."""
    token = _LOOK.set(look)
    try:
        yield
    finally:
        _LOOK.reset(token)


@contextmanager
def collecting() -> Iterator[dict[str, Tensor]]:
    """The values observed meanwhile, in the order in which they were made; the first attention is ``attention.0``."""
    found: dict[str, Tensor] = {}
    seen: Counter[str] = Counter()

    def look(part: str, value: Tensor) -> Tensor:
        found[f"{part}.{seen[part]}"] = value
        seen[part] += 1
        return value

    with watching(look):
        yield found


def is_tap(name: str) -> bool:
    """Whether a graph gives an observed value this name."""
    # What a lowering writes in a tap's place begins with its name, too.
    return name.startswith(PREFIX) and "/" not in name.removeprefix(PREFIX)
