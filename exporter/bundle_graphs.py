"""All graph files of a new bundle: its stages, the loops woven from them, and those of the target that it starts with.

Imports torch's exporter, so an export that finds its graphs kept does not import this.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from mythos_edge.exporter import loop_graph
from mythos_edge.exporter.portable import write_portable
from mythos_edge.exporter.targets.ort_cpu import OrtCpuTarget
from mythos_edge.exporter.targets.ort_files import write_graphs
from mythos_edge.exporter.targets.spec import record_of
from mythos_edge.exporter.tracing import traced_stages
from mythos_edge.exporter.weights import WeightsPlan, attach_weights
from mythos_edge.model.families.family import Config
from mythos_edge.model.looped import NARROW_CACHES
from mythos_edge.model.manifest import GraphSpec, TargetRecord, TensorSpec
from mythos_edge.model.stages import STAGES
from mythos_edge.plugins.torch_ops import add_functions


def write_bundle_graphs(
    config: Config,
    max_context: int,
    dtype: str,
    plan: WeightsPlan,
    folder: Path,
    portable: bool,
    progress: Callable[[str, float], None],
) -> tuple[dict[str, GraphSpec], str, TargetRecord]:
    """Writes the graphs to ``folder``, where the weights of ``plan`` are, and checks them.

    The record of the target names no bundle yet.
    """
    stages = traced_stages(config, max_context)
    for model in stages.values():
        attach_weights(model.graph, plan, folder)
    models = dict(stages)
    models["model"] = loop_graph.loop_model(stages, config.looped)
    models["model_with_past"] = loop_graph.loop_model_with_past(stages, config.looped)
    for index, (name, model) in enumerate(models.items()):
        progress("graphs", index / len(models))
        add_functions(model)
        path = folder / f"{name}.onnx"
        ir.save(model, path)
        onnx.checker.check_model(str(path), full_check=True)
    graphs = {
        name: GraphSpec(f"{name}.onnx", _tensor_specs(model.graph.inputs), _tensor_specs(model.graph.outputs))
        for name, model in models.items()
    }
    if portable:
        graphs = write_portable(graphs, folder, folder)
    stages = {stage: ir.load(folder / f"{stage}.onnx") for stage in STAGES}
    return graphs, *_exported_target(stages, folder, config, dtype)


def _exported_target(
    stages: Mapping[str, ir.Model], folder: Path, config: Config, stored: str
) -> tuple[str, TargetRecord]:
    """The target that every export has: float32 weights that stay mapped in the bundle's file.

    ``stored`` is the dtype of the large weights there.
    """
    target = OrtCpuTarget()
    note = f"weights are stored in {stored}; the CPU has no fast {stored} and computes in fp32"
    forms = replace(target.forms(config.looped), note="" if stored == "fp32" else note)
    written = write_graphs(stages, folder, target.name, config, forms, caches=NARROW_CACHES)
    return target.name, record_of(target.kind, written, "")


def _tensor_specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    specs = []
    for value in values:
        assert value.shape is not None
        assert value.dtype is not None
        shape = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
        specs.append(TensorSpec(str(value.name), str(value.dtype.numpy()), shape))
    return tuple(specs)
