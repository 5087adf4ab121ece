"""The shape of a Dory model: the checkpoint's own field names, checked. Needs nothing but the standard library."""

from dataclasses import asdict, dataclass
from typing import Any

from mythos_edge.model.looped import LoopedModel

FAMILY = "dory"
# Whatever a config says that a request takes by default, the model was trained for 1 to 4 loop steps.
_TRAINED_DEPTH = 4
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class DoryConfig:
    """One Dory model; counts are of layers that have an attention and an MLP each.

    ``layer_types`` says of every layer whether its attention is SLIDING (``sliding_window`` positions, the row's own
    included) or FULL; each kind has a theta of its own, None where there is no such layer. ``initializer_range`` and
    ``ngpt_alpha_init`` are what the learned scales were initialised with and are read by.

    Source: transformers 5.24.0, ``DoryConfig``. Differs: no defaults, and the layers in pairs only.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    sliding_window: int
    sliding_theta: float | None
    full_theta: float | None
    initializer_range: float
    ngpt_alpha_init: float
    n_input_layers: int
    n_recurrent_layers: int
    n_output_layers: int
    n_recurrent_loops: int

    @property
    def max_seq_len(self) -> int:
        """Positions that the model was made for."""
        return self.max_position_embeddings

    @property
    def family(self) -> str:
        """The name of its family."""
        return FAMILY

    @property
    def query_dim(self) -> int:
        """Values of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Values of the keys, or the values, of a position."""
        return self.num_key_value_heads * self.head_dim

    @property
    def thetas(self) -> dict[str, float]:
        """The theta of each kind of attention that the model has."""
        both = {SLIDING: self.sliding_theta, FULL: self.full_theta}
        return {kind: theta for kind, theta in both.items() if theta is not None}

    @property
    def sections(self) -> dict[str, range]:
        """The layers of each stage, by their places in the checkpoint."""
        loop = self.n_input_layers + self.n_recurrent_layers
        return {
            "prelude": range(self.n_input_layers),
            "step": range(self.n_input_layers, loop),
            "coda": range(loop, len(self.layer_types)),
        }

    @property
    def looped(self) -> LoopedModel:
        """The sizes that the runtime knows. There is no gate: a position takes as many loop steps as a request says."""
        return LoopedModel(
            vocab_size=self.vocab_size,
            dim=self.hidden_size,
            cache_width=2 * self.kv_dim,
            prelude_slots=self.n_input_layers,
            step_slots=self.n_recurrent_layers,
            coda_slots=self.n_output_layers,
            max_depth=self.n_recurrent_loops,
            threshold=1.0,
            attention="grouped",
            head_dim=self.head_dim,
            experts_per_token=0,
            exit_rule="none",
            trained_depth=_TRAINED_DEPTH,
            slot_windows=self._windows if any(self._windows) else (),
            cache_parts=(self.head_dim,) * (2 * self.num_key_value_heads),
        )

    @property
    def _windows(self) -> tuple[int, ...]:
        return tuple(self.sliding_window if kind == SLIDING else 0 for kind in self.layer_types)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, under the checkpoint's names."""
        fields = asdict(self)
        del fields["sliding_theta"], fields["full_theta"]
        ropes = {kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in self.thetas.items()}
        return fields | {"layer_types": list(self.layer_types), "rope_parameters": ropes}

    def described(self) -> dict[str, str]:
        """The model in words, line by line."""
        heads = f"{self.num_attention_heads} heads of {self.head_dim}, {self.num_key_value_heads} for keys and values"
        sliding = self.layer_types.count(SLIDING)
        loop = f"loop {self.n_recurrent_layers} x {self.n_recurrent_loops}"
        return {
            "model": f"dim {self.hidden_size}, vocabulary {self.vocab_size}, {heads}",
            "layers": f"prelude {self.n_input_layers}, {loop}, coda {self.n_output_layers}",
            "windows": f"{sliding} of {len(self.layer_types)} layers see {self.sliding_window} positions",
        }
