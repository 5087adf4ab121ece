"""Caches: the column buffer against a plain array of all columns ever written, and the memory plan by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from numpy.typing import NDArray

from mythos_edge.model.errors import CapacityError
from mythos_edge.model.families.openmythos.config import VARIANTS, config_from_dict
from mythos_edge.runtime.caches import CachePlan, ColumnBuffer, plan_cache, require_memory

LIMIT = 400
Float32 = NDArray[np.float32]


class BufferMachine(RuleBasedStateMachine):
    """``columns`` is the oracle: every column from 0 to ``end``; those before ``start`` are given up."""

    @initialize(width=st.integers(1, 3))
    def begin(self, width: int) -> None:
        self.width, self.start, self.count = width, 0, 0
        self.columns = np.zeros((1, 0, width), np.float32)
        self.buffer = ColumnBuffer(width, LIMIT)

    @property
    def end(self) -> int:
        return self.columns.shape[1]

    def _rows(self, count: int) -> Float32:
        size = count * self.width
        self.count += size
        # Every value ever written is another.
        return np.arange(self.count - size, self.count, dtype=np.float32).reshape(1, count, self.width)

    @rule(count=st.one_of(st.integers(0, 5), st.integers(0, 150)))
    def append(self, count: int) -> None:
        rows = self._rows(min(count, LIMIT - self.end))
        self.buffer.append(rows)
        self.columns = np.concatenate([self.columns, rows], axis=1)

    @rule(count=st.one_of(st.integers(0, 5), st.integers(0, 150)), taken=st.booleans())
    def tail(self, count: int, taken: bool) -> None:
        count = min(count, LIMIT - self.end)
        place = self.buffer.tail(count)
        assert place.shape == (1, count, self.width)
        assert place.flags.c_contiguous
        place[...] = rows = self._rows(count)
        # What was written and not taken in is not there.
        if taken:
            self.buffer.grow(count)
            self.columns = np.concatenate([self.columns, rows], axis=1)

    @precondition(lambda self: self.end > self.start)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        column = data.draw(st.integers(self.start, self.end - 1))
        rows = self._rows(data.draw(st.integers(0, self.end - column)))
        self.buffer.write(column, rows)
        self.columns[:, column : column + rows.shape[1]] = rows

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        end = data.draw(st.integers(0, self.end + 5))
        self.buffer.truncate(end)
        self.columns = self.columns[:, :end].copy()
        self.start = min(self.start, self.end)

    @rule(data=st.data())
    def drop_before(self, data: st.DataObject) -> None:
        self.start = data.draw(st.one_of(st.integers(self.start, self.end), st.just(self.end)))
        self.buffer.drop_before(self.start)
        if self.start == self.end:
            assert self.buffer.nbytes <= self.width * 4 * 64

    @rule(data=st.data())
    def view(self, data: st.DataObject) -> None:
        start = data.draw(st.integers(self.start, self.end))
        end = data.draw(st.integers(start, self.end))
        view = self.buffer.view(start, end)
        np.testing.assert_array_equal(view, self.columns[:, start:end])
        assert view.flags.c_contiguous
        assert self.buffer.view(start, end) is view

    @rule()
    def save_and_restore(self) -> None:
        state = {name: array.copy() for name, array in self.buffer.state().items()}
        assert state["columns"].tolist() == [self.start, self.end]
        self.buffer = ColumnBuffer(self.width, LIMIT)
        self.buffer.restore(state["columns"], state["data"])

    @precondition(lambda self: self.start == 0)
    @rule()
    def restore_in_place(self) -> None:
        state = self.buffer.state()
        self.buffer.append(self._rows(min(3, LIMIT - self.end)))
        self.buffer.restore(state["columns"], state["data"])

    @invariant()
    def holds_what_was_written(self) -> None:
        assert (self.buffer.start, self.buffer.end) == (self.start, self.end)
        np.testing.assert_array_equal(self.buffer.view(self.start, self.end), self.columns[:, self.start :])
        assert self.buffer.nbytes <= self.width * 4 * LIMIT


TestBuffer = BufferMachine.TestCase
TestBuffer.settings = settings(max_examples=120, stateful_step_count=25, deadline=None, derandomize=True)


def _filled(columns: int) -> ColumnBuffer:
    buffer = ColumnBuffer(2, LIMIT)
    buffer.append(np.arange(columns * 2, dtype=np.float32).reshape(1, columns, 2))
    return buffer


def test_views_share_memory() -> None:
    buffer = _filled(10)
    whole, part = buffer.view(0, 10), buffer.view(3, 7)
    assert np.shares_memory(whole, part)
    buffer.write(4, np.full((1, 1, 2), -1, np.float32))
    assert part[0, 1].tolist() == whole[0, 4].tolist() == [-1, -1]
    buffer.tail(2)[...] = 7
    buffer.grow(2)
    assert np.shares_memory(whole, buffer.view(10, 12).base)
    assert (buffer.view(10, 12) == 7).all()


def test_the_same_columns_are_the_same_object_until_the_memory_moves() -> None:
    buffer = _filled(10)
    first = buffer.view(2, 10)
    buffer.append(np.zeros((1, 5, 2), np.float32))
    assert buffer.view(2, 10) is first
    assert buffer.view(3, 10) is not first
    first = buffer.view(2, 10)
    buffer.append(np.ones((1, 100, 2), np.float32))
    moved = buffer.view(2, 10)
    assert moved is not first
    assert not np.shares_memory(moved, first)
    np.testing.assert_array_equal(moved, first)


def test_capacity_doubles_and_ends_at_the_limit() -> None:
    buffer = ColumnBuffer(2, 300)
    assert buffer.nbytes == 0
    sizes = []
    for _ in range(300):
        buffer.append(np.zeros((1, 1, 2), np.float32))
        sizes.append(buffer.nbytes // 8)
    assert sizes == [64] * 64 + [128] * 64 + [256] * 128 + [300] * 44
    small = ColumnBuffer(2, 5)
    small.append(np.zeros((1, 1, 2), np.float32))
    assert small.nbytes == 5 * 8


def test_columns_given_up_make_room() -> None:
    """A window that moves on does not grow."""
    buffer = ColumnBuffer(2, 10_000)
    for column in range(2000):
        buffer.append(np.full((1, 1, 2), column, np.float32))
        buffer.drop_before(max(0, column - 20))
    assert buffer.nbytes == 64 * 8
    assert buffer.view(1990, 2000)[0, :, 0].tolist() == list(range(1990, 2000))


def test_dropping_everything_gives_the_memory_back() -> None:
    buffer = _filled(200)
    buffer.drop_before(200)
    assert buffer.nbytes == 0
    buffer.append(np.ones((1, 3, 2), np.float32))
    assert (buffer.start, buffer.end) == (200, 203)
    assert buffer.view(200, 203).tolist() == np.ones((1, 3, 2)).tolist()


@pytest.mark.parametrize(("start", "end"), [(0, 5), (4, 11), (7, 6)])
def test_columns_that_are_not_there_are_an_assertion(start: int, end: int) -> None:
    buffer = _filled(10)
    buffer.drop_before(3)
    with pytest.raises(AssertionError):
        buffer.view(start, end)


# --- the plan -----------------------------------------------------------------------------------------------------


def test_a_plan_by_hand() -> None:
    # 1b: MLA rows of 256 + 32 floats; 2 + 5 + 2 slots; h and e of 2048 floats.
    plan = plan_cache(VARIANTS["1b"].looped, max_depth=5, context=1000, batch=3)
    assert plan == CachePlan(9, 9 * 288 * 4, 2 * 2048 * 4, 1000, 3)
    assert plan.cache_bytes == 9 * 288 * 4 * 3000
    assert plan.worst_bytes == (9 * 288 * 4 + 16384) * 3000
    # GQA: keys and values of 4 heads of 2048 / 16.
    gqa = dataclasses.replace(VARIANTS["1b"], attn_type="gqa", prelude_layers=0, coda_layers=1)
    assert plan_cache(gqa.looped, 2, 7) == CachePlan(3, 3 * 2 * 4 * 128 * 4, 16384, 7, 1)


def test_a_plan_is_what_buffers_take() -> None:
    config = config_from_dict(VARIANTS["1b"].to_dict() | {"dim": 64, "kv_lora_rank": 12}, origin="test")
    plan = plan_cache(config.looped, 3, 100, 2)
    buffers = [ColumnBuffer(config.cache_width, 100) for _ in range(2 * plan.slots)]
    for buffer in buffers:
        buffer.append(np.zeros((1, 100, config.cache_width), np.float32))
    assert sum(buffer.nbytes for buffer in buffers) == plan.cache_bytes


def test_memory_that_is_not_there_is_one_line() -> None:
    plan = CachePlan(2, 600_000, 400_000, 3000, 2)  # 6 GB with every position pending
    with pytest.raises(CapacityError) as caught:
        require_memory(plan, already_held=0, free=4_000_000_000)
    expected = "the caches of 2 x 3000 tokens need 6.0 GB; 4.0 GB are free: shorten the context or lower max_depth"
    assert str(caught.value) == expected
    with pytest.raises(CapacityError, match=r"5\.0 GB"):
        require_memory(plan, already_held=1_000_000_000, free=4_000_000_000)
    require_memory(plan, already_held=2_000_000_000, free=4_000_000_000)
    require_memory(plan, already_held=0, free=None)
