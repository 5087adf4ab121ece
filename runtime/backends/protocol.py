"""The protocol of a backend: it runs the stages of one bundle on arrays of its memory.

A backend knows graphs and memory, not sequences: the staircase decides which rows run against which cached rows.
"""

from collections.abc import Sequence
from typing import Protocol

from mythos_edge.runtime.backends.memory import Memory
from mythos_edge.runtime.backends.packing import Arrays, Call


class Backend(Protocol):
    """Runs the stages ``prelude``, ``step`` and ``coda`` of one bundle, for one sequence or for several at once.

    States, cached rows, halting mass, depth and logits are arrays of ``memory``; what the host decides (``input_ids``,
    ``step_index``, ``logit_rows`` and the scalars) are numpy's. The caller owns every buffer:
    ``feeds`` are read and ``outputs`` are written in place, all C-contiguous, while
    ``run`` is under way. A backend may keep references to them until the next run of the same stage, so that
    arrays passed again (the same objects, perhaps with other contents) cost nothing to bind.
    """

    @property
    def memory(self) -> Memory: ...

    @property
    def max_context(self) -> int | None:
        """The longest context it can serve; None leaves it to the bundle."""
        ...

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None: ...

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """The same as ``run`` for each of ``calls``, in one run of the stage as far as the backend can.

        The calls are of different sequences, each with a batch of one; their chunks, cached rows and loop steps may
        differ.
        """
        ...

    def close(self) -> None: ...
