"""The stages on ONNX Runtime's CUDA provider: caches and states stay on the GPU, all work is in one stream.

A run is queued and not waited for. What is bound are addresses: outputs are written where the caller wants them, and
what the host decides is put beside them first. Several sequences run together as on the CPU.

ONNX Runtime itself goes on with the CPU when the provider cannot be loaded, and gives single nodes to the CPU when the
provider has no kernel for them. Both are errors here. ``session.disable_cpu_ep_fallback`` would refuse every graph:
arithmetic on shapes belongs on the CPU, so what was placed where is read and checked instead.
"""

import contextlib
import ctypes
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BackendUnavailable, BundleError, MythosEdgeError, one_line
from mythos_edge.model.linked_weights import NONE_APART, Apart, lent_weights, weights_apart
from mythos_edge.model.target_options import ON_SHAPES, ONNXRUNTIME_GPU, OrtOptions, options_of
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime.backends.device import DeviceArray, DeviceMemory, device_array
from mythos_edge.runtime.backends.gpu import Gpu, give_back
from mythos_edge.runtime.backends.memory import Rows
from mythos_edge.runtime.backends.ort_session import (
    BoundGraph,
    Place,
    import_onnxruntime,
    on_host,
    session_options,
)
from mythos_edge.runtime.backends.ort_stages import OrtStages
from mythos_edge.runtime.backends.packing import Array, Arrays, Call

INSTALL = "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'"
CUDA_PROVIDER = "CUDAExecutionProvider"
# Its kernels were looked at. Before 1.28 MoE computed another SwiGLU than it was asked for.
OLDEST = (1, 31)
_LIBRARY = "libonnxruntime_providers_cuda.so"
# What ONNX Runtime allocates itself is aligned to this, and so its kernels may expect it.
_ALIGNMENT = 256


class OrtCudaBackend:
    """One of the bundle's targets for the CUDA provider, on one GPU.

    Raises BackendUnavailable without a working CUDA provider, driver or GPU, BundleError when a graph cannot be
    loaded.
    """

    max_context: int | None = None

    def __init__(
        self, bundle: Bundle, target: str, threads: int = 0, *, device: int = 0, driver: Driver | None = None
    ) -> None:
        options = options_of(bundle.target(target), OrtOptions)
        ort = import_gpu_onnxruntime()
        self._gpu = Gpu(driver, device)
        self._stages: OrtStages | None = None
        try:
            _check_kernels(self._gpu)
            # Only large matrices are narrow in these targets. ONNX Runtime writes outputs while it still reads inputs.
            self.memory = memory = DeviceMemory(self._gpu, "fp32")
        except BaseException:
            self._gpu.close()
            raise
        run_options = ort.RunOptions()
        # Nothing waits but what reads.
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def open_graph(path: Path, of_several: bool) -> _DeviceGraph:
            del of_several
            memory.trim()
            apart = weights_apart(bundle, path, target)
            session = gpu_session(path, _provider_options(memory), threads, options.prepacked, apart)
            return _DeviceGraph(path, session, run_options, memory)

        try:
            self._stages = OrtStages(bundle, target, memory, open_graph)
        except BaseException:
            self.close()
            raise

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        assert self._stages is not None
        self._stages.run(stage, feeds, outputs)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        assert self._stages is not None
        self._stages.run_together(stage, calls)

    def close(self) -> None:
        """Gives everything back to the GPU, see ``give_back``; again is nothing."""
        give_back(self._gpu.use)
        if self._stages is not None:
            # Its graphs may still be running.
            give_back(lambda: self.memory.driver.synchronize(self.memory.stream))
            self._stages.close()
            self._stages = None
        self.memory.close()
        self._gpu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _provider_options(memory: DeviceMemory) -> dict[str, str]:
    """The options that have the provider work in the stream of ``memory``."""
    return {
        "device_id": str(memory.device),
        "has_user_compute_stream": "1",
        "user_compute_stream": str(memory.stream),
        # On by default, it would leave products of float32 10 bits.
        "use_tf32": "0",
    }


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


