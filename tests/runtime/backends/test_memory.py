"""Rows whose keys and values lie in arrays of their own, beside one plain array that is used alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mythos_edge.runtime.backends.memory import Halves, HostMemory, as_graphs_know, empty_like
from mythos_edge.runtime.slots import Slot


def halves_of(whole: np.ndarray) -> Halves:
    return Halves([part.copy() for part in np.split(whole, 2, axis=-1)])


def test_halves_look_like_one_array(random: np.random.Generator) -> None:
    whole = random.standard_normal((1, 9, 6)).astype(np.float32)
    rows = halves_of(whole)
    assert (rows.shape, rows.dtype, rows.nbytes) == (whole.shape, whole.dtype, whole.nbytes)
    memory = HostMemory()
    np.testing.assert_array_equal(memory.to_host(rows[:, 2:5]), whole[:, 2:5])
    part = rows[:, 2:5]
    # A view of a view belongs to the array, as numpy's does.
    assert part.base is rows
    assert part[:, 1:2].base is rows
    assert all(one.flags.c_contiguous for one in part.parts)
    copied = part.copy()
    part[:, 0:1] = 0
    assert not memory.to_host(rows[:, 2:3]).any()
    np.testing.assert_array_equal(copied.whole(), whole[:, 2:5])
    part[...] = copied
    np.testing.assert_array_equal(rows.whole(), whole)
    part[...] = -whole[:, 2:5]
    np.testing.assert_array_equal(rows.whole()[:, 2:5], -whole[:, 2:5])
    np.testing.assert_array_equal(rows.whole()[:, 5:], whole[:, 5:])


def test_graphs_know_halves_by_their_names(random: np.random.Generator) -> None:
    whole = random.standard_normal((1, 3, 4)).astype(np.float32)
    named = dict(as_graphs_know("past_0@3", halves_of(whole)))
    assert list(named) == ["past_0@3.keys", "past_0@3.values"]
    np.testing.assert_array_equal(named["past_0@3.keys"], whole[..., :2])
    np.testing.assert_array_equal(named["past_0@3.values"], whole[..., 2:])
    assert dict(as_graphs_know("h", whole)) == {"h": whole}


@pytest.mark.parametrize("halved", [False, True])
def test_memory_like_rows(halved: bool) -> None:
    rows = np.zeros((1, 3, 4), np.int8)
    made = empty_like(HostMemory(), halves_of(rows) if halved else rows, 7)
    assert isinstance(made, Halves) == halved
    assert (made.shape, made.dtype) == ((1, 7, 4), np.int8)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), window=st.sampled_from([0, 5]), dtype=st.sampled_from(["float32", "int8"]))
def test_a_slot_of_halves_is_a_slot(data: st.DataObject, window: int, dtype: str) -> None:
    """The same is done to two slots, of whole rows and of halves: they hold the same, and give it back from disk."""
    halved = HostMemory("int8" if dtype == "int8" else "fp32")
    halved.halved = True
    plain = HostMemory(halved.cache)
    slots = [Slot(4, 600, memory, window, np.dtype(dtype)) for memory in (plain, halved)]
    written = 0
    for _ in range(data.draw(st.integers(1, 8))):
        end = slots[0].end
        match data.draw(st.sampled_from(["append", "truncate", "write", "give_up", "trim"])):
            case "append":
                count = data.draw(st.integers(0, 130))
                rows = (np.arange(count * 4).reshape(1, count, 4) + written).astype(dtype)
                written += count
                for slot in slots:
                    slot.tail(count)[...] = rows
                    slot.grow(count)
            case "truncate":
                to = data.draw(st.integers(slots[0].floor, end)) if slots[0].floor <= end else end
                for slot in slots:
                    slot.truncate(to)
            case "write" if end > slots[0].start:
                column = data.draw(st.integers(slots[0].start, end - 1))
                for slot in slots:
                    slot.write(column, np.full((1, 1, 4), 77, dtype))
            case "give_up" if window:
                for slot in slots:
                    slot.give_up(end)
            case "trim":
                for slot in slots:
                    slot.trim()
        whole, parted = slots
        assert (whole.start, whole.end, whole.capacity) == (parted.start, parted.end, parted.capacity)
        assert whole.nbytes == parted.nbytes
        np.testing.assert_array_equal(halved.to_host(parted.seen()), whole.seen())
        assert parted.seen() is parted.seen()
    for slot, memory in zip(slots, (plain, halved), strict=True):
        other = Slot(4, 600, memory, window, np.dtype(dtype))
        other.restore(**slot.state())
        np.testing.assert_array_equal(memory.to_host(other.seen()), memory.to_host(slot.seen()))
        copied = Slot(4, 600, memory, window, np.dtype(dtype))
        slot.copy_to(copied, slot.end)
        np.testing.assert_array_equal(memory.to_host(copied.seen()), memory.to_host(slot.seen()))


def test_rows_of_int8_know_on_disk_that_they_are_halves() -> None:
    memory = HostMemory("int8")
    memory.halved = True
    slots = [Slot(4, 9, one, 0, np.dtype(np.int8)) for one in (HostMemory("int8"), memory)]
    for slot, other in (slots, slots[::-1]):
        slot.append(np.ones((1, 3, 4), np.int8))
        with pytest.raises(ValueError, match=r"rows of shape .* do not fit, expected"):
            other.restore(**slot.state())
        slot.truncate(0)
