"""Eager networks of looped models: the stages that a family gives, and the pass over whole sequences made of them.

The stages are pure functions with named tensors, as ``stages`` declares them; the exporter traces exactly these.
``LoopedNetwork.forward`` is the parity reference: it runs them without a cache, the way a reference does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mythos_edge.model.looped import LoopedModel


class Window(NamedTuple):
    """Which positions a chunk of S new rows may look at: columns ``first[b] .. length`` of the cache, then itself.

    ``first`` is the number of padding columns at the left of each sequence (0 for a single sequence).
    """

    length: Int[Tensor, ""]
    first: Int[Tensor, "B"]


@runtime_checkable
class Ops(Protocol):
    """The operations that become custom ops; ``EagerOps`` computes them, ``plugins.torch_ops`` traces them."""

    def latent_attention(
        self,
        q: Float[Tensor, "B S H W"],
        rows: Float[Tensor, "B S W"],
        past: Float[Tensor, "B C W"],
        window: Window,
        value_dim: int,
        scale: float,
    ) -> Float[Tensor, "B S H R"]: ...

    def grouped_query_attention(
        self,
        q: Float[Tensor, "B S H F"],
        rows: Float[Tensor, "B S W"],
        past: Float[Tensor, "B C W"],
        window: Window,
        kv_heads: int,
        scale: float,
        window_size: int = 0,
    ) -> Float[Tensor, "B S H F"]: ...

    def sparse_moe(
        self,
        x: Float[Tensor, "N D"],
        router: Float[Tensor, "E D"],
        router_bias: Float[Tensor, "E"],
        fc1: Float[Tensor, "E F2 D"],
        fc2: Float[Tensor, "E D F"],
        shared: "tuple[Tensor, Tensor] | None",
        top_k: int,
    ) -> Float[Tensor, "N D"]: ...

    def rotate(
        self,
        x: Float[Tensor, "B S H P"],
        cos: Float[Tensor, "M F"],
        sin: Float[Tensor, "M F"],
        positions: Int[Tensor, "B S"],
    ) -> Float[Tensor, "B S H P"]: ...


class LoopState(NamedTuple):
    """The state that the loop carries, in the order of the ONNX Loop's carried values.

    ``h`` holds S rows; the other fields the last A <= S of them: earlier rows of a chunk have halted before and
    only move on, so nothing but ``h`` is needed of them.
    """

    h: Float[Tensor, "B S D"]
    out: Float[Tensor, "B A D"]
    halt_mass: Float[Tensor, "B A"]
    depth: Int[Tensor, "B A"]


class Halting(NamedTuple):
    """The halting rule of a request: mass counts from loop step ``min_depth`` on and halts at ``threshold``.

    Differs: the reference has no ``min_depth``; with 1 the rule is the reference's.
    """

    threshold: Float[Tensor, ""]
    min_depth: Int[Tensor, ""]


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


# The experts that each row chose in a loop step, and by how much the last of them beat the best of the others.
Choices = list[tuple[Int[Tensor, "N K"], Float[Tensor, "N"]]]


class LoopedNetwork(nn.Module):
    """All weights of a model, and its stages, which a family's subclass computes.

    ``always_wide`` are the ends of names of parameters that are float32 at least in every dtype. The parameter that
    comes first has the dtype of the cached rows.
    """

    always_wide: ClassVar[tuple[str, ...]] = ()

    def __init__(self, looped: LoopedModel) -> None:
        super().__init__()
        self.looped = looped

    def prelude(
        self, input_ids: Int[Tensor, "B S"], window: Window, *past: Float[Tensor, "B C W"]
    ) -> tuple[Float[Tensor, "B S D"], list[Float[Tensor, "B S W"]]]:
        """The embedded and encoded tokens ``e`` and the new rows of each prelude slot."""
        raise NotImplementedError

    def loop_step(
        self,
        state: LoopState,
        e: Float[Tensor, "B S D"],
        step_index: Int[Tensor, "B S"],
        halting: Halting,
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[LoopState, list[Float[Tensor, "B S W"]]]:
        """The state after one loop step, each row's own, and the new rows of each inner layer's slot."""
        raise NotImplementedError

    def coda(
        self,
        out: Float[Tensor, "B S D"],
        logit_rows: Int[Tensor, "L"],
        window: Window,
        *past: Float[Tensor, "B C W"],
    ) -> tuple[Float[Tensor, "B L V"], list[Float[Tensor, "B S W"]]]:
        """Logits of the chunk's rows ``logit_rows`` (decoding needs the last) and the new rows of each coda slot."""
        raise NotImplementedError

    def attentions(self) -> dict[str, nn.Module]:
        """The attention modules by name, where they differ in weights alone and can be traced once; none otherwise.

        Each is called with flat rows, the module of ``rotation``, positions, cached rows and a window.
        """
        return {}

    def rotation(self) -> tuple[str, nn.Module]:
        """Name and module of the rotation that all ``attentions`` take."""
        raise NotImplementedError

    @contextmanager
    def choices(self) -> Iterator[Choices]:
        """A list that takes down what a router chooses in every loop step that runs meanwhile; empty without one."""
        yield []

    def forward(
        self,
        input_ids: Int[Tensor, "B S"],
        max_depth: int | None = None,
        threshold: float | None = None,
        logit_rows: Int[Tensor, "L"] | None = None,
    ) -> Scored:
        """Logits and depth of whole sequences, in the network's own dtype; by default as trained."""
        looped, (batch, chunk) = self.looped, input_ids.shape
        window = Window(torch.tensor(0), torch.zeros(batch, dtype=torch.int64))
        threshold = looped.threshold if threshold is None else threshold
        e, _ = self.prelude(input_ids, window, *[self._no_past(batch)] * looped.prelude_slots)
        mass = torch.zeros(batch, chunk, dtype=torch.promote_types(e.dtype, torch.float32))
        state = LoopState(e, torch.zeros_like(e), mass, torch.zeros(batch, chunk, dtype=torch.int64))
        halting, margins = Halting(torch.tensor(threshold), torch.tensor(1)), []
        depth = looped.max_depth if max_depth is None else max_depth
        with self.choices() as choices:
            for index in range(depth):
                step_index = torch.full((batch, chunk), index)
                nothing = [self._no_past(batch)] * looped.step_slots
                state, _ = self.loop_step(state, e, step_index, halting, window, *nothing)
                # Where a state is chosen, the last has no choice, and no mass reaches a threshold of 1.
                decides = looped.exit_rule == "weighted" or (threshold < 1 and index < depth - 1)
                distance = (state.halt_mass - threshold).abs()
                margins.append(distance if decides else torch.full_like(distance, torch.inf))
        rows = torch.arange(chunk) if logit_rows is None else logit_rows
        logits, _ = self.coda(state.out, rows, window, *[self._no_past(batch)] * looped.coda_slots)
        margin = torch.stack(margins, dim=-1)
        if not choices:
            no_experts = torch.zeros(*margin.shape, 0, dtype=torch.int64)
            return Scored(logits, state.depth, margin, torch.full_like(margin, torch.inf), no_experts)
        experts, router_margins = (
            torch.stack(of_steps).unflatten(1, (batch, chunk)) for of_steps in zip(*choices, strict=True)
        )
        return Scored(logits, state.depth, margin, router_margins.movedim(0, -1), experts.movedim(0, 2))

    def _no_past(self, batch: int) -> Float[Tensor, "B 0 W"]:
        return torch.empty(batch, 0, self.looped.cache_width, dtype=next(self.parameters()).dtype)


def in_dtype(network: LoopedNetwork, dtype: torch.dtype) -> LoopedNetwork:
    """The network itself, with its weights in ``dtype``, but for those that are float32 at least in every dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(wide if name.endswith(network.always_wide) else dtype)
    return network
