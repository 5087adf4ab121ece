"""Recipes: how one stored tensor is made of a checkpoint's, piece by piece, so that none is ever whole in memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from mythos_edge.model.families.family import Config

PIECE_BYTES = 16 << 20


class TensorReader(Protocol):
    """A checkpoint: its config and row ranges of its tensors by canonical name."""

    @property
    def config(self) -> Config: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


def stored_table_of(reader: TensorReader) -> Any:
    """The rotary table that a reader brings along to compute with; None where it is the config's."""
    return getattr(reader, "stored_table", None)


Pieces = Callable[[TensorReader], Iterator[Tensor]]
Parts = tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """One stored tensor: its name in ``Network``, its shape and how its pieces are read.

    ``narrow`` says that the tensor takes the bundle's dtype; the others stay float32 (norms, halting, router,
    LoRA, injection, tables), because they are small and decide what is computed. ``share`` of it is read for one row,
    as of experts the chosen.

    A matrix that targets may round, because flat rows ``x (N, D)`` are multiplied with it, names the ``parts`` of the
    model that it belongs to: embedding, head, prelude, coda, experts, shared, attention, mlp, or others. The first is
    the one that it is counted in. ``role`` is the field of ``Experts`` that it is.
    """

    name: str
    shape: tuple[int, ...]
    pieces: Pieces
    narrow: bool = False
    share: float = 1.0
    parts: Parts = ()
    role: str = ""


class Experts(NamedTuple):
    """The stored tensors of a model's routed experts by name, as the op SparseMoE calls them."""

    router: str
    router_bias: str
    fc1: str
    fc2: str


def vector(name: str, source: str, size: int) -> Recipe:
    """A vector of a checkpoint as it is."""
    return Recipe(name, (size,), partial(rows_in_turn, [(source, size)], 1))


def stacked(name: str, sources: Sequence[tuple[str, int]], columns: int, parts: Parts = ()) -> Recipe:
    """Matrices of (source name, rows), one below the other; a large one belongs to ``parts``."""
    shape, pieces = (sum(rows for _, rows in sources), columns), partial(rows_in_turn, sources, columns)
    return Recipe(name, shape, pieces, narrow=bool(parts), parts=parts)


def rows_in_turn(sources: Sequence[tuple[str, int]], columns: int, reader: TensorReader) -> Iterator[Tensor]:
    """The rows of tensors (source name, rows), one after the other."""
    for source, rows in sources:
        for start, stop in row_ranges(rows, columns):
            yield reader.read(source, start, stop)


def row_ranges(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are one piece each."""
    height = max(1, PIECE_BYTES // (4 * columns))
    for start in range(0, rows, height):
        yield start, min(rows, start + height)
