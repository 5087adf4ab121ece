"""The caches of one sequence: a growing buffer per slot, and one for the pending states of lagging positions.

Columns are positions. A range of them is one piece of memory, so cached rows are passed on by pointer, and new ones
are written in their place.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.errors import CapacityError
from mythos_edge.model.looped import LoopedModel
from mythos_edge.runtime.backends.memory import HostMemory, Memory, Rows

_FIRST_CAPACITY = 64
# What a slot with a window keeps beside the columns that its next row sees, so that the last ones can be taken back.
ROLLBACK_MARGIN = 256
# Positions that are run at once unless a request says otherwise.
_CHUNK = 512


@dataclass(frozen=True)
class CachePlan:
    """The cache memory that a context costs, known before anything is allocated.

    ``bytes_per_token``: rows of the slots that grow with the context; ``pending_bytes_per_token``: h and e of a
    position below full depth. ``window_bytes``: all of those slots of a sequence whose layers see a window of the last
    positions, as many as there are room for in this context.
    """

    slots: int
    bytes_per_token: int
    pending_bytes_per_token: int
    context: int
    batch: int
    window_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        """All slots full for the whole context."""
        return (self.bytes_per_token * self.context + self.window_bytes) * self.batch

    @property
    def worst_bytes(self) -> int:
        """The same with every position still pending."""
        return self.cache_bytes + self.pending_bytes_per_token * self.context * self.batch


def plan_cache(
    model: LoopedModel,
    max_depth: int,
    context: int,
    batch: int = 1,
    value_bytes: int = 4,
    *,
    row_bytes: int | None = None,
    chunk: int = _CHUNK,
    all_columns: bool = False,
) -> CachePlan:
    """The memory that ``context`` tokens in each of ``batch`` sequences take at ``max_depth`` loop steps.

    A state has values of ``value_bytes``, and so has a cached row, unless it has ``row_bytes``. At most ``chunk`` of
    the tokens are run at once. ``all_columns``: slots give up nothing, whatever their window.
    """
    windows = model.windows
    of_slots = [*windows["prelude"], *windows["step"] * max_depth, *windows["coda"]]
    # Where positions halt, a slot may have to take in at once all that lag.
    bounded = [] if all_columns or model.halts else [window for window in of_slots if window]
    rooms = sum(min(context, kept_columns(window) + spare_columns(window) + chunk) for window in bounded)
    slot_bytes = model.cache_width * value_bytes if row_bytes is None else row_bytes
    growing = (len(of_slots) - len(bounded)) * slot_bytes
    return CachePlan(len(of_slots), growing, 2 * model.dim * value_bytes, context, batch, rooms * slot_bytes)


def plan_in(
    memory: Memory, model: LoopedModel, max_depth: int, context: int, batch: int = 1, chunk: int = _CHUNK
) -> CachePlan:
    """The plan of caches in ``memory``; see ``plan_cache``."""
    return plan_cache(
        model,
        max_depth,
        memory.room_of(context),
        batch,
        memory.dtype.itemsize,
        row_bytes=model.row_bytes(memory.cache),
        chunk=chunk,
        all_columns=memory.keeps_all_columns,
    )


def kept_columns(window: int) -> int:
    """The columns that a slot keeps whose rows see ``window`` of them, their own included."""
    return window - 1 + ROLLBACK_MARGIN


def spare_columns(window: int) -> int:
    """How far such a slot moves on before what it keeps is copied to the front, so that this is rare."""
    return max(_FIRST_CAPACITY, kept_columns(window) // 4)


def require_memory(plan: CachePlan, already_held: int, free: int | None) -> None:
    """Raises CapacityError when the planned caches do not fit the memory that is ``free`` now (where that is known)."""
    needed = plan.worst_bytes - already_held
    if free is not None and needed > free:
        raise CapacityError(
            f"the caches of {plan.batch} x {plan.context} tokens need {needed / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free: shorten the context or lower max_depth"
        )


class ColumnBuffer:
    """Columns ``start .. end`` of a (1, columns, width) array that grows by doubling up to ``limit`` columns.

    Columns below ``start`` are given up. Nothing is allocated before the first column is written. With ``spare`` it
    makes room for no more than so many columns to come. Values are of ``dtype``, by default that of states.
    """

    def __init__(
        self,
        width: int,
        limit: int,
        memory: Memory | None = None,
        spare: int | None = None,
        dtype: np.dtype[Any] | None = None,
    ) -> None:
        self._width, self._limit, self._spare = width, limit, spare
        self._memory = memory or HostMemory()
        self._dtype = dtype or self._memory.dtype
        self._data = self._columns(0)
        self._origin = 0  # the column that stands first in _data
        # Columns to make room for at once, so that memory is what was planned and nothing moves.
        self.expected = 0
        self.start = 0
        self.end = 0
        self._last_key = (0, 0)
        self._last_view: Rows | None = None

    @property
    def nbytes(self) -> int:
        return int(self._data.nbytes)

    @property
    def capacity(self) -> int:
        """The columns that there is memory for."""
        return self._data.shape[1]

    def view(self, start: int, end: int) -> Rows:
        """Columns ``start .. end``: C-contiguous memory of the buffer.

        The same columns are the same object until the memory moves, so that what is bound to a graph stays bound.
        """
        assert self.start <= start <= end <= self.end, (self.start, start, end, self.end)
        key = (start - self._origin, end - self._origin)
        if self._last_view is None or self._last_key != key or self._last_view.base is not self._data:
            self._last_key, self._last_view = key, self._data[:, key[0] : key[1]]
        return self._last_view

    def tail(self, count: int) -> Rows:
        """The ``count`` columns after ``end`` to write into directly; see ``grow``."""
        self._reserve(self.end + count)
        at = self.end - self._origin
        return self._data[:, at : at + count]

    def grow(self, count: int) -> None:
        """Takes in the columns written through ``tail``."""
        self.end += count

    def append(self, rows: Rows) -> None:
        """Writes ``rows (1, S, width)`` after the last column."""
        self.tail(rows.shape[1])[...] = rows
        self.grow(rows.shape[1])

    def write(self, column: int, rows: Rows) -> None:
        at = column - self._origin
        self._data[:, at : at + rows.shape[1]] = rows

    def copy_to(self, other: "ColumnBuffer", end: int) -> None:
        """Puts what there is before column ``end`` into an ``other`` buffer, which is empty."""
        stop = min(self.end, end)
        other.start = other.end = other._origin = min(self.start, stop)
        if other.start < stop:
            other.append(self.view(other.start, stop))

    def truncate(self, end: int) -> None:
        self.end = min(self.end, end)
        self.start = min(self.start, self.end)
        if self.start >= self.end:
            self._origin = self.start

    def drop_before(self, column: int) -> None:
        """Gives up the columns before ``column``; with none left their memory is given back."""
        self.start = column
        if self.start >= self.end:
            self._origin = self.start
            if self._data.shape[1] > max(_FIRST_CAPACITY, self._memory.room_of(1)):
                self._data = self._columns(0)

    def trim(self) -> None:
        """Gives back room for columns to come where it is more than half of all; none is expected any more."""
        self.expected, kept = 0, self.end - self.start
        if self._data.shape[1] > 2 * self._memory.room_of(max(kept, _FIRST_CAPACITY)):
            self.move_to(kept)

    def _reserve(self, end: int) -> None:
        needed, capacity = end - self._origin, self._data.shape[1]
        if needed <= capacity:
            return
        needed = end - self.start
        if needed <= self.expected:
            capacity = self.expected
        elif self._spare is not None:
            capacity = needed + min(self._spare, max(needed, _FIRST_CAPACITY))
        else:
            capacity = max(_FIRST_CAPACITY, capacity)
            while capacity < needed:
                capacity *= 2
        self.move_to(min(capacity, max(self._limit, needed)))

    def move_to(self, capacity: int) -> None:
        """Puts what there is to the front of memory for ``capacity`` columns."""
        kept = self._data[:, self.start - self._origin : self.end - self._origin]
        data = self._columns(capacity)
        data[:, : kept.shape[1]] = kept
        self._data, self._origin, self._last_view = data, self.start, None

    def state(self) -> dict[str, Any]:
        """The arrays that ``restore`` needs."""
        data = self._memory.to_host(self.view(self.start, self.end))
        return {"columns": np.array([self.start, self.end]), "data": data}

    def restore(self, columns: NDArray[np.int64], data: NDArray[Any]) -> None:
        """Takes over what ``state`` gave. Raises ValueError when it does not fit this buffer."""
        start, end = (int(column) for column in columns)
        fits = 0 <= start <= end <= self._limit and data.shape == (1, end - start, self._width)
        if not fits or data.dtype != self._dtype:
            raise ValueError(f"columns {start} .. {end} of {data.dtype} and shape {data.shape} do not fit")
        self.start = self.end = self._origin = int(columns[0])
        self._data = self._columns(0)
        self.append(self._memory.from_host(data))

    def _columns(self, count: int) -> Rows:
        return self._memory.columns(count, self._width, self._dtype)
