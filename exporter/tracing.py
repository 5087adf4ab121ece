"""Traces each stage once, on fake tensors: graphs without a single weight in memory.

What comes out are onnx_ir models whose initializers have names and shapes (those of ``Network``) but no values;
``weights`` gives them values on disk. Not here: the Loop (``loop_graph``), lowering, files.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythos_edge.exporter import child_process
from mythos_edge.exporter.weights import STORAGE_TYPES, attach_weights, name_weights, plan_weights
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.errors import ExportError
from mythos_edge.model.layers import Window
from mythos_edge.model.loop import Halting, LoopState
from mythos_edge.model.network import Network, in_dtype
from mythos_edge.model.stages import STAGES
from mythos_edge.plugins import ops
from mythos_edge.plugins.torch_ops import TracedOps

Axes = dict[int, Any]
# Two processes trace, so that tracing takes about as long as streaming a small model's weights.
_TRACE_GROUPS = (("step",), ("prelude", "coda"))


class _Prelude(nn.Module):
    # The dynamo exporter fails on NamedTuple arguments; these faces keep the graph's inputs flat and named.
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, length: Tensor, first: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        e, rows = self.network.prelude(input_ids, Window(length, first), *past)
        return e, *rows


class _Step(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self,
        h: Tensor,
        out: Tensor,
        halt_mass: Tensor,
        depth: Tensor,
        e: Tensor,
        step_index: Tensor,
        threshold: Tensor,
        min_depth: Tensor,
        length: Tensor,
        first: Tensor,
        past: Tensor,
    ) -> tuple[Tensor, ...]:
        state, halting, window = (
            LoopState(h, out, halt_mass, depth),
            Halting(threshold, min_depth),
            Window(length, first),
        )
        state, rows = self.network.loop_step(state, e, step_index, halting, window, past)
        return *state, rows


class _Coda(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, out: Tensor, logit_rows: Tensor, length: Tensor, first: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        logits, rows = self.network.coda(out, logit_rows, Window(length, first), *past)
        return logits.float(), *rows


@dataclass(frozen=True)
class _Inputs:
    """Example inputs of a stage by name, and which of their axes are symbolic."""

    values: dict[str, Any]
    axes: dict[str, Any]


def trace_stages(
    config: MythosConfig,
    max_context: int,
    stages: Iterable[str] = STAGES,
    dtype: torch.dtype = torch.float32,
    *,
    one_sequence: bool = False,
) -> dict[str, ir.Model]:
    """The stage graphs by name, initializers without values; they compute in ``dtype``.

    Whatever the dtype, halting and the loop table are float32, and so are the logits. With ``one_sequence`` the batch
    is one and all rows of a chunk are active.
    """
    sizes = _Sizes.of(dtype, one_sequence)
    with FakeTensorMode():
        network = in_dtype(Network(config, max_context, TracedOps()), dtype).requires_grad_(False).eval()
        faces: dict[str, tuple[nn.Module, _Inputs]] = {
            "prelude": (_Prelude(network), _prelude_inputs(config, sizes)),
            "step": (_Step(network), _step_inputs(config, sizes)),
            "coda": (_Coda(network), _coda_inputs(config, sizes)),
        }
        return {stage: _trace(stage, *faces[stage], config) for stage in stages}


def _trace(stage: str, face: nn.Module, inputs: _Inputs, config: MythosConfig) -> ir.Model:
    exported = torch.export.export(face, (), inputs.values, dynamic_shapes=inputs.axes)
    program = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=ops.OPSET,
        optimize=False,
        input_names=_names_of_inputs(inputs.values),
        output_names=_output_names(stage, config),
        verbose=False,
    )
    assert program is not None
    return _tidy(program.model, stage, inputs)


def _tidy(model: ir.Model, stage: str, inputs: _Inputs) -> ir.Model:
    """The traced graph with the names of this project, constants folded and nothing of the tracer left."""
    graph = model.graph
    graph.name = stage
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("network.")
        value.const_value = None
    names = _axis_names(graph, inputs)
    for node in graph:
        for value in node.outputs:
            _rename_axes(value, names)
    for value in graph.inputs:
        _rename_axes(value, names)
    fold_constants(model)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model)
    return model


def _axis_names(graph: ir.Graph, inputs: _Inputs) -> dict[str, str]:
    """The exporter's symbol of each dynamic axis -> the name the axis was given."""
    flat: list[Any] = []
    for axes in inputs.axes.values():
        flat += axes if isinstance(axes, list) else [axes]
    names = {}
    for value, axes in zip(graph.inputs, flat, strict=True):
        for axis, dim in (axes or {}).items():
            assert value.shape is not None
            if dim is not None:
                names[str(value.shape[axis])] = dim.__name__
    return names


