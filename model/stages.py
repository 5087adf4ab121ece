"""The three stages of a looped model as data: every tensor that goes in or comes out, declared once.

What is traced, which axes are free, how several sequences are packed, what the host writes and what stays on a device,
and the types an engine must have are derived from this table; opening a bundle checks its graphs against it.

    prelude   once, before the loop: tokens to ``e``
    step      one loop step: the state of every row that lags or runs, and what of it is still active
    coda      once, after the loop: outputs to logits

Non-goals: how a stage computes (``network``), and in what order stages run (``runtime.staircase``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

# Free axes: sequences, new positions, those of them that still run, cached positions, logits that are asked for.
BATCH, CHUNK, ACTIVE, CONTEXT, LOGITS = "batch", "chunk", "active", "context", "logit_count"
# Axes whose size is the model's: fields of its sizes.
DIM, CACHE_WIDTH, VOCAB = "dim", "cache_width", "vocab_size"
# The dtype of states and cached rows: the one that the network computes in.
OWN = "own"
# The halves of a cached row of grouped attention. A target's graphs may take and give them apart: see ``half_name``.
HALVES = ("keys", "values")
# Sequences that one run of a ``.many`` graph can serve.
MAX_TOGETHER = 8


def half_name(name: str, half: str) -> str:
    """The name in a graph of one of the ``HALVES`` of the cached rows ``name``, as in ``past_0.keys``."""
    return f"{name}.{half}"


def half_of(name: str) -> tuple[str, str]:
    """The cached rows that a name in a graph is of, and which half of them it is: "" for whole ones, and all else."""
    rows, _, half = name.rpartition(".")
    return (rows, half) if half in HALVES else (name, "")


@dataclass(frozen=True)
class StageTensor:
    """One input or output of a stage.

    ``dtype`` is numpy's name or ``OWN``. ``on_host``: the host writes it for every call, and it is small. ``slot``:
    there is one for each cache slot that a run of the stage has, named ``<name>_0`` and so on. ``halted`` is what
    stands in the rows of a tensor with the axis ``ACTIVE`` that are not active any more.
    """

    name: str
    axes: tuple[str, ...] = ()
    dtype: str = OWN
    on_host: bool = False
    slot: bool = False
    halted: float | None = None

    @property
    def by_row(self) -> bool:
        """Whether it has an entry for each new position."""
        return CHUNK in self.axes or ACTIVE in self.axes


@dataclass(frozen=True)
class Stage:
    """The inputs and outputs of a stage; ``rows`` names the input with every new position."""

    name: str
    rows: str
    inputs: tuple[StageTensor, ...]
    outputs: tuple[StageTensor, ...]

    def names_of(self, tensors: tuple[StageTensor, ...], slots: int) -> Iterator[tuple[str, StageTensor]]:
        """The names that ``tensors`` have in a graph with ``slots`` cache slots, each with its declaration."""
        for tensor in tensors:
            names = [f"{tensor.name}_{index}" for index in range(slots)] if tensor.slot else [tensor.name]
            yield from ((name, tensor) for name in names)

    def tensor(self, name: str) -> StageTensor:
        """The declaration of an input or output by its name in a graph. Raises KeyError for an unknown name."""
        stem, _, number = name.rpartition("_")
        for tensor in (*self.inputs, *self.outputs):
            if tensor.name == (stem if tensor.slot and number.isdigit() else name):
                return tensor
        raise KeyError(name)


def _host(name: str, *axes: str, dtype: str = "int64") -> StageTensor:
    return StageTensor(name, axes, dtype, on_host=True)


# ``length`` counts the cached columns, ``first`` those of each sequence that are padding.
_WINDOW = (_host("length"), _host("first", BATCH))
_PAST = StageTensor("past", (BATCH, CONTEXT, CACHE_WIDTH), slot=True)
_ROWS = StageTensor("rows", (BATCH, CHUNK, CACHE_WIDTH), slot=True)
# What a loop step hands to the next: the states of all rows, and the output, halting mass and depth of active rows.
STATE = (
    StageTensor("h", (BATCH, CHUNK, DIM)),
    StageTensor("out", (BATCH, ACTIVE, DIM), halted=0.0),
    StageTensor("halt_mass", (BATCH, ACTIVE), "float32", halted=float("inf")),
    StageTensor("depth", (BATCH, ACTIVE), "int64", halted=0.0),
)

_PRELUDE = Stage(
    "prelude",
    rows="input_ids",
    inputs=(_host("input_ids", BATCH, CHUNK), *_WINDOW, _PAST),
    outputs=(StageTensor("e", (BATCH, CHUNK, DIM)), _ROWS),
)
_STEP = Stage(
    "step",
    rows="h",
    inputs=(
        *STATE,
        StageTensor("e", (BATCH, CHUNK, DIM)),
        _host("step_index", BATCH, CHUNK),
        _host("threshold", dtype="float32"),
        _host("min_depth"),
        *_WINDOW,
        _PAST,
    ),
    outputs=(
        *(StageTensor(f"{tensor.name}_next", tensor.axes, tensor.dtype, halted=tensor.halted) for tensor in STATE),
        _ROWS,
    ),
)
_CODA = Stage(
    "coda",
    rows="out",
    inputs=(StageTensor("out", (BATCH, CHUNK, DIM)), _host("logit_rows", LOGITS), *_WINDOW, _PAST),
    outputs=(StageTensor("logits", (BATCH, LOGITS, VOCAB), "float32"), _ROWS),
)
# By name, in the order in which they run.
STAGES = {stage.name: stage for stage in (_PRELUDE, _STEP, _CODA)}
