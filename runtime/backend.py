"""What runs the three stages: the protocol, ONNX Runtime behind it, and a scripted network for tests.

A backend knows graphs and memory, not sequences: the staircase decides which rows run against which cached rows.
Exceptions of ONNX Runtime are translated here, those of opening a graph on a GPU in ``ort_cuda_backend``.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BackendUnavailable, BundleError, MythosEdgeError, UsageError, unavailable
from mythos_edge.model.linked_weights import NONE_APART, Apart, lent_weights, weights_apart
from mythos_edge.model.machine import cores
from mythos_edge.model.manifest import TARGET
from mythos_edge.model.stages import MAX_TOGETHER, STAGES
from mythos_edge.plugins.processor import has_integer_dot_products
from mythos_edge.runtime.memory import HostMemory, Memory, Rows
from mythos_edge.runtime.packing import ROWS, Array, Arrays, Call, packed, unpack
from mythos_edge.runtime.request_values import Within, whole

# More threads than cores only wait for each other. So many make no harm anywhere, beyond that four a core do.
_MOST_THREADS = 64


class Backend(Protocol):
    """Runs the stages ``prelude``, ``step`` and ``coda`` of one bundle, for one sequence or for several at once.

    States, cached rows, halting mass, depth and logits are arrays of ``memory``; what the host decides (``input_ids``,
    ``step_index``, ``logit_rows`` and the scalars) are numpy's. The caller owns every buffer:
    ``feeds`` are read and ``outputs`` are written in place, all C-contiguous, while
    ``run`` is under way. A backend may keep references to them until the next run of the same stage, so that
    arrays passed again (the same objects, perhaps with other contents) cost nothing to bind.
    """

    @property
    def memory(self) -> Memory: ...

    @property
    def max_context(self) -> int | None:
        """The longest context it can serve; None leaves it to the bundle."""
        ...

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None: ...

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """The same as ``run`` for each of ``calls``, in one run of the stage as far as the backend can.

        The calls are of different sequences, each with a batch of one; their chunks, cached rows and loop steps may
        differ.
        """
        ...

    def close(self) -> None: ...


class OrtBackend:
    """One of the bundle's ONNX Runtime CPU targets.

    Raises BackendUnavailable without onnxruntime, BundleError when a graph cannot be loaded.
    """

    max_context: int | None = None

    def __init__(
        self,
        bundle: Bundle,
        target: str = TARGET,
        threads: int = 0,
        *,
        memory: Memory | None = None,
        open_graph: "Callable[[Path], BoundGraph] | None" = None,
    ) -> None:
        self.memory = memory or HostMemory()
        self._stages: dict[str, BoundGraph] = {}
        # Loaded when several sequences run together for the first time.
        self._many: dict[str, BoundGraph] = {}
        spec = bundle.target(target)
        if spec.engine is not None:
            raise UsageError(f"target {target!r} is TensorRT's, and an ort-cpu one is needed here: choose another")
        if not set(STAGES) <= set(spec.graphs):
            raise BundleError(f"{bundle.path}: target {target!r} has not all stages: export the bundle again")
        if spec.weights == "int8" and not spec.block and not has_integer_dot_products():
            raise BackendUnavailable(
                f"target {target!r} multiplies 8-bit integers, which this processor is not known to do "
                "exactly (no VNNI, no Arm dot products)",
                f"mythos-edge build {bundle.path} --weights int8 --block 128",
            )

        def open_on_cpu(path: Path) -> BoundGraph:
            apart = weights_apart(bundle, path, target)
            return BoundGraph(path, ort_session(path, threads, spec.prepacked, apart))

        self._open = open_graph or open_on_cpu
        self._bundle, self._target, self._spec = bundle, target, spec
        self._positions = np.zeros((1, 1), np.int64)
        with bundle.unchanged(target):
            for stage in STAGES:
                self._stages[stage] = self._open(bundle.file(spec.graphs[stage]))

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        start, count = int(feeds["length"]), feeds[ROWS[stage]].shape[1]
        if self._positions.shape[1] != count:
            self._positions = np.empty((1, count), np.int64)
        self._positions[0] = range(start, start + count)
        given = {name: array for name, array in feeds.items() if name not in ("length", "first")}
        self._stages[stage].run(given | {"positions": self._positions}, outputs)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        if stage not in self._many:
            self._many[stage] = self._opened_late(self._spec.graphs[f"{stage}.many"])
        whole = packed(stage, calls, MAX_TOGETHER, self.memory)
        self._many[stage].run(*whole)
        # Not one of these arrays comes again, and bound they would stay in memory.
        self._many[stage].forget()
        unpack(stage, whole.outputs, calls)

    def _opened_late(self, file: str) -> "BoundGraph":
        """A graph of the same model and rounding as the others, or a BundleError."""
        with self._bundle.unchanged(self._target):
            return self._open(self._bundle.file(file))

    def graph_seconds(self, stage: str | None = None) -> float:
        """Time spent inside the graphs so far, or those of one stage; the rest of a run's time is the host's."""
        stages = STAGES if stage is None else (stage,)
        graphs = [opened[name] for opened in (self._stages, self._many) for name in stages if name in opened]
        return sum(graph.seconds for graph in graphs)

    def close(self) -> None:
        for graph in (*self._stages.values(), *self._many.values()):
            graph.close()
        self._stages, self._many = {}, {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BoundGraph:
    """One session whose inputs and outputs are bound once and again only when another array is passed."""

    def __init__(self, path: Path, session: Any, run_options: Any = None) -> None:
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
        for name, array in arrays.items():
            if self._bound.get(name) is not array:
                # Interrupted while it is bound, it is not known which one is.
                self._bound.pop(name, None)
                bind(name, *self._place(array))
                self._bound[name] = array

    def _place(self, array: Rows) -> tuple[str, int, type, tuple[int, ...], int]:
        """Where an array is, as ONNX Runtime is told: device, its number, type of the values, shape, address."""
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
    path = bundle.file(bundle.manifest.graphs[graph].file)
    with bundle.unchanged():
        session = ort_session(path, threads, apart=weights_apart(bundle, path, TARGET))

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


def one_line(error: Exception) -> str:
    """What a foreign exception says, on one line."""
    return " ".join(str(error).split())


class ScriptedBackend:
    """A network small enough to check by hand: the token says at which loop step its position halts.

    Token ``v`` halts at depth ``depths[v]``. Every other value depends on all visible rows of every slot it should
    depend on, so that a wrong slot, row or order changes the logits. Cache rows are one value wide.
    """

    max_context: int | None = None

    def __init__(self, depths: Mapping[int, int], vocab_size: int) -> None:
        self.memory = HostMemory()
        self.calls: list[tuple[str, int]] = []
        self._depths, self._vocab_size = dict(depths), vocab_size

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        rows = feeds["input_ids" if stage == "prelude" else "out" if stage == "coda" else "h"].shape[1]
        self.calls.append((stage, rows))
        made = getattr(self, f"_{stage}")(feeds)
        for name, array in outputs.items():
            assert array.shape == made[name].shape, (stage, name, array.shape, made[name].shape)
            array[...] = made[name]

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """One entry in ``calls`` for all of them."""
        for call in calls:
            self.run(stage, *call)
        rows = sum(rows for _, rows in self.calls[-len(calls) :])
        self.calls[-len(calls) :] = [(stage, rows)]

    def close(self) -> None:
        self.calls.clear()

    def _prelude(self, feeds: Arrays) -> dict[str, Array]:
        ids = feeds["input_ids"].astype(np.float32)
        mixed = _attend(ids[..., None], feeds["past_0"], feeds)
        # e = (token, what earlier tokens were)
        return {"e": np.concatenate([ids[..., None], mixed], -1), "rows_0": ids[..., None]}

    def _step(self, feeds: Arrays) -> dict[str, Array]:
        h, e, index = feeds["h"], feeds["e"], int(feeds["step_index"][0, 0])
        rows = np.tanh(h.sum(-1, keepdims=True) + index)
        mixed = _attend(rows, feeds["past"], feeds)
        h_next = (0.5 * h + 0.1 * e + mixed).astype(np.float32)
        active = h.shape[1] - feeds["out"].shape[1]
        running = feeds["halt_mass"] < feeds["threshold"]
        depths = np.vectorize(self._depths.__getitem__, otypes=[np.int64])(e[:, active:, 0].astype(np.int64))
        halts = (depths <= index + 1) & (index + 1 >= feeds["min_depth"])
        out = np.where((running & halts)[..., None], h_next[:, active:], feeds["out"])
        return {
            "h_next": h_next,
            "out_next": out,
            "halt_mass_next": np.where(running & halts, np.float32(1), feeds["halt_mass"]),
            "depth_next": feeds["depth"] + running,
            "rows": rows,
        }

    def _coda(self, feeds: Arrays) -> dict[str, Array]:
        out = feeds["out"]
        rows = out.sum(-1, keepdims=True)
        mixed = (rows + _attend(rows, feeds["past_0"], feeds))[:, feeds["logit_rows"]]
        return {
            "logits": np.cos(mixed * np.arange(1, self._vocab_size + 1)).astype(np.float32),
            "rows_0": rows,
        }


def _attend(rows: Array, past: Array, feeds: Arrays) -> Array:
    """For each new row a mean of the rows it sees, weighted by position so that their order matters."""
    length, first = int(feeds["length"]), feeds["first"]
    mixed = np.zeros_like(rows)
    for b, s in np.ndindex(rows.shape[:2]):
        seen = np.concatenate([past[b, :length], rows[b, : s + 1]])[min(int(first[b]), length + s) :]
        weights = np.arange(1, len(seen) + 1, dtype=np.float32)[:, None]
        mixed[b, s] = (seen * weights).sum(0) / weights.sum()
    return mixed
