"""The stages on TensorRT engines: everything stays on the device, the host only says what runs next.

A call's rows are copied to fixed places, the engine runs from there, and what it made is copied to where the caller
wants it: so that a run of few rows is the same CUDA graph every time, but for the cache it works on.
"""

import gc
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError, MythosEdgeError
from mythos_edge.model.stages import LOGITS, OWN, STAGES, StageTensor
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.runtime.backends.device import DeviceArray, DeviceMemory, Room, device_array
from mythos_edge.runtime.backends.gpu import give_back
from mythos_edge.runtime.backends.memory import Rows, host_array
from mythos_edge.runtime.backends.packing import ROWS, Array, Arrays, Call, declared
from mythos_edge.runtime.backends.trt_engine import Engine, Runtime

# Rows of a chunk are padded up to one of these and run as a CUDA graph; more rows are worth their launches.
GRAPH_ROWS = (1, 2, 4, 8, 16)
_MOST_GRAPHS = 512


class _Key(NamedTuple):
    """The key of a CUDA graph: fixed places but for the caches, by their addresses."""

    stage: str
    rows: int
    logits: int
    caches: tuple[int, ...]


class TrtBackend:
    """One of the bundle's TensorRT targets laid out in steps, on one GPU.

    ``trust`` loads engines that are not the files the manifest lists. Raises BackendUnavailable without TensorRT,
    driver or GPU, BundleError for engines that are not for here.
    """

    def __init__(
        self, bundle: Bundle, target: str, *, device: int = 0, trust: bool = False, driver: Driver | None = None
    ) -> None:
        spec = bundle.target(target)
        if spec.has_loop_inside:
            raise BundleError(
                f"{bundle.path}: target {target!r} is one engine with the loop inside, which keeps no cache: "
                "score with it, or build --layout step"
            )
        self._runtime = Runtime(bundle, target, driver, device)
        engine = self._runtime.spec
        self.max_context: int | None = engine.max_context
        rows, room = engine.max_rows, engine.max_context + engine.max_rows
        self._stages: dict[str, _Stage] = {}
        self._graphs: OrderedDict[_Key, int | None] = OrderedDict()
        self._capturing = True
        self._driver = self._runtime.gpu.driver
        # The rows of a call are at their fixed places before anything is written to where they came from.
        self.memory = DeviceMemory(self._runtime.gpu, spec.compute_dtype, Room(room, rows), updates_in_place=True)
        try:
            with bundle.unchanged(target):
                for stage in STAGES:
                    self._stages[stage] = _Stage(stage, self._runtime.load(stage, trust), self.memory, rows, room)
        except BaseException:
            self.close()
            raise

    def run(self, stage: str, feeds: Arrays, outputs: Arrays) -> None:
        self._runtime.gpu.use()
        for part in parts(stage, Call(feeds, outputs), self._stages[stage].max_rows):
            self._run_part(self._stages[stage], part)

    def run_together(self, stage: str, calls: Sequence[Call]) -> None:
        """One after the other: the engines are for one sequence."""
        for call in calls:
            self.run(stage, *call)

    def close(self) -> None:
        """Gives everything back to the GPU, see ``give_back``; again is nothing."""
        graphs = [graph for graph in self._graphs.values() if graph is not None]
        give_back(self._runtime.gpu.use)
        if self._stages:
            give_back(lambda: self.memory.driver.synchronize(self.memory.stream))
        give_back(*(partial(self._driver.destroy_graph, graph) for graph in graphs))
        self._graphs.clear()
        for stage in self._stages.values():
            stage.close()
        self._stages = {}
        self.memory.close()
        self._runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_part(self, stage: "_Stage", part: Call) -> None:
        count = part.feeds[ROWS[stage.name]].shape[1]
        rows = next((bucket for bucket in GRAPH_ROWS if count <= bucket <= stage.max_rows), count)
        logits = stage.place(part.feeds, count)
        key = _Key(stage.name, rows, logits, stage.caches_of(part.feeds))
        self._execute(stage, key, count)
        stage.hand_out(part.outputs, count)

    def _execute(self, stage: "_Stage", key: _Key, count: int) -> None:
        """Queues the engine, from the third run of its like on as a graph."""
        stream, driver = self.memory.stream, self._driver
        if not self._capturing or key.rows not in GRAPH_ROWS:
            stage.queue(key._replace(rows=count), stream)
            return
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
            driver.launch_graph(graph, stream)
            return
        stage.queue(key, stream)
        # What comes again is worth a capture, and right after a run of its shapes TensorRT has nothing left to set up.
        self._graphs[key] = self._capture(stage, key) if key in self._graphs else None
        if len(self._graphs) > _MOST_GRAPHS:
            _, oldest = self._graphs.popitem(last=False)
            if oldest is not None:
                driver.destroy_graph(oldest)

    def _capture(self, stage: "_Stage", key: _Key) -> int | None:
        """The graph of what was queued last; None where TensorRT does not allow a capture."""
        stream, driver = self.memory.stream, self._driver
        if not stage.capturable(key, stream):
            # It may after more runs, when all kernels of these shapes are there.
            return None
        # Giving memory back is forbidden meanwhile, and the collector would do so at any time.
        collecting = gc.isenabled()
        gc.disable()
        driver.begin_capture(stream)
        queued = False
        graph = None
        try:
            stage.queue(key, stream)
            queued = True
        except MythosEdgeError:
            # Not an error: the same work goes on being launched piece by piece.
            self._capturing = False
        finally:
            try:
                graph = driver.end_capture(stream)
            except MythosEdgeError:
                self._capturing = False
            if collecting:
                gc.enable()
        if graph is not None and not queued:
            driver.destroy_graph(graph)
            graph = None
        return graph

    @property
    def uses_graphs(self) -> bool:
        """Whether any run has become a CUDA graph so far; TensorRT may refuse them."""
        return any(graph is not None for graph in self._graphs.values())


