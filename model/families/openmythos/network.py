"""The three stages of OpenMythos.

Source: OpenMythos 8c68c1f, ``open_mythos/main.py`` ``OpenMythos``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.eager_ops import EagerOps
from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.families.openmythos.layers import RMS_EPS, Block, SparseMoE
from mythos_edge.model.families.openmythos.loop import LoopStep
from mythos_edge.model.layers import RMSNorm, Rope
from mythos_edge.model.network import Choices, Halting, LoopedNetwork, LoopState, Ops, Window


class Network(LoopedNetwork):
    """The weights and stages of an OpenMythos model. Fresh parameters are uninitialised: load or fake them.

    ``max_context`` is the number of positions in the rope tables; ``ops`` computes or traces the custom ops.
    """

    # What a position's depth is decided with, and tables of angles, which need their digits.
    always_wide = ("rope.cos", "rope.sin", "sin_frequency", "cos_frequency", "halt_weight", "halt_bias")

    def __init__(self, config: MythosConfig, max_context: int | None = None, ops: Ops | None = None) -> None:
        super().__init__(config.looped)
        ops = EagerOps() if ops is None else ops
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.rope = Rope(config.rope_dim, max_context or config.max_seq_len, ops)
        self.prelude_blocks = nn.ModuleList(Block(config, ops, moe=False) for _ in range(config.prelude_layers))
        self.step = LoopStep(config, ops)
        self.coda_blocks = nn.ModuleList(Block(config, ops, moe=False) for _ in range(config.coda_layers))
        self.norm = RMSNorm(config.dim, RMS_EPS)

    def attentions(self) -> dict[str, nn.Module]:
        names = [f"prelude_blocks.{index}.attn" for index in range(len(self.prelude_blocks))]
        names += ["step.block.attn", *(f"coda_blocks.{index}.attn" for index in range(len(self.coda_blocks)))]
        return {name: self.get_submodule(name) for name in names}

    def rotation(self) -> tuple[str, nn.Module]:
        return "rope", self.rope

    @contextmanager
    def choices(self) -> Iterator[Choices]:
        found: list[tuple[Tensor, Tensor]] = []
        experts = self.step.block.ffn
        assert isinstance(experts, SparseMoE)
        watch = experts.register_forward_pre_hook(lambda _, given: found.append(experts.choice(*given)))
        try:
            yield found
        finally:
            watch.remove()

    def prelude(
        self, input_ids: Int[Tensor, "B S"], window: Window, *past: Float[Tensor, "B C W"]
    ) -> tuple[Float[Tensor, "B S D"], list[Float[Tensor, "B S W"]]]:
        x = nn.functional.embedding(input_ids, self.embed)
        return self._run_blocks(self.prelude_blocks, x, window, past)

    def loop_step(
        self,
        state: LoopState,
        e: Float[Tensor, "B S D"],
        step_index: Int[Tensor, "B S"],
        halting: Halting,
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[LoopState, list[Float[Tensor, "B S W"]]]:
        positions = self.rope.positions(window, state.h.shape[1])
        next_state, rows = self.step(state, e, step_index, halting, self.rope, positions, *past, window)
        return next_state, [rows]

    def coda(
        self,
        out: Float[Tensor, "B S D"],
        logit_rows: Int[Tensor, "L"],
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[Float[Tensor, "B L V"], list[Float[Tensor, "B S W"]]]:
        x, rows = self._run_blocks(self.coda_blocks, out, window, past)
        x = x.index_select(1, logit_rows)
        logits = nn.functional.linear(self.norm(x.flatten(0, 1)), self.embed)
        return logits.unflatten(0, (x.shape[0], x.shape[1])), rows

    def _run_blocks(
        self, blocks: nn.ModuleList, x: Float[Tensor, "B S D"], window: Window, past: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "B S D"], list[Tensor]]:
        positions, flat, new_rows = self.rope.positions(window, x.shape[1]), x.flatten(0, 1), []
        for block, slot in zip(blocks, past, strict=True):
            flat, rows = block(flat, self.rope, positions, slot, window)
            new_rows.append(rows)
        return flat.view(x.shape), new_rows
