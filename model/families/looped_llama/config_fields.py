"""From the fields of a config.json to the config of a looped Llama, with all that cannot be computed refused by name.

A field is read, refused unless it is off, or known to change nothing; one that is none of these is refused while it
is set. Standard library only.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.hugging_face import HUGGING_FACE_FIELDS
from mythos_edge.model.families.looped_llama.config import NanbeigeConfig, OuroConfig, StackConfig, short_text
from mythos_edge.model.json_files import few

C = TypeVar("C", bound=StackConfig)
Note = Callable[[str], None]

# Fields that change nothing at inference, and those that ``_derived`` reads.
_INERT = HUGGING_FACE_FIELDS | {
    *("attention_dropout", "hidden_dropout", "initializer_range", "max_window_layers", "chunk_size", "pretraining_tp"),
    *("model_max_length", "kv_channels", "rope_parameters", "layer_types"),
}
# Of what a file may leave out, the defaults of the reference's config classes.
_DEFAULTS: dict[type[StackConfig], dict[str, Any]] = {
    OuroConfig: {"total_ut_steps": 4, "early_exit_threshold": 1.0},
    NanbeigeConfig: {"num_loops": 1, "loop_loss_weights": [], "skip_loop_final_norm": False},
}


@dataclass(frozen=True)
class _Refused:
    """A field that changes what is computed unless it is ``expected``; ``why`` says what to do about it."""

    expected: str
    why: str
    is_off: Callable[[Any], bool]


def _off(what: str, why: str = "") -> _Refused:
    return _Refused("it off", why or f"{what} cannot be computed: give a model without", lambda value: not value)


def _null(what: str, why: str = "") -> _Refused:
    """A field of which 0 is a value."""
    why = why or f"{what} cannot be computed: give a model without"
    return _Refused("null", why, lambda value: value is None or value is False or value == [])


def _only(value: Any, what: str) -> _Refused:
    return _Refused(repr(value), f"{what} cannot be computed", lambda told: told is None or told == value)


_NGRAMS, _HYPER = _off("a layer of n-grams"), _off("a hyper-connection")
_REFUSED = {
    "use_sliding_window": _off("attention within a window"),
    "sliding_window": _null("attention within a window"),
    "rope_scaling": _null("scaled rotary angles"),
    "partial_rotary_factor": _only(1, "a rotation of a part of each head"),
    "hidden_act": _only("silu", "another activation"),
    "tie_word_embeddings": _off("a head that is the embedding"),
    "attention_bias": _off("a bias of attention"),
    "mlp_bias": _off("a bias of the feed-forward"),
    "qk_layernorm": _off("a norm of queries and keys"),
    "quantization_config": _off("", "rounded weights cannot be read: give the model in bf16, fp16 or fp32"),
    "early_exit_step": _null("", "choose the depth of a request with max_depth and min_depth, and set it to null"),
    "use_weighted_exit": _off(
        "", "the output is the state of the last loop step taken, as the reference has it while a threshold is set"
    ),
    "enable_double_loop_split": _off("a loop that is split"),
    "loop_share_kv": _off("keys and values that loop steps share"),
    "loop_middle_layers": _off("a loop over some of the layers"),
    "enable_hyper_connection": _HYPER,
    "enable_mhc": _HYPER,
    "enable_h_res_identity": _HYPER,
    "enable_depth_attention": _off("attention over depth"),
    "emb_neighbor_num": _off("an embedding of neighbours"),
    "insert_ngram_layer_idx": _null("a layer of n-grams"),
    "ngram_insert_all_layers": _NGRAMS,
}
_REFUSED_BEGINNINGS = {"mhc_": _HYPER, "ngram_": _NGRAMS}


def config_from_fields(kind: type[C], values: Mapping[str, Any], origin: str, note: Note = lambda text: None) -> C:
    """The config of that ``kind`` held in ``values`` (a config.json, or the config of a manifest).

    ``origin`` names them in errors; ``note`` is told what they leave open. Raises ConfigError for a field that is
    missing, out of range, or set and not known.
    """
    _refuse(values, origin)
    if kind is NanbeigeConfig and values.get("num_loops") is None and not values.get("loop_loss_weights"):
        raise ConfigError(
            f"{origin}: num_loops is missing, as in the {kind.family} models before 4.2, which have no loop; expected "
            "a looped model: run this one with any runtime for Llama"
        )
    names = [field.name for field in dataclasses.fields(kind)]
    _refuse_unknown(values, names, origin)
    told = _derived(values, origin) | {name: values[name] for name in names if values.get(name) is not None}
    for name, value in _DEFAULTS[kind].items():
        if name not in told and kind is OuroConfig:
            note(f"{origin}: has no {name}: it is {value}, as the reference has it")
        told.setdefault(name, value)
    missing = [name for name in names if name not in told]
    if missing:
        raise ConfigError(f"{origin}: missing config field {', '.join(missing)}; give it in --config config.json")
    try:
        config = kind(**{name: _converted(value) for name, value in told.items()})
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}") from None
    _check_layer_types(config, values.get("layer_types"), origin)
    if isinstance(config, NanbeigeConfig) and values.get("num_loops") not in (None, config.max_depth):
        made = f"{len(config.loop_loss_weights)} loop_loss_weights make {config.max_depth} loop steps"
        note(f"{origin}: num_loops {config.num_loops} is ignored, as the reference does: {made}")
    return config


def _refuse(values: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError for what is set and cannot be computed."""
    for name, value in values.items():
        alike = (rule for beginning, rule in _REFUSED_BEGINNINGS.items() if name.startswith(beginning))
        rule = _REFUSED.get(name) or next(alike, None)
        if rule is not None and not rule.is_off(value):
            raise ConfigError(f"{origin}: {name} is {short_text(value)}, expected {rule.expected}: {rule.why}")


