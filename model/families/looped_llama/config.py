"""The shapes of Ouro and Nanbeige models: the checkpoint's own field names, checked. Standard library only.

Both are one stack of Llama's layers that runs several times. Ouro has a gate that ends a position's loop, and norms
after attention and feed-forward; Nanbeige has neither.
Not here: what a config.json may hold besides (``config_fields``), files, weights.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.family import SpecialTokens
from mythos_edge.model.looped import MOST_DEPTH, LoopedModel

_MOST_LAYERS = 1 << 12  # slots of a loop step
_LARGEST_SIZE = (1 << 31) - 1
_LARGEST_NUMBER = 1e38  # of float32, about
_TRAINED_DEPTH = 4


@dataclass(frozen=True)
class StackConfig:
    """The fields that both families have; names and meanings are the checkpoint's.

    Raises ConfigError when a field is out of range or two fields contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    family: ClassVar[str]
    # Norms of what attention and feed-forward add, and a gate that halts.
    post_norms: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    special_tokens: ClassVar[SpecialTokens | None] = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and type(value) is int and 0 < value < _LARGEST_NUMBER:
                # JSON writes whole numbers without a point.
                object.__setattr__(self, field.name, value := float(value))
            _check(field.name, field.type, value)
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ConfigError(f"num_attention_heads {heads} is not divisible by num_key_value_heads {kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, got {self.head_dim}: its channels are rotated in pairs")

    @property
    def max_depth(self) -> int:
        """Loop steps that were trained."""
        raise NotImplementedError

    @property
    def threshold(self) -> float:
        """The halting mass that ends a position's loop, which none reaches without a gate."""
        return 1.0

    @property
    def norm_in_step(self) -> bool:
        """Whether each loop step ends with the final norm, and not the last one alone."""
        return True

    @property
    def max_seq_len(self) -> int:
        """Positions that the model was made for."""
        return self.max_position_embeddings

    @property
    def looped(self) -> LoopedModel:
        """The sizes that the runtime knows."""
        return LoopedModel(
            vocab_size=self.vocab_size,
            dim=self.hidden_size,
            cache_width=2 * self.num_key_value_heads * self.head_dim,
            prelude_slots=0,
            step_slots=self.num_hidden_layers,
            coda_slots=0,
            max_depth=self.max_depth,
            threshold=self.threshold,
            attention="grouped",
            head_dim=self.head_dim,
            experts_per_token=0,
            exit_rule="gate" if self.gated else "none",
            cache_parts=(self.head_dim,) * (2 * self.num_key_value_heads),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    def described(self) -> dict[str, str]:
        """The model in words, line by line."""
        heads = f"{self.num_attention_heads} heads of {self.head_dim}, {self.num_key_value_heads} for keys and values"
        halting = f"a gate, threshold {self.threshold:g}" if self.gated else "none: depth is a request's to choose"
        return {
            "model": f"dim {self.hidden_size}, vocabulary {self.vocab_size}, {heads}",
            "layers": f"loop {self.num_hidden_layers} x {self.max_depth}, feed-forward {self.intermediate_size}",
            "halting": halting,
        }


@dataclass(frozen=True)
class OuroConfig(StackConfig):
    """One Ouro model.

    Source: ByteDance/Ouro-1.4B, ``configuration_ouro.py`` ``OuroConfig``.
    Differs: an ``early_exit_threshold`` of 1 or more is never reached; the reference compares rounded sums with it.
    """

    total_ut_steps: int
    early_exit_threshold: float

    family = "ouro"
    post_norms = True
    gated = True
    # The files of released models name the padding, <|endoftext|>, and their chats are ChatML.
    special_tokens = SpecialTokens(wrong="<|endoftext|>", begin="<|im_start|>", end="<|im_end|>")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total_ut_steps > _TRAINED_DEPTH:
            raise ConfigError(
                f"total_ut_steps is {self.total_ut_steps}, expected at most {_TRAINED_DEPTH}, as models of this family "
                "are trained with: more loop steps make answers worse; lower it, as with --config and a file that "
                f'holds {{"total_ut_steps": {_TRAINED_DEPTH}}}'
            )

    @property
    def max_depth(self) -> int:
        return self.total_ut_steps

    @property
    def threshold(self) -> float:
        return self.early_exit_threshold


@dataclass(frozen=True)
class NanbeigeConfig(StackConfig):
    """One looped Nanbeige model. Source: Nanbeige/Nanbeige4.2-3B, ``configuration_nanbeige.py`` ``NanbeigeConfig``."""

    num_loops: int
    loop_loss_weights: tuple[float, ...]
    skip_loop_final_norm: bool

    family = "nanbeige"

    @property
    def max_depth(self) -> int:
        return len(self.loop_loss_weights) + 1 if self.loop_loss_weights else self.num_loops

    @property
    def norm_in_step(self) -> bool:
        return not self.skip_loop_final_norm


_LARGEST = {"num_hidden_layers": _MOST_LAYERS, "num_loops": MOST_DEPTH}


def _check(name: str, kind: Any, value: Any) -> None:
    """Raises ConfigError for a value that a field of that type cannot have."""
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} is {short_text(value)}, expected true or false")
    elif kind is int:
        largest = _LARGEST.get(name, _LARGEST_SIZE)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise ConfigError(f"{name} is {short_text(value)}, expected an integer of 1 to {largest}")
    elif kind is float:
        # NaN fails both comparisons, so it is refused too.
        if isinstance(value, bool) or not isinstance(value, float) or not 0 < value <= _LARGEST_NUMBER:
            raise ConfigError(f"{name} is {short_text(value)}, expected a number above 0, at most {_LARGEST_NUMBER:g}")
    elif not isinstance(value, tuple) or len(value) >= MOST_DEPTH or not all(map(_is_number, value)):
        raise ConfigError(f"{name} is {short_text(value)}, expected a list of numbers, fewer than {MOST_DEPTH}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short_text(value: Any) -> str:
    """The value as text of one short line: a number of thousands of digits cannot even be printed."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
