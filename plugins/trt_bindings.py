"""Either TensorRT behind one door: TensorRT for RTX (``rtx``) and full TensorRT (``trt``), loaded when asked for.

What a release can do is found by looking, never by comparing versions. The bindings are passed around as ``trt``, a
module. Building and running engines is not done here.
"""

import hashlib
import importlib
import os
import re
import sys
from collections import deque
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mythos_edge.model.errors import BackendUnavailable, BuildError, one_line, raise_interrupt
from mythos_edge.model.user_cache import cache_folder

FLAVOURS = {
    "rtx": ("tensorrt_rtx", "pip install 'mythos-edge[tensorrt-rtx]'"),
    "trt": ("tensorrt", "pip install 'mythos-edge[tensorrt]'"),
}
_KEPT_MESSAGES = 1000
# What release 1.7 of TensorRT for RTX builds for, where no release is installed that could be asked.
_RTX_GPUS = (75, 80, 86, 89, 120, 121)
# What the ONNX parser of the RTX wheel opens by this very name; the wheel has it with the suffix .1 only.
_PARSER_WANTS = "libtensorrt_rtx.so"


def load(flavour: str) -> ModuleType:
    """The bindings of ``rtx`` or ``trt``. Raises BackendUnavailable with the install line."""
    assert flavour in FLAVOURS, flavour
    name, install = FLAVOURS[flavour]
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise_interrupt(error)
        raise BackendUnavailable(f"{name} cannot be imported ({one_line(error)})", install) from error


def version(trt: ModuleType) -> str:
    """Of the bindings, for example ``1.7.1.116``."""
    return str(trt.__version__)


def names_gpus(trt: ModuleType) -> bool:
    """Whether an engine is built for GPUs it is told, on a machine without one; if not, for the GPU at hand."""
    return hasattr(trt, "ComputeCapability") and hasattr(trt.IBuilderConfig, "set_compute_capability")


def known_compute_capabilities(trt: ModuleType) -> tuple[int, ...]:
    """The compute capabilities that engines can be built for, 89 for SM 8.9; empty where that is the GPU at hand.

    See ``names_gpus``.
    """
    if not names_gpus(trt):
        return ()
    numbers = (re.fullmatch(r"SM(\d+)", name) for name in trt.ComputeCapability.__members__)
    return tuple(sorted(int(number[1]) for number in numbers if number))


def rtx_compute_capabilities() -> tuple[int, ...]:
    """The compute capabilities that TensorRT for RTX builds for, also on a machine without it."""
    try:
        return known_compute_capabilities(load("rtx")) or _RTX_GPUS
    except BackendUnavailable:
        return _RTX_GPUS


def compute_capability_member(trt: ModuleType, compute_capability: int) -> Any:
    """The enum member for ``IBuilderConfig.set_compute_capability``. Raises BuildError for one that is not known."""
    known = known_compute_capabilities(trt)
    if compute_capability not in known:
        names = ", ".join(map(str, known)) or "none: it builds for the GPU of this machine"
        raise BuildError(f"{trt.__name__} {version(trt)} cannot build for SM {compute_capability}, expected {names}")
    return trt.ComputeCapability.__members__[f"SM{compute_capability}"]


def strongly_typed(trt: ModuleType) -> int:
    """The flags of a network that computes in the types its graph says; the bit has moved between releases."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def require_fields(trt: ModuleType) -> None:
    """Raises BackendUnavailable where plugins would read their first byte in place of all that a plan carries.

    Bindings from before NumPy 2 (TensorRT 10.9, 10.13) take the size of its elements to be 0.
    """
    sent = np.arange(5, dtype=np.int8)
    (field,) = trt.PluginFieldCollection([trt.PluginField("probe", sent, trt.PluginFieldType.INT8)])
    if not np.array_equal(np.asarray(field.data), sent):
        raise BackendUnavailable(
            f"{trt.__name__} {version(trt)} cannot read arrays of NumPy {np.__version__}, which plugins need",
            "pip install 'numpy<2'",
        )


class Messages:
    """The errors TensorRT reported last."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_KEPT_MESSAGES)

    def add(self, text: str) -> None:
        """``text`` is kept as one line."""
        self._lines.append(" ".join(text.split()))

    def errors(self) -> tuple[str, ...]:
        """All of them, oldest first."""
        return tuple(self._lines)


# TensorRT keeps the first logger of a process for good, so there is one for each bindings.
_LOGGERS: dict[str, tuple[Any, Messages]] = {}


def logger(trt: ModuleType) -> Any:
    """The ``ILogger`` to give to builder, parser and runtime; it prints nothing, ``messages`` has what it heard."""
    return _logger_and_messages(trt)[0]


def messages(trt: ModuleType) -> Messages:
    """The errors that ``logger`` heard."""
    return _logger_and_messages(trt)[1]


def _logger_and_messages(trt: ModuleType) -> tuple[Any, Messages]:
    if trt.__name__ not in _LOGGERS:
        kept = Messages()

        # Its base is in a module that is known only now, so no checker sees it.
        class KeepingLogger(trt.ILogger):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    kept.add(message)

        _LOGGERS[trt.__name__] = (KeepingLogger(), kept)
    return _LOGGERS[trt.__name__]


def library_path_for_plugins(trt: ModuleType) -> dict[str, str]:
    """The environment variables with which a process must start so that its ONNX parser can meet plugins.

    The parser of TensorRT for RTX opens ``libtensorrt_rtx.so``, which its wheel lacks, and aborts the process at the
    first plugin. So a folder in the user's cache gets a link of that name to the library these bindings use: another
    copy of it would crash as well. The dynamic loader reads the path at the start alone. Empty where nothing is
    needed. Raises BuildError when the cache cannot be written.
    """
    library = _rtx_library(trt)
    if library is None or sys.platform == "win32" or (library.parent / _PARSER_WANTS).exists():
        return {}
    folder = cache_folder() / hashlib.sha256(str(library).encode()).hexdigest()[:16]
    _link(folder / _PARSER_WANTS, library)
    before = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": f"{folder}{os.pathsep}{before}" if before else str(folder)}


def _rtx_library(trt: ModuleType) -> Path | None:
    """The library of the RTX wheel, where the bindings come from that wheel."""
    if trt.__name__ != FLAVOURS["rtx"][0]:
        return None
    try:
        libraries = importlib.import_module("tensorrt_rtx_libs")
    except ImportError as error:
        raise_interrupt(error)
        return None
    found = [path for folder in libraries.__path__ for path in sorted(Path(folder).glob(f"{_PARSER_WANTS}.*"))]
    return found[0].resolve() if found else None


def _link(link: Path, target: Path) -> None:
    """Makes ``link`` point to ``target``; builds at the same time do not meet a missing one."""
    try:
        if link.is_symlink() and link.readlink() == target:
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        beside = link.with_name(f"{link.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        beside.symlink_to(target)
        beside.replace(link)
    except OSError as error:
        raise BuildError(
            f"{link.parent}: cannot be written: {error.strerror or error}: set XDG_CACHE_HOME to a folder that can"
        ) from error
