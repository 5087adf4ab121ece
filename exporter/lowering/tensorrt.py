"""From a bundle to the strongly typed ONNX files that TensorRT gets, and that ONNX Runtime can run as well.

The stages are traced anew in the compute dtype, for one sequence. Custom ops keep their function bodies; nodes that
TensorRT is to compute by a plugin carry ``plugin_namespace``. Not here: building engines (``engine``), the manifest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mythos_edge.exporter.loop_graph import loop_model
from mythos_edge.exporter.lowering import tensorrt_passes
from mythos_edge.exporter.lowering.tensorrt_weights import attach, write_engine_weights
from mythos_edge.exporter.tracing import traced_stages
from mythos_edge.exporter.weights import bytes_read, is_unwritten
from mythos_edge.model.bundle import Bundle
from mythos_edge.model.errors import BuildError, ExportError
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.table import config_of
from mythos_edge.model.layout import recipes
from mythos_edge.plugins import ops
from mythos_edge.plugins.torch_ops import add_functions

# TensorRT's own attention fuses up to this head size, in multiples of 8; there is none in float32.
_LARGEST_HEAD, _HEAD_STEP = 256, 8
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class EngineOptions:
    """The choices of an engine: ``dtype`` fp16, bf16 or fp32; ``layout`` step or loop; ``weights`` none (those
    of ``dtype``), int8, int4 or fp8. A chunk has ``max_rows`` rows at most, a sequence ``max_context`` positions.
    """

    dtype: str
    layout: str
    weights: str
    max_context: int
    max_rows: int


@dataclass(frozen=True)
class LoweredForTensorRT:
    """ONNX files by name: ``prelude``, ``step`` and ``coda``, or ``model``; and the plugin nodes of each.

    ``fixed_bytes`` of weights are read once a token and ``step_bytes`` at each loop step.
    """

    graphs: dict[str, Path]
    plugins: dict[str, int]
    fixed_bytes: int
    step_bytes: int


def lower_for_tensorrt(
    bundle: Bundle, folder: Path, options: EngineOptions, progress: Progress = lambda phase, fraction: None
) -> LoweredForTensorRT:
    """The graphs written to ``folder``, with their weights beside them. Peak memory does not grow with the model.

    Inputs and outputs are those of the portable stages for a batch of one, without ``first``; where TensorRT's own
    attention is used, ``past`` is (1, 1, max_context + max_rows, W) and ``past_next`` takes the place of ``rows``.
    Raises BuildError.
    """
    config = config_of(bundle.manifest)
    assert options.max_context <= bundle.manifest.max_context, "a target checks its sizes"
    progress("graphs", 0.0)
    try:
        stages = traced_stages(config, bundle.manifest.max_context, options.dtype, one_sequence=True)
    except ExportError as error:
        raise BuildError(str(error)) from error
    for model in stages.values():
        _lower(model, config, options, bundle.manifest.max_context)
    models = dict(stages) if options.layout == "step" else {"model": loop_model(stages, config.looped)}
    weights = {
        name: value
        for model in stages.values()
        for name, value in model.graph.initializers.items()
        if is_unwritten(value)
    }
    tensors = write_engine_weights(weights, bundle, folder, lambda fraction: progress("weights", fraction))
    graphs = {name: _written(model, folder / f"{name}.onnx", tensors) for name, model in models.items()}
    for model in stages.values():
        attach(model.graph, tensors)
    sizes = {stage: bytes_read(model.graph, config) for stage, model in stages.items()}
    return LoweredForTensorRT(
        graphs=graphs,
        plugins={name: tensorrt_passes.plugin_nodes(model) for name, model in models.items()},
        fixed_bytes=sizes["prelude"] + sizes["coda"],
        step_bytes=sizes["step"],
    )


def attention_is_native(config: Config, options: EngineOptions) -> bool:
    """Whether TensorRT's own attention computes it: of 16 bits, with heads it has kernels for, outside a Loop.

    Latent attention is multi-query attention to it, with the whole cache row as key and as value.
    """
    head = config.looped.cache_width if _is_latent(config) else config.looped.head_dim
    fits = head <= _LARGEST_HEAD and head % _HEAD_STEP == 0
    return options.layout == "step" and options.dtype != "fp32" and fits


def _is_latent(config: Config) -> bool:
    return config.looped.attention == "latent"


def _lower(model: ir.Model, config: Config, options: EngineOptions, positions: int) -> None:
    tensorrt_passes.for_engine(model, positions)
    tensorrt_passes.part_shared_experts(model)
    if options.weights != "none":
        names = {recipe.name for recipe in recipes(config, 1) if recipe.narrow}
        tensorrt_passes.round_weights(model, options.weights, names)
    if options.layout == "loop":
        tensorrt_passes.rotate_by_hand(model)
    if attention_is_native(config, options):
        tensorrt_passes.attend_natively(model, options.max_context + options.max_rows)
    elif not _is_latent(config):
        tensorrt_passes.use_body(model, ops.GROUPED_QUERY_ATTENTION.name)


def _written(model: ir.Model, path: Path, tensors: dict[str, ir.TensorProtocol]) -> Path:
    tensorrt_passes.tidy(model)
    attach(model.graph, tensors)
    add_functions(model)
    ir.save(model, path)
    return path
