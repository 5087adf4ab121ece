"""Whole models in one file, as a bundle's model.onnx, that somebody has edited or converted."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime as ort
from planted_faults import Graph

Change = Callable[[ir.Model], None]


def edited(bundle: Path, folder: Path, *changes: Change) -> Path:
    """A copy of the bundle's model.onnx, with its weights, that was changed."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(bundle / "weights.safetensors", folder)
    model = ir.load(bundle / "model.onnx")
    for change in changes:
        change(model)
    ir.save(model, folder / "other.onnx")
    return folder / "other.onnx"


def in_loop(change: Callable[[Graph], None]) -> Change:
    """The change of the loop step, in the body of the Loop."""
    return lambda model: change(Graph(loop_of(model).attributes["body"].as_graph()))


def loop_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "Loop")


def rename_all(model: ir.Model) -> None:
    """Every value but the model's own inputs and outputs, and the weights, gets a number for a name."""
    kept = {*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()}
    for number, node in enumerate(model.graph.all_nodes()):
        node.name = f"node_{number}"
        for place, value in enumerate(node.outputs):
            if value not in kept:
                value.name = f"v{number}_{place}"


def optimised(file: Path) -> Path:
    """The file as ONNX Runtime's own optimiser rewrites it for every machine."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    made = file.parent / "optimised.onnx"
    options.optimized_model_filepath = str(made)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "64")
    ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return made


def inlined(file: Path) -> Path:
    """The file without functions."""
    from onnx.inliner import inline_local_functions

    made = file.parent / "inlined.onnx"
    onnx.save(inline_local_functions(onnx.load(file, load_external_data=False)), made)
    return made


def newer(file: Path) -> Path:
    """The file without functions, in a later version of the standard operators."""
    from onnx.version_converter import convert_version

    made = file.parent / "newer.onnx"
    model = onnx.load(inlined(file), load_external_data=False)
    (before,) = (one.version for one in model.opset_import if not one.domain)
    onnx.save(convert_version(model, before + 1), made)
    return made
