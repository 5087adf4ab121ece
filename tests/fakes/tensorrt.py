"""TensorRT's runtime without a GPU: an engine is an ONNX graph that ONNX Runtime runs on the fake driver's memory.

Stricter than TensorRT where that is cheap: shapes and addresses must be set, lie in live memory and fit the profile.
"""

import ctypes
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from fakes.driver import FakeDriver

from mythos_edge.plugins import trt_bindings

VERSION = "0.0.1"


def plan_of(model: Path, max_rows: int, max_context: int) -> bytes:
    """The "plan" of an ONNX file for chunks of up to ``max_rows`` rows."""
    return json.dumps({"model": str(model), "max_rows": max_rows, "max_context": max_context}).encode()


class FakeTensorRT(ModuleType):
    """What ``runtime.trt_engine`` uses of the module; ``engines`` are those that were loaded.

    ``capturable`` is what contexts answer, None for a flavour without the question; the run number ``fails_at`` (of
    all engines) fails.
    """

    __version__ = VERSION

    class TensorIOMode:
        INPUT, OUTPUT = "input", "output"

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    class TensorLocation:
        DEVICE, HOST = "device", "host"

    def __init__(self, driver: FakeDriver, capturable: bool | None = True) -> None:
        super().__init__("fake_tensorrt")
        self.driver, self.capturable = driver, capturable
        self.messages = trt_bindings.Messages()
        # Inputs that are read on the host when a run is queued.
        self.host_tensors: set[str] = set()
        self.engines: list[FakeEngine] = []
        self.runs = 0
        self.fails_at: int | None = None
        self.host_code_allowed: bool | None = None

    def Runtime(self, logger: Any) -> "FakeRuntime":
        del logger
        return FakeRuntime(self)

    def said(self, text: str) -> None:
        """An error in the log."""
        self.messages.add(text)


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "engine_host_code_allowed":
            self._trt.host_code_allowed = value
        super().__setattr__(name, value)

    def deserialize_cuda_engine(self, plan: bytes) -> "FakeEngine | None":
        try:
            job = json.loads(plan)
        except ValueError:
            self._trt.said("the plan is no plan")
            return None
        engine = FakeEngine(self._trt, **job)
        self._trt.engines.append(engine)
        return engine


class FakeEngine:
    """One graph; ``runs`` are the shapes of the inputs of every run."""

    def __init__(self, trt: FakeTensorRT, model: str, max_rows: int, max_context: int) -> None:
        self.trt, self.max_rows, self.max_context = trt, max_rows, max_context
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graph = onnx.load(model, load_external_data=False).graph
        self.values = {value.name: value for value in [*graph.input, *graph.output]}
        self._inputs = {value.name for value in graph.input}
        self.runs: list[dict[str, tuple[int, ...]]] = []
        self.runtime_cache = FakeCache()

    @property
    def num_io_tensors(self) -> int:
        return len(self.values)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        axes = self.values[name].type.tensor_type.shape.dim
        return tuple(axis.dim_value if axis.HasField("dim_value") else -1 for axis in axes)

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._inputs else "output"

    def get_tensor_location(self, name: str) -> str:
        return "host" if name in self.trt.host_tensors else "device"

    def create_runtime_config(self) -> "FakeConfig":
        return FakeConfig(self.runtime_cache)

    def create_execution_context(self, config: "FakeConfig") -> "FakeContext":
        assert config.strategy == "user managed"
        return FakeContext(self)

    def get_device_memory_size_for_profile_v2(self, number: int) -> int:
        return 1000 * (number + 1)

    def dtype_of(self, name: str) -> np.dtype[Any]:
        return onnx.helper.tensor_dtype_to_np_dtype(self.values[name].type.tensor_type.elem_type)


class FakeConfig:
    def __init__(self, cache: "FakeCache") -> None:
        self._cache = cache
        self.strategy: str | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "FakeCache":
        return self._cache

    def set_runtime_cache(self, cache: "FakeCache") -> bool:
        return cache is self._cache


class FakeCache:
    def __init__(self) -> None:
        self.read: bytes | None = None

    def deserialize(self, data: bytes) -> bool:
        self.read = data
        return data == b"compiled"

    def serialize(self) -> bytes:
        return b"compiled"


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._trt = engine, engine.trt
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile: int | None = None
        self._memory: tuple[int, int] | None = None
        if self._trt.capturable is not None:
            self.is_stream_capturable = lambda stream: self._trt.capturable

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = memory, size

    def set_optimization_profile_async(self, number: int, stream: int) -> bool:
        self._profile = number
        return number in (0, 1)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        axes = self._engine.get_tensor_shape(name)
        assert len(axes) == len(shape)
        assert all(axis in (-1, size) for axis, size in zip(axes, shape, strict=True)), (name, axes, shape)
        most = 1 if self._profile == 0 else self._engine.max_rows
        rows = self._engine.max_context + self._engine.max_rows if name.startswith("past") else most
        if any(axis == -1 and not 1 <= size <= rows for axis, size in zip(axes, shape, strict=True)):
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self._engine.values, name
        assert address != 0
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine, trt = self._engine, self._trt
        trt.runs += 1
        if trt.runs == trt.fails_at:
            trt.said("kernel launch failed")
            return False
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        assert set(self._addresses) == set(names), set(names) - set(self._addresses)
        shapes = {name: self._shapes.get(name, engine.get_tensor_shape(name)) for name in names}
        addresses = dict(self._addresses)
        on_host = {
            name: np.frombuffer(
                ctypes.string_at(addresses[name], engine.dtype_of(name).itemsize), engine.dtype_of(name)
            )
            for name in trt.host_tensors & engine.values.keys()
        }

        captured, memory = stream in trt.driver._captures, self._memory
        assert memory is not None

        def run() -> None:
            # A graph that was captured with other shapes than its context was given since is broken.
            now = {name: self._shapes.get(name, engine.get_tensor_shape(name)) for name in names}
            assert not captured or now == shapes
            trt.driver.device_memory.check(*memory, "the memory of a context")
            inputs = {name: shapes[name] for name in names if engine.get_tensor_mode(name) == "input"}
            assert all(size != -1 for shape in inputs.values() for size in shape), inputs
            engine.runs.append(inputs)
            feeds = {
                name: on_host[name].reshape(shape)
                if name in on_host
                else trt.driver.array(addresses[name], engine.dtype_of(name), shape).copy()
                for name, shape in inputs.items()
            }
            outputs = [value.name for value in engine.session.get_outputs()]
            for name, made in zip(outputs, engine.session.run(outputs, feeds), strict=True):
                trt.driver.array(addresses[name], made.dtype, made.shape)[...] = made

        trt.driver._queue(stream, "engine", run)
        return True
