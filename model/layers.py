"""Layers that families share, in the layout a bundle stores.

Rows are flat: ``x (N, D)`` with N = B * S, because only attention needs to know which rows form a sequence.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.network import Ops, Window


class RMSNorm(nn.Module):
    """x / rms(x) * weight, eps inside the root."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(dim)), eps

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Rope(nn.Module):
    """Cosine and sine of position * frequency up to ``max_context``, built in float32 whatever the model's dtype."""

    def __init__(self, rope_dim: int, max_context: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.cos = nn.Parameter(torch.empty(max_context, rope_dim // 2), requires_grad=False)
        self.sin = nn.Parameter(torch.empty(max_context, rope_dim // 2), requires_grad=False)

    def forward(self, x: Float[Tensor, "B S H P"], positions: Int[Tensor, "B S"]) -> Float[Tensor, "B S H P"]:
        """Each adjacent pair of ``x`` turned by its position's angle."""
        return self.ops.rotate(x, self.cos.to(x.dtype), self.sin.to(x.dtype), positions)

    def positions(self, window: Window, chunk: int) -> Int[Tensor, "B S"]:
        """The position of each new row in its sequence; rows that nothing looks at (padding, and rows of a sequence
        that has ended at the longest context while others of its batch go on) get the nearest there is."""
        columns = window.length + torch.arange(chunk)
        return (columns.unsqueeze(0) - window.first.unsqueeze(1)).clamp(min=0, max=self.cos.shape[0] - 1)


def rope_table(
    dim: int, max_context: int, theta: float, start: int = 0
) -> tuple[Float[Tensor, "M F"], Float[Tensor, "M F"]]:
    """Cosine and sine tables of the positions ``start`` .. ``max_context``, half of ``dim`` wide, in float32."""
    positions = torch.arange(start, max_context, dtype=torch.float32)
    angles = torch.outer(positions, rope_frequencies(dim, theta))
    return angles.cos(), angles.sin()


def rope_frequencies(dim: int, theta: float) -> Float[Tensor, "F"]:
    """Angle of each pair of channels at position 1, in float32 as the references compute it."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention; a cache row is keys | values of all key/value heads."""

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.heads, self.kv_heads, self.head_dim = ops, heads, kv_heads, head_dim
        self.qkv = nn.Parameter(torch.empty((heads + 2 * kv_heads) * head_dim, dim))
        self.wo = nn.Parameter(torch.empty(dim, heads * head_dim))

    def forward(
        self,
        x: Float[Tensor, "N D"],
        rope: Rope,
        positions: Int[Tensor, "B S"],
        past: Float[Tensor, "B C W"],
        window: Window,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "B S W"]]:
        """The attention output and the chunk's new cache rows."""
        batch, chunk = positions.shape
        kv_dim = self.kv_heads * self.head_dim
        q, key, value = nn.functional.linear(x, self.qkv).split([self.heads * self.head_dim, kv_dim, kv_dim], dim=-1)
        q = rope(q.view(batch, chunk, self.heads, -1), positions)
        key = rope(key.view(batch, chunk, self.kv_heads, -1), positions)
        rows = torch.cat([key.flatten(2), value.view(batch, chunk, -1)], dim=-1)
        mixed = self.ops.grouped_query_attention(q, rows, past, window, self.kv_heads, self.head_dim**-0.5)
        return nn.functional.linear(mixed.reshape(-1, self.heads * self.head_dim), self.wo), rows
