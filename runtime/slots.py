"""The cached rows of one layer. Where its rows see a window of the last positions, those before are given up."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.stages import HALVES
from mythos_edge.runtime import caches
from mythos_edge.runtime.backends.memory import ROW_DTYPES, Halves, Memory, Rows, host_array
from mythos_edge.runtime.caches import ColumnBuffer, kept_columns, spare_columns


class Slot(ColumnBuffer):
    """The rows of a layer that sees all positions, or with a ``window`` so many of the last, the row's own included.

    What it gives up depends on its own last column, not on the newest position: a slot may lag.
    """

    def __init__(
        self,
        width: int,
        limit: int,
        memory: Memory | None = None,
        window: int = 0,
        dtype: np.dtype[Any] | None = None,
    ) -> None:
        super().__init__(width, limit, memory, spare_columns(window) if window else None, dtype)
        self.window = window

    @property
    def floor(self) -> int:
        """The fewest columns, besides none, that it can be cut back to: the row after them sees what it needs."""
        return self.start + self.window - 1 if self.start else 0

    def seen(self) -> Rows:
        """The rows that its next one sees, and all those after it."""
        return self.view(max(0, self.end - self.window + 1) if self.window else 0, self.end)

    def expect(self, columns: int) -> None:
        """Makes room for so many columns at once, as far as it ever holds them."""
        window = self.window
        self.expected = min(columns, kept_columns(window) + spare_columns(window)) if window else columns

    def give_up(self, back_to: int) -> None:
        """Gives up what no row sees any more, though the slot be cut back to column ``back_to``, or a little."""
        oldest = min(back_to, self.end - caches.ROLLBACK_MARGIN) - self.window + 1
        if oldest > self.start:
            self.drop_before(oldest)
        most = kept_columns(self.window) + spare_columns(self.window)
        if self.capacity > 2 * most >= 2 * (self.end - self.start):
            self.move_to(most)

    def state(self) -> dict[str, Any]:
        state = super().state()
        rows = state["data"]
        return state | {"data": rows.reshape(*rows.shape[:2], *self._saved_axes)}

    def restore(self, columns: NDArray[np.int64], data: NDArray[Any]) -> None:
        if data.shape[2:] != self._saved_axes:
            raise ValueError(f"rows of shape {data.shape[2:]} do not fit, expected {self._saved_axes}")
        super().restore(columns, data.reshape(*data.shape[:2], self._width))
        if self.start and (not self.window or self.end < self.floor):
            raise ValueError(f"columns {self.start} .. {self.end} lack what the next row sees")

    @property
    def _saved_axes(self) -> tuple[int, ...]:
        """The axes of a row on disk. In int8 each half has its scales with it, so that it is no whole row."""
        apart = self._memory.halved and self._dtype == ROW_DTYPES["int8"]
        return (len(HALVES), self._width // len(HALVES)) if apart else (self._width,)

    def _columns(self, count: int) -> Rows:
        if not self._memory.halved:
            return super()._columns(count)
        width = self._width // len(HALVES)
        return Halves([host_array(self._memory.columns(count, width, self._dtype)) for _ in HALVES])


def slots_of(model: LoopedModel, stage: str, limit: int, memory: Memory) -> list[Slot]:
    """The slots of one run of a stage, for at most ``limit`` positions."""
    windows = [0 if memory.keeps_all_columns else window for window in model.windows[stage]]
    width, dtype = model.row_width(memory.cache), ROW_DTYPES[memory.cache]
    return [Slot(width, limit, memory, window, dtype) for window in windows]


def grow(slots: Iterable[Slot], chunk: int) -> None:
    """Takes in the rows that a call has written."""
    for slot in slots:
        slot.grow(chunk)
