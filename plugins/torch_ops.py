"""The torch and ONNX face of the custom ops: traced as single nodes of domain ``mythos``.

``TracedOps`` takes the place of ``model.layers.EagerOps`` while the exporter traces; it has shapes, not values.
"""

from collections.abc import Callable
from typing import Any

import onnx
import torch
from onnxscript.values import Opset
from torch import Tensor

from mythos_edge.model.layers import Window
from mythos_edge.plugins import ops

_MYTHOS = Opset(ops.DOMAIN, ops.VERSION)


@torch.library.custom_op("mythos::latent_attention", mutates_args=())
def _latent_attention(
    q: Tensor, rows: Tensor, past: Tensor, length: Tensor, first: Tensor, scale: float, value_dim: int
) -> Tensor:
    raise AssertionError("traced only")


@_latent_attention.register_fake
def _(q: Tensor, rows: Tensor, past: Tensor, length: Tensor, first: Tensor, scale: float, value_dim: int) -> Tensor:
    return q.new_empty((*q.shape[:3], value_dim))


@torch.library.custom_op("mythos::sparse_moe", mutates_args=())
def _sparse_moe(
    x: Tensor, router: Tensor, router_bias: Tensor, fc1: Tensor, fc2: Tensor, shared: list[Tensor], top_k: int
) -> Tensor:
    raise AssertionError("traced only")


@_sparse_moe.register_fake
def _(x: Tensor, router: Tensor, router_bias: Tensor, fc1: Tensor, fc2: Tensor, shared: list[Tensor], top_k: int) -> Tensor:
    return torch.empty_like(x)


class TracedOps:
    """``model.layers.Ops`` as nodes; shapes as there."""

    def latent_attention(
        self, q: Tensor, rows: Tensor, past: Tensor, window: Window, value_dim: int, scale: float
    ) -> Tensor:
        return _latent_attention(q, rows, past, window.length, window.first, scale, value_dim)

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
        return _sparse_moe(x, router, router_bias, fc1, fc2, list(shared or ()), top_k)


def _latent_attention_node(
    q: Any, rows: Any, past: Any, length: Any, first: Any, scale: float, value_dim: int
) -> Any:
    return _MYTHOS.LatentAttention(
        q, rows, past, length, first, scale=scale, value_dim=value_dim, plugin_namespace=ops.DOMAIN
    )


def _sparse_moe_node(x: Any, router: Any, router_bias: Any, fc1: Any, fc2: Any, shared: Any, top_k: int) -> Any:
    return _MYTHOS.SparseMoE(
        x, router, router_bias, fc1, fc2, *shared, top_k=top_k, plugin_namespace=ops.DOMAIN
    )


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How ``torch.onnx.export`` writes the traced ops: the value of ``custom_translation_table``."""
    return {
        torch.ops.mythos.latent_attention.default: _latent_attention_node,
        torch.ops.mythos.sparse_moe.default: _sparse_moe_node,
    }


def function_protos(used: dict[str, bool]) -> list[onnx.FunctionProto]:
    """The model-local functions of the ops in ``used``: op name -> whether its optional inputs are given."""
    return [
        onnx.parser.parse_function(ops.OPS[name].function_text(with_optional=with_optional))
        for name, with_optional in sorted(used.items())
    ]
