"""One loop step: table, recurrent block, depth-wise LoRA, injection, halting. Pure; the loop itself is the caller's.

Source: OpenMythos 8c68c1f, ``RecurrentBlock``, ``LoRAAdapter``, ``LTIInjection``, ``ACTHalting``.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.families.openmythos.layers import RMS_EPS, Block
from mythos_edge.model.layers import RMSNorm, Rope
from mythos_edge.model.network import Halting, LoopState, Ops, Window
from mythos_edge.model.observed import observed


class LoopTable(nn.Module):
    """The loop table: sine | cosine of step_index * frequency on the first channels, zero elsewhere.

    Source: ``loop_index_embedding``. Differs: float32 in every dtype (the reference loses 0.046 in bf16).
    """

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        loop_dim = config.loop_dim
        n_sin = min(math.ceil(loop_dim / 2), loop_dim)
        self.sin_frequency = nn.Parameter(torch.empty(n_sin), requires_grad=False)
        self.cos_frequency = nn.Parameter(torch.empty(loop_dim - n_sin), requires_grad=False)
        self.rest = config.dim - loop_dim

    def forward(self, step_index: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        index = step_index.unsqueeze(1).to(self.sin_frequency.dtype)
        waves = torch.cat([(index * self.sin_frequency).sin(), (index * self.cos_frequency).cos()], dim=-1)
        return nn.functional.pad(waves, (0, self.rest))


def loop_frequencies(loop_dim: int) -> Float[Tensor, "F"]:
    """Angular frequency of each sine channel of the loop table, float32."""
    return 1.0 / (10000.0 ** (torch.arange(0, loop_dim, 2, dtype=torch.float32) / max(loop_dim, 1)))


class DepthLoRA(nn.Module):
    """Low-rank correction whose scale is chosen by loop step; steps beyond the trained depth use the last scale."""

    def __init__(self, config: MythosConfig) -> None:
        super().__init__()
        self.last = config.max_loop_iters - 1
        self.down = nn.Parameter(torch.empty(config.lora_rank, config.dim))
        self.scale = nn.Parameter(torch.empty(config.max_loop_iters, config.lora_rank))
        self.up = nn.Parameter(torch.empty(config.lora_rank, config.dim))

    def forward(self, x: Float[Tensor, "N D"], step_index: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        scale = self.scale.index_select(0, step_index.clamp(max=self.last))
        return (nn.functional.linear(x, self.down) * scale) @ self.up


class LoopStep(nn.Module):
    """One loop step of the recurrent block over a chunk."""

    def __init__(self, config: MythosConfig, ops: Ops) -> None:
        super().__init__()
        self.table = LoopTable(config)
        self.norm = RMSNorm(config.dim, RMS_EPS)
        self.block = Block(config, ops, moe=True)
        self.lora = DepthLoRA(config)
        # A = exp(-exp(clamp(log_dt + log_A))) is constant at inference, so the layout stores A itself.
        self.decay = nn.Parameter(torch.empty(config.dim))
        self.inject = nn.Parameter(torch.empty(config.dim))
        self.halt_weight = nn.Parameter(torch.empty(1, config.dim))
        self.halt_bias = nn.Parameter(torch.empty(1))

    def forward(
        self,
        state: LoopState,
        e: Float[Tensor, "B S D"],
        step_index: Int[Tensor, "B S"],
        halting: Halting,
        rope: Rope,
        positions: Int[Tensor, "B S"],
        past: Float[Tensor, "B C W"],
        window: Window,
    ) -> tuple[LoopState, Float[Tensor, "B S W"]]:
        """The state after this loop step and the chunk's new cache rows.

        Every row has a ``step_index`` of its own: rows of different sequences need not be at the same loop step.
        """
        h, e_rows, index = state.h.flatten(0, 1), e.flatten(0, 1), step_index.flatten()
        x = observed("injection", self.norm(h + self.table(index).to(h.dtype) + e_rows))
        y, rows = self.block(x, rope, positions, past, window)
        y = y + observed("lora", self.lora(y, index))
        h = (self.decay * h + self.inject * e_rows + y).view(state.h.shape)
        return self.halt(state, h, step_index, halting), rows

    def halt(
        self, state: LoopState, h: Float[Tensor, "B S D"], step_index: Int[Tensor, "B S"], halting: Halting
    ) -> LoopState:
        """The state with ``h`` weighed into the output of the rows still running; halted rows stay frozen.

        Source: ``RecurrentBlock.forward``, the remainder rule. Halting is decided in float32 or wider.
        """
        active = h[:, h.shape[1] - state.out.shape[1] :]
        wide = active.to(state.halt_mass.dtype)
        logit = (wide * self.halt_weight.to(wide.dtype)).sum(-1) + self.halt_bias.to(wide.dtype)
        # Not Sigmoid: ONNX Runtime's is cut off at -18, and a position that never halts may live on weights of 1e-9,
        # which the coda's norms bring back to size.
        p = 1 / (1 + (-logit).exp())
        taken = step_index[:, h.shape[1] - state.out.shape[1] :] + 1
        p = torch.where(taken >= halting.min_depth, p, 0.0)
        running = state.halt_mass < halting.threshold
        mass = state.halt_mass + p
        weight = torch.where(mass >= halting.threshold, (1 - state.halt_mass).clamp(min=0), p)
        weight = torch.where(running, weight, 0.0)
        return LoopState(
            h=h,
            out=state.out + weight.unsqueeze(-1).to(state.out.dtype) * active,
            halt_mass=torch.where(running, mass, state.halt_mass),
            depth=state.depth + running.to(state.depth.dtype),
        )
