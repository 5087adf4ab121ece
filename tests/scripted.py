"""A staircase on the scripted network: token v halts at loop step DEPTHS[v]."""

from fakes.scripted_backend import ScriptedBackend

from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.runtime.backends.packing import Array, Arrays
from mythos_edge.runtime.backends.protocol import Backend
from mythos_edge.runtime.halting import Policy, ResolvedDepth
from mythos_edge.runtime.staircase import Staircase

LOOPS = 5
VOCAB = 9
# Token v halts at loop step DEPTHS[v]; 99 never does.
DEPTHS = {0: 1, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 99, 7: 1, 8: 2}
CONFIG = MythosConfig(
    vocab_size=VOCAB,
    dim=2,
    n_heads=1,
    n_kv_heads=1,
    max_seq_len=200,
    max_loop_iters=LOOPS,
    prelude_layers=1,
    coda_layers=1,
    attn_type="mla",
    kv_lora_rank=1,
    q_lora_rank=1,
    qk_rope_head_dim=2,
    qk_nope_head_dim=1,
    v_head_dim=1,
    n_experts=1,
    n_shared_experts=0,
    n_experts_per_tok=1,
    expert_dim=1,
    act_threshold=0.99,
    rope_theta=1e4,
    lora_rank=1,
)


class OneWide(MythosConfig):
    """The scripted network's cache rows are one value wide."""

    @property
    def cache_width(self) -> int:
        return 1


ONE_WIDE = OneWide(**CONFIG.to_dict())


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
