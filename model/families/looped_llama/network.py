"""The three stages of looped Llamas: the embedding, the whole stack as one loop step, the head.

Source: ByteDance/Ouro-1.4B, ``modeling_ouro.py`` ``OuroModel``; transformers, ``LlamaDecoderLayer``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.eager_ops import EagerOps, swiglu
from mythos_edge.model.families.looped_llama.config import StackConfig
from mythos_edge.model.layers import GroupedQueryAttention, RMSNorm, Rope
from mythos_edge.model.network import Halting, LoopedNetwork, LoopState, Ops, Window
from mythos_edge.model.observed import observed

# The largest float32 below 1, where halting mass ends: a threshold of 1 means never.
_MOST_MASS = 1 - 2**-24


class InnerLayer(nn.Module):
    """One layer of the stack: attention and SwiGLU, each after a norm, and before another where the family has it."""

    def __init__(self, c: StackConfig, ops: Ops) -> None:
        super().__init__()
        heads = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.attn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attn = GroupedQueryAttention(c.hidden_size, *heads, ops)
        self.ffn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.gate_up = nn.Parameter(torch.empty(2 * c.intermediate_size, c.hidden_size))
        self.down = nn.Parameter(torch.empty(c.hidden_size, c.intermediate_size))
        if c.post_norms:
            self.attn_post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
            self.ffn_post_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_norms = c.post_norms

    def forward(
        self,
        x: Float[Tensor, "N D"],
        rope: Rope,
        positions: Int[Tensor, "B S"],
        past: Float[Tensor, "B C W"],
        window: Window,
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "B S W"]]:
        """The layer's output and its new cache rows."""
        attended, rows = self.attn(self.attn_norm(x), rope, positions, past, window)
        x = x + observed("attention", self.attn_post_norm(attended) if self.post_norms else attended)
        made = swiglu(self.ffn_norm(x), self.gate_up, self.down)
        return x + observed("experts", self.ffn_post_norm(made) if self.post_norms else made), rows


class Network(LoopedNetwork):
    """The weights and stages of a looped Llama. Fresh parameters are uninitialised: load or fake them.

    ``max_context`` is the number of positions in the rope tables; ``ops`` computes or traces the custom ops.
    """

    # What a position's depth is decided with, and tables of angles, which need their digits.
    always_wide = ("rope.cos", "rope.sin", "gate_weight", "gate_bias")

    def __init__(self, config: StackConfig, max_context: int | None = None, ops: Ops | None = None) -> None:
        super().__init__(config.looped)
        ops = EagerOps() if ops is None else ops
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.rope = Rope(config.head_dim, max_context or config.max_seq_len, ops)
        self.layers = nn.ModuleList(InnerLayer(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.norm_in_step, self.gated = config.norm_in_step, config.gated
        if self.gated:
            self.gate_weight = nn.Parameter(torch.empty(1, config.hidden_size))
            self.gate_bias = nn.Parameter(torch.empty(1))

    def attentions(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in (f"layers.{i}.attn" for i in range(len(self.layers)))}

    def rotation(self) -> tuple[str, nn.Module]:
        return "rope", self.rope

    def prelude(
        self, input_ids: Int[Tensor, "B S"], window: Window, *past: Float[Tensor, "B C W"]
    ) -> tuple[Float[Tensor, "B S D"], list[Float[Tensor, "B S W"]]]:
        return nn.functional.embedding(input_ids, self.embed), []

    def loop_step(
        self,
        state: LoopState,
        e: Float[Tensor, "B S D"],
        step_index: Int[Tensor, "B S"],
        halting: Halting,
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[LoopState, list[Float[Tensor, "B S W"]]]:
        positions, x, new_rows = self.rope.positions(window, state.h.shape[1]), state.h.flatten(0, 1), []
        for layer, slot in zip(self.layers, past, strict=True):
            x, rows = layer(x, self.rope, positions, slot, window)
            new_rows.append(rows)
        h = (self.norm(x) if self.norm_in_step else x).view(state.h.shape)
        return self._halt(state, h, step_index, halting), new_rows

    def coda(
        self,
        out: Float[Tensor, "B S D"],
        logit_rows: Int[Tensor, "L"],
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[Float[Tensor, "B L V"], list[Float[Tensor, "B S W"]]]:
        x = out.index_select(1, logit_rows)
        flat = x.flatten(0, 1)
        logits = nn.functional.linear(flat if self.norm_in_step else self.norm(flat), self.head)
        return logits.unflatten(0, (x.shape[0], x.shape[1])), []

    def _halt(
        self, state: LoopState, h: Float[Tensor, "B S D"], step_index: Int[Tensor, "B S"], halting: Halting
    ) -> LoopState:
        """The state in which the output of the rows that still run is ``h``; halted rows stay frozen.

        Source: ``OuroForCausalLM``, the choice of the exit step. Differs: gate and mass are float32 or wider in every
        dtype, and the mass stays below 1, so that a threshold of 1 means never and not when rounding reaches it.
        """
        active = h[:, h.shape[1] - state.out.shape[1] :]
        running, mass = state.halt_mass < halting.threshold, self._mass(state, active, step_index, halting)
        return LoopState(
            h=h,
            out=torch.where(running.unsqueeze(-1), active, state.out),
            halt_mass=torch.where(running, mass, state.halt_mass),
            depth=state.depth + running.to(state.depth.dtype),
        )

    def _mass(
        self, state: LoopState, active: Float[Tensor, "B A D"], step_index: Int[Tensor, "B S"], halting: Halting
    ) -> Float[Tensor, "B A"] | float:
        """The halting mass of the rows of ``active`` after this loop step; 0 without a gate."""
        if not self.gated:
            return 0.0
        wide = active.to(state.halt_mass.dtype)
        logit = (wide * self.gate_weight.to(wide.dtype)).sum(-1) + self.gate_bias.to(wide.dtype)
        taken = step_index[:, step_index.shape[1] - active.shape[1] :] + 1
        # Not Sigmoid: ONNX Runtime's is cut off at -18.
        lam = torch.where(taken >= halting.min_depth, 1 / (1 + (-logit).exp()), 0.0)
        return (1 - (1 - state.halt_mass) * (1 - lam)).clamp(max=_MOST_MASS)
