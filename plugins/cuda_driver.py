"""The part of the CUDA driver that runtime and plugins use, called through ctypes: no CUDA toolkit, no compiler.

Handles and device pointers are plain integers. Nothing is freed behind the caller's back. Entry points carry the
version suffix they have in the library (``cuMemAlloc`` is a macro for ``cuMemAlloc_v2`` in cuda.h).
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, Self

from mythos_edge.model.errors import BackendUnavailable, MythosEdgeError

Argument = ctypes.c_void_p | ctypes.c_int32 | ctypes.c_int64 | ctypes.c_float

_SUCCESS, _NO_DEVICE = 0, 100
_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_MAX_DYNAMIC_SHARED_BYTES = 8
_STREAM_NON_BLOCKING = 1
_EVENT_DISABLE_TIMING = 2
_HOST_ALLOCATION_PORTABLE = 1
# Other threads go on allocating during a capture; a forbidden call of this one is an error, not a surprise.
_CAPTURE_THREAD_LOCAL = 1
_NAME_BYTES = 256

_int, _uint, _size, _flags64 = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_ulonglong
_pointer, _address, _handle = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p
_new_handle = ctypes.POINTER(ctypes.c_void_p)

SYMBOLS: dict[str, tuple[Any, ...]] = {
    "cuInit": (_uint,),
    "cuGetErrorName": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGetCount": (ctypes.POINTER(_int),),
    "cuDeviceGet": (ctypes.POINTER(_int), _int),
    "cuDeviceGetName": (ctypes.c_char_p, _int, _int),
    "cuDeviceGetAttribute": (ctypes.POINTER(_int), _int, _int),
    "cuDevicePrimaryCtxRetain": (_new_handle, _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxSetCurrent": (_handle,),
    "cuCtxGetDevice": (ctypes.POINTER(_int),),
    "cuMemGetInfo_v2": (ctypes.POINTER(_size), ctypes.POINTER(_size)),
    "cuMemAlloc_v2": (ctypes.POINTER(_pointer), _size),
    "cuMemFree_v2": (_pointer,),
    "cuMemHostAlloc": (_new_handle, _size, _uint),
    "cuMemFreeHost": (_address,),
    "cuMemcpyHtoDAsync_v2": (_pointer, _address, _size, _handle),
    "cuMemcpyDtoHAsync_v2": (_address, _pointer, _size, _handle),
    "cuMemcpyDtoDAsync_v2": (_pointer, _pointer, _size, _handle),
    "cuMemsetD8Async": (_pointer, ctypes.c_ubyte, _size, _handle),
    "cuModuleLoadData": (_new_handle, ctypes.c_char_p),
    "cuModuleGetFunction": (_new_handle, _handle, ctypes.c_char_p),
    "cuModuleUnload": (_handle,),
    "cuFuncSetAttribute": (_handle, _int, _int),
    "cuLaunchKernel": (_handle, *(_uint,) * 7, _handle, ctypes.POINTER(ctypes.c_void_p), _new_handle),
    "cuStreamCreate": (_new_handle, _uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamSynchronize": (_handle,),
    "cuEventCreate": (_new_handle, _uint),
    "cuEventRecord": (_handle, _handle),
    "cuEventSynchronize": (_handle,),
    "cuEventDestroy_v2": (_handle,),
    "cuStreamBeginCapture_v2": (_handle, _int),
    "cuStreamEndCapture": (_handle, _new_handle),
    "cuGraphInstantiateWithFlags": (_new_handle, _handle, _flags64),
    "cuGraphDestroy": (_handle,),
    "cuGraphLaunch": (_handle, _handle),
    "cuGraphExecDestroy": (_handle,),
}


class Driver:
    """The CUDA driver of this machine; all calls go to the context that is current in the calling thread.

    Raises MythosEdgeError, one line with CUDA's own name of the error, from every method.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        """Of ``library``; see ``load``. Raises BackendUnavailable for an old driver, or one without a device."""
        self._library = library
        # One handle for each time that a device's context was retained and not released.
        self._contexts: dict[int, list[int]] = {}
        for name, types in SYMBOLS.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise BackendUnavailable(
                    f"the NVIDIA driver has no {name}: install one for CUDA 12 or newer, and look at it", "nvidia-smi"
                ) from error
            function.argtypes, function.restype = types, ctypes.c_int
        code = library.cuInit(0)
        if code == _NO_DEVICE:
            raise BackendUnavailable("no NVIDIA GPU is visible (check CUDA_VISIBLE_DEVICES), look for it", "nvidia-smi")
        if code != _SUCCESS:
            raise BackendUnavailable(f"the NVIDIA driver does not start: {self._name_of(code)}", "nvidia-smi")

    @classmethod
    def load(cls) -> Self:
        """The driver installed on this machine. Raises BackendUnavailable without one, or without a device."""
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            library = ctypes.CDLL(name)
        except OSError as error:
            raise BackendUnavailable(
                f"no NVIDIA driver: {name} cannot be loaded; install the driver, and look whether it finds the GPU",
                "nvidia-smi",
            ) from error
        return cls(library)

    def device_count(self) -> int:
        """GPUs that this process may use."""
        return self._filled("cuDeviceGetCount", _int())

    def current_device(self) -> int:
        """The number of the GPU whose context is current in this thread."""
        return self._filled("cuCtxGetDevice", _int())

    def compute_capability(self, device: int) -> int:
        """89 for SM 8.9."""
        major, minor = (
            self._filled("cuDeviceGetAttribute", _int(), attribute, self._device(device))
            for attribute in (_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR)
        )
        return 10 * major + minor

    def device_name(self, device: int) -> str:
        """As NVIDIA calls the GPU."""
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self._call("cuDeviceGetName", name, _NAME_BYTES, self._device(device))
        return name.value.decode()

    def retain_primary_context(self, device: int) -> None:
        """Makes the context that TensorRT uses as well current in this thread, and keeps it alive."""
        context = self._made("cuDevicePrimaryCtxRetain", self._device(device))
        self._contexts.setdefault(device, []).append(context)
        self.use_context(device)

    def use_context(self, device: int) -> None:
        """Makes the context that was retained current in the calling thread; cheap, so it may be done at every call.

        Raises MythosEdgeError for a device whose context is not retained.
        """
        contexts = self._contexts.get(device)
        if not contexts:
            raise MythosEdgeError(f"the context of device {device} is not retained: call retain_primary_context first")
        self._call("cuCtxSetCurrent", contexts[-1])

    def release_primary_context(self, device: int) -> None:
        """Undoes one ``retain_primary_context``; after the last, no thread may use what was made in the context."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._device(device))
        if contexts := self._contexts.get(device):
            contexts.pop()

    def memory_info(self) -> tuple[int, int]:
        """Free and total bytes of the current GPU's memory."""
        free, total = _size(), _size()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """A pointer to ``size`` bytes of device memory, aligned to 256 bytes at least."""
        return self._filled("cuMemAlloc_v2", _pointer(), size, note=f" for {size} bytes of device memory")

    def free(self, pointer: int) -> None:
        """Gives device memory back."""
        self._call("cuMemFree_v2", pointer)

    def allocate_pinned(self, size: int) -> int:
        """The address of ``size`` bytes of host memory that copies reach without waiting."""
        note = f" for {size} bytes of pinned memory"
        return self._made("cuMemHostAlloc", size, _HOST_ALLOCATION_PORTABLE, note=note)

    def free_pinned(self, pointer: int) -> None:
        """Gives pinned host memory back."""
        self._call("cuMemFreeHost", pointer)

    def copy_to_device(self, to: int, source_address: int, size: int, stream: int) -> None:
        """Queues a copy from host memory; pinned memory is read when the copy runs, other memory now."""
        self._call("cuMemcpyHtoDAsync_v2", to, source_address, size, stream)

    def copy_to_host(self, to_address: int, source: int, size: int, stream: int) -> None:
        """Queues a copy to host memory; to memory that is not pinned, waits for it."""
        self._call("cuMemcpyDtoHAsync_v2", to_address, source, size, stream)

    def copy_on_device(self, to: int, source: int, size: int, stream: int) -> None:
        """Queues a copy inside device memory."""
        self._call("cuMemcpyDtoDAsync_v2", to, source, size, stream)

    def fill(self, pointer: int, byte: int, size: int, stream: int) -> None:
        """Queues writing ``byte`` ``size`` times."""
        self._call("cuMemsetD8Async", pointer, byte, size, stream)

    def load_module(self, cubin: bytes) -> int:
        """The kernels of a cubin or of PTX text (which the driver compiles), loaded into the current context."""
        return self._made("cuModuleLoadData", cubin)

    def function(self, module: int, entry: str) -> int:
        """The kernel named ``entry``."""
        return self._made("cuModuleGetFunction", module, entry.encode(), note=f" for kernel {entry}")

    def set_shared_bytes(self, function: int, size: int) -> None:
        """Allows a kernel ``size`` bytes of dynamic shared memory, which more than 48 KiB have to be."""
        self._call(
            "cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_BYTES, size, note=f" for {size} bytes of shared memory"
        )

    def unload_module(self, module: int) -> None:
        """Gives a module and its kernels back."""
        self._call("cuModuleUnload", module)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Queues a kernel; ``arguments`` are copied now."""
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self._call("cuLaunchKernel", function, *grid, threads, 1, 1, shared_bytes, stream, addresses, None)

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""
        return self._made("cuStreamCreate", _STREAM_NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        """Gives a stream back once its work is done."""
        self._call("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: int) -> None:
        """Waits for all work of a stream; an error of earlier work may show here."""
        self._call("cuStreamSynchronize", stream)

    def event(self) -> int:
        """A new event, ready until it is recorded."""
        return self._made("cuEventCreate", _EVENT_DISABLE_TIMING)

    def record(self, event: int, stream: int) -> None:
        """Makes ``event`` ready once all work so far of ``stream`` is done."""
        self._call("cuEventRecord", event, stream)

    def wait(self, event: int) -> None:
        """Waits on the host until ``event`` is ready."""
        self._call("cuEventSynchronize", event)

    def destroy_event(self, event: int) -> None:
        """Gives an event back."""
        self._call("cuEventDestroy_v2", event)

    def begin_capture(self, stream: int) -> None:
        """From now on work for ``stream`` is collected instead of done; allocating and waiting are errors."""
        self._call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """An executable graph of what was collected."""
        collected = ctypes.c_void_p()
        self._call("cuStreamEndCapture", stream, ctypes.byref(collected))
        graph = int(collected.value or 0)
        try:
            return self._made("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        """Queues all work of a graph, with the pointers and numbers it was captured with."""
        self._call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Gives an executable graph back."""
        self._call("cuGraphExecDestroy", graph)

    def _device(self, number: int) -> int:
        return self._filled("cuDeviceGet", _int(), number, note=f" for device {number}")

    def _made(self, name: str, *arguments: object, note: str = "") -> int:
        """The handle that a call writes to its first argument."""
        return self._filled(name, ctypes.c_void_p(), *arguments, note=note)

    def _filled(self, name: str, place: Any, *arguments: object, note: str = "") -> int:
        self._call(name, ctypes.byref(place), *arguments, note=note)
        return int(place.value or 0)

    def _call(self, name: str, *arguments: object, note: str = "") -> None:
        code = getattr(self._library, name)(*arguments)
        if code != _SUCCESS:
            raise MythosEdgeError(f"{name} failed{note}: {self._name_of(code)}")

    def _name_of(self, code: int) -> str:
        """CUDA's name of an error and what it says about it."""
        texts = []
        for function in (self._library.cuGetErrorName, self._library.cuGetErrorString):
            text = ctypes.c_char_p()
            if function(code, ctypes.byref(text)) == _SUCCESS and text.value:
                texts.append(text.value.decode())
        return f"{texts[0]} ({texts[-1]})" if texts else f"CUDA error {code}"
