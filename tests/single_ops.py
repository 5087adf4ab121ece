"""One custom op alone: what it is fed, a model of it, and what ONNX Runtime makes of that."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mythos_edge.exporter.lowering.ort_kernels import Pack
from mythos_edge.exporter.rounding import Rounding, round_blocks, unpacked
from mythos_edge.plugins import ops
from mythos_edge.runtime.backends.ort_session import ort_session

Feeds = dict[str, np.ndarray]
# float32 sums of a few hundred products of size 1.
TOLERANCE = 2e-5
# Ops of com.microsoft in a lowered graph -> element types of the CUDA provider's kernels. Looked at in onnxruntime-gpu
# 1.31.1; MoE ignored activation_alpha before 1.28, and QMoE knew no weights_prepacked.
CUDA_KERNELS = {
    "FusedMatMul": ("FLOAT",),
    "GatherBlockQuantized": ("FLOAT",),
    "MatMulNBits": ("FLOAT16",),
    "MoE": ("FLOAT", "FLOAT16"),
    "QMoE": ("FLOAT16",),
    "QuickGelu": ("FLOAT", "FLOAT16"),
}


def expert_feeds(random: np.random.Generator, shape: tuple[int, ...]) -> Feeds:
    """Inputs of SparseMoE for a shape of (rows, dim, experts, top-k, hidden, shared hidden, bias)."""
    rows, dim, experts, _, hidden, shared, biased = shape
    sizes = {
        "x": (rows, dim),
        "router": (experts, dim),
        "router_bias": (experts,),
        "fc1": (experts, 2 * hidden, dim),
        "fc2": (experts, dim, hidden),
    }
    if shared:
        sizes |= {"shared_gate_up": (2 * shared, dim), "shared_down": (dim, shared)}
    feeds = {name: (0.5 * random.standard_normal(size)).astype(np.float32) for name, size in sizes.items()}
    feeds["router_bias"] = 3 * feeds["router_bias"] * np.float32(biased)
    return feeds


def model_of(spec: ops.OpSpec, feeds: Feeds, attributes: dict[str, Any], constants: tuple[str, ...] = ()) -> ir.Model:
    """A model of one node; ``constants`` of the feeds are initializers."""
    values = {}
    for name, array in feeds.items():
        tensor = ir.tensor(array, name=name)
        constant = tensor if name in constants else None
        values[name] = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=constant
        )
    node = ir.node(spec.name, list(values.values()), attributes, domain=ops.DOMAIN)
    output = node.outputs[0]
    output.name, output.type = spec.output, ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([f"axis_{axis}" for axis in range(next(iter(feeds.values())).ndim)])
    graph = ir.Graph(
        [value for name, value in values.items() if name not in constants],
        node.outputs,
        nodes=[node],
        initializers=[values[name] for name in constants],
        opset_imports={"": ops.OPSET, ops.DOMAIN: ops.VERSION},
        name="one",
    )
    return ir.Model(graph, ir_version=10)


def experts_model(feeds: Feeds, top_k: int) -> ir.Model:
    """SparseMoE with its weights in the model: ``x`` is its only input."""
    return model_of(ops.SPARSE_MOE, feeds, {"top_k": top_k}, constants=tuple(name for name in feeds if name != "x"))


def packed(matrix: np.ndarray, rounding: Rounding, scale: type = np.float32) -> tuple[Pack, np.ndarray]:
    """A stack of matrices, or one, as the kernels read it, and what it stands for with scales of type ``scale``."""
    flat = matrix.reshape(-1, matrix.shape[-1])
    values, scales = round_blocks(flat, rounding)
    scales = scales.astype(scale).astype(np.float32)
    meant = unpacked(values, scales, rounding.bits, matrix.shape[-1]).reshape(matrix.shape)
    if matrix.ndim == 3:
        values, scales = (part.reshape(*matrix.shape[:2], -1) for part in (values, scales))
    return Pack(rounding.bits, rounding.block, matrix.shape[-1], ir.tensor(values), ir.tensor(scales)), meant


def run_saved(model: ir.Model, feeds: Feeds, folder: Path) -> np.ndarray:
    """The first output of ``model`` on the kernels and options of the runtime."""
    ir.save(model, folder / "model.onnx")
    session = ort_session(folder / "model.onnx", prepack=True)
    result: np.ndarray = session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})[0]
    return result
