"""The three stages of Dory.

Source: transformers 5.24.0, ``models/dory/modeling_dory.py`` ``DoryModel`` and ``DoryLMHead``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.eager_ops import EagerOps
from mythos_edge.model.families.dory.config import DoryConfig
from mythos_edge.model.families.dory.layers import Layer, unit
from mythos_edge.model.layers import Rope
from mythos_edge.model.network import Halting, LoopedNetwork, LoopState, Ops, Window
from mythos_edge.model.observed import observed


class Network(LoopedNetwork):
    """The weights and stages of a Dory model. Fresh parameters are uninitialised: load or fake them.

    ``max_context`` is the number of positions in the rotary tables, one of each kind of attention; ``ops`` computes or
    traces the custom ops. The state ``h`` has length 1, as the reference's has after the norm that its next reader
    starts with.
    """

    always_wide = (".cos", ".sin", "logit_scale")

    def __init__(self, config: DoryConfig, max_context: int | None = None, ops: Ops | None = None) -> None:
        super().__init__(config.looped)
        ops = EagerOps() if ops is None else ops
        positions = max_context or config.max_seq_len
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.ropes = nn.ModuleDict({kind: Rope(config.head_dim, positions, ops) for kind in config.thetas})
        self.layers = nn.ModuleDict(
            {
                stage: nn.ModuleList(Layer(config, config.layer_types[place], ops) for place in places)
                for stage, places in config.sections.items()
            }
        )
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.logit_scale = nn.Parameter(torch.empty(config.vocab_size))

    def prelude(
        self, input_ids: Int[Tensor, "B S"], window: Window, *past: Float[Tensor, "B C W"]
    ) -> tuple[Float[Tensor, "B S D"], list[Float[Tensor, "B S W"]]]:
        return self._run("prelude", unit(nn.functional.embedding(input_ids, self.embed)), window, past)

    def loop_step(
        self,
        state: LoopState,
        e: Float[Tensor, "B S D"],
        step_index: Int[Tensor, "B S"],
        halting: Halting,
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[LoopState, list[Float[Tensor, "B S W"]]]:
        h, rows = self._run("step", observed("injection", unit(state.h + e)), window, past)
        active = h[:, h.shape[1] - state.out.shape[1] :]
        running = state.halt_mass < halting.threshold
        out = torch.where(running.unsqueeze(-1), active, state.out)
        return LoopState(h, out, state.halt_mass, state.depth + running.to(state.depth.dtype)), rows

    def coda(
        self,
        out: Float[Tensor, "B S D"],
        logit_rows: Int[Tensor, "L"],
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[Float[Tensor, "B L V"], list[Float[Tensor, "B S W"]]]:
        x, rows = self._run("coda", out, window, past)
        x = x.index_select(1, logit_rows)
        logits = nn.functional.linear(x.flatten(0, 1), self.head).to(self.logit_scale.dtype) * self.logit_scale
        return logits.unflatten(0, (x.shape[0], x.shape[1])), rows

    def _run(
        self, stage: str, x: Float[Tensor, "B S D"], window: Window, past: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "B S D"], list[Tensor]]:
        """The rows after all layers of a stage, each with its own slot."""
        layers = self.layers[stage]
        assert isinstance(layers, nn.ModuleList)
        rope = next(iter(self.ropes.values()))
        assert isinstance(rope, Rope)
        positions, flat, new_rows = rope.positions(window, x.shape[1]), x.flatten(0, 1), []
        for layer, slot in zip(layers, past, strict=True):
            assert isinstance(layer, Layer)
            flat, rows = layer(flat, self.ropes[layer.kind], positions, slot, window)
            new_rows.append(rows)
        return flat.view(x.shape), new_rows