def _refuse_unknown(values: Mapping[str, Any], names: list[str], origin: str) -> None:
    known = {*names, *_INERT, *_REFUSED}
    unknown = sorted(name for name, value in values.items() if value and name not in known)
    unknown = [name for name in unknown if not name.endswith("_version")]
    if unknown:
        raise ConfigError(
            f"{origin}: unknown config field {few(unknown)}, which may change what is computed; known: "
            f"{', '.join(names)}: if it changes nothing, set it to null"
        )


def _derived(values: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Fields that others tell, where those are there. Raises ConfigError where they disagree."""
    found: dict[str, Any] = {}
    rope = values.get("rope_parameters")
    if rope:
        others = dict(rope) if isinstance(rope, Mapping) else {"": rope}
        theta, plain = others.pop("rope_theta", None), {"rope_type": "default", "partial_rotary_factor": 1}
        if any(name not in plain or told != plain[name] for name, told in others.items()):
            raise ConfigError(
                f"{origin}: rope_parameters is {short_text(rope)}, expected rope_theta and rope_type 'default': scaled "
                "rotary angles cannot be computed: give a model without"
            )
        found["rope_theta"] = theta
    heads = values.get("num_attention_heads")
    found["num_key_value_heads"], found["head_dim"] = heads, values.get("kv_channels")
    for name, other in (("rope_theta", "rope_parameters"), ("head_dim", "kv_channels")):
        if None not in (values.get(name), found.get(name)) and values[name] != found[name]:
            raise ConfigError(
                f"{origin}: {name} is {short_text(values[name])}, but {other} says {short_text(found[name])}: expected "
                "one value: correct the config"
            )
    hidden = values.get("hidden_size")
    if found["head_dim"] is None and type(heads) is int and type(hidden) is int and heads > 0 and hidden % heads == 0:
        found["head_dim"] = hidden // heads
    return {name: value for name, value in found.items() if value is not None}


def _converted(value: Any) -> Any:
    """A value of JSON as the config has it: lists are tuples."""
    return tuple(value) if isinstance(value, list) else value


def _check_layer_types(config: StackConfig, types: Any, origin: str) -> None:
    layers = config.num_hidden_layers
    if types is not None and types != ["full_attention"] * layers:
        others = [one for one in types if one != "full_attention"] if isinstance(types, list) else [types]
        got = short_text(others[0]) if others else f"of {len(types)} layers"
        raise ConfigError(
            f"{origin}: layer_types has an entry {got}, expected 'full_attention' for each of {layers} layers: another "
            "attention cannot be computed: give a model without"
        )
