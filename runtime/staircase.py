"""The staircase: exact dynamic depth with a cache.

The slots of loop step t, one for each inner layer, hold the rows of the first ``lengths[t]`` columns, and never more
than those of step t - 1: a staircase.
A position that halts early leaves the deeper slots without its row; the first later position that goes deeper
brings them all up in one causal chunk. Prefill, decode, catch-up and flush are therefore one operation, ``_advance``,
and rollback is a truncation. It is exact because the state of a position at step t depends only on earlier
positions before step t, which are the same values whenever they are computed.

Not here: tokens, sampling, files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mythos_edge.model.errors import CapacityError, UsageError
from mythos_edge.model.looped import LoopedModel
from mythos_edge.runtime.backends.memory import Rows
from mythos_edge.runtime.backends.packing import ROWS
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.caches import ColumnBuffer
from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.slots import Slot, grow, slots_of
from mythos_edge.runtime.together import NotRun, StageCall, Work, run_alone

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
_FIRST_ROW = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Fed:
    """The result of feeding a chunk: ``logits (1, L, V)`` of the rows asked for, ``depth (1, S)`` of every row."""

    logits: Float32
    depth: Int64


@dataclass
class _Rows:
    """The columns from ``start`` on as the loop moves them: ``out (1, S, D)``, ``halt_mass`` and ``depth (1, S)``."""

    start: int
    out: Rows
    halt_mass: Rows
    depth: Rows


class Staircase:
    """The caches of one sequence. What it needs run it yields as stage calls; ``feed`` and ``flush`` run them alone.

    ``block_calls`` counts runs of the recurrent block, ``block_rows`` the rows in them, ``catch_up_calls`` those of
    the calls in which no new position was running, ``rolled_back_rows`` the rows that were forgotten again.
    ``max_lag``: see ``Options``.
    """

    def __init__(
        self,
        backend: Backend,
        model: LoopedModel,
        depth: ResolvedDepth,
        max_context: int,
        max_lag: int | None = None,
    ) -> None:
        self.model, self.depth, self.max_context = model, depth, max_context
        self.columns = 0
        self.block_calls = self.block_rows = self.catch_up_calls = self.rolled_back_rows = 0
        self._backend, self.max_lag = backend, max_lag
        self._memory = memory = backend.memory
        stages = ["prelude", *["step"] * depth.max_depth, "coda"]
        groups = [slots_of(model, stage, max_context, memory) for stage in stages]
        self.prelude_slots, *self.loop_slots, self.coda_slots = groups
        self._slots = list(chain(*groups))
        self._windowed = [slot for slot in self._slots if slot.window]
        # States of the columns that are not at full depth: h as of their deepest computed step.
        self._h = ColumnBuffer(model.dim, max_context, memory)
        self._e = ColumnBuffer(model.dim, max_context, memory)
        # Scalars are bound once and changed in place.
        self._length = np.zeros((), np.int64)
        self._first = np.zeros(1, np.int64)
        self._threshold = np.array(depth.threshold, np.float32)
        self._min_depth = np.array(depth.min_depth, np.int64)
        self._step_index = np.zeros((1, 0), np.int64)
        # A step that nobody needed any more is exact all the same, unless it takes the place of a repeated row.
        self._running = memory.watch(depth.threshold, may_lag=depth.policy is not Policy.LAST)
        self._scratch: dict[str, Rows] = {}
        # What a call that only catches up moves on.
        nothing = memory.empty((1, 0, model.dim), memory.dtype)
        no_mass, no_depth = memory.empty((1, 0), np.float32), memory.empty((1, 0), np.int64)
        self._no_rows = _Rows(max_context, nothing, no_mass, no_depth)
        self._torn = False
        self._drafted: list[_Rows] = []

    @property
    def drafted(self) -> int:
        """Columns whose output is not final yet; see ``drafting``."""
        return len(self._drafted)

    @property
    def lengths(self) -> list[int]:
        """Columns computed at each loop step, from step 0 on; never increasing."""
        return [slots[0].end for slots in self.loop_slots]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """``block_calls``, ``block_rows``, ``catch_up_calls`` and ``rolled_back_rows``."""
        return self.block_calls, self.block_rows, self.catch_up_calls, self.rolled_back_rows

    @property
    def nbytes(self) -> int:
        """Bytes held in caches and pending states."""
        return sum(buffer.nbytes for buffer in self._buffers().values())

    @property
    def rollback_floor(self) -> int:
        """The fewest columns, besides none, that it can be rolled back to: slots with a window give up rows."""
        return max((slot.floor for slot in self._windowed), default=0)

    @property
    def is_whole(self) -> bool:
        """Whether it was never interrupted where that leaves caches of no use."""
        return not self._torn

    @property
    def is_caught_up(self) -> bool:
        """Whether every loop step has every column."""
        return self.lengths[-1] >= self.columns

    def trim(self) -> None:
        """Gives back the room for columns to come, where it is more than what there is."""
        for buffer in self._buffers().values():
            buffer.trim()

    def expect(self, columns: int) -> None:
        """Makes every slot that grows make room for so many columns at once, as far as the longest context."""
        for slot in self._slots:
            slot.expect(min(columns, self.max_context))

    def feed(self, ids: Int64, logit_rows: Int64) -> Fed:
        """Runs the next S columns ``ids (1, S)`` through all stages; logits of the rows ``logit_rows (L,)``.

        Interrupted or failing, it leaves the sequence as it was. Raises CapacityError beyond ``max_context``.
        """
        return run_alone(self.feeding(ids, logit_rows), self._backend)

    def feeding(self, ids: Int64, logit_rows: Int64) -> Work[Fed]:
        """The work of ``feed``."""
        assert not self._drafted
        start = self.columns
        try:
            rows = yield from self._enter(ids)
            yield from self._loop(rows, range(self.depth.max_depth))
            logits = yield from self._coda(rows.out, logit_rows, start)
        except BaseException:
            self.rollback(start)
            raise
        yield from self._settle()
        return Fed(logits, self._memory.to_host(rows.depth).copy())

    def drafting(self, token_id: int, depth: int) -> Work[Fed]:
        """Runs one more column through the first ``depth`` loop steps only, and through the coda as if that were all.

        Unless it and every drafted column before it have halted, it counts as drafted, and only ``verifying`` and
        ``keeping`` may follow the last. All columns of one draft have the same ``depth``.
        """
        start = self.columns
        try:
            rows = yield from self._enter(np.array([[token_id]]))
            yield from self._loop(rows, range(depth))
            logits = yield from self._coda(self._output_so_far(rows), _FIRST_ROW, start)
        except BaseException:
            self.rollback(start)
            raise
        mass = self._memory.to_host(rows.halt_mass)[0, 0]
        halted = self.depth.policy is not Policy.FULL and mass >= self._threshold
        if self._drafted or not halted:
            self._drafted.append(_Rows(start, rows.out.copy(), rows.halt_mass.copy(), rows.depth.copy()))
        else:
            yield from self._settle()
        return Fed(logits, self._memory.to_host(rows.depth).copy())

    def verifying(self) -> Work[Fed]:
        """Takes the drafted columns through the other loop steps and again through the coda; logits of all of them.

        When it fails, roll back to before the draft.
        """
        first, count = self._drafted[0].start, self.drafted
        out, mass, depth = map(self._memory.join, zip(*map(_moving, self._drafted), strict=True))
        rows = _Rows(first, out, mass, depth)
        taken = sum(length > first for length in self.lengths)
        yield from self._loop(rows, range(taken, self.depth.max_depth))
        for slot in self.coda_slots:
            slot.truncate(first)
        logits = yield from self._coda(out, np.arange(count), first)
        self._drafted = []
        return Fed(logits, self._memory.to_host(depth))

    def keeping(self, start: int, columns: int) -> Work[None]:
        """Ends a verified draft that began at column ``start``: forgets it from column ``columns`` on."""
        self.rollback(columns)
        yield from self._settle(start)

    def rollback(self, columns: int) -> None:
        """Forgets everything from column ``columns`` on, and all below ``rollback_floor``; nothing is copied."""
        columns = columns if columns >= self.rollback_floor else 0
        self.columns = min(self.columns, columns)
        self._drafted = [rows for rows in self._drafted if rows.start < columns]
        self.rolled_back_rows += sum(max(0, length - columns) for length in self.lengths)
        for buffer in self._buffers().values():
            buffer.truncate(columns)

    def copy(self, columns: int) -> "Staircase":
        """A staircase of its own with copies of the first ``columns`` columns, at least ``rollback_floor``."""
        assert not self._drafted
        assert columns >= self.rollback_floor
        self._check_whole()
        made = Staircase(self._backend, self.model, self.depth, self.max_context, self.max_lag)
        made.columns = min(self.columns, columns)
        for mine, other in zip(self._buffers().values(), made._buffers().values(), strict=True):
            mine.copy_to(other, columns)
        return made

    def flush(self, until: Callable[[], bool] = lambda: False) -> None:
        """Brings every slot to the current column, so that the next token has nothing to catch up with.

        ``until`` is asked before each loop step, and ends it there when it says so.
        """
        run_alone(self.flushing(until), self._backend)

    def flushing(self, until: Callable[[], bool] = lambda: False) -> Work[None]:
        """The work of ``flush``."""
        assert not self._drafted
        self._check_whole()
        for index in range(self.depth.max_depth):
            if until():
                return
            yield from self._catch_up(index)
        self._forget_finished(self.columns)

    def _check_whole(self) -> None:
        if self._torn:
            raise UsageError("this sequence was interrupted inside a loop step: start a new session")

    def _enter(self, ids: Int64) -> Work[_Rows]:
        """Runs new columns through the prelude: their rows, ready for the loop."""
        self._check_whole()
        start, chunk = self.columns, ids.shape[1]
        if start + chunk > self.max_context:
            raise CapacityError(
                f"{start + chunk} positions are needed; this bundle was exported for {self.max_context}: "
                "export with a larger --max-context or shorten the prompt"
            )
        self.columns += chunk
        e = self._take("e", (1, chunk, self.model.dim))
        yield self._call("prelude", start, self.prelude_slots, {"input_ids": np.ascontiguousarray(ids)}, {"e": e})
        grow(self.prelude_slots, chunk)
        self._e.append(e)
        self._h.append(e)
        out = self._take("out", (1, chunk, self.model.dim))
        mass, depth = self._take("halt_mass", (1, chunk), np.float32), self._take("depth", (1, chunk), np.int64)
        out[...], mass[...], depth[...] = 0.0, 0.0, 0
        return _Rows(start, out, mass, depth)

    def _loop(self, rows: _Rows, steps: Sequence[int]) -> Work[None]:
        """Takes ``rows``, the newest columns, through loop steps: all, or as the policy says those still running."""
        for index in steps:
            upto = self.columns
            if self.depth.policy is not Policy.FULL:
                # Columns after the last running one need this step only later, if ever.
                upto = rows.start + self._running(rows.halt_mass, begins=index == steps[0])
                if upto == rows.start:
                    break
            yield from self._advance(index, upto, rows)

    def _advance(self, index: int, upto: int, rows: _Rows) -> Work[None]:
        """Runs loop step ``index`` for all columns before ``upto`` that have not had it, as one causal chunk.

        Those from ``rows.start`` on are new: their output, halting mass and depth move on in place.
        """
        slots = self.loop_slots[index]
        begin, active = slots[0].end, max(0, upto - rows.start)
        chunk = upto - begin
        state = {
            "h": self._h.view(begin, upto),
            "out": _leading(rows.out, active),
            "halt_mass": _leading(rows.halt_mass, active),
            "depth": _leading(rows.depth, active),
        }
        in_place = self._memory.updates_in_place
        made = {
            f"{name}_next": rows_now if in_place else self._take(f"{name}_next", rows_now.shape, rows_now.dtype)
            for name, rows_now in state.items()
        }
        if self._step_index.shape[1] != chunk:
            self._step_index = np.empty((1, chunk), np.int64)
        self._step_index[...] = index
        others = {
            "e": self._e.view(begin, upto),
            "step_index": self._step_index,
            "threshold": self._threshold,
            "min_depth": self._min_depth,
        }
        # Making it finds room for the new rows, or fails while nothing has changed.
        call = self._call("step", begin, slots, state | others, dict(made))
        # Slots and pending state move on together; an interrupt in between leaves neither usable.
        self._torn = in_place
        try:
            yield call
        except NotRun:
            self._torn = False
            raise
        self._torn = True
        grow(slots, chunk)
        if not in_place:
            self._h.write(begin, made["h_next"])
        self._torn = False
        if not in_place:
            rows.out[:, :active], rows.halt_mass[:, :active] = made["out_next"], made["halt_mass_next"]
            rows.depth[:, :active] = made["depth_next"]
        self.block_calls += 1
        self.block_rows += chunk
        self.catch_up_calls += active == 0

    def _output_so_far(self, rows: _Rows) -> Rows:
        """The output as if ``rows`` ended here. In a weighted sum the halting mass of those that run is taken as whole,
        so that their states weigh as they would to the end."""
        if self.model.exit_rule != "weighted":
            return rows.out
        so_far = self._take("out_so_far", rows.out.shape)
        self._memory.output_so_far(rows.out, rows.halt_mass, self.depth.threshold, so_far)
        return so_far

    def _coda(self, out: Rows, logit_rows: Int64, start: int) -> Work[Float32]:
        logits = self._memory.empty((1, len(logit_rows), self.model.vocab_size), np.float32)
        yield self._call("coda", start, self.coda_slots, {"out": out, "logit_rows": logit_rows}, {"logits": logits})
        grow(self.coda_slots, out.shape[1])
        return self._memory.to_host(logits)

    def _call(
        self, stage: str, begin: int, slots: list[Slot], feeds: dict[str, Rows], made: dict[str, Rows]
    ) -> StageCall:
        """A run of ``stage`` for the columns from ``begin`` on, with the cached rows before; see ``_grow``."""
        self._length[()] = begin
        feeds |= {"length": self._length, "first": self._first}
        chunk = feeds[ROWS[stage]].shape[1]
        for number, slot in enumerate(slots):
            assert slot.end == begin
            # New rows are written in their place. Making it may move the buffer, so the filled ones are taken after.
            made[f"rows_{number}"] = slot.tail(chunk)
            feeds[f"past_{number}"] = slot.seen()
        return StageCall(stage, feeds, made)

    def _settle(self, back_to: int | None = None) -> Work[None]:
        """After a chunk: what the policy does about the steps that were not taken, and memory given back.

        It can still be rolled back to column ``back_to``, by default to the last.
        """
        if self.depth.policy is Policy.LAST:
            self._repeat_last_rows()
        elif self.max_lag is not None:
            # At most one call a token, so that catching up never shows as a pause; where it brings most.
            pairs = enumerate(pairwise([self.columns, *self.lengths]))
            gaps = {index: before - now for index, (before, now) in pairs if self.columns - now > self.max_lag}
            if gaps:
                yield from self._catch_up(max(gaps, key=gaps.__getitem__))
        self._forget_finished(self.columns if back_to is None else back_to)

    def _catch_up(self, index: int) -> Work[None]:
        """Brings loop step ``index`` as far as the step before it, in one call."""
        lengths = [self.columns, *self.lengths]
        upto = lengths[index]
        if lengths[index + 1] < upto:
            yield from self._advance(index, upto, self._no_rows)

    def _repeat_last_rows(self) -> None:
        for shallow_slots, deep_slots in pairwise(self.loop_slots):
            for shallow, deep in zip(shallow_slots, deep_slots, strict=True):
                if deep.end < shallow.end:
                    deep.append(shallow.view(deep.end, shallow.end))

    def _forget_finished(self, back_to: int) -> None:
        for slot in self._windowed:
            slot.give_up(back_to)
        finished = self.lengths[-1]
        self._h.drop_before(finished)
        self._e.drop_before(finished)

    def _take(self, name: str, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Rows:
        """A work array of this shape, by default of states: the same object as last time if the shape is, so that it
        stays bound."""
        array = self._scratch.get(name)
        if array is None or array.shape != shape:
            array = self._scratch[name] = self._memory.empty(shape, dtype or self._memory.dtype)
        return array

    def state(self) -> Arrays:
        """Everything but the weights, as named arrays; ``restore`` takes them back."""
        assert not self._drafted
        self._check_whole()
        saved: Arrays = {"columns": np.array(self.columns)}
        saved["counts"] = np.array(self.counts)
        for name, buffer in self._buffers().items():
            for part, array in buffer.state().items():
                saved[f"{name}.{part}"] = array
        return saved

    def restore(self, saved: Arrays) -> None:
        """Takes over a state saved with equal depth parameters.

        Raises KeyError or ValueError for arrays that are no such state.
        """
        self.columns = int(saved["columns"])
        counts = (int(count) for count in saved["counts"])
        self.block_calls, self.block_rows, self.catch_up_calls, self.rolled_back_rows = counts
        for name, buffer in self._buffers().items():
            buffer.restore(saved[f"{name}.columns"], saved[f"{name}.data"])
        lengths = [self.columns, *self.lengths]
        whole = [slot.end == self.columns for slot in [*self.prelude_slots, *self.coda_slots]]
        pending = (self._h.start, self._h.end) == (self._e.start, self._e.end) == (self.lengths[-1], self.columns)
        if not (all(whole) and pending and lengths == sorted(lengths, reverse=True)):
            raise ValueError("the lengths of the slots are no staircase")

    def _buffers(self) -> dict[str, ColumnBuffer]:
        named = {"h": self._h, "e": self._e}
        groups = {"prelude": self.prelude_slots, "coda": self.coda_slots}
        groups |= {f"loop_{index}": slots for index, slots in enumerate(self.loop_slots)}
        for group, slots in groups.items():
            named |= {f"{group}_{index}": slot for index, slot in enumerate(slots)}
        return named


def _moving(rows: _Rows) -> tuple[Rows, Rows, Rows]:
    return rows.out, rows.halt_mass, rows.depth


def _leading(array: Rows, columns: int) -> Rows:
    """The first columns; all of them is the same object, which stays bound."""
    return array if array.shape[1] == columns else array[:, :columns]
