"""TensorRT engines of a target: checked, loaded and run. Both flavours; nothing of TensorRT beyond this file.

An engine is native code, so nothing is deserialised before it is known to be the one the manifest lists, built by
this TensorRT for this GPU. Code for the host inside an engine is never allowed.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BundleError, MythosEdgeError, OSErrorAs, UsageError
from mythos_edge.model.output_files import writing
from mythos_edge.model.target_options import EngineSpec, options_of
from mythos_edge.model.user_cache import cache_folder
from mythos_edge.plugins import kernel_store, trt_bindings, trt_plugins
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.kernel_launch import Scratch
from mythos_edge.runtime.backends.gpu import Gpu

CACHE_FOLDER = "cache"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Tensor:
    """An input or output of an engine; -1 in ``shape`` is a free axis."""

    name: str
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool


class Runtime:
    """One GPU and the TensorRT that a target was built for.

    Raises BackendUnavailable without TensorRT, driver or GPU, BundleError for engines that are not for here.
    """

    def __init__(self, bundle: Bundle, target: str, driver: Driver | None = None, device: int = 0) -> None:
        spec = options_of(bundle.target(target), EngineSpec)
        self.trt: Any = trt_bindings.load(spec.flavour)
        self.gpu = Gpu(driver, device)
        self._bundle, self._target, self.spec = bundle, target, spec
        try:
            self._check()
            trt_plugins.register(self.trt)
        except BaseException:
            self.gpu.close()
            raise
        self._activations: Scratch | None = Scratch(self.gpu.driver)
        self._runtime = self.trt.Runtime(trt_bindings.logger(self.trt))
        # The default, said aloud: an engine may come from elsewhere.
        self._runtime.engine_host_code_allowed = False

    def lend_memory(self, context: Any, size: int) -> None:
        """Gives a context the memory its layers work in."""
        if size:
            assert self._activations is not None
            context.set_device_memory(self._activations.at_least(size), size)

    def close(self) -> None:
        """Gives the memory of the contexts and the GPU back; again is nothing."""
        self._runtime = None
        self._activations = None
        self.gpu.close()

    def _check(self) -> None:
        spec, gpu, where = self.spec, self.gpu, f"target {self._target!r}"
        again = "build it again here"
        installed = trt_bindings.version(self.trt)
        if installed != spec.version:
            raise BundleError(f"{where} was built by TensorRT {spec.version}, here is {installed}: {again}")
        if gpu.compute_capability not in spec.compute_capabilities:
            known = ", ".join(f"sm{number}" for number in spec.compute_capabilities)
            here = f"this GPU ({gpu.name}) is sm{gpu.compute_capability}"
            raise BundleError(f"{where} was built for {known}, {here}: {again}")
        if not spec.profiles or spec.profiles[-1].max_rows < spec.max_rows:
            raise BundleError(f"{where} has no profile for {spec.max_rows} rows: it was damaged or edited: {again}")
        if spec.device and spec.device != gpu.name:
            raise BundleError(f"{where} was built on {spec.device}, this GPU is {gpu.name}: {again}")
        if any(spec.plugin_layers.values()) and spec.kernels != kernel_store.manifest_sha256():
            raise BundleError(f"{where} carries kernels of another mythos-edge: {again}")

    def load(self, key: str, trust: bool = False) -> "Engine":
        """The engine of one graph of the target; with ``trust`` also one that is not the file the manifest lists."""
        file = self._bundle.target(self._target).graphs[key]
        path = self._bundle.file(file)
        with OSErrorAs(BundleError, f"{path}: cannot be read"):
            plan = path.read_bytes()
        wanted, found = self._bundle.manifest.files[file].sha256, hashlib.sha256(plan).hexdigest()
        if found != wanted and not trust:
            raise BundleError(
                f"{path}: is not the engine the manifest lists (sha256 {found[:12]}..., not {wanted[:12]}...): "
                "build it again, or pass --trust if you know where it comes from"
            )
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"{path}: TensorRT cannot load it: {said(self.trt)}")
        cache = f"{self._target}.{key}.sm{self.gpu.compute_capability}.{self.spec.version}.bin"
        return Engine(self, engine, path.name, self._bundle.path / CACHE_FOLDER / cache)


def said(trt: Any) -> str:
    """Why TensorRT failed: what a plugin raised, else the last error of its log."""
    causes = trt_plugins.take_failures() or trt_bindings.messages(trt).errors()[-1:]
    return causes[0] if causes else "its log says nothing"


class Engine:
    """One engine. ``run`` queues it; what TensorRT for RTX compiles for this GPU is kept in ``cache`` for next time.

    Runs that are captured as CUDA graphs have a context of their own for each set of shapes: a graph is broken by any
    other shape its context is given later. Other runs share one for each profile. An engine that is ``in_place`` writes
    new rows into the cache itself: its output ``past_next`` is at the address of ``past``.
    """

    def __init__(self, runtime: Runtime, engine: Any, name: str, cache: Path) -> None:
        self.name = name
        self._runtime, self._engine, self._cache = runtime, engine, _CompiledCache(cache)
        trt = runtime.trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.tensors = {
            name: Tensor(
                name,
                tuple(engine.get_tensor_shape(name)),
                engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT,
                engine.get_tensor_location(name) == trt.TensorLocation.HOST,
            )
            for name in names
        }
        self.in_place = any(tensor.name.startswith("past") for tensor in self.tensors.values() if not tensor.is_input)
        self._contexts: dict[object, _Context] = {}

    def run(self, shapes: Shapes, addresses: Mapping[str, int], rows: int, stream: int, *, captured: bool) -> None:
        """Queues one run with ``rows`` rows; ``shapes`` of the inputs with free axes, ``addresses`` of all tensors.

        Raises MythosEdgeError with what TensorRT says.
        """
        context = self._context(shapes, rows, stream, captured)
        if not context.run(shapes, addresses, stream):
            raise MythosEdgeError(f"{self.name}: TensorRT failed: {said(self._runtime.trt)}")

    def capturable(self, shapes: Shapes, rows: int, stream: int) -> bool:
        """Whether TensorRT allows a CUDA graph of such a run; a flavour that cannot tell leaves it to a try."""
        ask = getattr(self._context(shapes, rows, stream, captured=True).context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def close(self) -> None:
        """Keeps what was compiled, and gives the engine back."""
        self._contexts.clear()
        self._cache.keep()
        self._engine = None

    def _context(self, shapes: Shapes, rows: int, stream: int, captured: bool) -> "_Context":
        number = next(index for index, one in enumerate(self._runtime.spec.profiles) if rows <= one.max_rows)
        key = tuple(sorted(shapes.items())) if captured else number
        if key not in self._contexts:
            # All runs are in one stream, so one after the other all contexts of a target use the same memory.
            context = self._engine.create_execution_context(self._config(captured))
            if context is not None:
                self._runtime.lend_memory(context, self._engine.get_device_memory_size_for_profile_v2(number))
            if context is None or not context.set_optimization_profile_async(number, stream):
                what = said(self._runtime.trt)
                raise MythosEdgeError(f"{self.name}: TensorRT made no execution context: {what}")
            self._contexts[key] = _Context(context)
        return self._contexts[key]

    def _config(self, captured: bool) -> Any:
        """How to make a context; where the flavour compiles at run time, with what was compiled before."""
        own_memory = self._runtime.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        make = getattr(self._engine, "create_runtime_config", None)
        if make is None:
            return own_memory
        config = make()
        config.set_execution_context_allocation_strategy(own_memory)
        strategies = getattr(self._runtime.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is not None:
            # A graph keeps the kernels it was captured with, so those must be the good ones; the many other shapes
            # that are met once are not worth compiling for.
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER if captured else strategies.NONE
        self._cache.give(config)
        return config


class _Context:
    """An execution context, and the shapes and addresses it was given last."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def run(self, shapes: Shapes, addresses: Mapping[str, int], stream: int) -> bool:
        """Whether TensorRT took the run; it is told only what is new."""
        done = True
        for name, shape in shapes.items():
            if done and self._shapes.get(name) != shape:
                done = self.context.set_input_shape(name, shape)
                self._shapes[name] = shape
        for name, address in addresses.items():
            if done and self._addresses.get(name) != address:
                done = self.context.set_tensor_address(name, address)
                self._addresses[name] = address
        done = bool(done and self.context.execute_async_v3(stream))
        if not done:
            self._shapes.clear()
            self._addresses.clear()
        return done


