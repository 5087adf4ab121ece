"""Checkpoints of every kind: opened under one set of names, read in ranges, their config found or asked for."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import (
    OPEN_FIELDS,
    Weights,
    assert_refused,
    assert_same,
    bare,
    config_fields,
    safetensors_folder,
    saved,
    sharded,
    stored_weights,
    tiny_model,
    trainer_content,
    write_config,
)

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.families.openmythos.config import FIELD_NAMES
from mythos_edge.model.families.openmythos.shapes import expected_shapes
from mythos_edge.scripts.lab.reference import open_mythos

# --- every kind of file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_trainer_file(tmp_path: Path, attn_type: str) -> None:
    model = tiny_model(attn_type)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "step": 123,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cfg": model.cfg,
        "vocab_size": 19,
    }
    with open_checkpoint(saved(tmp_path, content, "step_0000123.pt")) as checkpoint:
        assert (checkpoint.kind, checkpoint.step) == ("trainer .pt", 123)
        fields = dataclasses.asdict(model.cfg)
        assert checkpoint.config.to_dict() == {name: fields[name] for name in FIELD_NAMES}
        assert_same(checkpoint, stored_weights(attn_type))


def test_first_trainer_version_with_muon_and_adamw(tmp_path: Path) -> None:
    moments = {"state": {0: {"momentum_buffer": torch.zeros(5)}}}
    content = trainer_content(stored_weights(), muon=moments, adamw=moments)
    # Fields that were added to the reference's config later.
    content["cfg"] = open_mythos().MythosConfig(**config_fields())
    del content["cfg"].__dict__["dropout"], content["cfg"].__dict__["max_output_tokens"]
    with open_checkpoint(saved(tmp_path, content)) as checkpoint:
        assert checkpoint.kind == "trainer .pt"
        assert_same(checkpoint, stored_weights())


def test_fsdp_file_with_head_stored_apart(tmp_path: Path) -> None:
    weights = stored_weights()
    weights["head.weight"] = weights["embed.weight"].clone()
    with open_checkpoint(saved(tmp_path, trainer_content(weights, optimizer={}))) as checkpoint:
        assert_same(checkpoint, weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights},
        lambda weights: {"state_dict": weights},
        lambda weights: {"model": weights, "cfg": tiny_model("mla").cfg},
        lambda weights: {"model": weights, "cfg": config_fields()},
    ],
)
@pytest.mark.parametrize("name", ["model.pth", "model.bin"])
def test_state_dict_shells(tmp_path: Path, wrap: Callable[[Weights], Any], name: str) -> None:
    write_config(tmp_path, OPEN_FIELDS)
    with open_checkpoint(saved(tmp_path, wrap(stored_weights()), name)) as checkpoint:
        assert checkpoint.step is None
        assert_same(checkpoint, stored_weights())


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "_fsdp_wrapped_module.",
        "module._orig_mod.",
        "_orig_mod.model.module.",
    ],
)
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    write_config(tmp_path)
    path = saved(tmp_path, {prefix + name: value for name, value in stored_weights().items()})
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, stored_weights())


def test_wrapper_inside_a_name(tmp_path: Path) -> None:
    write_config(tmp_path)
    renamed = {name.replace("block.", "block._fsdp_wrapped_module."): t for name, t in stored_weights().items()}
    with open_checkpoint(saved(tmp_path, renamed)) as checkpoint:
        assert_same(checkpoint, stored_weights())


def test_parameters_and_cuda_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    weights = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in bare().items()}
    path = saved(tmp_path, trainer_content(weights))
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, bare())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_in_both_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in bare().items()}
    for path in (safetensors_folder(tmp_path, weights), saved(tmp_path, weights)):
        with open_checkpoint(path) as checkpoint:
            assert_same(checkpoint, weights)


def test_safetensors_file_and_folder(tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path, bare())
    for path in (folder, folder / "model.safetensors"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.kind == "safetensors"
            assert checkpoint.n_parameters == sum(value.numel() for value in bare().values())
            assert checkpoint.total_bytes == 4 * checkpoint.n_parameters
            assert_same(checkpoint, bare())


def test_safetensors_with_head_and_rope_tables(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in stored_weights().items()}
    with open_checkpoint(safetensors_folder(tmp_path, weights)) as checkpoint:
        assert_same(checkpoint, weights)


def test_sharded_safetensors(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    for path in (folder, folder / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.kind == "sharded safetensors"
            assert_same(checkpoint, bare())


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_expected_shapes_are_the_references(attn_type: str, tmp_path: Path) -> None:
    with open_checkpoint(
        saved(tmp_path, trainer_content(bare(attn_type)) | {"cfg": config_fields(attn_type)})
    ) as checkpoint:
        shapes = {name: tuple(value.shape) for name, value in bare(attn_type).items()}
        assert expected_shapes(checkpoint.config) == shapes


# --- reading ------------------------------------------------------------------------------------------------------


def test_read_returns_row_ranges_in_fresh_memory(tmp_path: Path) -> None:
    embed = bare()["embed.weight"]
    for path in (safetensors_folder(tmp_path, bare()), saved(tmp_path, stored_weights())):
        with open_checkpoint(path) as checkpoint:
            assert torch.equal(checkpoint.read("embed.weight", 3, 11), embed[3:11])
            assert torch.equal(checkpoint.read("embed.weight", 17), embed[17:])
            assert checkpoint.read("embed.weight", 5, 5).shape == (0, 24)
            checkpoint.read("embed.weight").zero_()
            assert torch.equal(checkpoint.read("embed.weight"), embed)


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    weights = bare()
    together = torch.arange(48.0)
    weights["norm.weight"], weights["recurrent.norm.weight"] = together[:24], together[24:]
    write_config(tmp_path)
    with open_checkpoint(saved(tmp_path, weights)) as checkpoint:
        assert_same(checkpoint, weights)


def test_file_cut_while_open(tmp_path: Path) -> None:
    folder = safetensors_folder(tmp_path, bare())
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 20_000)
        with pytest.raises(CheckpointError, match="ends inside"):
            [checkpoint.read(name) for name in checkpoint.tensors]


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts read bytes the Linux way")
def test_optimizer_state_is_never_read(tmp_path: Path) -> None:
    """Opening and reading everything reads and maps far fewer bytes than the optimizer state has."""
    optimizer = {"state": {0: {"exp_avg": torch.ones(2_000_000), "exp_avg_sq": torch.ones(2_000_000)}}}
    path = saved(tmp_path, trainer_content(bare(), optimizer=optimizer))
    open_checkpoint(path).close()  # whatever Python still has to import is read here
    before = _read_bytes()
    with open_checkpoint(path) as checkpoint:
        assert_same(checkpoint, bare())
        assert str(path) not in Path("/proc/self/maps").read_text()
        assert _read_bytes() - before < checkpoint.total_bytes + 500_000
    assert path.stat().st_size > 16_000_000


def _read_bytes() -> int:
    counted = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert counted
    return int(counted[1])


# --- config -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_config_from_shapes_but_for_two_fields(tmp_path: Path, attn_type: str) -> None:
    path = saved(tmp_path, stored_weights(attn_type))
    assert_refused(ConfigError, "model.pt: missing config field act_threshold;|--config", path)
    without_table = saved(tmp_path, bare(attn_type), "bare.pt")
    fields = {name: value for name, value in config_fields(attn_type).items() if name not in OPEN_FIELDS}
    rest = write_config(tmp_path, fields, "rest.json")
    assert_refused(ConfigError, "rest.json: missing config field act_threshold, rope_theta;", without_table, rest)
    extra = write_config(tmp_path, OPEN_FIELDS, "extra.json")
    with open_checkpoint(path, extra) as checkpoint:
        unused = {"n_kv_heads"} if attn_type == "mla" else {n for n in FIELD_NAMES if "lora_r" in n or "_h" in n}
        for name in set(FIELD_NAMES) - unused - set(OPEN_FIELDS):
            assert getattr(checkpoint.config, name) == config_fields(attn_type)[name], name


def test_open_fields_without_rope_table_and_shared_experts(tmp_path: Path) -> None:
    path = saved(tmp_path, bare("gqa", n_shared_experts=0))
    missing = "n_heads, n_kv_heads, max_seq_len, n_experts_per_tok, act_threshold, rope_theta;"
    assert_refused(ConfigError, f"missing config field {missing}", path)
    # The key heads follow from n_heads.
    given = OPEN_FIELDS | {"n_heads": 3, "max_seq_len": 16, "n_experts_per_tok": 2}
    with open_checkpoint(path, write_config(tmp_path, given, "extra.json")) as checkpoint:
        assert (checkpoint.config.n_kv_heads, checkpoint.config.n_shared_experts) == (1, 0)


def test_config_sources_in_order(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": bare(), "cfg": {"act_threshold": 0.5}})
    write_config(tmp_path, OPEN_FIELDS | {"rope_theta": 7.0, "max_seq_len": 12})
    extra = write_config(tmp_path, {"rope_theta": 8.0}, "extra.json")
    with open_checkpoint(path, extra) as checkpoint:
        config = checkpoint.config
        assert (config.act_threshold, config.rope_theta, config.max_seq_len) == (0.5, 8.0, 12)
        assert checkpoint.notes == (
            f"act_threshold is 0.5, as cfg of {path} says; {tmp_path / 'config.json'} says 0.99",
            f"rope_theta is 8.0, as {extra} says; {tmp_path / 'config.json'} says 7.0",
        )


def test_complete_config_ignores_what_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("not ours")
    with open_checkpoint(saved(tmp_path, trainer_content(stored_weights()))) as checkpoint:
        assert checkpoint.config.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("name", "value", "in_weights"),
    [
        ("dim", 32, 24),
        ("n_heads", 4, 3),
        ("prelude_layers", 3, 1),
        ("max_loop_iters", 9, 3),
        ("attn_type", "gqa", "'mla'"),
        ("n_experts_per_tok", 1, 2),
        ("qk_rope_head_dim", 8, 4),
    ],
)
def test_config_contradicts_weights(tmp_path: Path, name: str, value: Any, in_weights: Any) -> None:
    folder = safetensors_folder(tmp_path, bare(), config_fields() | {name: value, "n_kv_heads": 1})
    words = f"config.json: {name} is {value!r}, but the weights have {in_weights}"
    assert_refused(ConfigError, words, folder)


def test_rope_table_betrays_a_wrong_head_count(tmp_path: Path) -> None:
    extra = write_config(tmp_path, config_fields("gqa") | {"n_heads": 4}, "extra.json")
    words = "extra.json: n_heads is 4, but the weights have 3"
    assert_refused(ConfigError, words, saved(tmp_path, stored_weights("gqa")), extra)


def test_bad_config_files(tmp_path: Path) -> None:
    path = saved(tmp_path, stored_weights())
    assert_refused(ConfigError, "absent.json: cannot read", path, tmp_path / "absent.json")
    wrong = write_config(tmp_path, OPEN_FIELDS | {"colour": 1}, "wrong.json")
    assert_refused(ConfigError, "wrong.json: unknown config field colour", path, wrong)
    wrong = write_config(tmp_path, OPEN_FIELDS | {"dim": "24"}, "wrong.json")
    assert_refused(ConfigError, "wrong.json: dim is '24', expected an integer", path, wrong)
    path = saved(tmp_path, {"model": stored_weights(), "cfg": [1]})
    assert_refused(ConfigError, "missing config field act_threshold|cfg of|is a list, expected the fields", path)
