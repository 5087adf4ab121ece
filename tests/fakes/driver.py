"""A CUDA driver without a GPU: device memory is host memory, and kernels are Python functions.

It is stricter than CUDA: every pointer must lie in live memory (AssertionError), calls that a graph cannot capture
fail while one is captured, and fresh memory is full of NaN. Each thread has a current context of its own, or none.
With ``delayed`` the work of a stream is done only when somebody waits for it, and until then a copy's destination holds
garbage.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Self

import numpy as np

from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.plugins.cuda_driver import Argument

# All ones is NaN in every float format and -1 as an integer.
GARBAGE = 0xFF
_ALIGNMENT = 256
_SHARED_BYTES_WITHOUT_ASKING = 48 << 10
_MAX_SHARED_BYTES = 99 << 10
_MAX_GRID = (2**31 - 1, 65535, 65535)
Work = Callable[[], None]
Kernel = Callable[..., None]


@dataclass(frozen=True)
class LaunchRecord:
    """One launched kernel; arguments as Python numbers, a null pointer as None."""

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    stream: int
    arguments: tuple[int | float | None, ...]


class Memory:
    """Live allocations of one kind, each a buffer of its own."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._buffers: dict[int, tuple[int, np.ndarray]] = {}

    def allocate(self, size: int) -> int:
        assert size > 0, f"allocating {size} bytes"
        buffer = np.full(size + _ALIGNMENT, GARBAGE, np.uint8)
        pointer = -(-buffer.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._buffers[pointer] = (size, buffer)
        return pointer

    def free(self, pointer: int) -> None:
        assert pointer in self._buffers, f"freeing {pointer:#x}, which is no live {self.kind} allocation"
        _, buffer = self._buffers.pop(pointer)
        buffer[...] = GARBAGE

    def holds(self, pointer: int, size: int) -> bool:
        return any(
            start <= pointer and pointer + size <= start + length for start, (length, _) in self._buffers.items()
        )

    def check(self, pointer: int, size: int, what: str) -> None:
        assert self.holds(pointer, size), f"{what}: {size} bytes at {pointer:#x} are not in live {self.kind} memory"

    @property
    def live_bytes(self) -> int:
        return sum(size for size, _ in self._buffers.values())


class FakeDriver:
    """The methods of ``Driver``, and what a test wants to know: ``launches``, ``calls``, ``live_bytes``.

    ``kernels`` maps an entry to a Python function, called at each launch with (driver, grid, *arguments); launches of
    other entries are only recorded. ``devices`` are compute capabilities.
    """

    def __init__(self, devices: Sequence[int] = (89,), total_bytes: int = 1 << 30, *, delayed: bool = False) -> None:
        self.devices, self.total_bytes, self.delayed = tuple(devices), total_bytes, delayed
        self.device_memory, self.pinned_memory = Memory("device"), Memory("pinned")
        self.kernels: dict[str, Kernel] = {}
        self.launches: list[LaunchRecord] = []
        self.calls: list[str] = []
        self.modules: dict[int, bytes] = {}
        self._retained: dict[int, int] = {}
        self._thread = threading.local()
        self._functions: dict[int, tuple[int, str]] = {}
        self._shared: dict[int, int] = {}
        self._streams: dict[int, list[Work]] = {}
        # The work that was queued, and of that the work done, when an event was recorded last.
        self._events: dict[int, tuple[int, list[bool]]] = {}
        self._captures: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._handles = 0

    @classmethod
    def load(cls) -> Self:
        return cls()

    # What tests look at.

    @property
    def live_bytes(self) -> int:
        """Device and pinned bytes that were not given back."""
        return self.device_memory.live_bytes + self.pinned_memory.live_bytes

    def array(self, pointer: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Device or pinned memory as a numpy array, without a copy."""
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        assert self.device_memory.holds(pointer, size) or self.pinned_memory.holds(pointer, size), (
            f"{size} bytes at {pointer:#x} are not in live memory"
        )
        buffer = (ctypes.c_ubyte * size).from_address(pointer)
        return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)

    def put(self, array: np.ndarray) -> int:
        """A new device allocation with the contents of ``array``."""
        array = np.ascontiguousarray(array)
        pointer = self.device_memory.allocate(max(array.nbytes, 1))
        ctypes.memmove(pointer, array.ctypes.data, array.nbytes)
        return pointer

    def advance(self, count: int = 1) -> None:
        """Does up to ``count`` pieces of delayed work of each stream, as time would."""
        for queue in self._streams.values():
            self._run(queue, count)

    # The methods of Driver.

    def device_count(self) -> int:
        return len(self.devices)

    def current_device(self) -> int:
        return self._current("cuCtxGetDevice")

    def compute_capability(self, device: int) -> int:
        return self.devices[self._device(device)]

    def device_name(self, device: int) -> str:
        return f"Fake GPU {self._device(device)}"

    def retain_primary_context(self, device: int) -> None:
        self._retained[self._device(device)] = self._retained.get(device, 0) + 1
        self.use_context(device)

    def use_context(self, device: int) -> None:
        if not self._retained.get(device):
            raise MythosEdgeError(f"the context of device {device} is not retained: call retain_primary_context first")
        self._thread.device = device

    def release_primary_context(self, device: int) -> None:
        assert self._retained.get(self._device(device)), f"device {device}: released more often than retained"
        self._retained[device] -= 1

    def memory_info(self) -> tuple[int, int]:
        return self.total_bytes - self.device_memory.live_bytes, self.total_bytes

    def allocate(self, size: int) -> int:
        self._not_captured("cuMemAlloc_v2")
        self._current("cuMemAlloc_v2")
        if size > self.memory_info()[0]:
            _fail(f"cuMemAlloc_v2 for {size} bytes", "CUDA_ERROR_OUT_OF_MEMORY")
        return self.device_memory.allocate(size)

    def free(self, pointer: int) -> None:
        self._not_captured("cuMemFree_v2")
        self.device_memory.free(pointer)

    def allocate_pinned(self, size: int) -> int:
        self._not_captured("cuMemHostAlloc")
        self._current("cuMemHostAlloc")
        return self.pinned_memory.allocate(size)

    def free_pinned(self, pointer: int) -> None:
        self._not_captured("cuMemFreeHost")
        self.pinned_memory.free(pointer)

    def copy_to_device(self, to: int, source_address: int, size: int, stream: int) -> None:
        self._current("cuMemcpyHtoDAsync_v2")
        self.device_memory.check(to, size, "copy_to_device")
        pinned = self.pinned_memory.holds(source_address, size)
        assert pinned or stream not in self._captures, "a captured copy must be from pinned memory"

        def copy() -> None:
            self.device_memory.check(to, size, "copy_to_device")
            if pinned:
                self.pinned_memory.check(source_address, size, "copy_to_device")
            ctypes.memmove(to, source_address, size)

        self._queue(stream, "copy_to_device", copy)
        if not pinned:
            # The driver may wait for the stream, and reads the memory when it likes until somebody else does.
            self.calls.append("copy from memory that is not pinned")

    def copy_to_host(self, to_address: int, source: int, size: int, stream: int) -> None:
        self._current("cuMemcpyDtoHAsync_v2")
        self.device_memory.check(source, size, "copy_to_host")
        pinned = self.pinned_memory.holds(to_address, size)
        assert pinned or stream not in self._captures, "a captured copy must be to pinned memory"

        def copy() -> None:
            self.device_memory.check(source, size, "copy_to_host")
            if pinned:
                self.pinned_memory.check(to_address, size, "copy_to_host")
            ctypes.memmove(to_address, source, size)

        if self.delayed and stream not in self._captures:
            ctypes.memset(to_address, GARBAGE, size)
        self._queue(stream, "copy_to_host", copy)
        if not pinned:
            self._run(self._streams[stream])

    def copy_on_device(self, to: int, source: int, size: int, stream: int) -> None:
        self._current("cuMemcpyDtoDAsync_v2")

        def copy() -> None:
            self.device_memory.check(to, size, "copy_on_device to")
            self.device_memory.check(source, size, "copy_on_device from")
            assert to + size <= source or source + size <= to, "copy_on_device: the two ranges overlap"
            ctypes.memmove(to, source, size)

        self._queue(stream, "copy_on_device", copy)

    def fill(self, pointer: int, byte: int, size: int, stream: int) -> None:
        self._current("cuMemsetD8Async")

        def write() -> None:
            self.device_memory.check(pointer, size, "fill")
            ctypes.memset(pointer, byte, size)

        self._queue(stream, "fill", write)

    def load_module(self, cubin: bytes) -> int:
        self._not_captured("cuModuleLoadData")
        self._current("cuModuleLoadData")
        module = self._handle()
        self.modules[module] = cubin
        return module

    def function(self, module: int, entry: str) -> int:
        # The names of a cubin's kernels are in its table of strings.
        if entry.encode() not in self.modules[module]:
            _fail(f"cuModuleGetFunction for kernel {entry}", "CUDA_ERROR_NOT_FOUND")
        function = self._handle()
        self._functions[function] = (module, entry)
        return function

    def set_shared_bytes(self, function: int, size: int) -> None:
        if size > _MAX_SHARED_BYTES:
            _fail(f"cuFuncSetAttribute for {size} bytes of shared memory", "CUDA_ERROR_INVALID_VALUE")
        assert function in self._functions
        self._shared[function] = size

    def unload_module(self, module: int) -> None:
        self._not_captured("cuModuleUnload")
        self._current("cuModuleUnload")
        del self.modules[module]
        for function in [function for function, (owner, _) in self._functions.items() if owner == module]:
            del self._functions[function]

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Argument],
    ) -> None:
        self._current("cuLaunchKernel")
        assert function in self._functions, f"launching {function}, which is no kernel of a loaded module"
        _, entry = self._functions[function]
        limit = max(self._shared.get(function, 0), _SHARED_BYTES_WITHOUT_ASKING)
        if not all(0 < count <= most for count, most in zip(grid, _MAX_GRID, strict=True)) or shared_bytes > limit:
            _fail(f"cuLaunchKernel of {entry}: grid {grid}, {shared_bytes} bytes", "CUDA_ERROR_INVALID_VALUE")
        assert 0 < threads <= 1024, f"{entry}: {threads} threads"
        values = tuple(argument.value for argument in arguments)
        record = LaunchRecord(entry, tuple(grid), threads, shared_bytes, stream, values)
        pointers = [
            argument.value for argument in arguments if isinstance(argument, ctypes.c_void_p) and argument.value
        ]

        def run() -> None:
            for pointer in pointers:
                self.device_memory.check(pointer, 1, f"launch of {entry}")
            self.launches.append(record)
            if entry in self.kernels:
                self.kernels[entry](self, record.grid, *values)

        self._queue(stream, f"launch {entry}", run)

    def stream(self) -> int:
        stream = self._handle()
        self._streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        assert stream not in self._captures, "destroying a stream that is captured"
        self._run(self._streams.pop(stream))

    def synchronize(self, stream: int) -> None:
        self._not_captured("cuStreamSynchronize")
        self.calls.append("synchronize")
        self._run(self._streams[stream])

    def event(self) -> int:
        event = self._handle()
        self._events[event] = (0, [True])
        return event

    def record(self, event: int, stream: int) -> None:
        assert event in self._events
        assert stream not in self._captures, "nobody could wait for an event recorded in a capture"
        done = [False]
        self._events[event] = (stream, done)

        def mark() -> None:
            done[0] = True

        self._queue(stream, "record", mark)

    def wait(self, event: int) -> None:
        self._not_captured("cuEventSynchronize")
        self.calls.append("wait")
        stream, done = self._events[event]
        while not done[0]:
            self._run(self._streams[stream], 1)

    def destroy_event(self, event: int) -> None:
        del self._events[event]

    def begin_capture(self, stream: int) -> None:
        assert stream in self._streams
        if stream in self._captures:
            _fail("cuStreamBeginCapture_v2", "CUDA_ERROR_ILLEGAL_STATE")
        self._captures[stream] = []

    def end_capture(self, stream: int) -> int:
        if stream not in self._captures:
            _fail("cuStreamEndCapture", "CUDA_ERROR_ILLEGAL_STATE")
        graph = self._handle()
        self._graphs[graph] = self._captures.pop(stream)
        return graph

    def launch_graph(self, graph: int, stream: int) -> None:
        self._not_captured("cuGraphLaunch")
        work = list(self._graphs[graph])

        def replay() -> None:
            for piece in work:
                piece()

        self._queue(stream, "launch_graph", replay)

    def destroy_graph(self, graph: int) -> None:
        del self._graphs[graph]

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def _device(self, number: int) -> int:
        if not 0 <= number < len(self.devices):
            _fail(f"cuDeviceGet for device {number}", "CUDA_ERROR_INVALID_DEVICE")
        return number

    def _current(self, name: str) -> int:
        """The device whose context the calling thread uses; without one, call ``name`` fails."""
        device: int | None = getattr(self._thread, "device", None)
        if device is None or not self._retained[device]:
            _fail(name, "CUDA_ERROR_INVALID_CONTEXT")
        return device

    def _not_captured(self, name: str) -> None:
        if self._captures:
            _fail(name, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")

    def _queue(self, stream: int, name: str, work: Work) -> None:
        assert stream in self._streams, f"{name}: {stream} is no live stream"
        self.calls.append(name)
        if stream in self._captures:
            self._captures[stream].append(work)
            return
        self._streams[stream].append(work)
        if not self.delayed:
            self._run(self._streams[stream])

    @staticmethod
    def _run(queue: list[Work], count: int | None = None) -> None:
        while queue and (count is None or count > 0):
            queue.pop(0)()
            count = None if count is None else count - 1


def _fail(call: str, error: str) -> NoReturn:
    raise MythosEdgeError(f"{call} failed: {error}")


class BrokenDriver(FakeDriver):
    """After ``good`` launches one meets an illegal address, and from then on no call that uses the context works."""

    def __init__(self, good: int) -> None:
        super().__init__()
        self.good, self.broken = good, False

    def __getattribute__(self, name: str) -> Any:
        uses_context = name in (
            "allocate",
            "begin_capture",
            "copy_on_device",
            "copy_to_device",
            "copy_to_host",
            "destroy_graph",
            "destroy_stream",
            "end_capture",
            "free",
            "launch",
            "launch_graph",
            "load_module",
            "memory_info",
            "release_primary_context",
            "synchronize",
        )
        if uses_context and self.broken:
            return self._fail
        return super().__getattribute__(name)

    def launch(self, *arguments: Any) -> None:
        self.good -= 1
        if self.good < 0:
            self.broken = True
            self._fail("launch")
        super().launch(*arguments)

    def _fail(self, *_: Any) -> Any:
        raise MythosEdgeError("CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)")
