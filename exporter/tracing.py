"""Traces the stages of a model on fake tensors: graphs without a single weight in memory.

What comes out are onnx_ir models whose initializers have the names and shapes of a network's parameters, and
stand-ins for values; ``weights`` gives them values on disk. Not here: the Loop (``loop_graph``), lowering, files.
"""

import gc
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import opset23
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from mythos_edge.exporter.kept_graphs import Graphs, kept
from mythos_edge.exporter.stage_inputs import ATTENTION, PIECE, Inputs, Sizes, inputs_of, names_of_inputs, output_names
from mythos_edge.exporter.weights import STORAGE_TYPES, name_weights
from mythos_edge.model.errors import ExportError, raise_interrupt
from mythos_edge.model.families.family import Config
from mythos_edge.model.layout import network_of
from mythos_edge.model.network import Halting, LoopedNetwork, LoopState, Window, in_dtype
from mythos_edge.model.observed import PREFIX, watching
from mythos_edge.model.stages import STAGES
from mythos_edge.plugins import ops
from mythos_edge.plugins.torch_ops import TracedOps

_OP: Any = opset23
# The node that stands in a traced graph for an observed value.
_OBSERVED = "Observed"
# torch's exporter changes torch for all threads while it traces.
_ONE_AT_A_TIME = threading.Lock()
# Loggers that tell of what torch's exporter and its passes leave alone, which is meant.
_TALKATIVE = ("torch.onnx", "onnx_ir", "onnxscript")


