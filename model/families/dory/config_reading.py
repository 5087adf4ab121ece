"""Reading the config of a Dory checkpoint, whichever of its readers it was written for.

transformers, vLLM and llama.cpp read the same facts under different names. What a config says twice must agree; what
is not computed here is refused by name.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.dory.config import FULL, SLIDING, DoryConfig
from mythos_edge.model.families.hugging_face import HUGGING_FACE_FIELDS
from mythos_edge.model.json_files import few
from mythos_edge.model.looped import MOST_DEPTH

# Fields that decide what is computed, and the one value that is computed here; a field that is absent or null has it.
# Source: the readers of Dory in transformers 5.24.0, vLLM and llama.cpp.
_ONLY: dict[str, Any] = {
    "dory_format_version": 1,
    "ngpt": True,
    "fngpt": True,
    "attention_output_gate": True,
    "ngpt_enable_final_norm": False,
    "initial_state": "input_copy",
    "input_transform": "residual",
    "output_transform": "replace",
    "mixer_type": None,
    "partial_rotary_factor": 1,
    "partial_rotary_factor_2": 1,
    "rope_scaling": None,
    "hidden_act": "silu",
    "mlp_hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_output_gate_logit_scale_init": None,
    "quantization_config": None,
    "recurrent_kv_cache_mode": "per_loop",
}
_MEND = {
    "quantization_config": "give the checkpoint in bf16; build --weights int8 or int4 rounds it",
    "recurrent_kv_cache_mode": "set it to per_loop, with which no result depends on how a prompt was cut",
}
# Sizes of sliding layers, which must be those of the full ones.
_SAME = {
    "swa_num_attention_heads": "num_attention_heads",
    "swa_num_key_value_heads": "num_key_value_heads",
    "swa_head_dim": "head_dim",
}
_PATTERN = {"S": SLIDING, "*": FULL, "-": "mlp"}
_COUNTS = ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers")
# What else is read here, and what changes nothing at inference.
_FIELDS = """
    vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim attention_head_dim
    max_position_embeddings initializer_range init_method_std ngpt_alpha_init sliding_window swa_window_size layer_types
    hybrid_layer_pattern n_recurrent_loops rope_parameters rope_theta rope_theta_2 rope_profile_layers no_rope_layers
    attention_dropout
"""
_LARGEST, _MOST_LAYERS = (1 << 31) - 1, 1 << 12
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def config_from_dict(values: Mapping[str, Any], origin: str) -> DoryConfig:
    """The config held in ``values`` (for example a config.json); ``origin`` names it in errors. Raises ConfigError."""
    told = {name: value for name, value in values.items() if value is not None}
    _refuse(told, origin)
    reader = _Reader(told, origin)
    kinds, doubled = reader.layers()
    counts = reader.counts(len(kinds), doubled)
    thetas = reader.thetas(kinds)
    for name, other in _SAME.items():
        if name in told and told[name] != told.get(other, told[name]):
            raise ConfigError(f"{origin}: {name} is {told[name]!r}, but {other} is {told[other]!r}: one size is known")
    config = DoryConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_attention_heads=reader.integer("num_attention_heads"),
        num_key_value_heads=reader.integer("num_key_value_heads"),
        head_dim=reader.integer("head_dim", "attention_head_dim"),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        layer_types=tuple(kinds),
        sliding_window=reader.integer("sliding_window", "swa_window_size") if SLIDING in kinds else 0,
        sliding_theta=thetas.get(SLIDING),
        full_theta=thetas.get(FULL),
        initializer_range=reader.number("initializer_range", "init_method_std"),
        ngpt_alpha_init=reader.number("ngpt_alpha_init"),
        n_recurrent_loops=reader.integer("n_recurrent_loops", most=MOST_DEPTH),
        **counts,
    )
    _check(config, origin)
    return config


def notes_on(values: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    """A line on the fields of a config that nothing here reads; none where there are none."""
    known = set(_FIELDS.split()) | set(_ONLY) | set(_SAME) | set(_COUNTS) | HUGGING_FACE_FIELDS
    unknown = sorted(name for name, value in values.items() if name not in known and value and "bias" not in name)
    return (f"{origin}: left out {few(unknown, 8)}, which this version does not know",) if unknown else ()


def _refuse(told: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError for what is not computed here."""
    biases = {name: False for name in told if "bias" in name}
    for name, wanted in (_ONLY | biases).items():
        if name in told and told[name] != wanted:
            mend = _MEND.get(name, "no other is computed here")
            raise ConfigError(f"{origin}: {name} is {_REPR.repr(told[name])}, expected {wanted!r}: {mend}")
    without = told.get("no_rope_layers", [])
    if not isinstance(without, list) or any(without):
        raise ConfigError(
            f"{origin}: no_rope_layers is {_REPR.repr(without)}, expected a list of 0: every layer is rotated here"
        )


