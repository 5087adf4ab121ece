"""A family of toys: all that it takes to add one."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mythos_edge.model.eager_ops import EagerOps
from mythos_edge.model.errors import CheckpointError
from mythos_edge.model.families.family import Opening
from mythos_edge.model.looped import LoopedModel
from mythos_edge.model.network import LoopedNetwork, LoopState, Window
from mythos_edge.model.recipes import Recipe
from mythos_edge.model.stored_checkpoint import Checkpoint

SHAPES = {"embed": (40, 8), **{f"mix.{number}": (16, 8) for number in range(4)}}
PARTS = {"mix.0": ("prelude",), "mix.1": ("attention",), "mix.2": ("attention",), "mix.3": ("coda",)}
PARTS["embed"] = ("head",)


@dataclass(frozen=True)
class ToyConfig:
    loops: int
    max_seq_len = 32
    family = "toy"
    looped = property(lambda self: LoopedModel(40, 8, 16, 1, 2, 1, self.loops, 0.9, "grouped", 8, 0))
    to_dict = asdict

    def described(self) -> dict[str, str]:
        return {"toy": f"{self.loops} loop steps of 8 values"}


class ToyNetwork(LoopedNetwork):
    """Attention of one head in prelude, loop step (twice) and coda; a row halts by its first value."""

    def __init__(self, config: ToyConfig, ops: Any) -> None:
        super().__init__(config.looped)
        self.ops, self.embed = EagerOps() if ops is None else ops, nn.Parameter(torch.empty(40, 8))
        self.mix = nn.ParameterList(torch.empty(16, 8) for _ in range(4))

    def attend(self, part: int, x: Tensor, past: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        rows = nn.functional.linear(x.flatten(0, 1), self.mix[part]).unflatten(0, x.shape[:2])
        return x + self.ops.grouped_query_attention(x.unsqueeze(2), rows, past, window, 1, 0.3).squeeze(2), rows

    def prelude(self, input_ids: Tensor, window: Window, *past: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, rows = self.attend(0, nn.functional.embedding(input_ids, self.embed), past[0], window)
        return x, [rows]

    def loop_step(self, state: LoopState, e: Tensor, step_index: Tensor, halting: Any, window: Any, *past: Any) -> Any:
        x, first_rows = self.attend(1, state.h, past[0], window)
        x, second_rows = self.attend(2, x, past[1], window)
        h = (x + e * (step_index.unsqueeze(-1) + 1)).tanh()
        active, taken = (each[:, h.shape[1] - state.out.shape[1] :] for each in (h, step_index + 1))
        running = state.halt_mass < halting.threshold
        halts = running & (active.select(-1, 0) > 0.5) & (taken >= halting.min_depth)
        out, mass = torch.where(running.unsqueeze(-1), active, state.out), halts.to(state.halt_mass.dtype)
        return LoopState(h, out, state.halt_mass + mass, state.depth + running.to(torch.int64)), [
            first_rows,
            second_rows,
        ]

    def coda(self, out: Tensor, logit_rows: Tensor, window: Window, *past: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, rows = self.attend(3, out, past[0], window)
        logits = nn.functional.linear(x.index_select(1, logit_rows).flatten(0, 1), self.embed)
        return logits.unflatten(0, (x.shape[0], -1)), [rows]


class Toy:
    name = "toy"
    recognises = staticmethod(lambda names, config: "mix.0" in names)
    config_from = staticmethod(lambda values, origin: ToyConfig(**values))
    network = staticmethod(lambda config, max_context, ops=None: ToyNetwork(config, ops))

    def open(self, opening: Opening) -> Checkpoint:
        if (found := {name: entry.shape for name, entry in opening.stored.entries.items()}) != SHAPES:
            raise CheckpointError(f"{opening.path}: holds {found}, expected {SHAPES}: save the whole toy")
        return Checkpoint(opening.path, opening.stored.kind, ToyConfig(4), opening.stored.entries)

    def recipes(self, config: ToyConfig, max_context: int) -> list[Recipe]:
        return [
            Recipe(name, shape, lambda reader, name=name: iter([reader.read(name)]), narrow=True, parts=PARTS[name])
            for name, shape in SHAPES.items()
        ]