class _Stage:
    """An engine and the fixed places its rows are copied to and from."""

    def __init__(self, name: str, engine: Engine, memory: DeviceMemory, max_rows: int, room: int) -> None:
        self.name, self.engine, self.max_rows = name, engine, max_rows
        self._memory, self._room = memory, room
        on_host = next((tensor.name for tensor in engine.tensors.values() if tensor.on_host), None)
        if on_host is not None:
            raise BundleError(f"{engine.name}: reads {on_host} on the host, expected all on the GPU: build it again")
        caches = [tensor for tensor in engine.tensors.values() if tensor.name.startswith("past")]
        self._caches = tuple(sorted(tensor.name for tensor in caches if tensor.is_input))
        self._places: dict[str, DeviceArray] = {}
        self._scalars: dict[str, Any] = {}
        for tensor in engine.tensors.values():
            if tensor.name.startswith("past"):
                continue
            # Free axes are rows; what a graph may read before it was written must be numbers.
            shape = tuple(max_rows if size == -1 else size for size in tensor.shape)
            place = memory.empty(shape, _dtype_of(declared(name, tensor.name), memory))
            place[...] = 0
            self._places[tensor.name] = place

    def place(self, feeds: Arrays, count: int) -> int:
        """Copies the ``count`` rows of a call to the places; returns how many logits are asked of them."""
        logits = 0
        for name, place in self._places.items():
            if name not in feeds:
                continue
            given, tensor = feeds[name], declared(self.name, name)
            if not tensor.on_host:
                # Rows before the active ones are as they were left: nothing that comes of them is looked at.
                place[:, count - given.shape[1] : count] = device_array(given)
            elif not tensor.axes:
                self._put_scalar(name, host_array(given))
            elif LOGITS in tensor.axes:
                # The engine makes one row of logits at least; nobody looks at it.
                wanted = host_array(given) if given.shape[0] else np.zeros(1, np.int64)
                logits = len(wanted)
                self._memory.upload(place.pointer, np.ascontiguousarray(wanted))
            else:
                self._memory.upload(place.pointer, np.ascontiguousarray(host_array(given)))
        return logits

    def hand_out(self, outputs: Arrays, count: int) -> None:
        """Copies what the engine made of ``count`` rows to where the caller wants it."""
        for name, wanted in outputs.items():
            if declared(self.name, name).slot and self.engine.in_place:
                continue
            end = wanted.shape[1] if LOGITS in declared(self.name, name).axes else count
            wanted[...] = self._places[name][:, end - wanted.shape[1] : end]

    def caches_of(self, feeds: Arrays) -> tuple[int, ...]:
        """The address of every cache of a call."""
        return tuple(device_array(feeds[name]).pointer for name in self._caches)

    def queue(self, key: _Key, stream: int) -> None:
        """Queues the engine for ``key``."""
        addresses = {name: place.pointer for name, place in self._places.items()}
        for name, pointer in zip(self._caches, key.caches, strict=True):
            addresses[name] = pointer
            if self.engine.in_place:
                addresses[f"{name}_next"] = pointer
        self.engine.run(self._shapes(key), addresses, key.rows, stream, captured=key.rows in GRAPH_ROWS)

    def capturable(self, key: _Key, stream: int) -> bool:
        """Whether TensorRT allows a CUDA graph of the run of ``key``, after it."""
        return self.engine.capturable(self._shapes(key), key.rows, stream)

    def _shapes(self, key: _Key) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for tensor in self.engine.tensors.values():
            if tensor.is_input and -1 in tensor.shape:
                free = {"logit_rows": key.logits}.get(tensor.name, key.rows)
                free = self._room if tensor.name in self._caches else free
                shapes[tensor.name] = tuple(free if size == -1 else size for size in tensor.shape)
        return shapes

    def close(self) -> None:
        self._places.clear()
        self.engine.close()

    def _put_scalar(self, name: str, value: Array) -> None:
        """Sets a scalar that is not what it was."""
        if self._scalars.get(name) != value:
            self._memory.upload(self._places[name].pointer, np.ascontiguousarray(value))
            self._scalars[name] = np.array(value)


