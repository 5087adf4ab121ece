"""One ONNX file in, one TensorRT plan out, in a process of its own: native code that aborts ends that process alone.

This module is what runs there (``python -m mythos_edge.exporter.engine '<json job>'``); ``engine_process`` starts it
and turns what goes wrong into errors. It reports in lines of JSON on what was its stdout; whatever TensorRT prints
goes to stderr. Not here: what the graph should look like (``lowering.tensorrt``).
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import onnx

from mythos_edge.model.errors import BuildError, MythosEdgeError, one_line
from mythos_edge.model.output_files import writing
from mythos_edge.plugins import trt_bindings

# Least, best and most of an axis or of an input's value.
Range = tuple[int, int, int]
_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.BOOL: "BOOL",
}
Report = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class EngineJob:
    """One engine to build: from the file ``graph`` into the file ``plan``.

    ``profiles`` gives each optimization profile as ranges of the named axes of the graph's inputs, ``values`` the
    ranges of scalar inputs that decide shapes or trip counts. ``compute_capabilities`` are the GPUs (89 for SM 8.9)
    of TensorRT for RTX, and those whose kernels travel in the plan. ``plugin_layers`` is how many plugins the engine
    must have. With ``layout`` step the engine takes its memory from who runs it, so that its runs can be captured in
    CUDA graphs.
    """

    graph: str
    plan: str
    flavour: str
    compute_capabilities: tuple[int, ...]
    profiles: tuple[dict[str, Range], ...]
    values: dict[str, Range]
    plugin_layers: int
    max_rows: int
    layout: str

    def run(self, report: Report) -> None:
        """Builds, and reports phases and at the end an ``EngineReport``. Raises BuildError, BackendUnavailable."""
        build = _Build(self, trt_bindings.load(self.flavour), report)
        if not self.plugin_layers:
            build.run()
            return
        with _plugins(self, build.trt):
            build.run()


@dataclass(frozen=True)
class EngineReport:
    """The result of a job; ``peak_bytes`` is the most memory the process held, ``layers`` the network had."""

    version: str
    layers: int
    plugin_layers: int
    plan_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class _Port:
    """An input or output as the ONNX file declares it: TensorRT's name of the type, axes by name or size."""

    kind: str
    axes: tuple[str | int, ...]


