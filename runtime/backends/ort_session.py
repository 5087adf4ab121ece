"""Sessions of ONNX Runtime: how they are made, and how arrays are bound to them. Its exceptions are translated here."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError, MythosEdgeError, one_line, unavailable
from mythos_edge.model.linked_weights import NONE_APART, Apart, lent_weights, weights_apart
from mythos_edge.model.machine import cores
from mythos_edge.runtime.backends.memory import Rows, as_graphs_know, host_array
from mythos_edge.runtime.backends.packing import Array, Arrays
from mythos_edge.runtime.request_values import Within, whole

# Where an array is, as ONNX Runtime is told: device, its number, type of the values, shape, address.
Place: TypeAlias = tuple[str, int, type, tuple[int, ...], int]
# More threads than cores only wait for each other. So many make no harm anywhere, beyond that four a core do.
_MOST_THREADS = 64


class BoundGraph:
    """One session whose inputs and outputs are bound once and again only when another array is passed.

    ``place`` says where an array is.
    """

    def __init__(
        self, path: Path, session: Any, run_options: Any = None, place: Callable[[Any], Place] | None = None
    ) -> None:
        self._place = place or on_host
        self._name = path.name
        self._session, self._run_options = session, run_options
        self._binding = session.io_binding()
        self._bound: dict[str, Rows] = {}
        self.seconds = 0.0

    def run(self, feeds: Arrays, outputs: Arrays) -> None:
        try:
            self._bind(self._binding.bind_input, feeds)
            self._bind(self._binding.bind_output, outputs)
            started = time.perf_counter()
            self._session.run_with_iobinding(self._binding, self._run_options)
            self.seconds += time.perf_counter() - started
        except Exception as error:  # onnxruntime's exceptions have no common base but this
            # Its frames would keep the session alive after ``close``.
            cause = error.with_traceback(None)
            raise MythosEdgeError(f"{self._name}: ONNX Runtime failed: {one_line(error)}") from cause

    def forget(self) -> None:
        """Lets go of every array that is bound."""
        self._bound.clear()
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()

    def close(self) -> None:
        """Lets go of the session, also where an exception still holds this graph."""
        self._bound.clear()
        self._session = self._binding = None

    def _bind(self, bind: Callable[..., None], arrays: Arrays) -> None:
        known = (one for name, rows in arrays.items() for one in as_graphs_know(name, rows))
        for name, array in known:
            if self._bound.get(name) is not array:
                # Interrupted while it is bound, it is not known which one is.
                self._bound.pop(name, None)
                bind(name, *self._place(array))
                self._bound[name] = array


def on_host(rows: Rows) -> Place:
    """The place of a numpy array."""
    array = host_array(rows)
    return "cpu", 0, array.dtype.type, array.shape, _address(array)


def ort_session(path: Path, threads: int = 0, prepack: bool = False, apart: Apart = NONE_APART) -> Any:
    """An onnxruntime.InferenceSession on the CPU with ``threads`` threads, by default one per core.

    Without ``prepack`` float32 weights are read straight from the mapped file: no second copy, loads at once. With it
    kernels copy them into their own layout, which is faster for 2 and more rows and needed for rounded weights.
    ``apart`` are weights that are not in the graph's folder, see ``linked_weights``.
    """
    ort = import_onnxruntime()
    options = session_options(ort, threads, prepack)
    try:
        with lent_weights(options, apart):
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # see BoundGraph.run
        raise BundleError(f"{path.name}: ONNX Runtime cannot load it: {one_line(error)}") from error


def session_options(ort: Any, threads: int, prepack: bool) -> Any:
    """The options of every session; see ``ort_session``. Raises UsageError."""
    options = ort.SessionOptions()
    # An error is raised as well, and what is logged goes to the terminal as it stands in the file.
    options.log_severity_level = 4
    options.intra_op_num_threads = thread_count(threads)
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    # The stages take turns. A pool that went on spinning after its run would take the cores from the next: measured
    # at half the speed. One global pool is as fast as this, but then no other session in the process could be made.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def graph_runner(bundle: Bundle, graph: str, threads: int = 0) -> Callable[[Arrays], list[Array]]:
    """Runs a portable graph of a bundle, such as ``model``: inputs by name -> all outputs in order."""
    bundle.require_whole("run its portable graphs")
    path = bundle.file(bundle.manifest.graphs[graph].file)
    with bundle.unchanged():
        session = ort_session(path, threads, apart=weights_apart(bundle, path, None))

    def run(feeds: Arrays) -> list[Array]:
        try:
            outputs: list[Array] = session.run(None, dict(feeds))
        except Exception as error:  # see BoundGraph.run
            raise MythosEdgeError(f"{path.name}: ONNX Runtime failed: {one_line(error)}") from error
        return outputs

    return run


def import_onnxruntime() -> Any:
    """The onnxruntime module, without its telemetry. Raises BackendUnavailable."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # QMoE's products in int8 like MatMulNBits: 2 to 4 times faster for int4 than through float32, its default.
    os.environ.setdefault("ORT_QMOE_CPU_QNBIT_GEMM", "int8")
    try:
        import onnxruntime
    except ImportError as error:
        raise unavailable(error, "running a bundle", "pip install onnxruntime") from error
    return onnxruntime


def thread_count(threads: int) -> int:
    """``threads`` as a number that can be started, one per core for 0. Raises UsageError."""
    most = max(_MOST_THREADS, 4 * (os.cpu_count() or 1))
    return whole("threads", threads, Within(least=0, most=most)) or cores()


def _address(array: Array) -> int:
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address
