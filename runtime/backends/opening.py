"""Opens the backend of a target: the one table of kinds. What a kind needs is imported when it is opened."""

from collections.abc import Callable

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError
from mythos_edge.runtime.backends.ort_session import thread_count
from mythos_edge.runtime.backends.protocol import Backend

# Bundle, name of the target, threads, whether engines that the manifest does not list are trusted.
Opener = Callable[[Bundle, str, int, bool], Backend]


def _ort_cpu(bundle: Bundle, target: str, threads: int, trust: bool) -> Backend:
    del trust
    from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend

    return OrtCpuBackend(bundle, target, threads)


def _ort_cuda(bundle: Bundle, target: str, threads: int, trust: bool) -> Backend:
    del trust
    from mythos_edge.runtime.backends.ort_cuda import OrtCudaBackend

    return OrtCudaBackend(bundle, target, threads)


def _tensorrt(bundle: Bundle, target: str, threads: int, trust: bool) -> Backend:
    del threads
    from mythos_edge.runtime.backends.tensorrt import TrtBackend

    return TrtBackend(bundle, target, trust=trust)


BACKENDS: dict[str, Opener] = {"ort-cpu": _ort_cpu, "ort-cuda": _ort_cuda, "tensorrt": _tensorrt}


def open_backend(bundle: Bundle, target: str, threads: int = 0, trust: bool = False) -> Backend:
    """The backend that runs a target; parameters and errors as in ``Session.open``."""
    # For every target alike: engines only make nothing of it.
    thread_count(threads)
    bundle = bundle.at_absolute_path()
    kind = bundle.target(target).kind
    if kind not in BACKENDS:
        raise BundleError(
            f"{bundle.path}: target {target!r} is of kind {kind!r}, expected one of {', '.join(BACKENDS)}: "
            "build it again with this mythos-edge, or upgrade it"
        )
    return BACKENDS[kind](bundle, target, threads, trust)
