"""Calls of a stage put together and cut apart by rows.

Several sequences as one run: rows side by side, each sequence with its own cached rows. The graphs ``<stage>.many`` of
a target take a fixed number of sequences; those left over have no rows. And one call as several of fewer rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mythos_edge.runtime.memory import Memory, Rows

Array = NDArray[Any]
Arrays = Mapping[str, Rows]
# The input that has every new row, and what else is given row by row.
ROWS = {"prelude": "input_ids", "step": "h", "coda": "out"}
_BY_ROW = ("h", "e", "out")
# Row by row as well, and always the host's.
_OF_HOST = ("input_ids", "step_index")
# Given only for the last rows of a chunk, the ones still running; earlier rows are marked as halted.
_ACTIVE = {"out": 0.0, "halt_mass": np.inf, "depth": 0}


class Call(NamedTuple):
    """One sequence's part in a run of a stage: what it reads, and what is written in place."""

    feeds: Arrays
    outputs: Arrays


def packed(stage: str, calls: Sequence[Call], jobs: int, memory: Memory) -> Call:
    """What ``<stage>.many`` reads and fresh ``memory`` for what it writes; ``unpack`` hands that out."""
    assert len(calls) <= jobs
    counts = [call.feeds[ROWS[stage]].shape[1] for call in calls]
    feeds: dict[str, Rows] = {"row_counts": np.array(counts + [0] * (jobs - len(calls)), np.int64)}
    starts = [int(call.feeds["length"]) for call in calls]
    spans = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    feeds["positions"] = np.concatenate(spans)[:, None]
    offsets = np.cumsum([0, *counts])
    first = calls[0].feeds
    for name in first.keys() - {"length", "first"}:
        given = [call.feeds[name] for call in calls]
        if name.startswith("past"):
            nothing = memory.columns(0, given[0].shape[2])
            feeds |= {f"{name}@{job}": given[job] if job < len(given) else nothing for job in range(jobs)}
        elif name == "logit_rows":
            feeds[name] = np.concatenate([rows + offset for rows, offset in zip(given, offsets, strict=False)])
        elif stage == "step" and name in _ACTIVE:
            filled = [_filled(memory, *both, _ACTIVE[name]) for both in zip(given, counts, strict=True)]
            feeds[name] = memory.join(filled)
        elif name in _BY_ROW:
            feeds[name] = memory.join(given)
        elif name in _OF_HOST:
            feeds[name] = np.concatenate(given, axis=1)
        else:  # scalars of the request
            assert all(np.array_equal(array, given[0]) for array in given), f"{name} differs between the sequences"
            feeds[name] = given[0]
    rows = int(offsets[-1])
    outputs = {
        name: memory.empty((1, len(feeds["logit_rows"]) if name == "logits" else rows, *array.shape[2:]), array.dtype)
        for name, array in calls[0].outputs.items()
    }
    return Call(feeds, outputs)


def unpack(stage: str, made: Arrays, calls: Sequence[Call]) -> None:
    """Copies each sequence's rows of a packed run into its own outputs."""
    end = logits_end = 0
    for call in calls:
        end += call.feeds[ROWS[stage]].shape[1]
        logits_end += len(call.feeds.get("logit_rows", ()))
        for name, array in call.outputs.items():
            stop = logits_end if name == "logits" else end
            array[...] = made[name][:, stop - array.shape[1] : stop]


def parts(stage: str, call: Call, most: int) -> Iterator[Call]:
    """A call as several, each of ``most`` rows of its chunk or fewer, to be run in this order.

    A causal chunk is the same as its parts: each finds the rows of those before it. Its new rows have to lie right
    behind the cached ones, which then are one array with those of earlier parts.
    """
    feeds, outputs = call
    count = feeds[ROWS[stage]].shape[1]
    if count <= most:
        yield call
        return
    for start in range(0, count, most):
        stop = min(count, start + most)
        yield Call(
            {name: _part_of_feed(stage, call, name, start, stop) for name in feeds},
            {name: _part_of_output(stage, call, name, start, stop) for name in outputs},
        )


def _part_of_feed(stage: str, call: Call, name: str, start: int, stop: int) -> Rows:
    given, count = call.feeds[name], call.feeds[ROWS[stage]].shape[1]
    if name == "length":
        return given + start
    if name.startswith("past"):
        return given.followed_by(call.outputs[name.replace("past", "rows")][:, :start])
    if name == "logit_rows":
        return given[_inside(given, start, stop)] - start
    if name in ("first", "threshold", "min_depth"):
        return given
    missing = count - given.shape[1] if stage == "step" and name in _ACTIVE else 0
    return _between(given, start - missing, stop - missing)


def _part_of_output(stage: str, call: Call, name: str, start: int, stop: int) -> Rows:
    wanted, count = call.outputs[name], call.feeds[ROWS[stage]].shape[1]
    if name == "logits":
        return wanted[:, _inside(call.feeds["logit_rows"], start, stop)]
    missing = count - wanted.shape[1]
    return _between(wanted, start - missing, stop - missing)


def _between(rows: Rows, start: int, stop: int) -> Rows:
    return rows[:, max(0, start) : max(0, stop)]


def _inside(rows: Any, start: int, stop: int) -> slice:
    """Which of ``rows``, in ascending order, lie between ``start`` and ``stop``."""
    first, end = np.searchsorted(rows, (start, stop))
    return slice(int(first), int(end))


def _filled(memory: Memory, active: Rows, count: int, filler: float) -> Rows:
    """``active`` with rows of ``filler`` before it, ``count`` in all."""
    missing = count - active.shape[1]
    if missing == 0:
        return active
    before = memory.empty((1, missing, *active.shape[2:]), active.dtype)
    before[...] = filler
    return memory.join([before, active])
