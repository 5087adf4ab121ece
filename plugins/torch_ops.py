"""The torch and ONNX face of the custom ops: traced as single nodes of domain ``mythos``.

``TracedOps`` takes the place of ``model.layers.EagerOps`` while the exporter traces; it has shapes, not values.
"""

from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

from mythos_edge.model.network import Window
from mythos_edge.plugins import ops


class TracedOps:
    """``model.network.Ops`` as nodes; shapes as there."""

    def latent_attention(
        self, q: Tensor, rows: Tensor, past: Tensor, window: Window, value_dim: int, scale: float
    ) -> Tensor:
        inputs = (q, rows, past, window.length, window.first)
        shape = (*q.shape[:3], value_dim)
        return _node(ops.LATENT_ATTENTION, inputs, shape, {"scale": scale, "value_dim": value_dim})

    def grouped_query_attention(
        self,
        q: Tensor,
        rows: Tensor,
        past: Tensor,
        window: Window,
        kv_heads: int,
        scale: float,
        window_size: int = 0,
    ) -> Tensor:
        inputs = (q, rows, past, window.length, window.first)
        shape = tuple(q.shape)
        attributes = {"scale": scale, "kv_heads": kv_heads, "window_size": window_size}
        return _node(ops.GROUPED_QUERY_ATTENTION, inputs, shape, attributes)

    def sparse_moe(
        self,
        x: Tensor,
        router: Tensor,
        router_bias: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        shared: tuple[Tensor, Tensor] | None,
        top_k: int,
    ) -> Tensor:
        inputs = (x, router, router_bias, fc1, fc2, *(shared or ()))
        return _node(ops.SPARSE_MOE, inputs, tuple(x.shape), {"top_k": top_k})

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
        turned = torch.onnx.ops.rotary_embedding(
            x.flatten(2), cos, sin, positions, interleaved=True, num_heads=x.shape[2]
        )
        return turned.view(x.shape)


def _node(
    spec: ops.OpSpec, inputs: tuple[Tensor, ...], shape: tuple[int, ...], attributes: dict[str, int | float]
) -> Tensor:
    # TensorRT looks a node's plugin up by this attribute; without it the function body always wins there.
    attrs: dict[str, Any] = {**attributes, "plugin_namespace": ops.DOMAIN}
    return torch.onnx.ops.symbolic(
        f"{ops.DOMAIN}::{spec.name}", inputs, attrs, dtype=inputs[0].dtype, shape=shape, version=ops.VERSION
    )


def extra_of(node: ir.Node) -> int:
    """The extra attribute of a custom op's node."""
    attribute = node.attributes.get(ops.OPS[node.op_type].extra)
    return 0 if attribute is None else attribute.as_int()


def add_functions(model: ir.Model) -> None:
    """Gives ``model`` the function bodies of the custom ops its nodes call, in loop bodies too."""
    nodes = [node for node in model.graph.all_nodes() if node.domain == ops.DOMAIN]
    with_extra = {node.op_type for node in nodes if extra_of(node)}
    for node in nodes:
        spec = ops.OPS[node.op_type]
        typed = node.inputs[spec.inputs.index(spec.typed_by)]
        assert typed is not None
        text = spec.function_text(
            with_optional=len(node.inputs) > len(spec.inputs),
            wide=typed.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
            with_extra=node.op_type in with_extra,
        )
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        # What the bodies are made of has not changed since, and ONNX Runtime wants one opset in a model.
        function.opset_imports[""] = max(ops.OPSET, model.graph.opset_imports[""])
        model.functions[function.identifier()] = function
