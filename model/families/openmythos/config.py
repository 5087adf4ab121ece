"""The shape of a model: the checkpoint's own field names, checked. Needs nothing but the standard library."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.looped import MOST_DEPTH, LoopedModel

# Far beyond every model there is: what is made one by one must come to an end. Others are held to the weights.
_LARGEST = {
    "max_loop_iters": MOST_DEPTH,
    "prelude_layers": 1 << 12,
    "coda_layers": 1 << 12,
    "n_experts": 1 << 16,
    "n_shared_experts": 1 << 12,
}
_LARGEST_SIZE = (1 << 31) - 1
_LARGEST_NUMBER = 1e38  # of float32, about
FAMILY = "openmythos"
# Fields of the reference's config that change nothing at inference; accepted and dropped.
INERT_FIELDS = frozenset({"dropout", "max_output_tokens"})


@dataclass(frozen=True)
class MythosConfig:
    """One OpenMythos architecture; field names and meanings are the checkpoint's.

    Source: OpenMythos 8c68c1f, ``open_mythos/main.py`` ``MythosConfig``.
    Differs: no defaults (a missing field is asked for, never guessed) and no training-only fields.
    Raises ConfigError when a field is out of range or two fields contradict each other.
    """

    vocab_size: int
    dim: int
    n_heads: int
    n_kv_heads: int
    max_seq_len: int
    max_loop_iters: int
    prelude_layers: int
    coda_layers: int
    attn_type: str
    kv_lora_rank: int
    q_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    n_experts: int
    n_shared_experts: int
    n_experts_per_tok: int
    expert_dim: int
    act_threshold: float
    rope_theta: float
    lora_rank: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_field(field.name, getattr(self, field.name))
        if self.n_experts_per_tok > self.n_experts:
            raise ConfigError(f"n_experts_per_tok is {self.n_experts_per_tok}, but there are {self.n_experts} experts")
        if self.attn_type == "gqa":
            if self.dim % self.n_heads:
                raise ConfigError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
            if self.n_heads % self.n_kv_heads:
                raise ConfigError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")
        if self.rope_dim % 2:
            raise ConfigError(f"the rotary dimension must be even, got {self.rope_dim}")

    @property
    def is_mla(self) -> bool:
        return self.attn_type == "mla"

    @property
    def head_dim(self) -> int:
        """Query/key size per head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """Channels of each head that are rotated."""
        return self.qk_rope_head_dim if self.is_mla else self.dim // self.n_heads

    @property
    def cache_width(self) -> int:
        """Values one position keeps in one slot: latent | rope key (MLA) or keys | values (GQA)."""
        return sum(self.cache_parts)

    @property
    def cache_parts(self) -> tuple[int, ...]:
        """The widths of the latent and of the rope key (MLA), or of each head's key, then each head's value (GQA)."""
        if self.is_mla:
            return self.kv_lora_rank, self.qk_rope_head_dim
        return (self.head_dim,) * (2 * self.n_kv_heads)

    @property
    def dense_dim(self) -> int:
        """Hidden size of the prelude and coda feed-forward."""
        return self.dim * 4 // 3

    @property
    def shared_dim(self) -> int:
        """Hidden size of all shared experts together, computed as one SwiGLU; 0 without shared experts."""
        return self.n_shared_experts * self.expert_dim * self.n_experts_per_tok

    @property
    def loop_dim(self) -> int:
        """Leading channels that carry the loop table."""
        return self.dim // 8

    @property
    def family(self) -> str:
        """The name of its family."""
        return FAMILY

    @property
    def looped(self) -> LoopedModel:
        """The sizes that the runtime knows."""
        return LoopedModel(
            vocab_size=self.vocab_size,
            dim=self.dim,
            cache_width=self.cache_width,
            prelude_slots=self.prelude_layers,
            step_slots=1,
            coda_slots=self.coda_layers,
            max_depth=self.max_loop_iters,
            threshold=self.act_threshold,
            attention="latent" if self.is_mla else "grouped",
            head_dim=self.head_dim,
            experts_per_token=self.n_experts_per_tok,
            cache_parts=self.cache_parts,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    def described(self) -> dict[str, str]:
        """The model in words, line by line."""
        experts = f"{self.n_experts} of {self.expert_dim} values, {self.n_experts_per_tok} a token"
        return {
            "model": f"dim {self.dim}, vocabulary {self.vocab_size}, {self.attn_type} with {self.n_heads} heads",
            "layers": f"prelude {self.prelude_layers}, loop 1 x {self.max_loop_iters}, coda {self.coda_layers}",
            "experts": f"{experts}, {self.n_shared_experts} shared",
        }


_FIELDS = {field.name: field.type for field in dataclasses.fields(MythosConfig)}
FIELD_NAMES = tuple(_FIELDS)
_MLA_FIELDS = frozenset({"kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"})


def check_field(name: str, value: Any) -> None:
    kind = _FIELDS[name]
    if kind is str:
        if value not in ("mla", "gqa"):
            raise ConfigError(f"{name} is {value!r}, expected 'mla' or 'gqa'")
        return
    wanted = "a number" if kind is float else "an integer"
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise ConfigError(f"{name} is {value!r}, expected {wanted}")
    smallest = 0 if name in ("n_shared_experts", "prelude_layers", "coda_layers") else 1
    largest = _LARGEST.get(name, _LARGEST_SIZE)
    if kind is int and value < smallest:
        raise ConfigError(f"{name} is {_short(value)}, expected at least {smallest}")
    if kind is int and value > largest:
        raise ConfigError(f"{name} is {_short(value)}, expected at most {largest}")
    # NaN fails both comparisons, so it is refused too.
    if kind is float and not 0 < value <= _LARGEST_NUMBER:
        raise ConfigError(f"{name} is {_short(value)}, expected a finite number above 0, at most {_LARGEST_NUMBER:g}")


def _short(value: float) -> str:
    """The number as text: one of thousands of digits cannot even be printed."""
    return str(value) if isinstance(value, float) or value.bit_length() < 256 else "a number of more than 77 digits"


def config_from_dict(values: Mapping[str, Any], *, origin: str) -> MythosConfig:
    """The config held in ``values`` (for example a config.json); ``origin`` names it in errors.

    Raises ConfigError for unknown keys, missing keys, wrong types and contradictions.
    """
    unknown = sorted(set(values) - set(FIELD_NAMES) - INERT_FIELDS)
    if unknown:
        raise ConfigError(f"{origin}: unknown config field {', '.join(unknown)}; known: {', '.join(FIELD_NAMES)}")
    known = {name: values[name] for name in FIELD_NAMES if name in values}
    if known.get("attn_type") == "gqa":
        # Unused by GQA; the reference's config has defaults for them, other writers leave them out.
        known |= {name: 1 if name != "qk_rope_head_dim" else 2 for name in _MLA_FIELDS - known.keys()}
    elif known.get("attn_type") == "mla":
        known.setdefault("n_kv_heads", known.get("n_heads"))
    missing = [name for name in FIELD_NAMES if name not in known]
    if missing:
        raise ConfigError(f"{origin}: missing config field {', '.join(missing)}; give it in --config config.json")
    for name in ("act_threshold", "rope_theta"):
        # JSON writes whole numbers without a point; one beyond every float fails its check below.
        if type(known[name]) is int and 0 < known[name] < 1e300:
            known[name] = float(known[name])
    try:
        return MythosConfig(**known)
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None


def _variant(
    dim: int,
    heads: tuple[int, int],
    ranks: tuple[int, int],
    head_dims: tuple[int, int],
    experts: tuple[int, int, int, int],
    loops_layers_lora: tuple[int, int, int],
    vocab_context_theta: tuple[int, int, float] = (32000, 4096, 5e5),
) -> MythosConfig:
    rope, nope = head_dims
    return MythosConfig(
        vocab_size=vocab_context_theta[0],
        dim=dim,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        max_seq_len=vocab_context_theta[1],
        max_loop_iters=loops_layers_lora[0],
        prelude_layers=loops_layers_lora[1],
        coda_layers=loops_layers_lora[1],
        attn_type="mla",
        kv_lora_rank=ranks[0],
        q_lora_rank=ranks[1],
        qk_rope_head_dim=rope,
        qk_nope_head_dim=nope,
        v_head_dim=nope,
        n_experts=experts[0],
        n_shared_experts=experts[2],
        n_experts_per_tok=experts[1],
        expert_dim=experts[3],
        act_threshold=0.99,
        rope_theta=vocab_context_theta[2],
        lora_rank=loops_layers_lora[2],
    )


# Source: OpenMythos 8c68c1f, open_mythos/variants.py (a test compares every field).
VARIANTS: dict[str, MythosConfig] = {
    "1b": _variant(2048, (16, 4), (256, 512), (32, 64), (64, 4, 2, 2048), (16, 2, 8)),
    "3b": _variant(3072, (24, 6), (384, 768), (32, 96), (64, 4, 2, 4096), (16, 2, 8)),
    "10b": _variant(4096, (32, 8), (512, 1024), (64, 128), (128, 4, 2, 5632), (24, 2, 16), (32000, 8192, 5e5)),
    "50b": _variant(6144, (48, 8), (512, 1536), (64, 128), (256, 4, 4, 9728), (32, 3, 32), (32000, 8192, 5e5)),
    "100b": _variant(8192, (64, 8), (512, 2048), (64, 128), (256, 8, 4, 13568), (32, 4, 64), (32000, 1000000, 1e6)),
    "500b": _variant(
        12288, (96, 16), (1024, 3072), (64, 128), (512, 8, 8, 23040), (48, 4, 128), (100000, 1000000, 1e6)
    ),
    "1t": _variant(16384, (128, 16), (1024, 4096), (64, 128), (512, 8, 8, 34560), (64, 6, 256), (100000, 1000000, 2e6)),
}