class _CompiledCache:
    """The file that keeps what TensorRT for RTX compiled for this GPU.

    It is code, and not in the manifest: only what this user's own runs have written is read back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._compiled: Any = None
        self._before = b""

    def give(self, config: Any) -> None:
        """Has contexts made with ``config`` use it."""
        if not hasattr(config, "create_runtime_cache"):
            return
        if self._compiled is None:
            self._compiled = config.create_runtime_cache()
            try:
                found = self._path.read_bytes()
                own = _own_mark(found).is_file()
            except OSError:
                own = False
            # One of another driver is refused by TensorRT, and made again.
            if own and self._compiled.deserialize(found):
                self._before = found
        config.set_runtime_cache(self._compiled)

    def keep(self) -> None:
        """Writes it, whole or not at all; in a bundle that cannot be written to it is compiled again next time."""
        serialized = None if self._compiled is None else self._compiled.serialize()
        self._compiled = None
        if serialized is None or not (made := bytes(serialized)) or made == self._before:
            return
        with suppress(OSError, UsageError):
            self._path.parent.mkdir(exist_ok=True)
            mark = _own_mark(made)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            with writing(self._path, "what TensorRT compiled") as file:
                file.write(made)


def _own_mark(content: bytes) -> Path:
    """An empty file that says that ``content`` was written by this user."""
    return cache_folder() / "compiled" / hashlib.sha256(content).hexdigest()
