"""The config: what it refuses, what follows from its fields, and the published variants."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.openmythos.config import FIELD_NAMES, VARIANTS, MythosConfig, config_from_dict
from mythos_edge.model.json_files import read_config_dict
from mythos_edge.scripts.lab.reference import open_mythos

MLA = VARIANTS["1b"].to_dict()
GQA = MLA | {"attn_type": "gqa"}
MLA_ONLY = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
MAY_BE_ZERO = ("n_shared_experts", "prelude_layers", "coda_layers")
INTEGERS = tuple(name for name in FIELD_NAMES if name not in ("attn_type", "act_threshold", "rope_theta"))


def _config(values: dict[str, Any], **changes: Any) -> MythosConfig:
    return config_from_dict(values | changes, origin="here.json")


def _refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(values, origin="here.json")
    message = str(caught.value)
    assert message.startswith("here.json: ")
    assert "\n" not in message
    return message


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


@pytest.mark.parametrize("values", [MLA, GQA])
def test_a_config_survives_the_way_through_json(values: dict[str, Any]) -> None:
    config = _config(values)
    assert tuple(config.to_dict()) == FIELD_NAMES
    assert config_from_dict(json.loads(json.dumps(config.to_dict())), origin="x") == config


@pytest.mark.parametrize("values", [MLA, GQA])
def test_every_missing_field_is_asked_for(values: dict[str, Any]) -> None:
    optional = MLA_ONLY if values is GQA else ("n_kv_heads",)
    for name in FIELD_NAMES:
        if name in optional:
            _config(_without(values, name))
        else:
            assert f"missing config field {name}; give it in --config" in _refused(_without(values, name))
    both = _refused(_without(values, "dim", "act_threshold"))
    assert "dim, act_threshold" in both
    assert "missing config field" in _refused({})


def test_fields_the_attention_does_not_use_are_filled_in() -> None:
    config = _config(_without(GQA, *MLA_ONLY))
    assert config.rope_dim == config.head_dim == 128
    assert _config(_without(MLA, "n_kv_heads")).n_kv_heads == 16


def test_unknown_fields_are_refused_and_inert_ones_dropped() -> None:
    assert _config(MLA, dropout=0.1, max_output_tokens=4096) == VARIANTS["1b"]
    message = _refused(MLA | {"zeta": 1, "n_layers": 2})
    assert "unknown config field n_layers, zeta; known: vocab_size, dim" in message


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_integers_in_their_range(name: str) -> None:
    for wrong in ("8", None, 8.0, True, [8], math.nan):
        assert f"{name} is {wrong!r}, expected an integer" in _refused(MLA | {name: wrong})
    smallest = 0 if name in MAY_BE_ZERO else 1
    assert f"{name} is {smallest - 1}, expected at least {smallest}" in _refused(MLA | {name: smallest - 1})
    assert f"{name} is -5" in _refused(MLA | {name: -5})


@pytest.mark.parametrize("name", MAY_BE_ZERO)
def test_layers_and_shared_experts_may_be_none(name: str) -> None:
    assert getattr(_config(MLA, **{name: 0}), name) == 0


@pytest.mark.parametrize("name", ["act_threshold", "rope_theta"])
def test_numbers_are_finite_and_above_zero(name: str) -> None:
    for wrong in ("1", None, True, [1.0]):
        assert f"{name} is {wrong!r}, expected a number" in _refused(MLA | {name: wrong})
    for wrong in (0, 0.0, -1.0, math.nan, math.inf, -math.inf):
        assert f"{name} is {wrong}, expected a finite number above 0" in _refused(MLA | {name: wrong})
    assert getattr(_config(MLA, **{name: 1}), name) == 1


@pytest.mark.parametrize("wrong", ["MLA", "", None, 1, ["mla"]])
def test_the_attention_is_one_of_two(wrong: Any) -> None:
    assert f"attn_type is {wrong!r}, expected 'mla' or 'gqa'" in _refused(MLA | {"attn_type": wrong})


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (MLA | {"n_experts_per_tok": 65}, "n_experts_per_tok is 65, but there are 64 experts"),
        (GQA | {"n_heads": 24}, "dim 2048 is not divisible by n_heads 24"),
        (GQA | {"n_kv_heads": 3}, "n_heads 16 is not divisible by n_kv_heads 3"),
        (GQA | {"n_kv_heads": 32}, "n_heads 16 is not divisible by n_kv_heads 32"),
        (GQA | {"dim": 48}, "the rotary dimension must be even, got 3"),
        (MLA | {"qk_rope_head_dim": 31}, "the rotary dimension must be even, got 31"),
    ],
)
def test_contradictions_are_told(values: dict[str, Any], what: str) -> None:
    assert what in _refused(values)


def test_a_contradiction_of_the_other_attention_does_not_matter() -> None:
    _config(MLA, n_heads=24, n_kv_heads=7, n_experts_per_tok=64)
    _config(GQA, qk_rope_head_dim=31)


def test_what_follows_from_the_fields() -> None:
    mla, gqa = _config(MLA), _config(GQA)
    assert (mla.is_mla, mla.head_dim, mla.rope_dim, mla.cache_width) == (True, 96, 32, 288)
    assert (gqa.is_mla, gqa.head_dim, gqa.rope_dim, gqa.cache_width) == (False, 128, 128, 1024)
    assert (mla.dense_dim, mla.shared_dim, mla.loop_dim) == (2730, 16384, 256)
    assert _config(MLA, n_shared_experts=0).shared_dim == 0


def test_a_config_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MLA | {"note": "Größe"}, ensure_ascii=False), encoding="utf-8")
    assert read_config_dict(path) == MLA | {"note": "Größe"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (None, "cannot read the config: No such file"),
        (b"", "not valid JSON"),
        (b"{'dim': 1}", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "expected a JSON object, got list"),
        (b"3", "expected a JSON object, got int"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, content: bytes | None, what: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=what) as caught:
        read_config_dict(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the config: Is a directory"):
        read_config_dict(tmp_path)


def test_the_variants_are_the_published_ones() -> None:
    open_mythos()
    published = importlib.import_module("open_mythos.variants")
    names = {name.removeprefix("mythos_") for name in vars(published) if name.startswith("mythos_")}
    assert set(VARIANTS) == names
    for name, config in VARIANTS.items():
        theirs = getattr(published, f"mythos_{name}")()
        assert {field: getattr(theirs, field) for field in FIELD_NAMES} == config.to_dict(), name
        # Every field of theirs is known, so that none is silently left behind.
        assert _config(vars(theirs)) == config


def test_the_fields_are_the_references_but_those_of_training() -> None:
    assert set(vars(open_mythos().MythosConfig())) - set(FIELD_NAMES) == {"dropout", "max_output_tokens"}


def test_whole_numbers_of_json_are_the_floats_they_stand_for() -> None:
    assert type(_config(MLA, rope_theta=10000).rope_theta) is float
    assert "rope_theta is a number of more than 77 digits, expected a finite number" in _refused(
        MLA | {"rope_theta": 10**400}
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8", "utf-16"])
def test_a_byte_order_mark_is_no_error(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MLA), encoding=encoding)
    assert read_config_dict(path) == MLA


def test_a_config_that_was_not_downloaded_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    with pytest.raises(ConfigError, match=r"is a git-LFS pointer.*`git lfs pull`"):
        read_config_dict(path)
