"""The stages on ONNX Runtime's CUDA provider: caches and states stay on the GPU, all work is in one stream.

A run is queued and not waited for. What is bound are addresses: outputs are written where the caller wants them, and
what the host decides is put beside them first. Several sequences run together as on the CPU.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BackendUnavailable, MythosEdgeError
from mythos_edge.model.linked_weights import weights_apart
from mythos_edge.model.manifest import CUDA_PROVIDER
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime.backend import BoundGraph, OrtBackend
from mythos_edge.runtime.device import DeviceArray, DeviceMemory
from mythos_edge.runtime.gpu import Gpu, give_back
from mythos_edge.runtime.memory import Rows
from mythos_edge.runtime.ort_gpu_session import Providers, gpu_session, import_gpu_onnxruntime
from mythos_edge.runtime.packing import Array, Arrays

# What ONNX Runtime allocates itself is aligned to this, and so its kernels may expect it.
_ALIGNMENT = 256


class OrtCudaBackend(OrtBackend):
    """One of the bundle's ``ort-cuda`` targets on one GPU.

    Raises BackendUnavailable without a working CUDA provider, driver or GPU, BundleError when a graph cannot be
    loaded.
    """

    memory: DeviceMemory

    def __init__(
        self, bundle: Bundle, target: str, threads: int = 0, *, device: int = 0, driver: Driver | None = None
    ) -> None:
        spec = bundle.target(target)
        ort = import_gpu_onnxruntime(*spec.providers)
        self._gpu = Gpu(driver, device)
        try:
            _check_kernels(self._gpu)
            # Only large matrices are narrow in these targets. ONNX Runtime writes outputs while it still reads inputs.
            memory = DeviceMemory(self._gpu, "fp32")
        except BaseException:
            self._gpu.close()
            raise
        run_options = ort.RunOptions()
        # Nothing waits but what reads.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def open_graph(path: Path) -> BoundGraph:
            memory.trim()
            apart = weights_apart(bundle, path, target)
            session = gpu_session(path, self._providers(bundle, target, memory), threads, spec.prepacked, apart)
            return _DeviceGraph(path, session, run_options, memory)

        try:
            super().__init__(bundle, target, threads, memory=memory, open_graph=open_graph)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Gives everything back to the GPU, see ``give_back``; again is nothing."""
        give_back(self._gpu.use)
        if self._stages:
            # Its graphs may still be running.
            give_back(lambda: self.memory.driver.synchronize(self.memory.stream))
        super().close()
        self.memory.close()
        self._gpu.close()

    def _providers(self, bundle: Bundle, target: str, memory: DeviceMemory) -> Providers:
        """What runs the nodes of the target's graphs, each with its options."""
        del bundle, target
        return {CUDA_PROVIDER: cuda_options(memory)}


def stream_options(memory: DeviceMemory) -> dict[str, str]:
    """The provider's options that have it work in the stream of ``memory``."""
    return {
        "device_id": str(memory.device),
        "has_user_compute_stream": "1",
        "user_compute_stream": str(memory.stream),
    }


def cuda_options(memory: DeviceMemory) -> dict[str, str]:
    """The options of the CUDA provider."""
    # On by default, it would leave products of float32 10 bits.
    return stream_options(memory) | {"use_tf32": "0"}


def _check_kernels(gpu: Gpu) -> None:
    """The runtime asks the GPU by kernels of this package which columns still run."""
    known = kernel_store.compute_capabilities()
    if gpu.compute_capability not in known:
        names = ", ".join(f"sm{number}" for number in known)
        raise BackendUnavailable(
            f"this GPU ({gpu.name}) is sm{gpu.compute_capability}, and there are kernels for {names}: use the target "
            "ort-cpu, and see what this machine can run",
            "mythos-edge doctor",
        )


class _DeviceGraph(BoundGraph):
    """A session on the GPU. An array of the host is put on the device when its values have changed.

    ONNX Runtime itself would copy it once, when it is bound, and outside the stream.
    """

    def __init__(self, path: Path, session: Any, run_options: Any, memory: DeviceMemory) -> None:
        super().__init__(path, session, run_options)
        self._memory = memory
        places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        self._on_host = {given.name for given, info in places if info.name == "Cpu"}
        # By input: its values when they were put last, and where.
        self._put: dict[str, tuple[Array, DeviceArray]] = {}
        # An address for what is empty, which must not be 0.
        self._nowhere = memory.empty((1,), np.uint8)

    def run(self, feeds: Arrays, outputs: Arrays) -> None:
        memory = self._memory
        memory.driver.use_context(memory.device)
        given = {name: self._given(name, array) for name, array in feeds.items()}
        made = {
            name: array if _is_aligned(array) else memory.empty(array.shape, array.dtype)
            for name, array in outputs.items()
        }
        try:
            super().run(given, made)
        except MythosEdgeError:
            # ONNX Runtime may have found no memory for itself. No output is an input, so it can begin again.
            trimmed = False
            # A driver that refuses everything from now on must not take the first error's place.
            with contextlib.suppress(MythosEdgeError):
                trimmed = memory.trim()
            if not trimmed:
                raise
            super().run(given, made)
        for name, array in outputs.items():
            if made[name] is not array:
                array[...] = made[name]

    def _given(self, name: str, array: Rows) -> Rows:
        """``array`` where the session wants it."""
        if name in self._on_host:
            return array if isinstance(array, np.ndarray) else self._memory.to_host(array)
        if isinstance(array, np.ndarray):
            return self._on_device(name, array)
        return array if _is_aligned(array) else array.copy()

    def _on_device(self, name: str, array: Array) -> DeviceArray:
        before, place = self._put.get(name, (None, None))
        if before is not None and place is not None and np.array_equal(before, array):
            return place
        if place is None or place.shape != array.shape:
            place = self._memory.empty(array.shape, array.dtype)
        # Interrupted from here on, it is not known what is there.
        self._put.pop(name, None)
        self._memory.upload(place.pointer, np.ascontiguousarray(array))
        self._put[name] = array.copy(), place
        return place

    def _place(self, array: Rows) -> tuple[str, int, type, tuple[int, ...], int]:
        if isinstance(array, np.ndarray):
            return super()._place(array)
        pointer = array.pointer or self._nowhere.pointer
        return "cuda", self._memory.device, array.dtype.type, array.shape, pointer


def _is_aligned(array: DeviceArray) -> bool:
    return not array.nbytes or array.pointer % _ALIGNMENT == 0