def _rename_axes(value: ir.Value, names: Mapping[str, str]) -> None:
    if value.shape is None:
        return
    value.shape = ir.Shape(
        [
            size if isinstance(size, int) else names.get(str(size), f"{value.name}_{axis}")
            for axis, size in enumerate(value.shape)
        ]
    )


def _names_of_inputs(values: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, value in values.items():
        names += [f"{name}_{index}" for index in range(len(value))] if isinstance(value, list) else [name]
    return names


def _output_names(stage: str, config: MythosConfig) -> list[str]:
    if stage == "prelude":
        return ["e", *(f"rows_{index}" for index in range(config.prelude_layers))]
    if stage == "coda":
        return ["logits", *(f"rows_{index}" for index in range(config.coda_layers))]
    return [*(f"{name}_next" for name in LoopState._fields), "rows"]


@dataclass(frozen=True)
class _Sizes:
    """Example sizes of the free axes, distinct from each other so that none is tied to another, and their symbols.

    A batch that is free must not be one in the example either, or it would be specialised.
    """

    dtype: torch.dtype
    batch: int
    active: int
    batch_axis: Any
    active_axis: Any
    chunk_axis: Any
    context_axis: Any
    chunk: int = 5
    context: int = 7
    logit_count: int = 4

    @classmethod
    def of(cls, dtype: torch.dtype, one_sequence: bool) -> "_Sizes":
        batch, active, chunk, context = (torch.export.Dim(name) for name in ("batch", "active", "chunk", "context"))
        if one_sequence:
            return cls(dtype, 1, cls.chunk, None, chunk, chunk, context)
        return cls(dtype, 2, 3, batch, active, chunk, context)

    def window(self) -> dict[str, Tensor]:
        return {"length": torch.zeros((), dtype=torch.int64), "first": torch.zeros(self.batch, dtype=torch.int64)}

    def past(self, config: MythosConfig, count: int) -> list[Tensor]:
        return [self.floats(self.batch, self.context, config.cache_width) for _ in range(count)]

    def past_axes(self, count: int) -> list[Axes]:
        return [{0: self.batch_axis, 1: self.context_axis} for _ in range(count)]

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)


def _prelude_inputs(config: MythosConfig, sizes: _Sizes) -> _Inputs:
    layers = config.prelude_layers
    values = {
        "input_ids": torch.zeros(sizes.batch, sizes.chunk, dtype=torch.int64),
        **sizes.window(),
        "past": sizes.past(config, layers),
    }
    axes = {
        "input_ids": {0: sizes.batch_axis, 1: sizes.chunk_axis},
        "length": None,
        "first": {0: sizes.batch_axis},
        "past": sizes.past_axes(layers),
    }
    return _Inputs(values, axes)


