"""Arrays in the memory of a GPU that slice and assign like numpy's, all work on them in one stream.

Work is queued, not done: nothing waits but ``to_host``, and a watch that reads what was so one call before. Memory
that is let go of is kept for the next array of its size; one stream makes that safe, and asking the driver would
stop the GPU.
"""

import ctypes
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from mythos_edge.model.errors import CapacityError, MythosEdgeError
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.kernel_launch import PreparedProgram
from mythos_edge.plugins.launches import program
from mythos_edge.runtime.backends.gpu import Gpu, give_back
from mythos_edge.runtime.backends.memory import Rows, Watch

# numpy has no bfloat16; nothing here computes with it.
STATE_DTYPES: dict[str, np.dtype[Any]] = {
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "fp32": np.dtype(np.float32),
}
_SMALLEST_BYTES = 512
_MOST_PREPARED = 1024


class DeviceArray:
    """Contiguous values on the device. Only slices that are contiguous as well can be taken or assigned to."""

    def __init__(
        self,
        memory: "DeviceMemory",
        pointer: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        base: "DeviceArray | None" = None,
    ) -> None:
        self.pointer, self.shape, self.dtype = pointer, shape, dtype
        self._memory = memory
        # Keeps the memory alive as long as a view of it is.
        self.base = base

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __getitem__(self, key: tuple[slice, slice]) -> Self:
        whole, columns = key
        assert whole == slice(None)
        assert self.shape[0] == 1
        start, stop, stride = columns.indices(self.shape[1])
        assert stride == 1
        column_bytes = int(np.prod(self.shape[2:], dtype=np.int64)) * self.dtype.itemsize
        shape = (1, max(0, stop - start), *self.shape[2:])
        pointer = self.pointer + start * column_bytes
        return type(self)(self._memory, pointer, shape, self.dtype, self.base or self)

    def __setitem__(self, key: Any, value: "DeviceArray | float") -> None:
        place = self if key in (..., ()) else self[key]
        if isinstance(value, DeviceArray):
            assert (value.shape, value.dtype) == (place.shape, place.dtype), (value.shape, place.shape)
            self._memory.copy(place.pointer, value.pointer, place.nbytes)
        else:
            self._memory.fill(place, value)

    def followed_by(self, columns: Self) -> Self:
        """A view (1, S + columns, ...) of this (1, S, ...) and the ``columns (1, columns, ...)`` right behind it."""
        assert columns.pointer == self.pointer + self.nbytes
        assert (columns.shape[2:], columns.dtype) == (self.shape[2:], self.dtype)
        shape = (1, self.shape[1] + columns.shape[1], *self.shape[2:])
        return type(self)(self._memory, self.pointer, shape, self.dtype, self.base or self)

    def copy(self) -> "DeviceArray":
        """An array of its own with the same values, copied in the stream."""
        made: DeviceArray = self._memory.empty(self.shape, self.dtype)
        made[...] = self
        return made


def device_array(rows: Rows) -> DeviceArray:
    """The array on the device that ``rows`` is known to be."""
    assert isinstance(rows, DeviceArray)
    return rows


class Room(NamedTuple):
    """How many ``columns`` every cache of an engine has, so that it meets one shape; the last ``padding`` of them are
    for padded rows.
    """

    columns: int
    padding: int