class _Build:
    """The steps of one build and what they share."""

    def __init__(self, job: EngineJob, trt: Any, report: Report) -> None:
        self.trt, self._job, self._report = trt, job, report
        self._logger = _logger(trt)
        self._builder = trt.Builder(self._logger)
        self._network = self._builder.create_network(trt_bindings.strongly_typed(trt))

    def run(self) -> None:
        job = self._job
        self._tell("parsing")
        inputs, outputs = declared_ports(Path(job.graph))
        self._parse()
        self._check_ports([self._network.get_input(i) for i in range(self._network.num_inputs)], inputs)
        self._check_ports([self._network.get_output(i) for i in range(self._network.num_outputs)], outputs)
        self._check_plugins()
        self._check_reads()
        config = self._config(inputs)
        self._tell("building")
        size = self._write_plan(config)
        report = EngineReport(
            trt_bindings.version(self.trt), self._network.num_layers, job.plugin_layers, size, _peak_bytes()
        )
        self._report({"done": asdict(report)})

    def _tell(self, phase: str, fraction: float = 0.0) -> None:
        self._report({"phase": phase, "fraction": fraction})

    def _parse(self) -> None:
        parser = self.trt.OnnxParser(self._network, self._logger)
        if not parser.parse_from_file(self._job.graph):
            raise BuildError(_first_error(parser))

    def _check_ports(self, found: Sequence[Any], declared: Mapping[str, _Port]) -> None:
        expected = {name: port.kind for name, port in declared.items()}
        got = {tensor.name: tensor.dtype.name for tensor in found}
        if got != expected:
            wrong = sorted(name for name in {*got, *expected} if got.get(name) != expected.get(name))[0]
            raise BuildError(
                f"TensorRT took {wrong!r} as {got.get(wrong, 'nothing')}, the graph declares it as "
                f"{expected.get(wrong, 'nothing')}: this version of TensorRT does not fit the graph"
            )

    def _check_plugins(self) -> None:
        kinds = [self._network.get_layer(index).type for index in range(self._network.num_layers)]
        found = kinds.count(self.trt.LayerType.PLUGIN_V3)
        if found != self._job.plugin_layers:
            raise BuildError(
                f"TensorRT made {found} plugin layers of {self._job.plugin_layers} plugin nodes and would run the rest "
                "in some other, slow way: the plugins are not registered, or this version of TensorRT passes over them"
            )

    def _check_reads(self) -> None:
        """Only a loop may need values of inputs on the host: those of a step come from the GPU and stay there."""
        inputs = (self._network.get_input(index) for index in range(self._network.num_inputs))
        read = [tensor.name for tensor in inputs if tensor.is_shape_tensor]
        if read and self._job.layout == "step":
            raise BuildError(
                f"the value of {read[0]!r} decides shapes, so TensorRT would read it on the host at every run: "
                "shapes of a step layout may depend on shapes of inputs alone"
            )

    def _config(self, inputs: Mapping[str, _Port]) -> Any:
        job, trt = self._job, self.trt
        config = self._builder.create_builder_config()
        if trt_bindings.names_gpus(trt):
            config.num_compute_capabilities = len(job.compute_capabilities)
            for index, number in enumerate(job.compute_capabilities):
                config.set_compute_capability(trt_bindings.compute_capability_member(trt, number), index)
        # TensorRT for RTX asks for it before runs can be captured; a loop is never captured.
        if job.layout == "step" and hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        # The engine's layers can be read back by name, on a machine that can load it.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.progress_monitor = _monitor(trt, lambda fraction: self._tell("building", fraction))
        for ranges in job.profiles:
            if config.add_optimization_profile(self._profile(inputs, ranges)) < 0:
                raise BuildError(f"TensorRT refused the optimization profile {ranges}")
        return config

    def _profile(self, inputs: Mapping[str, _Port], ranges: Mapping[str, Range]) -> Any:
        profile = self._builder.create_optimization_profile()
        for index in range(self._network.num_inputs):
            tensor = self._network.get_input(index)
            port = inputs[tensor.name]
            if any(isinstance(axis, str) for axis in port.axes):
                try:
                    sizes = [ranges[axis] if isinstance(axis, str) else (axis,) * 3 for axis in port.axes]
                except KeyError as error:
                    raise BuildError(
                        f"axis {error.args[0]!r} of {tensor.name!r} has no range, expected one of {', '.join(ranges)}"
                    ) from None
                profile.set_shape(tensor.name, *(tuple(size[at] for size in sizes) for at in range(3)))
            elif tensor.is_shape_tensor:
                if tensor.name not in self._job.values:
                    raise BuildError(f"the value of {tensor.name!r} decides shapes, and no range is known for it")
                profile.set_shape_input(tensor.name, *([value] for value in self._job.values[tensor.name]))
        return profile

    def _write_plan(self, config: Any) -> int:
        """Writes the plan, whole or not at all; its size in bytes."""
        plan = Path(self._job.plan)
        with writing(plan, "the engine") as file:
            # Where there are streams the plan is never whole in memory.
            if hasattr(self._builder, "build_serialized_network_to_stream"):
                writer = _writer(self.trt, self._logger, file, self._tell)
                built = self._builder.build_serialized_network_to_stream(self._network, config, writer)
            else:
                serialized = self._builder.build_serialized_network(self._network, config)
                built = serialized is not None
                if built:
                    self._tell("serializing")
                    file.write(serialized)
            if not built or not file.tell():
                raise BuildError(f"TensorRT built nothing: {self._logger.first_error or 'it said no reason'}")
        return plan.stat().st_size