class _Stages(nn.Module):
    """All stages as one module, so that torch's exporter, which takes longest to get going, runs once.

    The attention of all blocks has one shape, and half of all ops: it is traced once, as a piece of its own that each
    block calls.
    """

    # The exporter fails on NamedTuple arguments; these faces keep the inputs flat and named.
    def __init__(self, network: LoopedNetwork) -> None:
        super().__init__()
        self.network = network
        attentions = network.attentions()
        if attentions:
            first, *others = map(_but_for_weights, attentions.values())
            assert all(other == first for other in others), f"{', '.join(attentions)} differ in more than weights"
            real = next(iter(attentions.values())).forward
            self._real_attention: Any = partial(real, rope=network.rotation()[1])
        for attention in attentions.values():
            attention.forward = partial(_call_attention, attention)

    def forward(
        self,
        prelude: dict[str, Any],
        step: dict[str, Any],
        coda: dict[str, Any],
        attention: dict[str, Any] | None = None,
    ) -> tuple[tuple[Tensor, ...], ...]:
        made = self._prelude(**prelude), self._step(**step), self._coda(**coda)
        return made if attention is None else (*made, self._attention(**attention))

    def _attention(
        self, x: Tensor, positions: Tensor, past: Tensor, length: Tensor, first: Tensor
    ) -> tuple[Tensor, ...]:
        window = Window(length, first)
        return tuple(self._real_attention(x.flatten(0, 1), positions=positions, past=past, window=window))

    def _prelude(self, input_ids: Tensor, length: Tensor, first: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        e, rows = self.network.prelude(input_ids, Window(length, first), *past)
        return e, *rows

    def _step(
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
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        state, halting, window = (
            LoopState(h, out, halt_mass, depth),
            Halting(threshold, min_depth),
            Window(length, first),
        )
        made, rows = self.network.loop_step(state, e, step_index, halting, window, *past)
        # What a loop step leaves alone, as the halting mass where nothing halts, is an output of its own nevertheless.
        carried = [new.clone() if new is old else new for new, old in zip(made, state, strict=True)]
        return *carried, *rows

    def _coda(
        self, out: Tensor, logit_rows: Tensor, length: Tensor, first: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        logits, rows = self.network.coda(out, logit_rows, Window(length, first), *past)
        return logits.float(), *rows


def _named_in_graph(part: str, value: Tensor) -> Tensor:
    """A node in the place of an observed value; ``_dissolve_observed`` makes a name of it."""
    return torch.onnx.ops.symbolic(
        f"{ops.DOMAIN}::{_OBSERVED}",
        (value,),
        {"part": part},
        dtype=value.dtype,
        shape=value.shape,
        version=ops.VERSION,
    )


def _dissolve_observed(graph: ir.Graph) -> None:
    """Gives observed values their names, as ``observed/attention.0``, and takes the nodes away that marked them."""
    seen: Counter[str] = Counter()
    for node in [node for node in graph if node.domain == ops.DOMAIN and node.op_type == _OBSERVED]:
        (value,), part = node.inputs, node.attributes["part"].as_string()
        assert value is not None
        ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        if value.producer() is not None and not value.is_graph_output():
            value.name = f"{PREFIX}{part}.{seen[part]}"
        seen[part] += 1


def _but_for_weights(module: nn.Module) -> list[Any]:
    """All that a module computes with; of its weights the names and shapes alone."""
    assert next(module.buffers(), None) is None, "what an attention computes with is a parameter, or no tensor"
    weights = [(name, weight.shape, weight.dtype) for name, weight in module.named_parameters()]
    parts = [(type(part), {k: v for k, v in vars(part).items() if k[0] != "_"}) for part in module.modules()]
    return [weights, parts]


def _call_attention(
    attention: nn.Module, x: Tensor, rope: nn.Module, positions: Tensor, past: Tensor, window: Window
) -> tuple[Tensor, ...]:
    inputs = (x, positions, past, *window, *rope.parameters(), *attention.parameters())
    shapes = (x.shape, (*positions.shape, past.shape[-1]))
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{ops.DOMAIN}::{ATTENTION}", inputs, dtypes=(x.dtype, x.dtype), shapes=shapes, version=ops.VERSION
        )
    )


def traced_stages(
    config: Config, max_context: int, dtype: str = "fp32", *, one_sequence: bool = False
) -> dict[str, ir.Model]:
    """The stage graphs by name, which compute in ``dtype``; their weights are stand-ins: see ``weights.unwritten``.

    Whatever the dtype, halting and the loop table are float32, and so are the logits. With ``one_sequence`` the batch
    is one and all rows of a chunk are active. Traced once for each shape of model, and kept. Raises ExportError.
    """

    def make() -> Graphs:
        traced = _trace(config, max_context, STORAGE_TYPES[dtype].torch, one_sequence)
        return Graphs({stage: ir.to_proto(model).SerializeToString() for stage, model in traced.items()})

    depends_on = {
        "family": config.family,
        "config": config.to_dict(),
        "max_context": max_context,
        "dtype": dtype,
        "one_sequence": one_sequence,
    }
    found = kept("stages", depends_on, make)
    return {stage: ir.from_proto(onnx.load_model_from_string(data)) for stage, data in found.files.items()}


def _trace(config: Config, max_context: int, dtype: torch.dtype, one_sequence: bool) -> dict[str, ir.Model]:
    mode = FakeTensorMode()
    # Looking a symbolic shape up costs torch more than working it out.
    mode.cache_enabled = False
    try:
        with _ONE_AT_A_TIME, _undisturbed(), mode:
            network = in_dtype(network_of(config, max_context, TracedOps()), dtype).requires_grad_(False).eval()
            stages = dict(STAGES) | ({ATTENTION: PIECE} if network.attentions() else {})
            inputs = {
                name: inputs_of(stage, Sizes(name, config.looped, dtype, one_sequence))
                for name, stage in stages.items()
            }
            values, axes = ({stage: getattr(one, kind) for stage, one in inputs.items()} for kind in ("values", "axes"))
            with watching(_named_in_graph):
                exported = torch.export.export(_Stages(network), (), values, dynamic_shapes=axes)
            model = _in_onnx(
                exported,
                [f"{stage}/{name}" for stage, one in inputs.items() for name in names_of_inputs(one.values)],
                [f"{stage}/{name}" for stage in inputs for name in output_names(stage, config.looped.slots)],
            )
            attention = _function(model, network, inputs[ATTENTION]) if ATTENTION in inputs else None
            return {stage: _tidy(_inlined(model, stage, attention), inputs[stage]) for stage in STAGES}
    except Exception as error:  # torch's exporter can fail in any way
        raise_interrupt(error)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise ExportError(f"tracing the model failed: {reason}") from error


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Without warnings, log lines, and the garbage collector, which would search millions of objects of torch's."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels, collects = [logger.level for logger in loggers], gc.isenabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.disable()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if collects:
                gc.enable()


def _in_onnx(exported: ExportedProgram, input_names: list[str], output_names: list[str]) -> ir.Model:
    """The program in ONNX, without what torch's exporter does before: tracing it again, to decompose its ops.

    Of the ops here it knows nearly all as they are. It does it where one mutates a tensor, or is unknown to it.
    """
    decompose, whole = exported.run_decompositions, any(_mutates(node.target) for node in exported.graph.nodes)
    while True:
        exported.run_decompositions = decompose if whole else lambda *_: exported
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=ops.OPSET,
                optimize=False,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=_TRANSLATIONS,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError:
            if whole:
                raise
            whole = True
        else:
            assert program is not None
            return program.model


def _mutates(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _cast(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
    return _OP.Cast(x, to=dtype)


def _subtract_from(x: Any, other: float, alpha: float = 1) -> Any:
    assert alpha == 1
    return _OP.Sub(_OP.CastLike(_OP.Constant(value_float=float(other)), x), x)


def _both(x: Any, y: Any) -> Any:
    return _OP.And(x, y)


# Ops that the exporter knows only decomposed.
_TRANSLATIONS: dict[Any, Any] = {
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.rsub.Scalar: _subtract_from,
    torch.ops.aten.__and__.Tensor: _both,
}


def _part(model: ir.Model, stage: str) -> ir.Model:
    """A copy of ``stage`` alone."""
    part = model.clone()
    part.graph.name = stage
    for values in (part.graph.inputs, part.graph.outputs):
        own = [value for value in values if str(value.name).startswith(f"{stage}/")]
        values.clear()
        values.extend(own)
    passes.RemoveUnusedNodesPass()(part)
    for value in [*part.graph.inputs, *part.graph.outputs]:
        value.name = str(value.name).removeprefix(f"{stage}/")
    return part


def _function(model: ir.Model, network: LoopedNetwork, inputs: Inputs) -> ir.Function:
    """The attention of all blocks as a function of what ``_call_attention`` gives, its weights among it."""
    graph = _part(model, ATTENTION).graph
    _rename_all_axes(graph, inputs)
    x, *others = graph.inputs
    for node, index in tuple(x.uses()):
        if node.op_type == "Shape":
            assert node.attributes["end"].as_int() <= len(others[0].shape or ())
            node.replace_input_with(index, others[0])
    ((flatten, _),) = x.uses()
    # The blocks have flat rows already; the piece starts from unflattened ones to know what they are a product of.
    rows = ir.Value(name="rows", type=flatten.outputs[0].type, shape=flatten.outputs[0].shape)
    ir.convenience.replace_all_uses_with(flatten.outputs[0], rows)
    graph.remove(flatten, safe=True)
    name, attention = next(iter(network.attentions().items()))
    modules = dict([network.rotation(), (name, attention)])
    weights = [
        graph.initializers.pop(f"network.{place}.{parameter}")
        for place, module in modules.items()
        for parameter, _ in module.named_parameters()
    ]
    graph.inputs.clear()
    graph.inputs.extend([rows, *others, *weights])
    return ir.Function(ops.DOMAIN, ATTENTION, graph=graph, attributes=[])


def _inlined(model: ir.Model, stage: str, attention: ir.Function | None) -> ir.Model:
    part = _part(model, stage)
    if attention is None:
        return part
    part.functions[attention.identifier()] = attention
    passes.InlinePass()(part)
    return part


def _tidy(model: ir.Model, inputs: Inputs) -> ir.Model:
    """The stage with the names of this project, constants folded, and nothing of the tracer left."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        value.name = str(value.name).removeprefix("network.")
        value.const_value = None
    _rename_all_axes(graph, inputs)
    fold_constants(model)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.DeduplicateInitializersPass(),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
    )(model)
    _dissolve_observed(graph)
    name_weights(graph)
    return model


def _rename_all_axes(graph: ir.Graph, inputs: Inputs) -> None:
    names = _axis_names(graph, inputs)
    # Of what was inlined, the axes are named already.
    names |= {name: name for name in names.values()}
    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        _rename_axes(value, names)


def _axis_names(graph: ir.Graph, inputs: Inputs) -> dict[str, str]:
    """The exporter's symbol of each dynamic axis -> the name the axis was given."""
    flat: list[Any] = []
    for axes in inputs.axes.values():
        flat += axes if isinstance(axes, list) else [axes]
    names = {}
    for value, axes in zip(graph.inputs, flat, strict=True):
        for axis, dim in (axes or {}).items():
            assert value.shape is not None
            names[str(value.shape[axis])] = dim.__name__.removeprefix(f"{graph.name}_")
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
