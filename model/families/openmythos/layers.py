"""The layers of the recurrent-depth transformer, in the layout a bundle stores.

Rows are flat: ``x (N, D)`` with N = B * S, because only attention needs to know which rows form a sequence.
Weights that are multiplied with the same input are one matrix, the key/value up-projection is kept as the two
absorbed matrices, and the experts are stacked; ``layout`` makes these from a checkpoint's tensors.
Not here: the loop (``loop``), the stages (``network``), training.

Source: OpenMythos 8c68c1f, ``open_mythos/main.py``: of what families share, ``RMSNorm``, ``precompute_rope_freqs`` and
``apply_rope`` (real tables, two float32 rows instead of one complex row), ``GQAttention``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.eager_ops import chosen_experts, swiglu
from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.layers import GroupedQueryAttention, RMSNorm, Rope
from mythos_edge.model.network import Ops, Window
from mythos_edge.model.observed import observed

# Source: ``RMSNorm``.
RMS_EPS = 1e-6


class LatentAttention(nn.Module):
    """Multi-latent attention computed in latent space: keys and values are the cached rows themselves.

    Source: ``MLAttention``. Differs: caches the *normalised* latent and one rope key shared by the heads, and
    multiplies the query and the result by the up-projection instead of every cached row (equal by associativity).
    """

    def __init__(self, config: MythosConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        heads, latent, rope = config.n_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.qkv_down = nn.Parameter(torch.empty(config.q_lora_rank + latent + rope, config.dim))
        self.q_norm = RMSNorm(config.q_lora_rank, RMS_EPS)
        self.kv_norm = RMSNorm(latent, RMS_EPS)
        self.q_up = nn.Parameter(torch.empty(heads * config.head_dim, config.q_lora_rank))
        self.key_up = nn.Parameter(torch.empty(heads, config.qk_nope_head_dim, latent))
        self.value_up = nn.Parameter(torch.empty(heads, latent, config.v_head_dim))
        self.wo = nn.Parameter(torch.empty(config.dim, heads * config.v_head_dim))

    def forward(
        self,
        x: Float[Tensor, "N D"],
        rope: Rope,
        positions: Int[Tensor, "B S"],
        past: Float[Tensor, "B C W"],
        window: Window,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "B S W"]]:
        """The attention output and the chunk's new cache rows, latent | rope key."""
        c = self.config
        batch, chunk = positions.shape
        down = nn.functional.linear(x, self.qkv_down)
        q_latent, latent, key_rope = down.split([c.q_lora_rank, c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        q = nn.functional.linear(self.q_norm(q_latent), self.q_up)
        q_nope, q_rope = q.split([c.n_heads * c.qk_nope_head_dim, c.n_heads * c.qk_rope_head_dim], dim=-1)
        q_absorbed = q_nope.view(-1, c.n_heads, c.qk_nope_head_dim).transpose(0, 1) @ self.key_up  # (H, N, R)
        q_absorbed = q_absorbed.transpose(0, 1).reshape(batch, chunk, c.n_heads, c.kv_lora_rank)
        q_rope = rope(q_rope.view(batch, chunk, c.n_heads, c.rope_dim), positions)
        key_rope = rope(key_rope.view(batch, chunk, 1, c.rope_dim), positions)
        rows = torch.cat([self.kv_norm(latent).view(batch, chunk, c.kv_lora_rank), key_rope.squeeze(2)], dim=-1)
        mixed = self.ops.latent_attention(
            torch.cat([q_absorbed, q_rope], dim=-1), rows, past, window, c.kv_lora_rank, c.head_dim**-0.5
        )
        values = mixed.view(-1, c.n_heads, c.kv_lora_rank).transpose(0, 1) @ self.value_up  # (H, N, V)
        return nn.functional.linear(values.transpose(0, 1).reshape(-1, c.n_heads * c.v_head_dim), self.wo), rows


class DenseFeedForward(nn.Module):
    """SwiGLU of a prelude or coda block. Source: ``Expert``."""

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * config.dense_dim, config.dim))
        self.down = nn.Parameter(torch.empty(config.dim, config.dense_dim))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return swiglu(x, self.gate_up, self.down)


class SparseMoE(nn.Module):
    """Routed and shared experts of the recurrent block. Source: ``MoEFFN``.

    ``fc1[e]`` interleaves the rows of gate and up (g0, u0, g1, u1, ...), the layout ONNX Runtime's kernel reads.
    """

    def __init__(self, config: MythosConfig, ops: Ops) -> None:
        super().__init__()
        self.ops, self.top_k = ops, config.n_experts_per_tok
        self.router = nn.Parameter(torch.empty(config.n_experts, config.dim))
        self.router_bias = nn.Parameter(torch.empty(config.n_experts))
        self.fc1 = nn.Parameter(torch.empty(config.n_experts, 2 * config.expert_dim, config.dim))
        self.fc2 = nn.Parameter(torch.empty(config.n_experts, config.dim, config.expert_dim))
        if config.shared_dim:
            self.shared_gate_up = nn.Parameter(torch.empty(2 * config.shared_dim, config.dim))
            self.shared_down = nn.Parameter(torch.empty(config.dim, config.shared_dim))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        shared = (self.shared_gate_up, self.shared_down) if hasattr(self, "shared_down") else None
        return self.ops.sparse_moe(x, self.router, self.router_bias, self.fc1, self.fc2, shared, self.top_k)

    def choice(self, x: Float[Tensor, "N D"]) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N"]]:
        """The experts that ``forward`` uses for each row, and how clear the choice is; see ``chosen_experts``."""
        logits = nn.functional.linear(x, self.router).to(torch.promote_types(x.dtype, torch.float32))
        return chosen_experts(logits + self.router_bias, self.top_k)


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with its residual. Source: ``TransformerBlock``."""

    def __init__(self, config: MythosConfig, ops: Ops, *, moe: bool) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, RMS_EPS)
        heads = config.n_heads, config.n_kv_heads, config.head_dim
        self.attn = LatentAttention(config, ops) if config.is_mla else GroupedQueryAttention(config.dim, *heads, ops)
        self.ffn_norm = RMSNorm(config.dim, RMS_EPS)
        self.ffn = SparseMoE(config, ops) if moe else DenseFeedForward(config)

    def forward(
        self,
        x: Float[Tensor, "N D"],
        rope: Rope,
        positions: Int[Tensor, "B S"],
        past: Float[Tensor, "B C W"],
        window: Window,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "B S W"]]:
        """The block's output and its new cache rows."""
        attended, rows = self.attn(self.attn_norm(x), rope, positions, past, window)
        x = x + observed("attention", attended)
        return x + observed("experts", self.ffn(self.ffn_norm(x))), rows
