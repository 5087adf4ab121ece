"""Sessions of ONNX Runtime on a GPU, on the providers that were asked for and never quietly without one.

ONNX Runtime itself goes on with the CPU when a provider cannot be loaded, and gives single nodes to the CPU when no
provider has a kernel for them. Both are errors here. ``session.disable_cpu_ep_fallback`` would refuse every graph:
arithmetic on shapes belongs on the CPU, so what was placed where is read and checked instead.
"""

import contextlib
import ctypes
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import BackendUnavailable, BundleError, UsageError
from mythos_edge.model.linked_weights import NONE_APART, Apart, lent_weights
from mythos_edge.model.manifest import CUDA_PROVIDER, ON_SHAPES, TENSORRT_PROVIDER
from mythos_edge.plugins import trt_bindings
from mythos_edge.runtime.backend import import_onnxruntime, one_line, session_options

# pip does not know that the two are one module: side by side, the one installed last wins.
INSTALL = "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'"
REPLACE = "pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
# Its TensorRT provider is linked with libnvinfer.so.10, which no later TensorRT has.
TENSORRT_MAJOR = "10"
INSTALL_TENSORRT = "pip install 'tensorrt<11'"
# Its kernels were looked at. Before 1.28 MoE computed another SwiGLU than it was asked for.
OLDEST = (1, 31)
# Without one of these TensorRT has nothing worth an engine.
_PRODUCTS = {"Gemm", "MatMul"}
# Set to anything else, TensorRT rounds products of float32.
_TF32 = "NVIDIA_TF32_OVERRIDE"
# Each provider's library, and what brings it.
_LIBRARIES = {
    CUDA_PROVIDER: ("libonnxruntime_providers_cuda.so", INSTALL),
    TENSORRT_PROVIDER: ("libonnxruntime_providers_tensorrt.so", INSTALL_TENSORRT),
}

# The options of each provider; a node goes to the first that takes it.
Providers = Mapping[str, Mapping[str, str]]


def gpu_session(
    path: Path,
    providers: Providers,
    threads: int = 0,
    prepack: bool = True,
    apart: Apart = NONE_APART,
) -> Any:
    """An onnxruntime.InferenceSession on ``providers``, each at work, and with only shapes' arithmetic on the CPU.

    ``apart`` are weights that are not in the graph's folder, see ``linked_weights``.
    Raises BackendUnavailable, BundleError when the graph cannot be loaded.
    """
    ort = import_gpu_onnxruntime(*providers)
    options = session_options(ort, threads, prepack)
    # 4: only what is fatal. That a provider was not loaded is told below, in one line.
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    wanted = [(name, dict(values)) for name, values in providers.items()]
    try:
        # Its own fallback prints, and begins again on other providers.
        with lent_weights(options, apart):
            session = ort.InferenceSession(str(path), options, providers=wanted, enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        for name in providers:
            if reason := _not_loadable(ort, name):
                raise _not_loaded(name, reason) from error
        raise BundleError(f"{path.name}: ONNX Runtime cannot load it on the GPU: {one_line(error)}") from error
    loaded, assignment = session.get_providers(), session.get_provider_graph_assignment_info()
    try:
        for name in providers:
            if name not in loaded:
                raise _not_loaded(name, _not_loadable(ort, name) or "it found no usable GPU or driver")
        _check_assignment(ort, path, providers, assignment)
    except BackendUnavailable:
        # Held by the exception it would outlive its stream.
        del session
        raise
    return session


def import_gpu_onnxruntime(*providers: str) -> Any:
    """The onnxruntime module with ``providers``, of a version that is known to compute right.

    For the whole process it mutes ONNX Runtime's log, and for TensorRT's provider it sets ``NVIDIA_TF32_OVERRIDE`` to
    0, which every library of CUDA reads. Raises BackendUnavailable, UsageError where that is set to something else.
    """
    try:
        ort = import_onnxruntime()
    except BackendUnavailable as error:
        raise BackendUnavailable("onnxruntime-gpu is not installed", REPLACE) from error
    for name in providers:
        if name not in ort.get_available_providers():
            raise BackendUnavailable(
                f"onnxruntime {ort.__version__} is the build for CPUs (it has no {name}); onnxruntime-gpu replaces it",
                REPLACE,
            )
    if version_of(ort.__version__) < OLDEST:
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
    if TENSORRT_PROVIDER in providers:
        # A TensorRT network is float32 with TF32 allowed, products of 10 bits, and the provider has no option for it.
        if os.environ.get(_TF32, "") not in ("", "0"):
            raise UsageError(
                f"{_TF32} is {os.environ[_TF32]!r}, expected 0 for float32 on {TENSORRT_PROVIDER}: unset it"
            )
        os.environ[_TF32] = "0"
        # Where pip put TensorRT its module finds the libraries; elsewhere the loader does.
        with contextlib.suppress(BackendUnavailable):
            trt_bindings.load("trt")
    return ort


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def nodes_elsewhere(assignment: Iterable[Any], providers: Iterable[str]) -> list[str]:
    """The ops placed on none of ``providers`` that are no arithmetic on shapes, as the lowering has named it."""
    known = set(providers)
    nodes = [node for part in assignment if part.ep_name not in known for node in part.get_nodes()]
    return sorted({node.op_type for node in nodes if not node.name.startswith(ON_SHAPES)})


def _check_assignment(ort: Any, path: Path, providers: Providers, assignment: Any) -> None:
    on_cpu = nodes_elsewhere(assignment, providers)
    if on_cpu:
        raise BackendUnavailable(
            f"{path.name}: onnxruntime-gpu {ort.__version__} has no CUDA kernel for {', '.join(on_cpu)}, and computing "
            "them on the CPU was not asked for",
            INSTALL,
        )
    for name in providers:
        ops = {node.op_type for part in assignment if part.ep_name == name for node in part.get_nodes()}
        if not (ops & _PRODUCTS if name == TENSORRT_PROVIDER else ops):
            what = "product" if ops else "node"
            raise BackendUnavailable(
                f"{path.name}: {name} takes no {what} of it: build the target without it, or look for another version",
                _LIBRARIES[name][1],
            )


def _not_loaded(name: str, reason: str) -> BackendUnavailable:
    return BackendUnavailable(f"ONNX Runtime could not load its {name}: {reason}", _LIBRARIES[name][1])


def _not_loadable(ort: Any, name: str) -> str | None:
    """Why a provider's library cannot be loaded: ONNX Runtime writes it to its log only, the loader tells it again."""
    library = Path(ort.__file__).parent / "capi" / _LIBRARIES[name][0]
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"{one_line(error)} (what it needs is not installed, or not found)"
    return None
