"""ONNX Runtime on a GPU: the same graphs' protocol as ``backend``, on the CUDA provider and never quietly without it.

ONNX Runtime itself goes on with the CPU when its CUDA provider can not be loaded, and gives single nodes to the CPU
when it has no kernel for them. Both are errors here. ``session.disable_cpu_ep_fallback`` would refuse every graph:
arithmetic on shapes belongs on the CPU, so what was placed where is read and checked instead.

A first version: caches are host memory (``HostMemory``), and what is bound is copied to the GPU at each run.
"""

import contextlib
import ctypes
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BackendUnavailable, BundleError
from mythos_edge.runtime.backend import OrtBackend, import_onnxruntime, one_line, session_options

PROVIDER = "CUDAExecutionProvider"
# pip does not know that the two are one module: side by side, the one installed last wins.
INSTALL = "pip install --upgrade 'onnxruntime-gpu[cuda,cudnn]'"
REPLACE = "pip uninstall --yes onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
# Its kernels were looked at. Before 1.28 MoE computed another SwiGLU than it was asked for.
OLDEST = (1, 31)
# What the CPU may do: arithmetic on shapes, a few integers each.
_ON_SHAPES = frozenset(["Concat", "Greater", "Reshape", "Shape", "Split", "Squeeze", "Sub", "Unsqueeze"])


class OrtCudaBackend(OrtBackend):
    """One of the bundle's ``ort-cuda`` targets.

    Raises BackendUnavailable without a working CUDA provider, BundleError when a graph can not be loaded.
    """

    def __init__(self, bundle: Bundle, target: str, threads: int = 0) -> None:
        super().__init__(bundle, target, threads, ort_cuda_session)


def ort_cuda_session(path: Path, threads: int = 0, prepack: bool = True) -> Any:
    """An onnxruntime.InferenceSession on the CUDA provider, with no node but shapes' arithmetic on the CPU."""
    ort = import_cuda_onnxruntime()
    options = session_options(ort, threads, prepack)
    # 4: only what is fatal. That the provider was not loaded is told below, in one line.
    options.log_severity_level = 4
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = ort.InferenceSession(str(path), options, providers=[PROVIDER])
    except Exception as error:  # onnxruntime's exceptions have no common base but this
        raise BundleError(f"{path.name}: ONNX Runtime can not load it on the GPU: {one_line(error)}") from error
    if PROVIDER not in session.get_providers():
        raise BackendUnavailable(f"ONNX Runtime could not load its {PROVIDER}: {_why_not_loaded(ort)}", INSTALL)
    on_cpu = nodes_on_cpu(session.get_provider_graph_assignment_info())
    if on_cpu:
        raise BackendUnavailable(
            f"{path.name}: onnxruntime-gpu {ort.__version__} has no CUDA kernel for {', '.join(on_cpu)}, and computing "
            "them on the CPU was not asked for",
            INSTALL,
        )
    return session


def import_cuda_onnxruntime() -> Any:
    """The onnxruntime module with a CUDA provider of a version that is known to compute right.

    Raises BackendUnavailable.
    """
    try:
        ort = import_onnxruntime()
    except BackendUnavailable as error:
        raise BackendUnavailable("onnxruntime-gpu is not installed", REPLACE) from error
    if PROVIDER not in ort.get_available_providers():
        raise BackendUnavailable(
            f"onnxruntime {ort.__version__} is the build for CPUs (it has no {PROVIDER}); onnxruntime-gpu replaces it",
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
    # Finds CUDA's libraries where pip put them; what it can not find it prints, and the session says why it fails.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    return ort


def version_of(text: str) -> tuple[int, int]:
    """Major and minor of a version."""
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def nodes_on_cpu(assignment: Iterable[Any]) -> list[str]:
    """The ops placed on the CPU that are no arithmetic on shapes, from a session's assignment information."""
    ops = {node.op_type for part in assignment if part.ep_name != PROVIDER for node in part.get_nodes()}
    return sorted(ops - _ON_SHAPES)


def _why_not_loaded(ort: Any) -> str:
    """ONNX Runtime writes the reason to its log only; the loader tells it again."""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"{one_line(error)} (CUDA or cuDNN is not installed, or not found)"
    return "it found no usable GPU or driver"
