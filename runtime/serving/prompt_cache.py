"""Sequences that are done, kept for requests that begin alike, within a number of bytes. Not here: who runs them."""

from collections.abc import Sequence
from dataclasses import dataclass

from mythos_edge.runtime.halting import ResolvedDepth
from mythos_edge.runtime.prompts import common_length
from mythos_edge.runtime.staircase import Staircase

# Fewer tokens are computed as fast as they are copied.
_LEAST_KEPT = 8


@dataclass
class _Entry:
    ids: list[int]
    staircase: Staircase
    # Whether every loop step was caught up.
    flushed: bool = False


class PromptCache:
    """The sequences used last, in at most ``limit`` bytes of caches; 0 keeps none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: list[_Entry] = []  # the one used last is the last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.staircase.nbytes for entry in self._entries)

    def take(self, ids: Sequence[int], depth: ResolvedDepth) -> Staircase | None:
        """A staircase that has a beginning of ``ids``, at most all but the last; None where there is none worth it.

        A sequence of which all can be used is given away, of others the beginning is copied, as it may serve again.
        Rows of other depth parameters are of no use.
        """
        fits = [entry for entry in self._entries if entry.staircase.depth == depth]
        best = max(fits, key=lambda entry: common_length(entry.ids, ids), default=None)
        if best is None:
            return None
        kept = min(common_length(best.ids, ids), len(ids) - 1, best.staircase.columns)
        if kept < _LEAST_KEPT:
            return None
        self._entries.remove(best)
        if kept >= len(best.ids) - 1:
            best.staircase.rollback(kept)
            return best.staircase
        self._entries.append(best)
        return best.staircase.copy(kept)

    def put(self, ids: Sequence[int], staircase: Staircase) -> None:
        """Keeps a sequence that is done, and forgets those used longest ago where there is no room."""
        staircase.rollback(len(ids))
        if staircase.columns < _LEAST_KEPT or staircase.nbytes > self.limit:
            return
        # What begins as the new one and is shorter adds nothing to it.
        self._entries = [
            entry
            for entry in self._entries
            if entry.staircase.depth != staircase.depth or common_length(entry.ids, ids) < len(entry.ids)
        ]
        self._entries.append(_Entry(list(ids), staircase))
        self.shrink(self.limit)

    def shrink(self, limit: int) -> None:
        """Forgets the sequences used longest ago until the others have at most ``limit`` bytes."""
        while self._entries and self.nbytes > limit:
            del self._entries[0]

    @property
    def has_lagging(self) -> bool:
        return not all(entry.flushed for entry in self._entries)

    def lagging(self) -> Staircase | None:
        """The staircase used last whose loop steps were not caught up since; it is taken for caught up from now on."""
        for entry in reversed(self._entries):
            if not entry.flushed:
                entry.flushed = True
                return entry.staircase
        return None
