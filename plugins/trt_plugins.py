"""The custom ops as TensorRT plugins in Python, for TensorRT for RTX and full TensorRT alike: ``register``.

One class serves every op. While building, it negotiates types and shapes and puts the op's kernels for all wanted
GPUs into the plan; while running, it launches them through the CUDA driver. It never computes on the CPU, and never
imports TensorRT: the bindings are given. TensorRT turns an exception of a callback into a failure code, and drops
that of some callbacks altogether, so each is remembered: see ``take_failures``.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from mythos_edge.model.errors import BuildError, BundleError, MythosEdgeError, one_line
from mythos_edge.plugins import launches, trt_bindings
from mythos_edge.plugins.carried_kernels import Carried, collect, decode, encode
from mythos_edge.plugins.cuda_driver import Driver
from mythos_edge.plugins.kernel_launch import LoadedKernels, PreparedProgram, Scratch
from mythos_edge.plugins.ops import (
    DOMAIN,
    FLOAT_ATTRIBUTES,
    LATENT_ATTENTION,
    QUANTIZED_SPARSE_MOE,
    SPARSE_MOE,
    VERSION,
    OpSpec,
)

PLUGINS = (LATENT_ATTENTION, SPARSE_MOE, QUANTIZED_SPARSE_MOE)
NAMESPACE = DOMAIN
# TensorRT's names of the dtypes that launches know.
DTYPES = {
    "FLOAT": "fp32",
    "HALF": "fp16",
    "BF16": "bf16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "INT4": "int4",
    "FP8": "fp8",
}
_COMPUTE, _CODES = ("FLOAT", "HALF", "BF16"), ("INT8", "INT4", "FP8")
_BLOB_FIELD = "kernels"


@dataclass(frozen=True)
class _Build:
    """The GPUs and types that the plugins of one build carry kernels for."""

    compute_capabilities: tuple[int, ...]
    max_rows: int


_build: _Build | None = None
_failures: list[str] = []


@contextmanager
def carrying(compute_capabilities: Sequence[int], max_rows: int) -> Iterator[None]:
    """Around parsing and building: plugins carry kernels for these GPUs and chunks of up to ``max_rows`` rows.

    Raises BuildError at the end when a callback failed and TensorRT built a plan all the same.
    """
    global _build
    assert _build is None, "builds cannot be nested"
    _failures.clear()
    _build = _Build(tuple(sorted(compute_capabilities)), max_rows)
    try:
        yield
    finally:
        _build = None
    failures = take_failures()
    if failures:
        raise BuildError(failures[0])


def take_failures() -> tuple[str, ...]:
    """The errors that callbacks raised since the last time, one line each; the first is the cause of the others."""
    taken = tuple(_failures)
    _failures.clear()
    return taken


def register(trt: ModuleType, driver_factory: Callable[[], Driver] = Driver.load) -> None:
    """Makes the plugins known to the bindings ``trt``; again is nothing.

    Raises BuildError when TensorRT refuses, BackendUnavailable for bindings that do not fit NumPy. The driver is loaded
    when a plugin first needs a GPU, which building for named GPUs never does.
    """
    if trt.__name__ in _REGISTERED:
        return
    trt_bindings.require_fields(trt)
    gpu = GpuKernels(driver_factory)
    creators = [creator_class(trt)(spec, gpu) for spec in PLUGINS]
    registry = trt.get_plugin_registry()
    for creator in creators:
        if not registry.register_creator(creator, NAMESPACE):
            raise BuildError(
                f"{trt.__name__} refuses the plugin {creator.name}: is one of its name registered already?"
            )
    _REGISTERED[trt.__name__] = creators


# The registry does not keep Python's objects alive.
_REGISTERED: dict[str, list[Any]] = {}


class GpuKernels:
    """The driver and the loaded kernels that all plugins of a process share, made when first needed."""

    def __init__(self, driver_factory: Callable[[], Driver]) -> None:
        self._driver_factory = driver_factory

    @functools.cached_property
    def kernels(self) -> LoadedKernels:
        """Raises BackendUnavailable without a driver."""
        return LoadedKernels(self._driver_factory())


def _remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """A callback whose exception is also logged and kept for ``take_failures``."""

    @functools.wraps(method)
    def guarded(self: Any, *arguments: Any) -> Any:
        try:
            return method(self, *arguments)
        except Exception as error:  # whatever it is, TensorRT may drop it; it goes on below
            kind = "" if isinstance(error, MythosEdgeError) else f"{type(error).__name__}: "
            line = f"{self.title} ({method.__name__}): {kind}{one_line(error)}"
            _failures.append(line)
            trt_bindings.logger(self.trt).log(self.trt.ILogger.Severity.ERROR, line)
            raise

    return guarded


class OpPlugin:
    """The work of a plugin, without TensorRT's base classes; see ``plugin_class``."""

    def __init__(self, trt: ModuleType, spec: OpSpec, attributes: Mapping[str, int | float], gpu: GpuKernels) -> None:
        self.trt, self.spec, self.gpu = trt, spec, gpu
        self.attributes = dict(attributes)
        self.layer = ""
        self.build: _Build | None = None
        # What the plan carries; None while it is built.
        self.carried: Carried | None = None
        self.num_outputs = 1
        self.plugin_name, self.plugin_namespace, self.plugin_version = spec.name, NAMESPACE, str(VERSION)
        self._wanted: frozenset[str] = frozenset()
        self._prepared: PreparedProgram | None = None
        self._scratch: Scratch | None = None
        self._workspace = 0
        self._blob: np.ndarray | None = None

    @property
    def title(self) -> str:
        """The op and the layer, for messages."""
        return f"{self.spec.name} {self.layer}".rstrip()

    def get_capability_interface(self, kind: Any) -> Any:
        return self

    @_remembered
    def clone(self) -> Any:
        other = type(self)(self.trt, self.spec, self.attributes, self.gpu)
        other.layer, other.build, other.carried = self.layer, self.build, self.carried
        other._wanted, other._blob = self._wanted, self._blob
        return other

    # Building.

    @_remembered
    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        names = self.spec.inputs
        if len(input_types) != len(names):
            raise BuildError(f"has {len(input_types)} inputs, expected {len(names)}: {', '.join(names)}")
        return [input_types[0]]

    @_remembered
    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        if self.spec is not LATENT_ATTENTION:
            return [inputs[0]]
        shape = self.trt.DimsExprs(4)
        for axis in range(3):
            shape[axis] = inputs[0][axis]
        shape[3] = builder.constant(int(self.attributes["value_dim"]))
        return [shape]

    @_remembered
    def supports_format_combination(self, position: int, tensors: Sequence[Any], input_count: int) -> bool:
        found = tensors[position].desc
        if found.format != self.trt.TensorFormat.LINEAR:
            return False
        # Tensors beyond ``position`` are not set yet.
        name = self.spec.inputs[position] if position < input_count else self.spec.output
        own = self.spec.types.get(name)
        if own == "int64":
            return bool(found.type == self.trt.DataType.INT64)
        if own == "codes":
            first = next(index for index, one in enumerate(self.spec.inputs) if self.spec.types.get(one) == "codes")
            return found.type.name in _CODES and bool(found.type == tensors[first].desc.type)
        return found.type.name in _COMPUTE and bool(found.type == tensors[0].desc.type)

    @_remembered
    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Decides which kernels are carried; called for each profile."""
        if self.build is None:
            raise BuildError("is built outside of trt_plugins.carrying(): which GPUs to carry kernels for is not known")
        shapes, dtypes = self._most(inputs)
        names = launches.variants(self.spec.name, shapes, dtypes, self.attributes, self.build.max_rows)
        if not self._wanted >= set(names):
            self._wanted |= set(names)
            # A kernel that is missing fails here: TensorRT would drop the error of get_fields_to_serialize.
            self._blob = np.frombuffer(encode(self._carried()), np.uint8)

    @_remembered
    def get_valid_tactics(self) -> list[int]:
        return []

    @_remembered
    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        """None of TensorRT's: inside a Loop it builds no plugin that asks for any. See ``_prepare``."""
        return 0

    @_remembered
    def get_fields_to_serialize(self) -> Any:
        trt = self.trt
        if self._blob is None:
            self._blob = np.frombuffer(encode(self._carried()), np.uint8)
        field = trt.PluginField(_BLOB_FIELD, self._blob, trt.PluginFieldType.UNKNOWN)
        return trt.PluginFieldCollection([field])

    # Running; the builder of full TensorRT runs plugins as well.

    @_remembered
    def attach_to_context(self, resources: Any) -> Any:
        """A clone whose kernels are loaded, so that running it loads nothing."""
        attached = self.clone()
        if self.carried is not None:
            kernels = self.gpu.kernels
            kernels.load(self.carried.for_gpu(kernels.compute_capability()).values())
        return attached

    @_remembered
    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self._prepare(inputs)

    @_remembered
    def set_tactic(self, tactic: int) -> None:
        pass

    @_remembered
    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        assert self._prepared is not None, "TensorRT runs a plugin before telling it the shapes"
        pointers = dict(zip(self.spec.inputs, inputs, strict=True))
        pointers[self.spec.output] = outputs[0]
        self._prepared.run(pointers, self._workspace, stream)

    def _prepare(self, inputs: Sequence[Any]) -> None:
        shapes = self._shapes([tensor.dims for tensor in inputs])
        program = launches.program(self.spec.name, shapes, self._dtypes(inputs), self.attributes)
        kernels = self.gpu.kernels
        loaded = kernels.load(self._carried().for_gpu(kernels.compute_capability()).values())
        self._prepared = PreparedProgram(kernels.driver, program, loaded)
        if self._scratch is None:
            self._scratch = Scratch(kernels.driver)
        self._workspace = self._scratch.at_least(program.workspace_bytes)

    def _carried(self) -> Carried:
        if self.carried is not None:
            return self.carried
        if self.build is None or not self._wanted:
            raise BuildError("is asked for its kernels before it was configured")
        return collect(self.spec.name, self.attributes, self._wanted, self.build.compute_capabilities)

    def _most(self, inputs: Sequence[Any]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """The largest shapes of a profile, and the dtypes."""
        return self._shapes([tensor.max for tensor in inputs]), self._dtypes([tensor.desc for tensor in inputs])

    def _shapes(self, dims: Sequence[Any]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(shape) for name, shape in zip(self.spec.inputs, dims, strict=True)}

    def _dtypes(self, inputs: Sequence[Any]) -> dict[str, str]:
        return {name: DTYPES[tensor.type.name] for name, tensor in zip(self.spec.inputs, inputs, strict=True)}


@functools.cache
def plugin_class(trt: ModuleType) -> Any:
    """``OpPlugin`` as a plugin of the bindings ``trt``."""
    bases = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    # The bases are the given bindings', so no checker sees them; so below.
    class Plugin(OpPlugin, *bases):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            for base in bases:
                base.__init__(self)
            OpPlugin.__init__(self, *arguments)

    return Plugin


@functools.cache
def creator_class(trt: ModuleType) -> Any:
    """Makes plugins of one op: from a node's attributes while building, from a plan's blob while running."""

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[name-defined, misc]
        def __init__(self, spec: OpSpec, gpu: GpuKernels) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.trt, self.spec, self.gpu, self.title = trt, spec, gpu, spec.name
            self.name, self.plugin_namespace, self.plugin_version = spec.name, NAMESPACE, str(VERSION)
            kinds = trt.PluginFieldType
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(name, np.array([]), kinds.FLOAT32 if name in FLOAT_ATTRIBUTES else kinds.INT32)
                    for name in spec.attributes
                ]
            )

        @_remembered
        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            data = {field.name: field.data for field in fields}
            if phase == trt.TensorRTPhase.BUILD:
                plugin = plugin_class(trt)(trt, self.spec, _attributes(self.spec, data), self.gpu)
                plugin.build = _build
            else:
                carried = _from_plan(self.spec, data)
                plugin = plugin_class(trt)(trt, self.spec, carried.attributes, self.gpu)
                plugin.carried = carried
            plugin.layer = name
            return plugin

    return Creator


def _attributes(spec: OpSpec, data: Mapping[str, Any]) -> dict[str, int | float]:
    """The attributes of a node."""
    missing = sorted(set(spec.attributes) - set(data))
    if missing:
        raise BuildError(f"the node has no attribute {missing[0]}, expected {', '.join(spec.attributes)}")
    return {
        name: float(value) if name in FLOAT_ATTRIBUTES else int(value)
        for name in spec.attributes
        for value in [np.asarray(data[name]).reshape(-1)[0]]
    }


def _from_plan(spec: OpSpec, data: Mapping[str, Any]) -> Carried:
    """The data that a plan carries for one node."""
    if _BLOB_FIELD not in data:
        raise BundleError("the plan carries no kernels: it was not built by mythos-edge: build the target again")
    carried = decode(np.asarray(data[_BLOB_FIELD]).tobytes())
    if carried.op != spec.name:
        raise BundleError(f"the plan carries kernels of {carried.op}, expected {spec.name}: build the target again")
    return carried
