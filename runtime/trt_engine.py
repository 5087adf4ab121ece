"""TensorRT engines of a target: checked, loaded and run. Both flavours; nothing of TensorRT beyond this file.

An engine is native code, so nothing is deserialised before it is known to be the one the manifest lists, built by
this TensorRT for this GPU. Code for the host inside an engine is never allowed.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BackendUnavailable, BundleError, MythosEdgeError
from mythos_edge.plugins import kernel_store, trt_bindings, trt_plugins
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.kernel_launch import LoadedKernels, PreparedProgram
from mythos_edge.plugins.launches import Program

CACHE_FOLDER = "cache"


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
        spec = bundle.target(target).engine
        assert spec is not None
        self.trt: Any = trt_bindings.load(spec.flavour)
        self.driver = driver or Driver.load()
        count = self.driver.device_count()
        if not 0 <= device < count:
            raise BackendUnavailable(f"device is {device}, expected less than {count}, the GPUs here", "nvidia-smi")
        self.driver.retain_primary_context(device)
        self.compute_capability = self.driver.compute_capability(device)
        self._bundle, self._target, self.spec = bundle, target, spec
        self._check(device)
        self._kernels = LoadedKernels(self.driver)
        trt_plugins.register(self.trt)
        self._runtime = self.trt.Runtime(trt_bindings.logger(self.trt))
        # The default, said aloud: an engine may come from elsewhere.
        self._runtime.engine_host_code_allowed = False

    def _check(self, device: int) -> None:
        spec, where = self.spec, f"target {self._target!r}"
        again = "build it again here"
        installed = trt_bindings.version(self.trt)
        if installed != spec.version:
            raise BundleError(f"{where} was built by TensorRT {spec.version}, here is {installed}: {again}")
        if self.compute_capability not in spec.compute_capabilities:
            known = ", ".join(f"sm{number}" for number in spec.compute_capabilities)
            here = f"this GPU ({self.driver.device_name(device)}) is sm{self.compute_capability}"
            raise BundleError(f"{where} was built for {known}, {here}: {again}")
        if any(spec.plugin_layers.values()) and spec.kernels != kernel_store.manifest_sha256():
            raise BundleError(f"{where} carries kernels of another mythos-edge: {again}")

    def prepare(self, program: Program) -> PreparedProgram:
        """A program of the package's own kernels, loaded. Raises BuildError for a GPU none were compiled for."""
        built = [kernel_store.kernel(launch.kernel, self.compute_capability) for launch in program.launches]
        return PreparedProgram(self.driver, program, self._kernels.load(built))

    def load(self, key: str, trust: bool = False) -> "Engine":
        """The engine of one graph of the target; with ``trust`` also one that is not the file the manifest lists."""
        file = self._bundle.target(self._target).graphs[key]
        path = self._bundle.file(file)
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: can not be read: {error.strerror}") from error
        wanted, found = self._bundle.manifest.files[file].sha256, hashlib.sha256(plan).hexdigest()
        if found != wanted and not trust:
            raise BundleError(
                f"{path}: is not the engine the manifest lists (sha256 {found[:12]}..., not {wanted[:12]}...): "
                "build it again, or pass --trust if you know where it comes from"
            )
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BundleError(f"{path}: TensorRT can not load it: {said(self.trt)}")
        cache = f"{self._target}.{key}.sm{self.compute_capability}.{self.spec.version}.bin"
        return Engine(self, engine, path.name, self._bundle.path / CACHE_FOLDER / cache)


def said(trt: Any) -> str:
    """Why TensorRT failed: what a plugin raised, else the last error of its log."""
    causes = trt_plugins.take_failures() or trt_bindings.messages(trt).errors()[-1:]
    return causes[0] if causes else "its log says nothing"


class Engine:
    """One engine with an execution context for each of its profiles.

    ``run`` queues it; what TensorRT for RTX compiles for this GPU is kept in ``cache`` for the next time. An engine
    that is ``in_place`` writes new rows into the cache itself: its output ``past_next`` is at the address of ``past``.
    """

    def __init__(self, runtime: Runtime, engine: Any, name: str, cache: Path) -> None:
        self._runtime, self._engine, self._name, self._cache = runtime, engine, name, cache
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
        self._compiled: Any = None
        self._compiled_before = b""
        self._config = self._runtime_config()
        # Of each profile: the context, and the shapes and addresses it was given last.
        self._contexts: dict[int, tuple[Any, dict[str, tuple[int, ...]], dict[str, int]]] = {}

    def run(self, shapes: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int], rows: int, stream: int) -> None:
        """Queues one run with ``rows`` rows; ``shapes`` of the inputs with free axes, ``addresses`` of all tensors.

        Raises MythosEdgeError with what TensorRT says.
        """
        context, known_shapes, known_addresses = self._context(rows, stream)
        done = True
        for name, shape in shapes.items():
            if known_shapes.get(name) != shape:
                done = done and context.set_input_shape(name, shape)
                known_shapes[name] = shape
        for name, address in addresses.items():
            if known_addresses.get(name) != address:
                done = done and context.set_tensor_address(name, address)
                known_addresses[name] = address
        if not done or not context.execute_async_v3(stream):
            known_shapes.clear()
            known_addresses.clear()
            what = said(self._runtime.trt)
            raise MythosEdgeError(f"{self._name}: TensorRT failed: {what}")

    def capturable(self, rows: int, stream: int) -> bool:
        """Whether TensorRT allows a CUDA graph of what was run last; a flavour that can not tell leaves it to a try."""
        ask = getattr(self._context(rows, stream)[0], "is_stream_capturable", None)
        return ask is None or bool(ask(stream))

    def close(self) -> None:
        """Keeps what was compiled, and gives the contexts back."""
        self._contexts.clear()
        if self._compiled is None:
            return
        made = bytes(self._compiled.serialize())
        if made and made != self._compiled_before:
            partial = self._cache.with_suffix(".partial")
            try:
                self._cache.parent.mkdir(exist_ok=True)
                partial.write_bytes(made)
                partial.replace(self._cache)
            except OSError:
                # A bundle that can not be written to is compiled for again next time, nothing else.
                partial.unlink(missing_ok=True)
        self._compiled = self._config = None

    def _context(self, rows: int, stream: int) -> tuple[Any, dict[str, tuple[int, ...]], dict[str, int]]:
        profiles = self._runtime.spec.profiles
        number = next(index for index, profile in enumerate(profiles) if rows <= profile.max_rows)
        if number not in self._contexts:
            context = self._engine.create_execution_context(*([] if self._config is None else [self._config]))
            if context is None or not context.set_optimization_profile_async(number, stream):
                what = said(self._runtime.trt)
                raise MythosEdgeError(f"{self._name}: TensorRT made no execution context: {what}")
            self._contexts[number] = context, {}, {}
        return self._contexts[number]

    def _runtime_config(self) -> Any:
        """With the cache of kernels compiled for this GPU, where the flavour compiles at run time."""
        make = getattr(self._engine, "create_runtime_config", None)
        if make is None:
            return None
        config = make()
        if not hasattr(config, "create_runtime_cache"):
            return config
        self._compiled = config.create_runtime_cache()
        try:
            self._compiled_before = self._cache.read_bytes()
        except OSError:
            self._compiled_before = b""
        # One of another driver is refused by TensorRT, and made again.
        if self._compiled_before and not self._compiled.deserialize(self._compiled_before):
            self._compiled_before = b""
        config.set_runtime_cache(self._compiled)
        return config