def declared_ports(graph: Path) -> tuple[dict[str, _Port], dict[str, _Port]]:
    """Inputs and outputs of an ONNX file; BuildError for a type that no engine has at its borders."""
    model = onnx.load(str(graph), load_external_data=False).graph
    constants = {tensor.name for tensor in model.initializer}
    return (
        {value.name: _port(value) for value in model.input if value.name not in constants},
        {value.name: _port(value) for value in model.output},
    )


def _port(value: onnx.ValueInfoProto) -> _Port:
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        raise BuildError(
            f"{value.name!r} is of ONNX type {kind.elem_type}, expected one of {', '.join(_TYPES.values())}"
        )
    return _Port(_TYPES[kind.elem_type], tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim))


def _first_error(parser: Any) -> str:
    """The parser's first error in one line, with the node it met it at."""
    if not parser.num_errors:
        return "TensorRT cannot parse the graph and says no reason"
    error = parser.get_error(0)
    what = " ".join(str(error.desc()).split())
    name, operator = error.node_name(), error.node_operator()
    return f"TensorRT cannot parse node {name!r} ({operator}): {what}" if operator else f"TensorRT: {what}"


@contextmanager
def _plugins(job: EngineJob, trt: Any) -> Iterator[None]:
    """Around the build: our plugins take part, and what fails in one of them is the error."""
    from mythos_edge.plugins import trt_plugins

    try:
        trt_plugins.register(trt)
        with trt_plugins.carrying(job.compute_capabilities, job.max_rows):
            yield
    except BuildError as error:
        # TensorRT tells only that a callback failed.
        failures = trt_plugins.take_failures()
        raise BuildError(failures[0] if failures else str(error)) from error


# The classes below derive from TensorRT's own, there only once it has been loaded: no type checker sees them.


def _logger(trt: Any) -> Any:
    failures = (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Everything TensorRT says goes to stderr at once, so that an abort loses nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.first_error = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in failures and not self.first_error:
                self.first_error = " ".join(message.split())
            os.write(2, f"[{severity.name}] {message}\n".encode())

    return Logger()


def _monitor(trt: Any, tell: Callable[[float], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """How much of the outermost phase is done, from its steps and those of the phases within."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[int]] = {}  # steps done and steps in all, outermost first
            self._told = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [0, max(num_steps, 1)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases[phase_name][0] = step + 1
            done, share = 0.0, 1.0
            for steps_done, steps in self._phases.values():
                done += share * steps_done / steps
                share /= steps
            # Phases come one after another within a step, so what is told must not run backwards.
            if done > self._told + 0.01:
                self._told = min(done, 1.0)
                tell(self._told)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

    return Monitor()


def _writer(trt: Any, logger: Any, file: IO[bytes], tell: Callable[[str], None]) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self._begun = False

        def write(self, data: bytes) -> int:
            if not self._begun:
                tell("serializing")
                self._begun = True
            try:
                return file.write(data)
            except OSError as error:
                logger.log(trt.ILogger.Severity.ERROR, f"the plan cannot be written: {error.strerror}")
                return 0

    return Writer()


def _peak_bytes() -> int:
    """The most memory this process ever held."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # The other figure also counts the process that forked this one.
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def main() -> int:
    """Runs the job in the first argument; 0, or 1 after reporting an error."""
    with os.fdopen(os.dup(1), "w") as reports:
        os.dup2(2, 1)  # what native code prints is no report

        def report(values: Mapping[str, Any]) -> None:
            reports.write(json.dumps(values) + "\n")
            reports.flush()

        try:
            EngineJob(**json.loads(sys.argv[1])).run(report)
        except MythosEdgeError as error:
            report({"error": str(error)})
            return 1
        except OSError as error:
            report({"error": ": ".join(filter(None, (error.filename, error.strerror or one_line(error))))})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