def parts(stage: str, call: Call, most: int) -> Iterator[Call]:
    """A call as several, each of ``most`` rows of its chunk or fewer, to be run in this order.

    A causal chunk is the same as its parts: each finds the rows of those before it. Its new rows have to lie right
    behind the cached ones, which then are one array with those of earlier parts.
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
    given, count, tensor = call.feeds[name], call.feeds[ROWS[stage]].shape[1], declared(stage, name)
    if name == "length":
        return np.asarray(host_array(given) + start)
    if tensor.slot:
        return device_array(given).followed_by(device_array(call.outputs[name.replace("past", "rows")][:, :start]))
    if LOGITS in tensor.axes:
        return host_array(given)[_inside(given, start, stop)] - start
    if not tensor.by_row:
        return given
    missing = count - given.shape[1] if tensor.halted is not None else 0
    return _between(given, start - missing, stop - missing)


def _part_of_output(stage: str, call: Call, name: str, start: int, stop: int) -> Rows:
    wanted, count = call.outputs[name], call.feeds[ROWS[stage]].shape[1]
    if LOGITS in declared(stage, name).axes:
        return wanted[:, _inside(call.feeds["logit_rows"], start, stop)]
    missing = count - wanted.shape[1]
    return _between(wanted, start - missing, stop - missing)


def _between(rows: Rows, start: int, stop: int) -> Rows:
    return rows[:, max(0, start) : max(0, stop)]


def _inside(rows: Rows, start: int, stop: int) -> slice:
    """Which of ``rows``, in ascending order, lie between ``start`` and ``stop``."""
    first, end = np.searchsorted(host_array(rows), (start, stop))
    return slice(int(first), int(end))


def _dtype_of(tensor: StageTensor, memory: DeviceMemory) -> np.dtype[Any]:
    return memory.dtype if tensor.dtype == OWN else np.dtype(tensor.dtype)
