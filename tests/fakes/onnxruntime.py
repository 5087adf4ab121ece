"""onnxruntime-gpu without a GPU: graphs run on the CPU's kernels of the real one, on the fake driver's memory.

As strict as ONNX Runtime where results depend on it: an input that is bound where it is not wanted is copied there
once, at once and outside the stream; without our stream a run begins before what was queued in ours. And stricter:
addresses are aligned as its own are, and no output may lie where an input is read.
"""

import ctypes
import itertools
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from fakes.driver import FakeDriver

from mythos_edge.runtime.backends.ort_cuda import CUDA_PROVIDER
from mythos_edge.runtime.backends.ort_session import import_onnxruntime

_ALIGNMENT = 256


@dataclass
class Part:
    """What a session says of the nodes placed on one provider, which have the names ``ops``: the end is their op."""

    ep_name: str
    ops: list[str]

    def get_nodes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, op_type=name.rpartition("/")[2]) for name in self.ops]


@dataclass
class FakeOnnxruntime:
    """The module. ``asked`` are the providers of each session with their options, and its own config entry.

    ``without`` providers cannot be loaded. ``on_host`` are inputs that graphs read on the host. ``ran`` are the files
    of the graphs that ran. Runs of the stage ``fails_at`` fail, and all where less than ``scratch_bytes`` are free.
    """

    driver: FakeDriver
    __version__: str = "1.31.1"
    available: tuple[str, ...] = (CUDA_PROVIDER, "CPUExecutionProvider")
    without: tuple[str, ...] = ()
    parts: tuple[Part, ...] = (
        Part(CUDA_PROVIDER, ["Gemm", "MoE"]),
        Part("CPUExecutionProvider", ["on_shapes/Squeeze", "on_shapes/x/Concat"]),
    )
    on_host: frozenset[str] = frozenset(["row_counts"])
    asked: list[tuple[dict[str, dict[str, str]], str]] = field(default_factory=list)
    sessions: list["weakref.ref[FakeSession]"] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    fails_at: str | None = None
    scratch_bytes: int = 0
    __file__: str = "/nowhere/onnxruntime/__init__.py"

    def get_available_providers(self) -> list[str]:
        return list(self.available)

    def preload_dlls(self) -> None:
        print("Failed to load libcublasLt.so.13")

    def set_default_logger_severity(self, severity: int) -> None:
        assert severity == 4

    def SessionOptions(self) -> Any:
        return import_onnxruntime().SessionOptions()

    def RunOptions(self) -> Any:
        return import_onnxruntime().RunOptions()

    def InferenceSession(
        self, path: str, options: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
    ) -> "FakeSession":
        assert not enable_fallback
        self.asked.append(
            (dict(providers), options.get_session_config_entry("session.record_ep_graph_assignment_info"))
        )
        real = import_onnxruntime().InferenceSession(path, options, providers=["CPUExecutionProvider"])
        session = FakeSession(self, real, dict(providers), Path(path).name)
        self.sessions.append(weakref.ref(session))
        return session


