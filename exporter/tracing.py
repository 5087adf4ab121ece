"""Traces each stage once, on fake tensors: graphs without a single weight in memory.

What comes out are onnx_ir models whose initializers have names and shapes (those of ``Network``) but no values;
``weights`` gives them values on disk. Not here: the Loop (``loop_graph``), lowering, files.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythos_edge.exporter.weights import attach_weights, plan_weights
from mythos_edge.model.bundle import STAGES
from mythos_edge.model.config import MythosConfig
from mythos_edge.model.layers import Window
from mythos_edge.model.loop import Halting, LoopState
from mythos_edge.model.network import Network
from mythos_edge.plugins import ops
from mythos_edge.plugins.torch_ops import TracedOps

Axes = dict[int, Any]


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
        return logits, *rows


@dataclass(frozen=True)
class _Inputs:
    """Example inputs of a stage by name, and which of their axes are symbolic."""

    values: dict[str, Any]
    axes: dict[str, Any]


def trace_stages(config: MythosConfig, max_context: int, stages: Sequence[str] = STAGES) -> dict[str, ir.Model]:
    """The stage graphs by name, initializers without values."""
    with FakeTensorMode():
        network = Network(config, max_context, TracedOps()).requires_grad_(False).eval()
        faces: dict[str, tuple[nn.Module, _Inputs]] = {
            "prelude": (_Prelude(network), _prelude_inputs(config)),
            "step": (_Step(network), _step_inputs(config)),
            "coda": (_Coda(network), _coda_inputs(config)),
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


def _dims() -> tuple[Any, ...]:
    return tuple(torch.export.Dim(name) for name in ("batch", "chunk", "context"))


# Example sizes are distinct from each other and from 1, so that no axis is specialised or tied to another.
_B, _S, _A, _C, _L = 2, 5, 3, 7, 4


def _window() -> dict[str, Tensor]:
    return {"length": torch.zeros((), dtype=torch.int64), "first": torch.zeros(_B, dtype=torch.int64)}


def _prelude_inputs(config: MythosConfig) -> _Inputs:
    batch, chunk, context = _dims()
    layers = config.prelude_layers
    values = {"input_ids": torch.zeros(_B, _S, dtype=torch.int64), **_window(), "past": _past(config, layers)}
    axes = {
        "input_ids": {0: batch, 1: chunk},
        "length": None,
        "first": {0: batch},
        "past": [{0: batch, 1: context} for _ in range(layers)],
    }
    return _Inputs(values, axes)


def _step_inputs(config: MythosConfig) -> _Inputs:
    batch, chunk, context = _dims()
    active = torch.export.Dim("active")
    values = {
        "h": torch.empty(_B, _S, config.dim),
        "out": torch.empty(_B, _A, config.dim),
        "halt_mass": torch.empty(_B, _A),
        "depth": torch.zeros(_B, _A, dtype=torch.int64),
        "e": torch.empty(_B, _S, config.dim),
        "step_index": torch.zeros(_B, _S, dtype=torch.int64),
        "threshold": torch.empty(()),
        "min_depth": torch.zeros((), dtype=torch.int64),
        **_window(),
        "past": _past(config, 1)[0],
    }
    whole, tail = {0: batch, 1: chunk}, {0: batch, 1: active}
    axes = dict.fromkeys(values, None) | {
        "h": whole,
        "e": whole,
        "step_index": whole,
        "out": tail,
        "halt_mass": tail,
        "depth": tail,
        "first": {0: batch},
        "past": {0: batch, 1: context},
    }
    return _Inputs(values, axes)


def _coda_inputs(config: MythosConfig) -> _Inputs:
    batch, chunk, context = _dims()
    layers = config.coda_layers
    values = {
        "out": torch.empty(_B, _S, config.dim),
        "logit_rows": torch.zeros(_L, dtype=torch.int64),
        **_window(),
        "past": _past(config, layers),
    }
    axes = {
        "out": {0: batch, 1: chunk},
        "logit_rows": {0: torch.export.Dim("logit_count")},
        "length": None,
        "first": {0: batch},
        "past": [{0: batch, 1: context} for _ in range(layers)],
    }
    return _Inputs(values, axes)


def _past(config: MythosConfig, count: int) -> list[Tensor]:
    return [torch.empty(_B, _C, config.cache_width) for _ in range(count)]


@dataclass(frozen=True)
class TraceJob:
    """Which stages to trace into ``folder`` as ``<stage>.onnx``, over a weights file that need not exist yet."""

    config: dict[str, Any]
    max_context: int
    dtype: str
    stages: tuple[str, ...]
    folder: str

    def run(self) -> None:
        config = MythosConfig(**self.config)
        plan = plan_weights(config, self.max_context, self.dtype)
        for stage, model in trace_stages(config, self.max_context, self.stages).items():
            attach_weights(model.graph, plan, Path(self.folder))
            ir.save(model, Path(self.folder) / f"{stage}.onnx")


def start_tracing(job: TraceJob, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Traces in a process of its own, beside the streaming of the weights; what torch prints goes to ``log``."""
    command = [sys.executable, "-m", "mythos_edge.exporter.tracing", json.dumps(asdict(job))]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


if __name__ == "__main__":
    TraceJob(**json.loads(sys.argv[1])).run()
