"""Calls of a stage put together and cut apart by rows.

Several sequences as one run: rows side by side, each sequence with its own cached rows. The graphs ``<stage>.many`` of
a target take a fixed number of sequences; those left over have no rows. And one call as several of fewer rows.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mythos_edge.model.stages import LOGITS, STAGES, StageTensor
from mythos_edge.runtime.backends.memory import Memory, Rows, empty_like, host_array

Array = NDArray[Any]
Arrays = Mapping[str, Rows]
# The input of each stage that has every new row.
ROWS = {name: stage.rows for name, stage in STAGES.items()}
# Inputs that say which cached rows a chunk of one sequence sees.
WINDOW = ("length", "first")
# Scalars of the request, which all sequences of one run have in common.
REQUEST = {
    name: tuple(one.name for one in stage.inputs if not one.axes and one.name not in WINDOW)
    for name, stage in STAGES.items()
}


@cache
def declared(stage: str, name: str) -> StageTensor:
    """The declaration of an input or output of a stage."""
    return STAGES[stage].tensor(name)


class Call(NamedTuple):
    """One sequence's part in a run of a stage: what it reads, and what is written in place."""

    feeds: Arrays
    outputs: Arrays


def packed(stage: str, calls: Sequence[Call], jobs: int, memory: Memory) -> Call:
    """The inputs of ``<stage>.many``, and fresh ``memory`` for its outputs; ``unpack`` hands that out."""
    assert len(calls) <= jobs
    counts = [call.feeds[ROWS[stage]].shape[1] for call in calls]
    feeds: dict[str, Rows] = {"row_counts": np.array(counts + [0] * (jobs - len(calls)), np.int64)}
    starts = [int(host_array(call.feeds["length"])) for call in calls]
    spans = [np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
    feeds["positions"] = np.concatenate(spans)[:, None]
    offsets = np.cumsum([0, *counts])
    first = calls[0].feeds
    for name in first.keys() - set(WINDOW):
        given, tensor = [call.feeds[name] for call in calls], declared(stage, name)
        if tensor.slot:
            nothing = empty_like(memory, given[0], 0)
            feeds |= {f"{name}@{job}": given[job] if job < len(given) else nothing for job in range(jobs)}
        elif LOGITS in tensor.axes:
            numbers = [host_array(rows) + offset for rows, offset in zip(given, offsets, strict=False)]
            feeds[name] = np.concatenate(numbers)
        elif tensor.halted is not None:
            # Earlier rows of a sequence have halted: they are marked so.
            filled = [_filled(memory, *both, tensor.halted) for both in zip(given, counts, strict=True)]
            feeds[name] = memory.join(filled)
        elif tensor.by_row and tensor.on_host:
            feeds[name] = np.concatenate([host_array(rows) for rows in given], axis=1)
        elif tensor.by_row:
            feeds[name] = memory.join(given)
        else:  # scalars of the request
            scalars = {host_array(array).item() for array in given}
            assert len(scalars) == 1, f"{name} differs between the sequences"
            feeds[name] = given[0]
    outputs = {}
    for name, array in calls[0].outputs.items():
        rows = feeds["logit_rows"].shape[0] if LOGITS in declared(stage, name).axes else int(offsets[-1])
        outputs[name] = empty_like(memory, array, rows)
    return Call(feeds, outputs)


def unpack(stage: str, made: Arrays, calls: Sequence[Call]) -> None:
    """Copies each sequence's rows of a packed run into its own outputs."""
    end = logits_end = 0
    for call in calls:
        end += call.feeds[ROWS[stage]].shape[1]
        logits_end += call.feeds["logit_rows"].shape[0] if "logit_rows" in call.feeds else 0
        for name, array in call.outputs.items():
            stop = logits_end if LOGITS in declared(stage, name).axes else end
            array[...] = made[name][:, stop - array.shape[1] : stop]


def _filled(memory: Memory, active: Rows, count: int, filler: float) -> Rows:
    """``active`` with rows of ``filler`` before it, ``count`` in all."""
    missing = count - active.shape[1]
    if missing == 0:
        return active
    before = memory.empty((1, missing, *active.shape[2:]), active.dtype)
    before[...] = filler
    return memory.join([before, active])