class FakeSession:
    def __init__(self, ort: FakeOnnxruntime, real: Any, providers: dict[str, dict[str, str]], name: str) -> None:
        self.ort, self.real, self.driver, self._providers, self._name = ort, real, ort.driver, providers, name
        self._stage = name.partition(".")[0]
        streams = {
            int(options["user_compute_stream"])
            for options in providers.values()
            if options.get("has_user_compute_stream") == "1"
        }
        # One that a provider was not told would have it work in another.
        shared = all("user_compute_stream" in options for options in providers.values()) and len(streams) == 1
        self.stream = streams.pop() if shared else None
        assert self.stream is None or self.stream in self.driver._streams

    def __del__(self) -> None:
        assert self.stream is None or self.stream in self.driver._streams, "a session outlives its stream"

    def get_inputs(self) -> Any:
        return self.real.get_inputs()

    def get_input_memory_infos(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="Cpu" if self.reads_on_host(one.name) else "Cuda") for one in self.get_inputs()]

    def get_providers(self) -> list[str]:
        return [*(name for name in self._providers if name not in self.ort.without), "CPUExecutionProvider"]

    def get_provider_graph_assignment_info(self) -> list[Part]:
        return [part for part in self.ort.parts if part.ep_name in (*self._providers, "CPUExecutionProvider")]

    def reads_on_host(self, name: str) -> bool:
        return name in self.ort.on_host

    def io_binding(self) -> "FakeBinding":
        return FakeBinding(self)

    def run_with_iobinding(self, binding: "FakeBinding", run_options: Any) -> None:
        self.driver._current("cudaLaunchKernel")
        entry = "disable_synchronize_execution_providers"
        if self._stage == self.ort.fails_at:
            raise RuntimeError("an illegal\naddress")
        if self.driver.memory_info()[0] < self.ort.scratch_bytes:
            raise RuntimeError("Failed to allocate memory")
        self.ort.ran.append(self._name)
        waits = run_options is None or run_options.get_run_config_entry(entry) != "1"
        inputs, outputs = dict(binding.inputs), dict(binding.outputs)
        for output, other in itertools.product(outputs, [*inputs, *outputs]):
            assert output == other or not _overlap(outputs[output], (inputs | outputs)[other]), (output, other)
        # What the host reads it reads now.
        now = {name: place.values() for name, place in inputs.items() if place.device == "cpu"}

        def run() -> None:
            feeds = now | {name: place.values(self.driver) for name, place in inputs.items() if name not in now}
            for (name, place), made in zip(outputs.items(), self.real.run(list(outputs), feeds), strict=True):
                assert (made.shape, made.dtype) == (place.shape, place.dtype), name
                if made.size:
                    self.driver.array(place.pointer, made.dtype, made.shape)[...] = made

        if self.stream is None:
            run()
        else:
            self.driver._queue(self.stream, "run", run)
            if waits:
                self.driver.synchronize(self.stream)


@dataclass(frozen=True)
class Place:
    device: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    pointer: int
    # Bound where it is not wanted: what was copied.
    copied: np.ndarray | None = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def values(self, driver: FakeDriver | None = None) -> np.ndarray:
        """A copy of what is there now."""
        if self.copied is not None:
            return self.copied
        if not self.size:
            return np.empty(self.shape, self.dtype)
        if driver is not None:
            return driver.array(self.pointer, self.dtype, self.shape).copy()
        return np.frombuffer(ctypes.string_at(self.pointer, self.size), self.dtype).reshape(self.shape)


class FakeBinding:
    def __init__(self, session: FakeSession) -> None:
        self._session = session
        self.inputs: dict[str, Place] = {}
        self.outputs: dict[str, Place] = {}

    def bind_input(
        self, name: str, device: str, number: int, dtype: type, shape: tuple[int, ...], pointer: int
    ) -> None:
        place = self._checked(device, number, dtype, shape, pointer)
        wanted = "cpu" if self._session.reads_on_host(name) else "cuda"
        if device != wanted:
            values = place.values(self._session.driver if device == "cuda" else None)
            place = Place(device, place.dtype, place.shape, pointer, values)
        self.inputs[name] = place

    def bind_output(
        self, name: str, device: str, number: int, dtype: type, shape: tuple[int, ...], pointer: int
    ) -> None:
        assert device == "cuda", "it would be copied to the host at each run"
        self.outputs[name] = self._checked(device, number, dtype, shape, pointer)

    def clear_binding_inputs(self) -> None:
        self.inputs.clear()

    def clear_binding_outputs(self) -> None:
        self.outputs.clear()

    def _checked(self, device: str, number: int, dtype: type, shape: tuple[int, ...], pointer: int) -> Place:
        assert number == 0
        # The bindings refuse it.
        assert pointer != 0
        place = Place(device, np.dtype(dtype), tuple(shape), pointer)
        if device == "cuda" and place.size:
            self._session.driver.device_memory.check(pointer, place.size, "binding")
            assert pointer % _ALIGNMENT == 0
        return place


def _overlap(one: Place, other: Place) -> bool:
    if not one.size or not other.size or other.device != one.device or other.copied is not None:
        return False
    return one.pointer < other.pointer + other.size and other.pointer < one.pointer + one.size