class _DeviceGraph:
    """A session on the GPU. An array of the host is put on the device when its values have changed.

    ONNX Runtime itself would copy it once, when it is bound, and outside the stream.
    """

    def __init__(self, path: Path, session: Any, run_options: Any, memory: DeviceMemory) -> None:
        self._bound = BoundGraph(path, session, run_options, self._place)
        self._memory = memory
        places = zip(session.get_inputs(), session.get_input_memory_infos(), strict=True)
        self._on_host = {given.name for given, info in places if info.name == "Cpu"}
        # By input: its values when they were put last, and where.
        self._put: dict[str, tuple[Array, DeviceArray]] = {}
        # An address for what is empty, which must not be 0.
        self._nowhere = memory.empty((1,), np.uint8)

    @property
    def seconds(self) -> float:
        """Time spent inside it so far."""
        return self._bound.seconds

    def forget(self) -> None:
        """Lets go of every array that is bound."""
        self._bound.forget()

    def close(self) -> None:
        """Lets go of the session, also where an exception still holds this graph."""
        self._bound.close()

    def run(self, feeds: Arrays, outputs: Arrays) -> None:
        memory = self._memory
        memory.driver.use_context(memory.device)
        given = {name: self._given(name, array) for name, array in feeds.items()}
        made = {
            name: array if _is_aligned(array) else memory.empty(array.shape, array.dtype)
            for name, array in outputs.items()
        }
        try:
            self._bound.run(given, made)
        except MythosEdgeError:
            # ONNX Runtime may have found no memory for itself. No output is an input, so it can begin again.
            trimmed = False
            # A driver that refuses everything from now on must not take the first error's place.
            with contextlib.suppress(MythosEdgeError):
                trimmed = memory.trim()
            if not trimmed:
                raise
            self._bound.run(given, made)
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

    def _place(self, array: Rows) -> Place:
        if isinstance(array, np.ndarray):
            return on_host(array)
        pointer = device_array(array).pointer or self._nowhere.pointer
        return "cuda", self._memory.device, array.dtype.type, array.shape, pointer


def _is_aligned(array: Rows) -> bool:
    return not array.nbytes or device_array(array).pointer % _ALIGNMENT == 0


def gpu_session(
    path: Path, provider_options: Mapping[str, str], threads: int = 0, prepack: bool = True, apart: Apart = NONE_APART
) -> Any:
    """An onnxruntime.InferenceSession on the CUDA provider, with only shapes' arithmetic on the CPU.

    ``apart`` are weights that are not in the graph's folder, see ``linked_weights``.
    Raises BackendUnavailable, BundleError when the graph cannot be loaded.
    """
    ort = import_gpu_onnxruntime()
    options = session_options(ort, threads, prepack)
    # 4: only what is fatal. That a provider was not loaded is told below, in one line.
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    wanted = [(CUDA_PROVIDER, dict(provider_options))]
    try:
        # Its own fallback prints, and begins again on other providers.
        with lent_weights(options, apart):
            session = ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        if reason := _not_loadable(ort):
            raise _not_loaded(reason) from error
        raise BundleError(f"{path.name}: ONNX Runtime cannot load it on the GPU: {one_line(error)}") from error
    loaded, assignment = session.get_providers(), session.get_provider_graph_assignment_info()
    try:
        if CUDA_PROVIDER not in loaded:
            raise _not_loaded(_not_loadable(ort) or "it found no usable GPU or driver")
        _check_assignment(ort, path, assignment)
    except BackendUnavailable:
        # Held by the exception it would outlive its stream.
        del session
        raise
    return session


def import_gpu_onnxruntime() -> Any:
    """The onnxruntime module with the CUDA provider, of a version that is known to compute right.

    For the whole process it mutes ONNX Runtime's log. Raises BackendUnavailable.
    """
    try:
        ort = import_onnxruntime()
    except BackendUnavailable as error:
        raise BackendUnavailable("onnxruntime-gpu is not installed", ONNXRUNTIME_GPU) from error
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise BackendUnavailable(
            f"onnxruntime {ort.__version__} is the build for CPUs (it has no {CUDA_PROVIDER}); onnxruntime-gpu "
            "replaces it",
            ONNXRUNTIME_GPU,
        )
    major, minor = ort.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise BackendUnavailable(
            f"onnxruntime-gpu is {ort.__version__}, expected {wanted} or newer: older ones compute experts otherwise",
            INSTALL,
        )
    # What it logs by itself, about CUDA that is missing, is an error below.
    ort.set_default_logger_severity(4)
    # Finds CUDA's libraries where pip put them; what it cannot find it prints, and the session says why it fails.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    return ort


def _check_assignment(ort: Any, path: Path, assignment: Iterable[Any]) -> None:
    """Refuses ops that ONNX Runtime placed on the CPU, but for arithmetic on shapes, as the lowering has named it."""
    nodes = [node for part in assignment if part.ep_name != CUDA_PROVIDER for node in part.get_nodes()]
    on_cpu = sorted({node.op_type for node in nodes if not node.name.startswith(ON_SHAPES)})
    if on_cpu:
        raise BackendUnavailable(
            f"{path.name}: onnxruntime-gpu {ort.__version__} has no CUDA kernel for {', '.join(on_cpu)}, and computing "
            "them on the CPU was not asked for",
            INSTALL,
        )
    if not any(part.ep_name == CUDA_PROVIDER and part.get_nodes() for part in assignment):
        raise BackendUnavailable(
            f"{path.name}: {CUDA_PROVIDER} takes no node of it: look for another version of onnxruntime-gpu", INSTALL
        )


def _not_loaded(reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"ONNX Runtime could not load its {CUDA_PROVIDER}: {reason}", INSTALL)


def _not_loadable(ort: Any) -> str | None:
    """Why the provider's library cannot be loaded: ONNX Runtime only logs it, the loader tells it again."""
    library = Path(ort.__file__).parent / "capi" / _LIBRARY
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"{one_line(error)} (what it needs is not installed, or not found)"
    return None