def _check(c: DoryConfig, origin: str) -> None:
    """Raises ConfigError for sizes that contradict each other."""
    if c.num_attention_heads % c.num_key_value_heads:
        raise ConfigError(
            f"{origin}: num_attention_heads {c.num_attention_heads} is not divisible by "
            f"num_key_value_heads {c.num_key_value_heads}"
        )
    if c.head_dim % 2:
        raise ConfigError(f"{origin}: head_dim is {c.head_dim}, expected an even number: channels are rotated in pairs")


class _Reader:
    """Facts of a config, each under one or more names."""

    def __init__(self, told: Mapping[str, Any], origin: str) -> None:
        self._told, self._origin = told, origin

    def integer(self, *names: str, least: int = 1, most: int = _LARGEST) -> int:
        """The whole number that all present ``names`` say."""
        name, value = self._agreed(names)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._error(name, value, f"an integer of {least} to {most}")
        return value

    def number(self, *names: str) -> float:
        """The number above 0 that all present ``names`` say."""
        name, value = self._agreed(names)
        return self._number(name, value)

    def layers(self) -> tuple[list[str], bool]:
        """The kind of each layer's attention, and whether attention and MLP are counted apart."""
        given = self._told.get("layer_types")
        pattern = self._told.get("hybrid_layer_pattern")
        if given is None and pattern is None:
            raise self._missing("layer_types")
        spelled = None if pattern is None else self._kinds("hybrid_layer_pattern", self._spelled(pattern))
        if given is None:
            assert spelled is not None
            return spelled
        read = self._kinds("layer_types", given)
        if spelled is not None and spelled[0] != read[0]:
            raise ConfigError(
                f"{self._origin}: hybrid_layer_pattern {_REPR.repr(pattern)} has other layers than layer_types: "
                "correct one of them"
            )
        return read

    def counts(self, layers: int, doubled: bool) -> dict[str, int]:
        """The layers of each section, which are all ``layers`` together."""
        share, found = 2 if doubled else 1, {}
        for name in _COUNTS:
            if name in self._told:
                count = self.integer(name, least=0, most=share * _MOST_LAYERS)
                if count % share:
                    raise self._error(name, count, "an even number, as attention and MLP are counted apart")
                found[name] = count // share
        for name in ("n_input_layers", "n_output_layers"):
            if name not in found:
                raise self._missing(name)
        rest = layers - found["n_input_layers"] - found["n_output_layers"]
        total = found.pop("num_hidden_layers", layers)
        if total != layers or found.setdefault("n_recurrent_layers", rest) != rest or rest < 1:
            sections = ", ".join(f"{name} {share * count}" for name, count in found.items())
            raise ConfigError(
                f"{self._origin}: the layers do not add up: {sections}, num_hidden_layers {share * total}, and "
                f"layer_types has {share * layers}"
            )
        return found

    def thetas(self, kinds: Sequence[str]) -> dict[str, float]:
        """The theta of every kind of attention."""
        given, profiles = self._told.get("rope_parameters"), self._told.get("rope_profile_layers")
        by_kind = None if given is None else self._thetas_by_kind(given)
        by_profile = None if profiles is None else self._thetas_by_profile(profiles, kinds)
        if by_kind is None and by_profile is None:
            raise self._missing("rope_parameters")
        found = by_kind or by_profile or {}
        for kind in dict.fromkeys(kinds):
            if kind not in found:
                raise ConfigError(f"{self._origin}: rope_parameters has no {kind}, of which there are layers")
            if by_profile is not None and by_profile[kind] != found[kind]:
                raise ConfigError(
                    f"{self._origin}: rope_theta of {kind} is {found[kind]:g}, but rope_profile_layers says "
                    f"{by_profile[kind]:g}: correct one of them"
                )
        return {kind: found[kind] for kind in dict.fromkeys(kinds)}

    def _thetas_by_kind(self, given: Any) -> dict[str, float]:
        if not isinstance(given, dict) or not all(isinstance(one, dict) for one in given.values()):
            raise self._error("rope_parameters", given, f"an object with {SLIDING} and {FULL}")
        found = {}
        for kind, parameters in given.items():
            name = f"rope_parameters.{kind}"
            known = {"rope_type": "default", "partial_rotary_factor": 1}
            for field, value in parameters.items():
                if field != "rope_theta" and value is not None and value != known.get(field):
                    raise self._error(f"{name}.{field}", value, f"{known.get(field)!r}: no other is computed here")
            found[kind] = self._number(f"{name}.rope_theta", parameters.get("rope_theta"))
        return found

    def _thetas_by_profile(self, given: Any, kinds: Sequence[str]) -> dict[str, float]:
        """Source: vLLM and llama.cpp; profile 1 is ``rope_theta``, 2 is ``rope_theta_2``."""
        name = "rope_profile_layers"
        lengths = (len(kinds), 2 * len(kinds))
        if not isinstance(given, list) or len(given) not in lengths:
            raise self._error(name, given, f"a list of {lengths[0]} or {lengths[1]} profiles")
        found: dict[str, float] = {}
        for kind, profile in zip(kinds, given[:: len(given) // len(kinds)], strict=True):
            if profile not in (1, 2):
                raise self._error(name, profile, "1 or 2 for every attention: each is rotated here")
            theta = self.number("rope_theta" if profile == 1 else "rope_theta_2")
            if found.setdefault(kind, theta) != theta:
                raise ConfigError(f"{self._origin}: {name} gives {kind} layers both thetas, expected one for each kind")
        return found

    def _spelled(self, pattern: Any) -> list[str]:
        if not isinstance(pattern, str) or not set(pattern) <= set(_PATTERN):
            raise self._error("hybrid_layer_pattern", pattern, f"text of {' '.join(_PATTERN)}")
        return [_PATTERN[letter] for letter in pattern]

    def _kinds(self, name: str, given: Any) -> tuple[list[str], bool]:
        if not isinstance(given, list) or not given or len(given) > 2 * _MOST_LAYERS:
            raise self._error(name, given, f"a list of 1 to {2 * _MOST_LAYERS} kinds of layers")
        doubled = "mlp" in given
        attentions, rest = (given[::2], given[1::2]) if doubled else (given, [])
        for kind in attentions:
            if kind not in (SLIDING, FULL):
                raise self._error(name, kind, f"{SLIDING} or {FULL}" + (", each followed by mlp" if doubled else ""))
        if doubled and rest != ["mlp"] * len(attentions):
            raise ConfigError(f"{self._origin}: {name} must be attention and mlp in turn, as mlp stands in it")
        return list(attentions), doubled

    def _agreed(self, names: Sequence[str]) -> tuple[str, Any]:
        """The first of ``names`` that the config has, and what all of them say."""
        present = [name for name in names if name in self._told]
        if not present:
            raise self._missing(names[0])
        first, *others = present
        for name in others:
            if self._told[name] != self._told[first]:
                raise ConfigError(
                    f"{self._origin}: {first} is {_REPR.repr(self._told[first])}, but {name} is "
                    f"{_REPR.repr(self._told[name])}, which is the same fact: correct one of them"
                )
        return first, self._told[first]

    def _number(self, name: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # A whole number of JSON may be larger than every float.
        if not is_number or not 0 < value < 1e38 or not math.isfinite(value):
            raise self._error(name, value, "a finite number above 0, at most 1e+38")
        return float(value)

    def _error(self, name: str, value: Any, expected: str) -> ConfigError:
        return ConfigError(f"{self._origin}: {name} is {_REPR.repr(value)}, expected {expected}")

    def _missing(self, name: str) -> ConfigError:
        return ConfigError(f"{self._origin}: missing config field {name}; give it in --config config.json")