def _step_inputs(config: MythosConfig, sizes: _Sizes) -> _Inputs:
    batch, chunk, active = sizes.batch, sizes.chunk, sizes.active
    values = {
        "h": sizes.floats(batch, chunk, config.dim),
        "out": sizes.floats(batch, active, config.dim),
        "halt_mass": torch.empty(batch, active),
        "depth": torch.zeros(batch, active, dtype=torch.int64),
        "e": sizes.floats(batch, chunk, config.dim),
        "step_index": torch.zeros(batch, chunk, dtype=torch.int64),
        "threshold": torch.empty(()),
        "min_depth": torch.zeros((), dtype=torch.int64),
        **sizes.window(),
        "past": sizes.past(config, 1)[0],
    }
    whole, tail = {0: sizes.batch_axis, 1: sizes.chunk_axis}, {0: sizes.batch_axis, 1: sizes.active_axis}
    axes = dict.fromkeys(values, None) | {
        "h": whole,
        "e": whole,
        "step_index": whole,
        "out": tail,
        "halt_mass": tail,
        "depth": tail,
        "first": {0: sizes.batch_axis},
        "past": sizes.past_axes(1)[0],
    }
    return _Inputs(values, axes)


def _coda_inputs(config: MythosConfig, sizes: _Sizes) -> _Inputs:
    layers = config.coda_layers
    values = {
        "out": sizes.floats(sizes.batch, sizes.chunk, config.dim),
        "logit_rows": torch.zeros(sizes.logit_count, dtype=torch.int64),
        **sizes.window(),
        "past": sizes.past(config, layers),
    }
    axes = {
        "out": {0: sizes.batch_axis, 1: sizes.chunk_axis},
        "logit_rows": {0: torch.export.Dim("logit_count")},
        "length": None,
        "first": {0: sizes.batch_axis},
        "past": sizes.past_axes(layers),
    }
    return _Inputs(values, axes)


@dataclass(frozen=True)
class TraceJob:
    """Which stages to trace into ``folder`` as ``<stage>.onnx``, over a weights file that need not exist yet.

    A bundle's graphs compute in float32 whatever ``dtype`` the weights are stored in. With ``engine`` they compute in
    ``dtype``, for one sequence, and their weights are only named: see ``weights.unwritten``.
    """

    config: dict[str, Any]
    max_context: int
    dtype: str
    stages: tuple[str, ...]
    folder: str
    engine: bool = False

    def run(self) -> None:
        config = MythosConfig(**self.config)
        if self.engine:
            dtype = STORAGE_TYPES[self.dtype].torch
            for stage, model in trace_stages(config, self.max_context, self.stages, dtype, one_sequence=True).items():
                name_weights(model.graph)
                ir.save(model, Path(self.folder) / f"{stage}.onnx")
            return
        plan = plan_weights(config, self.max_context, self.dtype)
        for stage, model in trace_stages(config, self.max_context, self.stages).items():
            attach_weights(model.graph, plan, Path(self.folder))
            ir.save(model, Path(self.folder) / f"{stage}.onnx")


def start_tracing(job: TraceJob, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Traces in a process of its own, beside the streaming of the weights; what torch prints goes to ``log``."""
    return child_process.start("mythos_edge.exporter.tracing", json.dumps(asdict(job)), stdout=log, stderr=log)


@contextmanager
def tracing(
    config: MythosConfig, context: int, dtype: str, folder: Path, *, engine: bool = False
) -> Iterator[Callable[[], None]]:
    """Tracing of all stages under way in processes of their own; calling what is yielded waits for them.

    Raises ExportError from that call when one of them fails.
    """
    logs = [folder / f"trace-{index}.log" for index in range(len(_TRACE_GROUPS))]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for stages, log in zip(_TRACE_GROUPS, logs, strict=True):
            with log.open("wb") as file:
                job = TraceJob(config.to_dict(), context, dtype, stages, str(folder), engine)
                processes.append(start_tracing(job, file))

        def finish() -> None:
            for process, log in zip(processes, logs, strict=True):
                if process.wait() != 0:
                    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
                    raise ExportError(f"tracing the model failed with status {process.returncode}: {lines[-1]}")

        yield finish
    finally:
        for process in processes:
            child_process.end(process)
        for log in logs:
            log.unlink(missing_ok=True)


if __name__ == "__main__":
    TraceJob(**json.loads(sys.argv[1])).run()
