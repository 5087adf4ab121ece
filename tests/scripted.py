"""A staircase on the scripted network: token v halts at loop step DEPTHS[v]."""

from fakes.scripted_backend import ScriptedBackend

from mythos_edge.model.looped import LoopedModel
from mythos_edge.runtime.backends.packing import Array, Arrays
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.staircase import Staircase

LOOPS = 5
VOCAB = 9
# Token v halts at loop step DEPTHS[v]; 99 never does.
DEPTHS = {0: 1, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 99, 7: 1, 8: 2}
# The scripted network's cache rows are one value wide.
ONE_WIDE = LoopedModel(
    vocab_size=VOCAB,
    dim=2,
    cache_width=1,
    prelude_slots=1,
    step_slots=2,
    coda_slots=1,
    max_depth=LOOPS,
    threshold=0.99,
    attention="latent",
    head_dim=3,
    experts_per_token=1,
)


def staircase(
    policy: str = "exact", max_lag: int | None = None, min_depth: int = 1, backend: Backend | None = None
) -> Staircase:
    depth = ResolvedDepth(Policy(policy), LOOPS, min_depth, 0.99)
    return Staircase(backend or ScriptedBackend(DEPTHS, VOCAB), ONE_WIDE, depth, 200, max_lag)


class Leaning(ScriptedBackend):
    """Logits that lean towards ``favourite``, by so much that drafts agree with the end often, or always."""

    def __init__(self, favourite: int, lean: float) -> None:
        super().__init__(DEPTHS, VOCAB)
        self._favourite, self._lean = favourite, lean

    def _coda(self, feeds: Arrays) -> dict[str, Array]:
        made = super()._coda(feeds)
        made["logits"][..., self._favourite] += self._lean
        return made
