"""The staircase: exact dynamic depth with a cache.

Slot t of the loop holds the rows of the first ``lengths[t]`` columns, and never more than slot t - 1: a staircase.
A position that halts early leaves the deeper slots without its row; the first later position that goes deeper
brings them all up in one causal chunk. Prefill, decode, catch-up and flush are therefore one operation, ``_advance``,
and rollback is a truncation. It is exact because the state of a position at step t depends only on earlier
positions before step t, which are the same values whenever they are computed.

Not here: tokens, sampling, files.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.runtime.backend import Backend
from mythos_edge.runtime.caches import ColumnBuffer
from mythos_edge.runtime.halting import Policy, ResolvedDepth

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Fed:
    """What feeding a chunk gave: ``logits (B, L, V)`` of the rows asked for, ``depth (B, S)`` of every row."""

    logits: Float32
    depth: Int64


class Staircase:
    """The caches of a batch of sequences in lockstep, advanced through a backend.

    ``padding (B,)`` is the number of padding columns at the left of each sequence. ``block_calls`` counts runs of
    the recurrent block, ``block_rows`` the rows (batch x columns) in them, ``catch_up_calls`` those of the calls
    in which no new position was running.
    """

    def __init__(
        self,
        backend: Backend,
        config: MythosConfig,
        depth: ResolvedDepth,
        max_context: int,
        padding: Int64 | None = None,
        max_lag: int | None = None,
    ) -> None:
        self.config, self.depth, self.max_context = config, depth, max_context
        self.padding = np.zeros(1, np.int64) if padding is None else np.ascontiguousarray(padding, np.int64)
        self.batch = len(self.padding)
        self.columns = 0
        self.block_calls = self.block_rows = self.catch_up_calls = 0
        self._backend, self.max_lag = backend, max_lag
        # The sequence with the most padding reaches the longest context last; the others have ended by then.
        self.limit = max_context + int(self.padding.max(initial=0))
        self.prelude_slots = [self._slot() for _ in range(config.prelude_layers)]
        self.coda_slots = [self._slot() for _ in range(config.coda_layers)]
        self.loop_slots = [self._slot() for _ in range(depth.max_depth)]
        # States of the columns that are not at full depth: h as of their deepest computed step.
        self._h = ColumnBuffer(self.batch, config.dim, self.limit)
        self._e = ColumnBuffer(self.batch, config.dim, self.limit)
        # Scalars are bound once and changed in place.
        self._length = np.zeros((), np.int64)
        self._threshold = np.array(depth.threshold, np.float32)
        self._min_depth = np.array(depth.min_depth, np.int64)
        self._scratch: dict[str, NDArray[Any]] = {}
        self._torn = False

    @property
    def lengths(self) -> list[int]:
        """Columns computed at each loop step, from step 0 on; never increasing."""
        return [slot.end for slot in self.loop_slots]

    @property
    def nbytes(self) -> int:
        """Bytes held in caches and pending states."""
        slots = self.prelude_slots + self.coda_slots + self.loop_slots
        return sum(buffer.nbytes for buffer in [*slots, self._h, self._e])

    def feed(self, ids: Int64, logit_rows: Int64, halted: NDArray[np.bool_] | None = None) -> Fed:
        """Runs the next S columns ``ids (B, S)`` through all stages; logits of the rows ``logit_rows (L,)``.

        Rows that are padding, or of sequences marked in ``halted (B,)``, count as halted from the start: depth 0.
        Raises CapacityError beyond ``max_context``.
        """
        self._check_whole()
        chunk = ids.shape[1]
        if self.columns + chunk > self.limit:
            raise CapacityError(
                f"{self.columns + chunk} positions are needed; this bundle was exported for {self.max_context}: "
                "export with a larger --max-context or shorten the prompt"
            )
        start, self.columns = self.columns, self.columns + chunk
        try:
            e = self._prelude(ids, start)
            out, depth = self._loop(e, start, halted)
            logits = self._coda(out, logit_rows, start)
        except BaseException:
            # An interrupted feed leaves the sequence as it was before.
            self.rollback(start)
            raise
        self._settle(depth, start)
        return Fed(logits, depth.copy())

    def rollback(self, columns: int) -> None:
        """Forgets everything from column ``columns`` on; nothing is copied."""
        self.columns = min(self.columns, columns)
        for slot in [*self.prelude_slots, *self.coda_slots, *self.loop_slots, self._h, self._e]:
            slot.truncate(columns)

    def flush(self) -> None:
        """Brings every slot to the current column, so that the next token has nothing to catch up with."""
        self._check_whole()
        for index in range(self.depth.max_depth):
            self._catch_up(index)
        self._forget_finished()

    def _check_whole(self) -> None:
        if self._torn:
            raise UsageError("this sequence was interrupted inside a loop step: start a new session")

    def _slot(self) -> ColumnBuffer:
        return ColumnBuffer(self.batch, self.config.cache_width, self.limit)

    def _prelude(self, ids: Int64, start: int) -> Float32:
        e = self._take("e", (self.batch, ids.shape[1], self.config.dim))
        self._run("prelude", start, self.prelude_slots, {"input_ids": np.ascontiguousarray(ids)}, {"e": e})
        self._e.append(e)
        self._h.append(e)
        return e

    def _loop(self, e: Float32, start: int, halted: NDArray[np.bool_] | None) -> tuple[Float32, Int64]:
        """The weighted output and depth of the columns from ``start`` on."""
        rows = (self.batch, self.columns - start)
        out = self._take("out", (*rows, self.config.dim))
        mass = self._take("halt_mass", rows)
        depth = self._take("depth", rows, np.int64)
        out[...], mass[...], depth[...] = 0.0, 0.0, 0
        mass[(start + np.arange(rows[1])) < self.padding[:, None]] = np.inf
        if halted is not None:
            mass[halted] = np.inf
        for index in range(self.depth.max_depth):
            upto = self.columns
            if self.depth.policy is not Policy.FULL:
                running = np.any(mass < self._threshold, axis=0)
                if not running.any():
                    break
                # Columns after the last running one need this step only later, if ever.
                upto = start + rows[1] - int(running[::-1].argmax())
            self._advance(index, upto, out, mass, depth, active=upto - start)
        return out, depth

    def _advance(self, index: int, upto: int, out: Float32, mass: Float32, depth: Int64, active: int) -> None:
        """Runs loop step ``index`` for all columns before ``upto`` that have not had it, as one causal chunk.

        The last ``active`` of them are new: their output, halting mass and depth move on in place.
        """
        slot = self.loop_slots[index]
        begin = slot.end
        chunk = upto - begin
        take, batch, dim = self._take, self.batch, self.config.dim
        made = {
            "h_next": take("h_next", (batch, chunk, dim)),
            "out_next": take("out_next", (batch, active, dim)),
            "halt_mass_next": take("halt_mass_next", (batch, active)),
            "depth_next": take("depth_next", (batch, active), np.int64),
        }
        step_index = take("step_index", (batch, chunk), np.int64)
        step_index[...] = index
        feeds = {
            "h": self._h.view(begin, upto),
            "out": _leading(out, active),
            "halt_mass": _leading(mass, active),
            "depth": _leading(depth, active),
            "e": self._e.view(begin, upto),
            "step_index": step_index,
            "threshold": self._threshold,
            "min_depth": self._min_depth,
        }
        halted = _leading(mass, active) >= self._threshold if self.depth.policy is Policy.LAST else None
        # Slot and pending state move on together; an interrupt in between leaves neither usable.
        self._torn = True
        self._run("step", begin, [slot], feeds, made, names=("past", "rows"))
        self._h.write(begin, made["h_next"])
        self._torn = False
        if halted is not None and index:
            # A position that went along because another did keeps its last row, as it would alone.
            rows, columns = np.nonzero(halted)
            slot.copy_from(self.loop_slots[index - 1], rows, columns + upto - active)
        out[:, :active], mass[:, :active] = made["out_next"], made["halt_mass_next"]
        depth[:, :active] = made["depth_next"]
        self.block_calls += 1
        self.block_rows += batch * chunk
        self.catch_up_calls += active == 0

    def _coda(self, out: Float32, logit_rows: Int64, start: int) -> Float32:
        logits = np.empty((self.batch, len(logit_rows), self.config.vocab_size), np.float32)
        feeds: dict[str, NDArray[Any]] = {"out": out, "logit_rows": logit_rows}
        self._run("coda", start, self.coda_slots, feeds, {"logits": logits})
        return logits

    def _run(
        self,
        stage: str,
        begin: int,
        slots: list[ColumnBuffer],
        feeds: dict[str, NDArray[Any]],
        made: dict[str, NDArray[Any]],
        names: tuple[str, str] | None = None,
    ) -> None:
        """Runs ``stage`` for the columns from ``begin`` on, with the cached rows before and appending the new ones."""
        chunk = next(iter(feeds.values())).shape[1]
        self._length[()] = begin
        feeds |= {"length": self._length, "first": self.padding}
        new_rows = []
        for number, slot in enumerate(slots):
            assert slot.end == begin
            past, rows = names or (f"past_{number}", f"rows_{number}")
            # A batch of one passes pointers: the filled rows in, and the place of the new ones out.
            direct = slot.tail(chunk)
            feeds[past] = slot.whole() if direct is None else slot.view(0, begin)
            made[rows] = self._take(rows, (self.batch, chunk, self.config.cache_width)) if direct is None else direct
            new_rows.append(None if direct is not None else made[rows])
        self._backend.run(stage, feeds, made)
        for slot, copied in zip(slots, new_rows, strict=True):
            if copied is None:
                slot.grow(chunk)
            else:
                slot.append(copied)

    def _settle(self, depth: Int64, start: int) -> None:
        """After a chunk: what the policy does about the steps that were not taken, and memory given back."""
        if self.depth.policy is Policy.LAST:
            self._repeat_last_rows(start)
        elif self.max_lag is not None:
            # At most one call a token, so that catching up never shows as a pause; where it brings most.
            lengths = [self.columns, *self.lengths]
            gaps = [before - length for before, length in pairwise(lengths)]
            index = int(np.argmax(gaps))
            if self.columns - lengths[index + 1] > self.max_lag:
                self._catch_up(index)
        self._forget_finished()

    def _catch_up(self, index: int) -> None:
        """Brings loop step ``index`` as far as the step before it, in one call."""
        upto = self.loop_slots[index - 1].end if index else self.columns
        if self.loop_slots[index].end < upto:
            none = self._take("none", (self.batch, 0, self.config.dim))
            no_mass, no_depth = none[:, :, 0], np.zeros((self.batch, 0), np.int64)
            self._advance(index, upto, none, no_mass, no_depth, active=0)

    def _repeat_last_rows(self, start: int) -> None:
        for shallow, deep in zip(self.loop_slots, self.loop_slots[1:], strict=False):
            if deep.end < shallow.end:
                deep.append(shallow.view(deep.end, shallow.end))

    def _forget_finished(self) -> None:
        finished = self.loop_slots[-1].end
        self._h.drop_before(finished)
        self._e.drop_before(finished)

    def _take(self, name: str, shape: tuple[int, ...], dtype: type = np.float32) -> NDArray[Any]:
        """A work array of this shape: the same object as last time if the shape is, so that it stays bound."""
        array = self._scratch.get(name)
        if array is None or array.shape != shape:
            array = self._scratch[name] = np.empty(shape, dtype)
        return array

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything but the weights, as named arrays; ``restore`` takes them back."""
        self._check_whole()
        saved: dict[str, NDArray[Any]] = {"padding": self.padding, "columns": np.array(self.columns)}
        saved["counts"] = np.array([self.block_calls, self.block_rows, self.catch_up_calls])
        for name, buffer in self._buffers().items():
            for part, array in buffer.state().items():
                saved[f"{name}.{part}"] = array
        return saved

    def restore(self, saved: dict[str, NDArray[Any]]) -> None:
        """Takes over a state saved with equal depth parameters and padding.

        Raises KeyError or ValueError for arrays that are no such state.
        """
        self.columns = int(saved["columns"])
        self.block_calls, self.block_rows, self.catch_up_calls = (int(count) for count in saved["counts"])
        for name, buffer in self._buffers().items():
            buffer.restore(saved[f"{name}.columns"], saved[f"{name}.data"])
        lengths = [self.columns, *self.lengths]
        whole = [slot.end == self.columns for slot in [*self.prelude_slots, *self.coda_slots]]
        pending = (self._h.start, self._h.end) == (self._e.start, self._e.end) == (self.lengths[-1], self.columns)
        if not (all(whole) and pending and lengths == sorted(lengths, reverse=True)):
            raise ValueError("the lengths of the slots are no staircase")

    def _buffers(self) -> dict[str, ColumnBuffer]:
        named = {"h": self._h, "e": self._e}
        for kind, slots in (
            ("prelude", self.prelude_slots),
            ("loop", self.loop_slots),
            ("coda", self.coda_slots),
        ):
            named |= {f"{kind}_{index}": slot for index, slot in enumerate(slots)}
        return named


def _leading(array: NDArray[Any], columns: int) -> NDArray[Any]:
    """The first columns; all of them is the same object, which stays bound."""
    return array if array.shape[1] == columns else np.ascontiguousarray(array[:, :columns])
