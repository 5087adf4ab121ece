"""Runs ``kernel_cases`` on a GPU through the CUDA driver: is the answer right, and how long does it take.

Times are those of a CUDA graph of many runs, each with another value of one input, so that neither launching nor the
GPU's cache decides. Bandwidth is given as a share of what copying large buffers on the same GPU was measured at.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np

from mythos_edge.model import errors
from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.plugins import kernel_store
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.kernel_launch import LoadedKernels, PreparedProgram
from mythos_edge.plugins.launches import program
from mythos_edge.scripts.lab.kernel_cases import NUMPY, TOLERANCES, Array, Case, as_stored, relative_error, turned

# Of the bandwidth of a copy, for kernels that decode one row.
BANDWIDTH_TARGET = 0.7
_COPY_BYTES = 256 << 20
_REPEATS = 20
# The first that is visible.
_DEVICE = 0
# Runs in a graph: as many as there are turns, but for tiny inputs.
_MAX_RUNS = 64


@contextmanager
def _giving_back(give_back: Callable[[], object]) -> Iterator[None]:
    """Calls ``give_back`` after the block. After an error in the block what fails there is not told: the first is."""
    try:
        yield
    except BaseException:
        with suppress(MythosEdgeError):
            give_back()
        raise
    give_back()


class MeasuredGpu:
    """The GPU with its kernels. A context manager that gives everything back.

    ``lost`` is the error that made the GPU useless to this process, which an illegal address does for good.
    """

    def __init__(self, driver: Driver, load_kernel: Any = kernel_store.kernel) -> None:
        self.driver, self._load_kernel = driver, load_kernel
        driver.retain_primary_context(_DEVICE)
        self.capability = driver.compute_capability(_DEVICE)
        self.stream = driver.stream()
        self.kernels = LoadedKernels(driver)
        self.lost: MythosEdgeError | None = None

    def still_works(self) -> bool:
        """Whether the GPU takes work after an error; where it does not, nothing in this process ever will."""
        try:
            self.driver.synchronize(self.stream)
        except MythosEdgeError as error:
            self.lost = error
        return self.lost is None

    def close(self) -> None:
        """Gives stream and context back, as far as a lost GPU still takes them."""
        quiet = suppress(MythosEdgeError) if self.lost else nullcontext()
        with quiet, _giving_back(lambda: self.driver.release_primary_context(_DEVICE)):
            self.driver.destroy_stream(self.stream)

    def __enter__(self) -> "MeasuredGpu":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with suppress(MythosEdgeError) if kind else nullcontext():
            self.close()

    @contextmanager
    def memory(self, size: int) -> Iterator[int]:
        """Device memory while the block runs."""
        pointer = self.driver.allocate(max(size, 1))
        with _giving_back(lambda: self.driver.free(pointer)):
            yield pointer

    @contextmanager
    def copy_of(self, array: Array) -> Iterator[int]:
        """An array in device memory while the block runs."""
        flat = np.ascontiguousarray(array)
        with self.memory(flat.nbytes) as pointer:
            if flat.nbytes:
                self.driver.copy_to_device(pointer, flat.ctypes.data, flat.nbytes, self.stream)
                self.driver.synchronize(self.stream)
            yield pointer

    def fetched(self, pointer: int, shape: tuple[int, ...], dtype: Any) -> Array:
        """The content of device memory once all work is done."""
        made = np.empty(shape, dtype)
        self.driver.copy_to_host(made.ctypes.data, pointer, made.nbytes, self.stream)
        self.driver.synchronize(self.stream)
        return made

    @contextmanager
    def prepared(self, case: Case) -> Iterator["Prepared"]:
        """A case in device memory with its kernels loaded."""
        made = program(case.op, case.shapes, case.dtypes, case.attributes)
        names = sorted({launch.kernel for launch in made.launches})
        loaded = self.kernels.load(self._load_kernel(name, self.capability) for name in names)
        size = int(np.prod(case.output_shape)) * np.dtype(NUMPY[case.dtype]).itemsize
        with ExitStack() as held:
            pointers = {
                name: held.enter_context(self.copy_of(as_stored(array, case.dtypes[name])))
                for name, array in case.inputs.items()
            }
            pointers[case.output] = held.enter_context(self.memory(size))
            workspace = held.enter_context(self.memory(made.workspace_bytes))
            yield Prepared(self, case, PreparedProgram(self.driver, made, loaded), pointers, workspace)


class Prepared:
    """A case that can be run."""

    def __init__(
        self, gpu: MeasuredGpu, case: Case, program: PreparedProgram, pointers: Mapping[str, int], workspace: int
    ) -> None:
        self._gpu, self._case, self._program = gpu, case, program
        self._pointers, self._workspace = dict(pointers), workspace

    def run(self, **pointers: int) -> None:
        """Queues one run, with other ``pointers`` for some inputs."""
        self._program.run(self._pointers | pointers, self._workspace, self._gpu.stream)

    def output(self) -> Array:
        """The output of the last run."""
        kind = NUMPY[self._case.dtype]
        return self._gpu.fetched(self._pointers[self._case.output], self._case.output_shape, kind)


def check(gpu: MeasuredGpu, case: Case) -> dict[str, Any]:
    """One row of the report: a kernel against the oracle."""
    with gpu.prepared(case) as prepared:
        prepared.run()
        error = relative_error(prepared.output(), case.wanted())
    allowed = TOLERANCES[case.dtype]
    return {"case": case.label, "error": error, "allowed": allowed, "ok": error <= allowed}


def measure(gpu: MeasuredGpu, case: Case, copy_bytes_per_s: float) -> dict[str, Any]:
    """One row of the report: how fast a kernel is, and what share of the copy bandwidth its bytes come to."""
    name, count = case.turns
    turns = max(1, min(count, _MAX_RUNS))
    with gpu.prepared(case) as prepared, ExitStack() as held:
        others = (as_stored(turned(case, turn), case.dtypes[name]) for turn in range(turns))
        pointers = [held.enter_context(gpu.copy_of(other)) for other in others]

        def in_turn() -> None:
            for pointer in pointers:
                prepared.run(**{name: pointer})

        seconds = _seconds_of_graph(gpu, in_turn) / turns
    share = case.bytes_moved / seconds / copy_bytes_per_s
    row = {
        "case": case.label,
        "mb_moved": round(case.bytes_moved / 1e6, 3),
        "us": round(seconds * 1e6, 2),
        "share_of_copy": round(share, 3),
    }
    return row | ({"target": BANDWIDTH_TARGET, "reached": share >= BANDWIDTH_TARGET} if case.decode else {})


def copy_bandwidth(gpu: MeasuredGpu, size: int = _COPY_BYTES) -> float:
    """Bytes read and written a second by copies inside device memory: median of many."""
    with gpu.memory(size) as source, gpu.memory(size) as target:
        gpu.driver.fill(source, 1, size, gpu.stream)

        def copies() -> None:
            for _ in range(4):
                gpu.driver.copy_on_device(target, source, size, gpu.stream)

        return 4 * 2 * size / _seconds_of_graph(gpu, copies)


def _seconds_of_graph(gpu: MeasuredGpu, queue: Any) -> float:
    """Median time of a CUDA graph of what ``queue`` queues."""
    driver, stream = gpu.driver, gpu.stream
    queue()  # what is done at a first run only
    driver.synchronize(stream)
    graphs: list[int] = []
    driver.begin_capture(stream)
    with _giving_back(lambda: graphs.append(driver.end_capture(stream))):
        queue()
    (graph,) = graphs
    with _giving_back(lambda: driver.destroy_graph(graph)):
        times = []
        for _ in range(_REPEATS + 3):
            started = time.perf_counter()
            driver.launch_graph(graph, stream)
            driver.synchronize(stream)
            times.append(time.perf_counter() - started)
        return statistics.median(times[3:])


def one_line(error: Exception) -> str:
    """The message of an error, for a cell of the report."""
    return str(error) if isinstance(error, MythosEdgeError) else f"{type(error).__name__}: {errors.one_line(error)}"
