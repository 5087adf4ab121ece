"""The stages on ONNX Runtime's TensorRT provider, which builds engines here, and the CUDA provider for the rest.

The provider makes an engine for the range of shapes that it has met, and a wider one whenever a shape lies outside. So
each stage is run at the least and the largest shapes of all its branches when the target is opened, and no call asks
for more later: rows beyond are calls of their own. Engines are native code and are kept in the user's own cache, never
in the bundle.
"""

import contextlib
import ctypes
import hashlib
from collections.abc import Sequence

import numpy as np

from mythos_edge.model.bundle import Bundle, verify_hashes
from mythos_edge.model.errors import BackendUnavailable, CapacityError, MythosEdgeError, UsageError
from mythos_edge.model.manifest import CUDA_PROVIDER, TARGET, TENSORRT_PROVIDER, TensorSpec
from mythos_edge.model.partial_folders import PartialFolder
from mythos_edge.model.stages import STAGES
from mythos_edge.plugins import trt_bindings
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime.device import DeviceMemory
from mythos_edge.runtime.memory import Rows
from mythos_edge.runtime.ort_cuda_backend import OrtCudaBackend, cuda_options, stream_options
from mythos_edge.runtime.ort_gpu_session import TENSORRT_MAJOR, Providers, import_gpu_onnxruntime
from mythos_edge.runtime.packing import ON_HOST, Arrays, Call, parts

# The most rows of one call: enough for a prompt, and few enough for the scores of a long context.
MAX_ROWS = 64


class OrtTensorrtBackend(OrtCudaBackend):
    """One of the bundle's ``ort-cuda-*-tensorrt`` targets on one GPU; raises as ``OrtCudaBackend`` does.

    Opening it for the first time builds engines, which takes minutes for a large model.
    """

    def __init__(
        self, bundle: Bundle, target: str, threads: int = 0, *, device: int = 0, driver: Driver | None = None
    ) -> None:
        self._engines: _EngineFolder | None = None
        try:
            super().__init__(bundle, target, threads, device=device, driver=driver)
            self._build_engines(bundle)
        except MythosEdgeError as error:
            others = (BackendUnavailable, CapacityError, UsageError)
            if self._engines is None or self._engines.is_new or isinstance(error, others):
                raise
            raise MythosEdgeError(
                f"{error} (with engines of an earlier time: if they are why, delete {self._engines.path})"
            ) from error
        finally:
            if self._engines is not None:
                self._engines.discard()

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        for part in parts(stage, Call(feeds, outputs), MAX_ROWS):
            super().run(stage, *part)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """One after the other: the engines are for one sequence."""
        for call in calls:
            self.run(stage, *call)

    def _build_engines(self, bundle: Bundle) -> None:
        try:
            for sizes in _sizes_to_meet(bundle.manifest.max_context):
                for stage in STAGES:
                    super().run(stage, *_idle_call(bundle, stage, sizes, self.memory))
            assert self._engines is not None
            # What was queued may fail only here.
            self.memory.trim()
            self._engines.keep()
        except BaseException:
            self.close()
            raise

    def _providers(self, bundle: Bundle, target: str, memory: DeviceMemory) -> Providers:
        if self._engines is None:
            self._engines = _EngineFolder(self._key(bundle, target))
        folder = str(self._engines.path)
        own = {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": folder,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": folder,
        }
        return {TENSORRT_PROVIDER: stream_options(memory) | own, CUDA_PROVIDER: cuda_options(memory)}

    def _key(self, bundle: Bundle, target: str) -> str:
        """Of what engines are made of and for: graphs and weights, this GPU and these libraries."""
        manifest = bundle.manifest
        names = manifest.files_of(TARGET) | manifest.files_of(target)
        # Other weights than the manifest says would be in the engines of every bundle that says the same.
        verify_hashes(bundle, names=names)
        ort = import_gpu_onnxruntime(*bundle.target(target).providers)
        made_of = [f"{name} {manifest.files[name].sha256}" for name in sorted(names)]
        made_of += [self._gpu.name, ort.__version__, str(tensorrt_version())]
        return hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]


class _EngineFolder:
    """Where ONNX Runtime keeps engines: ``path`` is the folder of a key, or until all are built a private one beside.

    So the folder of a key is whole, whoever is killed, and whoever builds the same at the same time.
    """

    def __init__(self, key: str) -> None:
        parent = trt_bindings.cache_folder() / "ort-tensorrt"
        self.path = self._whole = parent / key
        self.is_new = not self._whole.is_dir()
        if not self.is_new:
            return
        try:
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._private = PartialFolder(parent, key, mode=0o700)
        except OSError as error:
            raise UsageError(
                f"{parent}: cannot be written: {error.strerror}: set XDG_CACHE_HOME to a folder that can"
            ) from error
        self.path = self._private.path

    def keep(self) -> None:
        """Makes a private folder the key's, unless another process has been faster: then that one's is as good."""
        if self.is_new:
            with contextlib.suppress(OSError):
                self.path.rename(self._whole)

    def discard(self) -> None:
        """Removes a private folder that was not kept."""
        if self.is_new:
            self._private.remove()


def _sizes_to_meet(most: int) -> list[dict[str, int]]:
    """Of calls after which no engine is built any more, in a context of up to ``most`` columns.

    A graph has branches for one row and for several, with and without cached rows, each perhaps with engines of its
    own: every one meets the least and the most of its rows, columns, rows still running and rows that ran before.
    """
    rows = min(MAX_ROWS, most)
    met = [(rows, most, rows), (1, 0, 0), (rows, 0, 0), (min(2, rows), 0, 0), (1, 1, 1)]
    return [
        {"chunk": chunk, "context": context, "active": active, "logit_count": active} for chunk, context, active in met
    ]


def _idle_call(bundle: Bundle, stage: str, sizes: dict[str, int], memory: DeviceMemory) -> Call:
    """A call of these sizes with nothing but zeros in it, at the first positions whatever is cached."""
    graph = bundle.manifest.graphs[stage]
    free = {"batch": 1, **sizes}

    def zeros(tensor: TensorSpec) -> Rows:
        shape = tuple(size if isinstance(size, int) else free[size] for size in tensor.shape)
        if tensor.name in ON_HOST:
            return np.zeros(shape, tensor.dtype)
        made = memory.empty(shape, tensor.dtype)
        made[...] = 0
        return made

    feeds = {tensor.name: zeros(tensor) for tensor in graph.inputs}
    return Call(feeds, {tensor.name: zeros(tensor) for tensor in graph.outputs})


def tensorrt_version() -> int:
    """Of the library that the provider loads, from wherever it comes; 0 where there is none.

    The session that finds none says why.
    """
    with contextlib.suppress(BackendUnavailable):
        trt_bindings.load("trt")
    try:
        return int(ctypes.CDLL(f"libnvinfer.so.{TENSORRT_MAJOR}").getInferLibVersion())
    except OSError:
        return 0
