"""The three stages, and the eager model built only from them.

The stages are pure functions with named tensors; the exporter traces exactly these. ``Network.forward`` is the
parity reference: it runs them over whole sequences without a cache, the way the reference does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.config import MythosConfig
from mythos_edge.model.layers import Block, EagerOps, Ops, RMSNorm, Rope, SparseMoE, Window
from mythos_edge.model.loop import Halting, LoopState, LoopStep


class Scored(NamedTuple):
    """The result of a full pass, and how near its decisions were to others at every loop step.

    ``margin`` is the distance of a position's halting mass to the threshold after the loop step, ``router_margin`` by
    how much the last chosen expert beat the best of the others (infinite where all are chosen), ``experts`` are those
    chosen.
    """

    logits: Float[Tensor, "B L V"]
    depth: Int[Tensor, "B S"]
    margin: Float[Tensor, "B S M"]
    router_margin: Float[Tensor, "B S M"]
    experts: Int[Tensor, "B S M K"]


class Network(nn.Module):
    """All weights of a model, and its stages. Fresh parameters are uninitialised: load or fake them.

    ``max_context`` is the number of positions in the rope tables; ``ops`` computes or traces the custom ops.
    """

    def __init__(self, config: MythosConfig, max_context: int | None = None, ops: Ops | None = None) -> None:
        super().__init__()
        ops = ops or EagerOps()
        self.config = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.rope = Rope(config, max_context or config.max_seq_len, ops)
        self.prelude_blocks = nn.ModuleList(Block(config, ops, moe=False) for _ in range(config.prelude_layers))
        self.step = LoopStep(config, ops)
        self.coda_blocks = nn.ModuleList(Block(config, ops, moe=False) for _ in range(config.coda_layers))
        self.norm = RMSNorm(config.dim)

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        max_depth: int | None = None,
        threshold: float | None = None,
        logit_rows: Int[Tensor, "L"] | None = None,
    ) -> Scored:
        """Logits and depth of whole sequences, in the network's own dtype; by default as trained."""
        config, (batch, chunk) = self.config, input_ids.shape
        window = Window(torch.tensor(0), torch.zeros(batch, dtype=torch.int64))
        threshold = config.act_threshold if threshold is None else threshold
        e, _ = self.prelude(input_ids, window, *[self._no_past(batch)] * config.prelude_layers)
        mass = torch.zeros(batch, chunk, dtype=torch.promote_types(e.dtype, torch.float32))
        state = LoopState(e, torch.zeros_like(e), mass, torch.zeros(batch, chunk, dtype=torch.int64))
        halting, margins = Halting(torch.tensor(threshold), torch.tensor(1)), []
        with self._choices() as choices:
            for index in range(config.max_loop_iters if max_depth is None else max_depth):
                state, _ = self.loop_step(
                    state, e, torch.full((batch, chunk), index), halting, window, self._no_past(batch)
                )
                margins.append((state.halt_mass - threshold).abs())
        rows = torch.arange(chunk) if logit_rows is None else logit_rows
        logits, _ = self.coda(state.out, rows, window, *[self._no_past(batch)] * config.coda_layers)
        experts, router_margins = (
            torch.stack(of_steps).unflatten(1, (batch, chunk)) for of_steps in zip(*choices, strict=True)
        )
        return Scored(
            logits,
            state.depth,
            torch.stack(margins, dim=-1),
            router_margins.movedim(0, -1),
            experts.movedim(0, 2),
        )

    @contextmanager
    def _choices(self) -> Iterator[list[tuple[Int[Tensor, "N K"], Float[Tensor, "N"]]]]:
        """A list that takes down what the router chooses in every loop step that runs meanwhile."""
        found: list[tuple[Tensor, Tensor]] = []
        experts = self.step.block.ffn
        assert isinstance(experts, SparseMoE)
        watch = experts.register_forward_pre_hook(lambda _, given: found.append(experts.choice(*given)))
        try:
            yield found
        finally:
            watch.remove()

    def _no_past(self, batch: int) -> Float[Tensor, "B 0 W"]:
        return torch.empty(batch, 0, self.config.cache_width, dtype=self.norm.weight.dtype)

    def prelude(
        self, input_ids: Int[Tensor, "B S"], window: Window, *past: Float[Tensor, "B C W"]
    ) -> tuple[Float[Tensor, "B S D"], list[Float[Tensor, "B S W"]]]:
        """The embedded and encoded tokens ``e`` and the new rows of each prelude slot."""
        x = nn.functional.embedding(input_ids, self.embed)
        return self._run_blocks(self.prelude_blocks, x, window, past)

    def loop_step(
        self,
        state: LoopState,
        e: Float[Tensor, "B S D"],
        step_index: Int[Tensor, "B S"],
        halting: Halting,
        window: Window,
        past: Float[Tensor, "B C W"],
    ) -> tuple[LoopState, Float[Tensor, "B S W"]]:
        """The state after one loop step, each row's own, and the new rows of its slot."""
        positions = self._positions(window, state.h.shape[1])
        next_state, rows = self.step(state, e, step_index, halting, self.rope, positions, past, window)
        return next_state, rows

    def coda(
        self,
        out: Float[Tensor, "B S D"],
        logit_rows: Int[Tensor, "L"],
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[Float[Tensor, "B L V"], list[Float[Tensor, "B S W"]]]:
        """Logits of the chunk's rows ``logit_rows`` (decoding needs the last) and the new rows of each coda slot."""
        x, rows = self._run_blocks(self.coda_blocks, out, window, past)
        x = x.index_select(1, logit_rows)
        logits = nn.functional.linear(self.norm(x.flatten(0, 1)), self.embed)
        return logits.unflatten(0, (x.shape[0], x.shape[1])), rows

    def _run_blocks(
        self, blocks: nn.ModuleList, x: Float[Tensor, "B S D"], window: Window, past: Sequence[Tensor]
    ) -> tuple[Float[Tensor, "B S D"], list[Tensor]]:
        positions, flat, new_rows = self._positions(window, x.shape[1]), x.flatten(0, 1), []
        for block, slot in zip(blocks, past, strict=True):
            flat, rows = block(flat, self.rope, positions, slot, window)
            new_rows.append(rows)
        return flat.view(x.shape), new_rows

    def _positions(self, window: Window, chunk: int) -> Int[Tensor, "B S"]:
        """The position of each new row in its sequence; rows that nothing looks at (padding, and rows of a sequence
        that has ended at the longest context while others of its batch go on) get the nearest there is."""
        columns = window.length + torch.arange(chunk)
        return (columns.unsqueeze(0) - window.first.unsqueeze(1)).clamp(min=0, max=self.rope.cos.shape[0] - 1)


# What a position's depth is decided with, and tables of angles, which need their digits.
_ALWAYS_WIDE = ("rope.cos", "rope.sin", "sin_frequency", "cos_frequency", "halt_weight", "halt_bias")


def in_dtype(network: Network, dtype: torch.dtype) -> Network:
    """The network itself, with its weights in ``dtype``, but for those that are float32 at least in every dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(wide if name.endswith(_ALWAYS_WIDE) else dtype)
    return network
