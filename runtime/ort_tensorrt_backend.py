"""The stages on ONNX Runtime's TensorRT provider, which builds engines here, and the CUDA provider for the rest.

The provider makes an engine for the range of shapes that it has met, and a wider one whenever a shape lies outside. So
each stage is run at its least and its largest shapes when the target is opened, and no call asks for more later: rows
beyond are calls of their own. Engines are native code and are kept in the user's own cache, never in the bundle.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mythos_edge.model.bundle import CUDA_PROVIDER, STAGES, TENSORRT_PROVIDER, Bundle, TensorSpec
from mythos_edge.model.errors import BackendUnavailable, UsageError
from mythos_edge.plugins import trt_bindings
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime.device import DeviceMemory
from mythos_edge.runtime.memory import Rows
from mythos_edge.runtime.ort_cuda_backend import OrtCudaBackend, cuda_options, stream_options
from mythos_edge.runtime.ort_gpu_session import Providers, import_gpu_onnxruntime
from mythos_edge.runtime.packing import ROWS, Arrays, Call

# The most rows of one call: enough for a prompt, and few enough for the scores of a long context.
MAX_ROWS = 64
# Given for the last rows of a chunk only, those that may still run.
_ACTIVE = ("out", "halt_mass", "depth")
_LEAST = {"chunk": 1, "active": 0, "logit_count": 0, "context": 0}


class OrtTensorrtBackend(OrtCudaBackend):
    """One of the bundle's ``ort-cuda-*-tensorrt`` targets on one GPU; raises as ``OrtCudaBackend`` does.

    Opening it for the first time builds engines, which takes minutes for a large model.
    """

    def __init__(
        self, bundle: Bundle, target: str, threads: int = 0, *, device: int = 0, driver: Driver | None = None
    ) -> None:
        super().__init__(bundle, target, threads, device=device, driver=driver)
        most = bundle.manifest.max_context
        rows = min(MAX_ROWS, most)
        largest = {"chunk": rows, "active": rows, "logit_count": rows, "context": most}
        try:
            # In this order no engine is tuned for nothing.
            for sizes in (largest, _LEAST):
                for stage in STAGES:
                    super().run(stage, *_idle_call(bundle, stage, sizes, self.memory))
        except BaseException:
            self.close()
            raise

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        # A causal chunk is the same as its parts one after the other: each finds the rows of those before it.
        for part in parts(stage, Call(feeds, outputs), MAX_ROWS):
            super().run(stage, *part)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """One after the other: the engines are for one sequence."""
        for call in calls:
            self.run(stage, *call)

    def _providers(self, bundle: Bundle, target: str, memory: DeviceMemory) -> Providers:
        folder = str(self._cache_folder(bundle, target))
        own = {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
        return {TENSORRT_PROVIDER: stream_options(memory) | own, CUDA_PROVIDER: cuda_options(memory)}

    def _cache_folder(self, bundle: Bundle, target: str) -> Path:
        """Where engines for these weights and graphs, this GPU and these libraries are kept."""
        spec = bundle.target(target)
        parts = [bundle.manifest.identity, target, self._gpu.name]
        parts += [bundle.manifest.files[file].sha256 for _, file in sorted(spec.graphs.items())]
        parts += [import_gpu_onnxruntime(*spec.providers).__version__, _tensorrt_version()]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        folder = trt_bindings.cache_folder() / "ort-tensorrt" / key
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{folder}: can not be written: {error.strerror}: set XDG_CACHE_HOME to a folder that can"
            ) from error
        return folder


def parts(stage: str, call: Call, most: int) -> Iterator[Call]:
    """A call as several of up to ``most`` rows each, to be run in this order.

    Its new rows have to lie right behind the cached ones, which then are one array with those of earlier parts.
    """
    feeds, outputs = call
    count = feeds[ROWS[stage]].shape[1]
    if count <= most:
        yield call
        return
    for start in range(0, count, most):
        stop = min(count, start + most)
        yield Call(
            {name: _part_of_feed(stage, call, name, start, stop) for name in feeds},
            {name: _part_of_output(stage, call, name, start, stop) for name in outputs},
        )


def _part_of_feed(stage: str, call: Call, name: str, start: int, stop: int) -> Rows:
    given, count = call.feeds[name], call.feeds[ROWS[stage]].shape[1]
    if name == "length":
        return given + start
    if name.startswith("past"):
        return given.followed_by(call.outputs[name.replace("past", "rows")][:, :start])
    if name == "logit_rows":
        return given[_inside(given, start, stop)] - start
    if name in ("first", "threshold", "min_depth"):
        return given
    missing = count - given.shape[1] if stage == "step" and name in _ACTIVE else 0
    return _between(given, start - missing, stop - missing)


def _part_of_output(stage: str, call: Call, name: str, start: int, stop: int) -> Rows:
    wanted, count = call.outputs[name], call.feeds[ROWS[stage]].shape[1]
    if name == "logits":
        return wanted[:, _inside(call.feeds["logit_rows"], start, stop)]
    missing = count - wanted.shape[1]
    return _between(wanted, start - missing, stop - missing)


def _between(rows: Rows, start: int, stop: int) -> Rows:
    return rows[:, max(0, start) : max(0, stop)]


def _inside(rows: Any, start: int, stop: int) -> slice:
    """Which of ``rows``, in ascending order, lie between ``start`` and ``stop``."""
    first, end = np.searchsorted(rows, (start, stop))
    return slice(int(first), int(end))


def _idle_call(bundle: Bundle, stage: str, sizes: dict[str, int], memory: DeviceMemory) -> Call:
    """A call of these sizes with nothing but zeros in it, at the first positions whatever is cached."""
    graph = bundle.manifest.graphs[stage]
    free = {"batch": 1, **sizes}

    def zeros(tensor: TensorSpec) -> Rows:
        shape = tuple(size if isinstance(size, int) else free[size] for size in tensor.shape)
        if tensor.name in ("length", "first", "input_ids", "step_index", "threshold", "min_depth", "logit_rows"):
            return np.zeros(shape, tensor.dtype)
        made = memory.empty(shape, tensor.dtype)
        made[...] = 0
        return made

    feeds = {tensor.name: zeros(tensor) for tensor in graph.inputs}
    return Call(feeds, {tensor.name: zeros(tensor) for tensor in graph.outputs})


def _tensorrt_version() -> str:
    try:
        return trt_bindings.version(trt_bindings.load("trt"))
    except BackendUnavailable:
        return ""
