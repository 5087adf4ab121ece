"""Sequences that are done, kept for requests that begin alike, within a number of bytes. Not here: who runs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.staircase import Staircase

Int64 = NDArray[np.int64]
# Fewer tokens are computed as fast as they are copied.
_LEAST_KEPT = 8
# Sequences that a request is compared with, while all others wait.
_MOST_KEPT = 256


@dataclass(eq=False)
class _Entry:
    ids: Int64
    staircase: Staircase
    nbytes: int


class PromptCache:
    """The sequences used last, in at most ``limit`` bytes of caches; 0 keeps none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: list[_Entry] = []  # the one used last is the last

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries)

    def take(self, ids: Sequence[int], depth: ResolvedDepth) -> Staircase | None:
        """A staircase that has a beginning of ``ids``, at most all but the last; None where there is none worth it.

        A sequence of which all can be used is given away, of others the beginning is copied, as it may serve again.
        Rows of other depth parameters are of no use, nor is a beginning that slots with a window do not go back to.
        """
        wanted = np.array(ids, np.int64)
        fits = [entry for entry in self._entries if entry.staircase.depth == depth]
        lengths = [_usable(entry, wanted) for entry in fits]
        kept = max(lengths, default=0)
        if kept < _LEAST_KEPT:
            return None
        # Of several the one used last.
        best = fits[len(fits) - 1 - lengths[::-1].index(kept)]
        self._entries.remove(best)
        if kept >= len(best.ids) - 1:
            best.staircase.rollback(kept)
            return best.staircase
        self._entries.append(best)
        return best.staircase.copy(kept)

    def put(self, ids: Sequence[int], staircase: Staircase) -> None:
        """Keeps a sequence that is done, and forgets those used longest ago where there is no room.

        One that was interrupted may be of no use. Nor are rows of the policy ``last``: what stands in for a row that
        was not computed depends on how a prompt was cut into chunks.
        """
        if not staircase.is_whole or staircase.depth.policy is Policy.LAST:
            return
        staircase.rollback(len(ids))
        if staircase.columns < _LEAST_KEPT:
            return
        staircase.trim()
        new = _Entry(np.array(ids, np.int64), staircase, staircase.nbytes)
        if new.nbytes > self.limit:
            return
        # What begins as the new one and is shorter adds nothing to it.
        self._entries = [entry for entry in self._entries if not _adds_nothing(entry, new)]
        self._entries.append(new)
        self.shrink(self.limit)

    def shrink(self, limit: int) -> None:
        """Forgets the sequences used longest ago until the others have at most ``limit`` bytes, and are not many."""
        spare = self.nbytes - limit
        while self._entries and (spare > 0 or len(self._entries) > _MOST_KEPT):
            spare -= self._entries.pop(0).nbytes

    @property
    def has_lagging(self) -> bool:
        """Whether a sequence has loop steps to catch up."""
        return any(not entry.staircase.is_caught_up for entry in self._entries)

    def catch_up(self, until: Callable[[], bool]) -> None:
        """Catches up the loop steps of the sequence used last that has some to; ``until`` ends it between two.

        Raises what a stage raises, and forgets the sequence then.
        """
        entry = next(entry for entry in reversed(self._entries) if not entry.staircase.is_caught_up)
        try:
            entry.staircase.flush(until)
        except BaseException:
            self._entries.remove(entry)
            raise
        entry.staircase.trim()
        entry.nbytes = entry.staircase.nbytes
        self.shrink(self.limit)


def _usable(entry: _Entry, wanted: Int64) -> int:
    """The columns of an entry that all but the last of the tokens ``wanted`` can begin with."""
    length = min(_common(entry.ids, wanted), len(wanted) - 1, entry.staircase.columns)
    return length if length >= entry.staircase.rollback_floor else 0


def _adds_nothing(old: _Entry, new: _Entry) -> bool:
    shorter = old.staircase.depth == new.staircase.depth and old.staircase.columns <= new.staircase.columns
    goes_back = new.staircase.rollback_floor <= old.staircase.rollback_floor
    return shorter and goes_back and _common(old.ids, new.ids) == len(old.ids)


def _common(before: Int64, now: Int64) -> int:
    """The number of tokens that two sequences begin with alike."""
    length = min(len(before), len(now))
    differ = before[:length] != now[:length]
    return int(differ.argmax()) if differ.any() else length
