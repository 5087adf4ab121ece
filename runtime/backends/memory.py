"""Where the arrays of a sequence live, and what is done with them besides running stages.

The staircase works on arrays that it gets here and slices like numpy's: on the host they are numpy's, on a GPU they
are ``device.DeviceArray``. Nothing but what a caller asks for with ``to_host`` leaves the memory.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mythos_edge.model.machine import free_memory_bytes
from mythos_edge.model.stages import HALVES, half_name


class Rows(Protocol):
    """The part of an array that the staircase needs; numpy arrays, ``Halves`` and ``device.DeviceArray`` have it.

    Slices of the leading axes are views, and ``base`` is the array that a view belongs to.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def base(self) -> Any: ...

    def __getitem__(self, key: tuple[slice, slice], /) -> "Rows": ...

    def __setitem__(self, key: Any, value: Any, /) -> None: ...

    def copy(self) -> "Rows": ...


def host_array(rows: Rows) -> NDArray[Any]:
    """The numpy array that ``rows`` is known to be."""
    assert isinstance(rows, np.ndarray)
    return rows


class Halves:
    """Rows (1, S, W) whose keys and values, a half of each row, are arrays of their own; sliced along S as one array.

    Assigned to are rows of either kind, or a number.
    """

    def __init__(self, parts: Sequence[NDArray[Any]], base: "Halves | None" = None) -> None:
        self.parts = tuple(parts)
        self.base = base

    @property
    def shape(self) -> tuple[int, ...]:
        *sizes, width = self.parts[0].shape
        return (*sizes, width * len(self.parts))

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __getitem__(self, key: tuple[slice, slice]) -> "Halves":
        return Halves([part[key] for part in self.parts], self if self.base is None else self.base)

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, Halves):
            given: Sequence[Any] = value.parts
        else:
            is_rows = isinstance(value, np.ndarray) and value.ndim > 0
            given = np.split(value, len(self.parts), axis=-1) if is_rows else [value] * len(self.parts)
        for part, one in zip(self.parts, given, strict=True):
            part[key] = one

    def copy(self) -> "Halves":
        return Halves([part.copy() for part in self.parts])

    def whole(self) -> NDArray[Any]:
        """The rows as one array, copied."""
        return np.concatenate(self.parts, axis=-1)


def as_graphs_know(name: str, rows: Rows) -> Iterator[tuple[str, Rows]]:
    """The arrays that a graph takes or gives for ``rows``, by their names there."""
    if not isinstance(rows, Halves):
        yield name, rows
        return
    for half, part in zip(HALVES, rows.parts, strict=True):
        yield half_name(name, half), part


# What numpy holds a cached row in, by its form; bfloat16 as uint16.
ROW_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "int8": np.dtype(np.int8),
}


class Watch(Protocol):
    """Sees which columns of a chunk still run."""

    def __call__(self, halt_mass: Rows, *, begins: bool) -> int:
        """1 + the last column of ``halt_mass (1, S)`` still running, or 0; ``begins`` for a chunk's first loop step.

        One that may lag tells what was so one call before, so as not to wait, and at first that all run: columns
        never start to run again, so that is the same or more.
        """
        ...


class Memory(Protocol):
    """One place for arrays; ``dtype`` is what states are kept in there (bfloat16 as uint16), ``cache`` the form of
    cached rows, one of ``ROW_DTYPES``.

    ``updates_in_place``: backends of this memory have read all feeds before they write, so that a state may be fed
    and be overwritten by what comes after it. ``keeps_all_columns``: they find a cached row by its place in the buffer,
    so that none can be given up. ``halved``: they take cached rows as ``Halves``.
    """

    dtype: np.dtype[Any]
    cache: str
    updates_in_place: bool
    keeps_all_columns: bool
    halved: bool

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Rows: ...

    def columns(self, count: int, width: int, dtype: DTypeLike) -> Rows:
        """Room for ``count`` columns of states or cached rows, or more: (1, count, width)."""
        ...

    def room_of(self, count: int) -> int:
        """The columns that are allocated when so many are asked for."""
        ...

    def from_host(self, array: NDArray[Any]) -> Rows: ...

    def to_host(self, rows: Rows) -> NDArray[Any]:
        """The values as they are when all that was asked for before has run; may share memory with ``rows``."""
        ...

    def to_floats(self, rows: Rows) -> NDArray[np.float32]:
        """States, or cached rows in the same dtype, as float32 on the host."""
        ...

    def join(self, parts: Sequence[Rows]) -> Rows:
        """The parts one after the other along their second axis."""
        ...

    def watch(self, threshold: float, *, may_lag: bool) -> Watch: ...

    def output_so_far(self, out: Rows, halt_mass: Rows, threshold: float, made: Rows) -> None:
        """Writes to ``made`` the output with the halting mass of running rows taken as whole."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes that can be allocated now; None where that is not known."""
        ...


def empty_like(memory: Memory, rows: Rows, count: int) -> Rows:
    """Memory for ``count`` rows of the kind that ``rows`` are."""
    if isinstance(rows, Halves):
        return Halves([host_array(empty_like(memory, part, count)) for part in rows.parts])
    return memory.empty((1, count, *rows.shape[2:]), rows.dtype)


class HostMemory:
    """Numpy arrays; ``cache`` is the form of cached rows, which are ``Halves`` if ``halved``."""

    dtype: np.dtype[Any] = np.dtype(np.float32)
    updates_in_place = False
    keeps_all_columns = False

    def __init__(self, cache: str = "fp32") -> None:
        self.cache, self.halved = cache, False

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Rows:
        return np.empty(shape, dtype)

    def columns(self, count: int, width: int, dtype: DTypeLike) -> Rows:
        return np.empty((1, count, width), dtype)

    def room_of(self, count: int) -> int:
        return count

    def from_host(self, array: NDArray[Any]) -> Rows:
        return array

    def to_host(self, rows: Rows) -> NDArray[Any]:
        return rows.whole() if isinstance(rows, Halves) else host_array(rows)

    def to_floats(self, rows: Rows) -> NDArray[np.float32]:
        return self.to_host(rows)

    def join(self, parts: Sequence[Rows]) -> Rows:
        return np.concatenate([host_array(part) for part in parts], axis=1)

    def watch(self, threshold: float, *, may_lag: bool) -> Watch:
        def running(halt_mass: Rows, *, begins: bool) -> int:
            del begins
            row = host_array(halt_mass)[0] < np.float32(threshold)
            return len(row) - int(row[::-1].argmax()) if row.any() else 0

        return running

    def output_so_far(self, out: Rows, halt_mass: Rows, threshold: float, made: Rows) -> None:
        mass = host_array(halt_mass)
        weight = np.where((mass > 0) & (mass < np.float32(threshold)), mass, np.float32(1))
        np.divide(host_array(out), weight[..., None], out=host_array(made))

    def free_bytes(self) -> int | None:
        return free_memory_bytes()
