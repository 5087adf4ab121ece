"""ONNX Runtime CPU face of the custom ops: the same graph with the runtime's own fastest kernels.

Weights are not touched, so the lowered graph shares the weights file with the portable one. The attention ops stay:
their bodies are inlined by ONNX Runtime and already are what was measured to be fastest there (plain products over
the cached rows; its attention kernels want other cache layouts and were 2-4x slower).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mythos_edge.plugins import ops

MICROSOFT = "com.microsoft"
# Scores of experts that were not chosen; exp of the difference to any real score is exactly 0 in float32.
_NOT_CHOSEN = -1e30


def lower_for_ort(model: ir.Model) -> ir.Model:
    """A copy of ``model`` in which every ``mythos::SparseMoE`` is ``com.microsoft::MoE`` and plain products.

    The selection bias must have its values: a bias of zeros needs no nodes.
    """
    lowered = model.clone()
    for node in list(lowered.graph):
        if (node.domain, node.op_type) == (ops.DOMAIN, ops.SPARSE_MOE.name):
            _lower_sparse_moe(lowered.graph, node)
    lowered.graph.opset_imports[MICROSOFT] = 1
    lowered.graph.name = f"{model.graph.name} for ONNX Runtime"
    return lowered


def _lower_sparse_moe(graph: ir.Graph, node: ir.Node) -> None:
    inputs = dict(zip(ops.SPARSE_MOE.inputs + ops.SPARSE_MOE.optional, node.inputs, strict=False))
    writer = _Writer(graph, node)
    top_k = node.attributes["top_k"].as_int()
    routing = writer.add("Gemm", [inputs["x"], inputs["router"]], transB=1)
    bias = inputs["router_bias"]
    if bias is not None and _bias_matters(bias):
        routing = _biased_choice(writer, routing, bias, top_k)
    y = writer.add(
        "MoE",
        [inputs["x"], routing, inputs["fc1"], None, inputs["fc2"]],
        MICROSOFT,
        k=top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
    )
    if "shared_down" in inputs:
        both = writer.add("Gemm", [inputs["x"], inputs["shared_gate_up"]], transB=1)
        gate, up = writer.add_many("Split", [both], 2, axis=-1, num_outputs=2)
        # QuickGelu with alpha 1 is x * sigmoid(x); SiLU as such has no CPU kernel.
        silu = writer.add("QuickGelu", [gate], MICROSOFT, alpha=1.0)
        hidden = writer.add("Mul", [silu, up])
        # The Gemm adds the routed experts' sum itself.
        y = writer.add("Gemm", [hidden, inputs["shared_down"], y], transB=1)
    name = node.outputs[0].name
    ir.convenience.replace_all_uses_with(node.outputs[0], y, replace_graph_outputs=True)
    y.name, y.type, y.shape = name, node.outputs[0].type, node.outputs[0].shape
    graph.remove(node, safe=True)


def _bias_matters(bias: ir.Value) -> bool:
    assert bias.const_value is not None, "lower after the weights are attached"
    return bool(np.any(bias.const_value.numpy()))


def _biased_choice(writer: "_Writer", logits: ir.Value, bias: ir.Value, top_k: int) -> ir.Value:
    """Logits whose top-k are the experts chosen with the bias, with their unbiased values; the others drop out."""
    biased = writer.add("Add", [logits, bias])
    k = writer.add("Constant", [], value=ir.tensor([top_k], dtype=ir.DataType.INT64))
    _, chosen = writer.add_many("TopK", [biased, k], 2)
    values = writer.add("GatherElements", [logits, chosen], axis=1)
    dropped = writer.add(
        "ConstantOfShape",
        [writer.add("Shape", [logits])],
        value=ir.tensor([_NOT_CHOSEN], dtype=ir.DataType.FLOAT),
    )
    return writer.add("ScatterElements", [dropped, chosen, values], axis=1)


class _Writer:
    """Writes nodes before ``node``."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node, self._count = graph, node, 0

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: Any) -> ir.Value:
        return self.add_many(op_type, inputs, 1, domain, **attributes)[0]

    def add_many(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> Sequence[ir.Value]:
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        for value in made.outputs:
            self._count += 1
            value.name = f"{self._node.name}/{op_type.lower()}_{self._count}"
        made.name = str(made.outputs[0].name)
        self._graph.insert_before(self._node, made)
        return made.outputs