class DeviceMemory:
    """The memory of one GPU and the stream all its work is queued in; ``Memory`` says what it is for.

    Without a fixed ``room`` there is as much for columns as is asked for. ``updates_in_place`` and
    ``keeps_all_columns``: see ``Memory``.
    Raises CapacityError when the GPU has no room left.
    """

    def __init__(self, gpu: Gpu, dtype: str, room: Room | None = None, *, updates_in_place: bool = False) -> None:
        self.dtype, self._dtype_name, self.cache = STATE_DTYPES[dtype], dtype, dtype
        self.updates_in_place, self.keeps_all_columns, self.halved = updates_in_place, room is not None, False
        self.device = gpu.device
        self.driver, self.stream = gpu.driver, gpu.driver.stream()
        self._room = room
        self._prepare, self._prepared = gpu.prepare, dict[tuple[Any, ...], PreparedProgram]()
        self._spare: dict[int, list[int]] = defaultdict(list)
        self._held: set[int] = set()
        self._thresholds: dict[float, DeviceArray] = {}
        # Logits come every token; copies to memory that is not pinned are slow.
        self._pinned, self._pinned_bytes = 0, 0
        self._staging = _Staging(self.driver, self.stream)
        # Copies to what an ended watch had may still be queued, so it is kept for the next.
        self._watches: list[_WatchPlace] = []
        self._spare_watches: list[_WatchPlace] = []
        self._closed = False

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceArray:
        return self._array(shape, np.dtype(dtype))

    def columns(self, count: int, width: int, dtype: DTypeLike) -> DeviceArray:
        if self._room is None or not count:
            return self._array((1, count, width), np.dtype(dtype))
        usable = self._room.columns - self._room.padding
        assert count <= usable
        array = self._array((1, self._room.columns, width), np.dtype(dtype))
        # What an engine reads beyond the filled columns is multiplied with zero, and must not be infinite.
        array[...] = 0
        array.shape = (1, usable, width)
        return array

    def room_of(self, count: int) -> int:
        return count if self._room is None else self._room.columns

    def from_host(self, array: NDArray[Any]) -> DeviceArray:
        source = np.ascontiguousarray(array)
        made = self._array(array.shape, array.dtype)
        self.upload(made.pointer, source)
        return made

    def to_host(self, rows: Rows) -> NDArray[Any]:
        self.driver.use_context(self.device)
        host = np.empty(rows.shape, rows.dtype)
        if host.nbytes > self._pinned_bytes:
            if self._pinned_bytes:
                self.driver.free_pinned(self._pinned)
            self._pinned_bytes = _rounded(host.nbytes)
            self._pinned = self.driver.allocate_pinned(self._pinned_bytes)
        if host.nbytes:
            self.driver.copy_to_host(self._pinned, device_array(rows).pointer, host.nbytes, self.stream)
            self.driver.synchronize(self.stream)
            ctypes.memmove(host.ctypes.data, self._pinned, host.nbytes)
        return host

    def to_floats(self, rows: Rows) -> NDArray[np.float32]:
        host = self.to_host(rows)
        if host.dtype == STATE_DTYPES["bf16"]:
            # bfloat16 is the upper half of a float32.
            return (host.astype(np.uint32) << 16).view(np.float32)
        return host.astype(np.float32)

    def join(self, parts: Sequence[Rows]) -> DeviceArray:
        columns = sum(part.shape[1] for part in parts)
        made = self.empty((1, columns, *parts[0].shape[2:]), parts[0].dtype)
        end = 0
        for part in parts:
            made[:, end : end + part.shape[1]] = device_array(part)
            end += part.shape[1]
        return made

    def watch(self, threshold: float, *, may_lag: bool) -> Watch:
        return _DeviceWatch(self, self._threshold(threshold), may_lag)

    def output_so_far(self, out: Rows, halt_mass: Rows, threshold: float, made: Rows) -> None:
        arrays = {"out": out, "halt_mass": halt_mass, "so_far": made}
        given = {name: device_array(rows) for name, rows in arrays.items()}
        self.answer("OutputSoFar", {**given, "threshold": self._threshold(threshold)})

    def free_bytes(self) -> int | None:
        self.driver.use_context(self.device)
        spare = sum(size * len(pointers) for size, pointers in self._spare.items())
        return self.driver.memory_info()[0] + spare

    def trim(self) -> bool:
        """Gives back to the driver what nobody holds, for others to allocate; whether that was anything."""
        # Work that is queued may use it.
        self.driver.synchronize(self.stream)
        given_back = False
        for spare in self._spare.values():
            while spare:
                self.driver.free(spare.pop())
                given_back = True
        return given_back

    def answer(self, question: str, arrays: Mapping[str, "DeviceArray"]) -> None:
        """Queues one of the runtime's own programs on arrays by the names of its arguments."""
        shapes = {name: array.shape for name, array in arrays.items()}
        key = (question, *shapes.values())
        if key not in self._prepared:
            wide = ("halt_mass", "threshold")
            dtypes = {name: "fp32" if name in wide else self._dtype_name for name in arrays}
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[key] = self._prepare(program(question, shapes, dtypes, {}))
        pointers = {name: array.pointer for name, array in arrays.items()}
        self._prepared[key].run(pointers, 0, self.stream)

    def upload(self, pointer: int, source: NDArray[Any]) -> None:
        """Queues a copy from the host, whose values are taken now; only one of many bytes waits for the stream."""
        if not source.nbytes:
            return
        place = self._staging.take(source.nbytes)
        if place is None:
            self.driver.copy_to_device(pointer, source.ctypes.data, source.nbytes, self.stream)
            self.driver.synchronize(self.stream)
            return
        ctypes.memmove(place, source.ctypes.data, source.nbytes)
        self.driver.copy_to_device(pointer, place, source.nbytes, self.stream)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Queues a copy on the device."""
        if nbytes:
            self.driver.copy_on_device(to, source, nbytes, self.stream)

    def fill(self, array: DeviceArray, value: float) -> None:
        """Queues writing ``value`` everywhere."""
        if value == 0:
            if array.nbytes:
                self.driver.fill(array.pointer, 0, array.nbytes, self.stream)
        else:
            self.upload(array.pointer, np.full(array.shape, value, array.dtype))

    def close(self) -> None:
        """Gives everything back, see ``give_back``; arrays that are still held must not be used again."""
        if self._closed:
            return
        self._closed = True
        self._thresholds.clear()
        driver = self.driver
        give_back(lambda: driver.synchronize(self.stream))
        device = [*self._held, *(pointer for spare in self._spare.values() for pointer in spare)]
        self._held.clear()
        self._spare.clear()
        pinned = [place.pinned for place in self._watches] + [self._pinned] * bool(self._pinned_bytes)
        give_back(*(partial(driver.free, pointer) for pointer in device))
        give_back(*(partial(driver.free_pinned, pointer) for pointer in pinned))
        give_back(*(partial(driver.destroy_event, event) for place in self._watches for event in place.events))
        self._staging.close()
        give_back(lambda: driver.destroy_stream(self.stream))

    def _array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        # Whatever a thread does here begins with an array.
        self.driver.use_context(self.device)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if not size:
            return DeviceArray(self, 0, shape, dtype)
        size = _rounded(size)
        pointer = self._spare[size].pop() if self._spare[size] else self._allocate(size)
        self._held.add(pointer)
        array = DeviceArray(self, pointer, shape, dtype)
        weakref.finalize(array, _give_back, weakref.ref(self), pointer, size)
        return array

    def _allocate(self, size: int) -> int:
        try:
            return self.driver.allocate(size)
        except MythosEdgeError as error:
            # What is spare in other sizes may be enough.
            self.trim()
            try:
                return self.driver.allocate(size)
            except MythosEdgeError:
                free = self.driver.memory_info()[0]
                raise CapacityError(
                    f"{size / 1e6:.1f} MB of GPU memory are needed, {free / 1e6:.1f} MB are free: "
                    "shorten the context or lower max_depth"
                ) from error

    def _release(self, pointer: int, size: int) -> None:
        if not self._closed:
            self._held.discard(pointer)
            self._spare[size].append(pointer)

    def _watch_place(self) -> "_WatchPlace":
        if not self._spare_watches:
            self._watches.append(
                _WatchPlace(self.driver.allocate_pinned(2 * 4), (self.driver.event(), self.driver.event()))
            )
            return self._watches[-1]
        return self._spare_watches.pop()

    def _threshold(self, threshold: float) -> DeviceArray:
        if threshold not in self._thresholds:
            self._thresholds[threshold] = self.from_host(np.array(threshold, np.float32))
        return self._thresholds[threshold]


class _WatchPlace(NamedTuple):
    """Two numbers that a watch reads on the host, and when each is there."""

    pinned: int
    events: tuple[int, int]


class _Staging:
    """Pinned memory for small copies to the device: from other memory the driver may wait for the stream.

    Two halves take turns; a half is written again once the copies from it have run.
    """

    _HALF_BYTES = 256 << 10
    _ALIGNMENT = 16

    def __init__(self, driver: Driver, stream: int) -> None:
        self._driver, self._stream = driver, stream
        self._pinned = driver.allocate_pinned(2 * self._HALF_BYTES)
        self._events = [driver.event(), driver.event()]
        self._half = self._used = 0

    def take(self, size: int) -> int | None:
        """Where to put ``size`` bytes that are copied next; None for more than belong here."""
        size = -(-size // self._ALIGNMENT) * self._ALIGNMENT
        if size > self._HALF_BYTES // 4:
            return None
        if self._used + size > self._HALF_BYTES:
            self._driver.record(self._events[self._half], self._stream)
            self._half, self._used = 1 - self._half, 0
            self._driver.wait(self._events[self._half])
        place = self._pinned + self._half * self._HALF_BYTES + self._used
        self._used += size
        return place

    def close(self) -> None:
        driver = self._driver
        give_back(partial(driver.free_pinned, self._pinned), *(partial(driver.destroy_event, e) for e in self._events))


class _DeviceWatch:
    """Has the device say which columns run; one that may lag reads what it said one call before, which is known."""

    def __init__(self, memory: DeviceMemory, threshold: DeviceArray, may_lag: bool) -> None:
        self._memory, self._threshold, self._may_lag = memory, threshold, may_lag
        self._flags = [memory.empty((1,), np.int32) for _ in range(2)]
        place = memory._watch_place()
        self._pinned, self._events = place
        self._turn = 0
        weakref.finalize(self, _give_watch_back, weakref.ref(memory), place)

    def __call__(self, halt_mass: Rows, *, begins: bool) -> int:
        driver, stream, turn = self._memory.driver, self._memory.stream, self._turn
        arrays = {"halt_mass": device_array(halt_mass), "threshold": self._threshold, "count": self._flags[turn]}
        self._memory.answer("RunningColumns", arrays)
        driver.copy_to_host(self._pinned + 4 * turn, self._flags[turn].pointer, 4, stream)
        driver.record(self._events[turn], stream)
        self._turn = 1 - turn
        if self._may_lag and begins:
            return int(halt_mass.shape[1])
        read = self._turn if self._may_lag else turn
        driver.wait(self._events[read])
        return ctypes.c_int32.from_address(self._pinned + 4 * read).value


def _rounded(size: int) -> int:
    """A size that few others differ from, at most a quarter more: so that memory is taken up again."""
    if size <= _SMALLEST_BYTES:
        return _SMALLEST_BYTES
    quarter = 1 << max(0, (size - 1).bit_length() - 3)
    return -(-size // quarter) * quarter


def _give_back(memory: "weakref.ref[DeviceMemory]", pointer: int, size: int) -> None:
    alive = memory()
    if alive is not None:
        alive._release(pointer, size)


def _give_watch_back(memory: "weakref.ref[DeviceMemory]", place: _WatchPlace) -> None:
    alive = memory()
    if alive is not None:
        alive._spare_watches.append(place)
