"""The layers of Dory, an nGPT: every hidden state has length 1, and a layer moves it towards where its block points.

Rows are flat: ``x (N, D)``. A row that goes into a layer has length 1, and so has the row that comes out: the reference
normalises at the start of a layer instead, which is the same norm at the same place of the whole. Learned scales are
stored as they multiply (``layout``). Not here: the stages (``network``).

Source: transformers 5.24.0, ``models/dory/modeling_dory.py``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.families.dory.config import SLIDING, DoryConfig
from mythos_edge.model.layers import Rope
from mythos_edge.model.network import Ops, Window
from mythos_edge.model.observed import observed

EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """``x`` with its last axis brought to length 1. Source: ``DoryL2Norm``.

    Differs: written as the mean of squares, for which runtimes have a kernel.
    """
    size = x.shape[-1]
    return nn.functional.rms_norm(x, (size,), x.new_full((size,), size**-0.5), EPS / size)


class Attention(nn.Module):
    """Grouped-query attention with queries and keys of length 1 and a gate. Source: ``DoryAttention``.

    A cache row is keys | values of all key/value heads. With a ``window_size`` a row sees as many positions.
    Differs: the channels of each head are in the order in which adjacent ones are rotated together.
    """

    def __init__(self, config: DoryConfig, window_size: int, ops: Ops) -> None:
        super().__init__()
        self.config, self.window_size, self.ops = config, window_size, ops
        self.qkvg = nn.Parameter(torch.empty(2 * config.query_dim + 2 * config.kv_dim, config.hidden_size))
        self.query_scale = nn.Parameter(torch.empty(config.query_dim))
        self.gate_scale = nn.Parameter(torch.empty(config.query_dim))
        self.wo = nn.Parameter(torch.empty(config.hidden_size, config.query_dim))

    def forward(
        self,
        x: Float[Tensor, "N D"],
        rope: Rope,
        positions: Int[Tensor, "B S"],
        past: Float[Tensor, "B C W"],
        window: Window,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "B S W"]]:
        """The attention output and the chunk's new cache rows."""
        c = self.config
        batch, chunk = positions.shape
        parts = [c.query_dim, c.kv_dim, c.kv_dim, c.query_dim]
        q, key, value, gate = nn.functional.linear(x, self.qkvg).split(parts, dim=-1)
        q = rope(unit(q.view(batch, chunk, c.num_attention_heads, c.head_dim)), positions)
        q = q * self.query_scale.view(c.num_attention_heads, c.head_dim)
        key = rope(unit(key.view(batch, chunk, c.num_key_value_heads, c.head_dim)), positions)
        rows = torch.cat([key.flatten(2), value.view(batch, chunk, c.kv_dim)], dim=-1)
        mixed = self.ops.grouped_query_attention(
            q, rows, past, window, c.num_key_value_heads, c.head_dim**-0.5, self.window_size
        )
        gated = mixed.reshape(-1, c.query_dim) * torch.sigmoid(gate * self.gate_scale)
        return nn.functional.linear(unit(gated), self.wo), rows


class FeedForward(nn.Module):
    """SwiGLU whose halves have learned scales and whose hidden row has length 1. Source: ``DoryMLP``."""

    def __init__(self, config: DoryConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * config.intermediate_size, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(2 * config.intermediate_size))
        self.down = nn.Parameter(torch.empty(config.hidden_size, config.intermediate_size))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        gate, up = (nn.functional.linear(x, self.gate_up) * self.scale).chunk(2, dim=-1)
        return nn.functional.linear(unit(gate * torch.sigmoid(gate) * up), self.down)


class Layer(nn.Module):
    """Attention and feed-forward, each followed by a step towards its direction. Source: ``DoryDecoderLayer``."""

    def __init__(self, config: DoryConfig, kind: str, ops: Ops) -> None:
        super().__init__()
        self.kind = kind
        self.attn = Attention(config, config.sliding_window if kind == SLIDING else 0, ops)
        self.attn_rate = nn.Parameter(torch.empty(config.hidden_size))
        self.mlp = FeedForward(config)
        self.mlp_rate = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self,
        x: Float[Tensor, "N D"],
        rope: Rope,
        positions: Int[Tensor, "B S"],
        past: Float[Tensor, "B C W"],
        window: Window,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "B S W"]]:
        """Rows of length 1 from rows of length 1, and the layer's new cache rows."""
        attended, rows = self.attn(x, rope, positions, past, window)
        x = observed("attention", unit(x + self.attn_rate * (unit(attended) - x)))
        return observed("experts", unit(x + self.mlp_rate * (unit(self.mlp(x)) - x))), rows
