"""Opens the backend of a target: the one table of kinds. What a kind needs is imported when it is opened."""

from collections.abc import Callable

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError, UsageError
from mythos_edge.model.looped import NARROW_CACHES
from mythos_edge.model.manifest import TargetRecord
from mythos_edge.runtime.backends.ort_session import thread_count
from mythos_edge.runtime.backends.protocol import Backend

# Bundle, name of the target, threads, whether engines that the manifest does not list are trusted.
Opener = Callable[[Bundle, str, int, bool], Backend]


def _ort_cpu(bundle: Bundle, target: str, threads: int, trust: bool) -> Backend:
    del trust
    return _ort_cpu_with(bundle, target, threads, "fp32")


def _ort_cpu_with(bundle: Bundle, target: str, threads: int, cache: str) -> Backend:
    from mythos_edge.runtime.backends.ort_cpu import OrtCpuBackend

    return OrtCpuBackend(bundle, target, threads, cache)


def _ort_cuda(bundle: Bundle, target: str, threads: int, trust: bool) -> Backend:
    del trust
    from mythos_edge.runtime.backends.ort_cuda import OrtCudaBackend

    return OrtCudaBackend(bundle, target, threads)


def _tensorrt(bundle: Bundle, target: str, threads: int, trust: bool) -> Backend:
    del threads
    from mythos_edge.runtime.backends.tensorrt import TrtBackend

    return TrtBackend(bundle, target, trust=trust)


BACKENDS: dict[str, Opener] = {"ort-cpu": _ort_cpu, "ort-cuda": _ort_cuda, "tensorrt": _tensorrt}


# The kinds whose graphs can keep cached rows in another form than their own; form for trust.
NARROWING: dict[str, Callable[[Bundle, str, int, str], Backend]] = {"ort-cpu": _ort_cpu_with}


def open_backend(
    bundle: Bundle, target: str, threads: int = 0, trust: bool = False, cache: str | None = None
) -> Backend:
    """The backend that runs a target; parameters and errors as in ``Session.open``."""
    # For every target alike: engines only make nothing of it.
    thread_count(threads)
    bundle = bundle.at_absolute_path()
    record = bundle.target(target)
    kind = record.kind
    if kind not in BACKENDS:
        raise BundleError(
            f"{bundle.path}: target {target!r} is of kind {kind!r}, expected one of {', '.join(BACKENDS)}: "
            "build it again with this mythos-edge, or upgrade it"
        )
    if cache in (None, record.own_cache):
        return BACKENDS[kind](bundle, target, threads, trust)
    require_cache(bundle, target, record, cache)
    return NARROWING[kind](bundle, target, threads, cache)


def require_cache(bundle: Bundle, target: str, record: TargetRecord, cache: object) -> None:
    """Raises UsageError or BundleError unless a target can keep cached rows in the form ``cache``."""
    own = record.own_cache
    if cache == own:
        return
    known = dict.fromkeys([own, "fp32", *NARROW_CACHES])
    if cache not in known:
        raise UsageError(f"cache is {str(cache)[:40]!r}, expected one of {', '.join(known)}")
    if record.kind not in NARROWING:
        raise UsageError(
            f"target {target!r} keeps its caches in {own} alone, got cache {cache}: leave --cache out, or use a target "
            f"of {' or '.join(NARROWING)}"
        )
    if cache not in record.caches:
        exported = target == bundle.manifest.default_target
        mend = "export the bundle again" if exported else "build the target again"
        raise BundleError(
            f"{bundle.path}: target {target!r} has no graphs for caches in {cache}, as older versions made it: "
            f"{'pack the bundle again from a new export' if bundle.manifest.is_packed else mend}"
        )
