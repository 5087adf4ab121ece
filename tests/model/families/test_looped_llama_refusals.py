"""Ouro and Nanbeige folders that cannot be computed are refused by name; inert config fields change nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from looped_llamas import changed, in_shards
from tiny_checkpoint import assert_refused

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.families.looped_llama.family import NANBEIGE, OURO

SMALL = {"ouro": "ouro-small", "nanbeige": "nanbeige-small"}
FULL = "full_attention"

# A field that is set, words of its refusal, and the families that know it.
SET: list[tuple[dict[str, Any], str]] = [
    ({"use_sliding_window": True}, "use_sliding_window is True, expected it off|window"),
    ({"sliding_window": 4096}, "sliding_window is 4096, expected null"),
    ({"sliding_window": 0}, "sliding_window is 0, expected null"),
    ({"layer_types": [FULL, "sliding_attention", FULL][:2]}, "layer_types has an entry|layers"),
    ({"layer_types": "full"}, "layer_types has an entry 'full', expected 'full_attention'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling is {'rope_type': 'yarn'}, expected null"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_parameters is|expected rope_theta and"),
    ({"rope_parameters": {"rope_theta": 1e6, "factor": 4}}, "rope_parameters is|expected rope_theta and"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta is|rope_parameters says 5.0"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected it off"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"attention_bias": True}, "attention_bias is True, expected it off"),
    ({"mlp_bias": True}, "mlp_bias is True, expected it off"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}|bf16, fp16 or fp32"),
    ({"early_exit_step": 2}, "early_exit_step is 2, expected null|max_depth and min_depth"),
    ({"early_exit_step": 0}, "early_exit_step is 0, expected null|max_depth and min_depth"),
    ({"use_weighted_exit": True}, "use_weighted_exit is True, expected it off|last loop step taken"),
    ({"enable_double_loop_split": True}, "enable_double_loop_split is True, expected it off"),
    ({"loop_share_kv": True}, "loop_share_kv is True, expected it off"),
    ({"loop_middle_layers": [1, 2]}, "loop_middle_layers is [1, 2], expected it off"),
    ({"enable_hyper_connection": True}, "enable_hyper_connection is True"),
    ({"enable_mhc": True}, "enable_mhc is True, expected it off"),
    ({"enable_h_res_identity": True}, "enable_h_res_identity is True"),
    ({"mhc_expansion_rate": 4}, "mhc_expansion_rate is 4, expected it off"),
    ({"enable_depth_attention": True}, "enable_depth_attention is True"),
    ({"emb_neighbor_num": 2}, "emb_neighbor_num is 2, expected it off"),
    ({"insert_ngram_layer_idx": [1]}, "insert_ngram_layer_idx is [1], expected null"),
    ({"insert_ngram_layer_idx": 0}, "insert_ngram_layer_idx is 0, expected null"),
    ({"ngram_insert_all_layers": True}, "ngram_insert_all_layers is True"),
    ({"ngram_sizes": [2]}, "ngram_sizes is [2], expected it off"),
    ({"qk_layernorm": True}, "qk_layernorm is True, expected it off"),
    ({"novel_loop_trick": 2, "other": None}, "unknown config field novel_loop_trick, which may change|set it to null"),
    ({"num_attention_heads": 5, "num_key_value_heads": 3}, "num_attention_heads 5 is not divisible by"),
    ({"head_dim": 15, "kv_channels": None}, "head_dim must be even, got 15"),
    ({"num_hidden_layers": 10**100}, "num_hidden_layers is a number of more than 77 digits, expected an integer of 1"),
    ({"hidden_size": "64"}, "hidden_size is '64', expected an integer of 1"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a number above 0"),
    ({"rope_theta": ...}, "missing config field rope_theta; give it in --config"),
    ({"vocab_size": True}, "vocab_size is True, expected an integer"),
]


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize(("fields", "words"), SET, ids=[next(iter(fields)) for fields, _ in SET])
def test_what_cannot_be_computed_is_refused_by_name(
    family: str, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    assert_refused(ConfigError, f"config.json|{words}", changed(tmp_path, SMALL[family], fields))


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("ouro", {"total_ut_steps": 5}, 'total_ut_steps is 5, expected at most 4|lower it|{"total_ut_steps": 4}'),
        ("ouro", {"total_ut_steps": 0}, "total_ut_steps is 0, expected an integer of 1"),
        ("ouro", {"early_exit_threshold": 0}, "early_exit_threshold is 0, expected a number above 0"),
        ("ouro", {"early_exit_threshold": float("nan")}, "early_exit_threshold is nan, expected a number above 0"),
        ("ouro", {"num_loops": 2}, "unknown config field num_loops"),
        ("nanbeige", {"num_loops": ...}, "num_loops is missing|before 4.2|any runtime for Llama"),
        ("nanbeige", {"num_loops": 0}, "num_loops is 0, expected an integer of 1"),
        ("nanbeige", {"num_loops": 1.5}, "num_loops is 1.5, expected an integer of 1"),
        ("nanbeige", {"loop_loss_weights": "many"}, "loop_loss_weights is 'many', expected a list of numbers"),
        ("nanbeige", {"skip_loop_final_norm": 1}, "skip_loop_final_norm is 1, expected true or false"),
        ("nanbeige", {"kv_channels": 24}, "head_dim is 16, but kv_channels says 24"),
    ],
)
def test_fields_of_one_family(family: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert_refused(ConfigError, f"config.json|{words}", changed(tmp_path, SMALL[family], fields))


IGNORED = {
    "attention_dropout": 0.1, "initializer_range": 0.5, "max_window_layers": 1, "chunk_size": 8, "auto_map": {"a": "b"},
    "dtype": "bfloat16", "torch_dtype": "float16", "transformers_version": "5.24.0", "unsloth_version": "2026.1",
    "pretraining_tp": 2, "use_cache": False, "bos_token_id": 7, "pad_token_id": 0, "loop_share_kv": False,
    "mhc_expansion_rate": 0, "novel_loop_trick": None, "insert_ngram_layer_idx": [], "partial_rotary_factor": 1.0,
    "early_exit_step": None,
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_what_changes_nothing_is_ignored(family: str, tmp_path: Path) -> None:
    plain, more = changed(tmp_path / "a", SMALL[family]), changed(tmp_path / "b", SMALL[family], IGNORED)
    with open_checkpoint(plain) as one, open_checkpoint(more) as other:
        assert one.config == other.config
        assert one.config.family == family
        assert other.notes == ()


def test_fields_that_others_tell(tmp_path: Path) -> None:
    fields = {"head_dim": ..., "num_key_value_heads": ..., "rope_theta": ..., "total_ut_steps": ...}
    rope = {"rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 1.0}
    fields |= {"rope_parameters": rope, "early_exit_threshold": ...}
    with open_checkpoint(changed(tmp_path / "ouro", "ouro-small", fields)) as told:
        assert (told.config.head_dim, told.config.num_key_value_heads, told.config.rope_theta) == (16, 4, 1e6)
        assert (told.config.max_depth, told.config.threshold) == (4, 1.0)
        assert all("config.json: has no" in note for note in told.notes)
        assert len(told.notes) == 2
    with open_checkpoint(changed(tmp_path / "n", "nanbeige-small", {"head_dim": ...})) as told:
        assert told.config.head_dim == 16  # kv_channels says so, hidden_size / heads is 12
    fields = {"loop_loss_weights": [0.5, 0.5], "num_loops": 2}
    with open_checkpoint(changed(tmp_path / "w", "nanbeige-small", fields)) as told:
        assert told.config.max_depth == 3
        assert "num_loops 2 is ignored" in told.notes[0]


@pytest.mark.parametrize("family", [OURO, NANBEIGE], ids=SMALL)
def test_a_config_is_what_a_bundle_keeps_of_it(family: Any, tmp_path: Path) -> None:
    fields = {} if family is OURO else {"loop_loss_weights": [0.25, 0.75]}
    with open_checkpoint(changed(tmp_path, SMALL[family.name], fields)) as checkpoint:
        kept = json.loads(json.dumps(checkpoint.config.to_dict()))
    assert family.config_from(kept, "manifest.config") == checkpoint.config


GATE = "model.early_exit_gate"


@pytest.mark.parametrize(
    ("family", "tensors", "words"),
    [
        ("ouro", {f"{GATE}.bias": None}, "missing tensors model.early_exit_gate.bias"),
        ("ouro", {f"{GATE}.weight": torch.zeros(64)}, "early_exit_gate.weight has shape (64,), expected (1, 64)"),
        ("ouro", {"model.layers.1.input_layernorm_2.weight": None}, "missing tensors model.layers.1.input_layernorm_2"),
        ("ouro", {"lm_head.weight": None}, "missing tensors lm_head.weight"),
        ("ouro", {"model.norm.weight": torch.zeros(64, dtype=torch.int64)}, "model.norm.weight has dtype torch.int64"),
        ("nanbeige", {"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}, "unknown tensors model.layers.0.self"),
        (
            "nanbeige",
            {"model.layers.3.mlp.up_proj.weight": torch.zeros(144, 72)},
            "unknown tensors|with 3 layers only",
        ),
        ("nanbeige", {"model.layers.0.input_layernorm_2.weight": torch.zeros(72)}, "unknown tensors model.layers.0"),
        ("nanbeige", {f"{GATE}.weight": torch.zeros(1, 72)}, "unknown tensors model.early_exit_gate.weight"),
        (
            "nanbeige",
            {"model.layers.2.self_attn.k_proj.weight": torch.zeros(96, 72)},
            "model.layers.2.self_attn.k_proj.weight has shape (96, 72), expected (32, 72) by the config",
        ),
    ],
)
def test_tensors_that_are_wrong(family: str, tensors: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert_refused(CheckpointError, words, changed(tmp_path, SMALL[family], tensors=tensors))


def test_stored_frequencies_are_ignored_with_a_note(tmp_path: Path) -> None:
    stored = {f"model.layers.{index}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for index in range(3)}
    with open_checkpoint(changed(tmp_path, "nanbeige-small", tensors=stored)) as checkpoint:
        assert "inv_freq" in checkpoint.notes[0]
        assert not [name for name in checkpoint.tensors if "inv_freq" in name]


def test_how_a_folder_is_recognised(tmp_path: Path) -> None:
    by_class = changed(tmp_path / "class", "nanbeige-small", {"model_type": ...})
    by_type = changed(tmp_path / "type", "nanbeige-small", {"architectures": None})
    for path in (by_class, by_type):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.config.family == "nanbeige"
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    words = "of no family that is known|ouro, nanbeige|'llama'"
    assert_refused(CheckpointError, words, changed(tmp_path / "llama", "nanbeige-small", llama))
    bare = changed(tmp_path / "bare", "ouro-small")
    (bare / "config.json").rename(tmp_path / "whole.json")
    assert_refused(ConfigError, "config.json: no such file, expected the model's config: copy it there|--config", bare)
    (bare / "config.json").write_text("{")
    assert_refused(ConfigError, "config.json: not valid JSON", bare)
    (bare / "config.json").unlink()
    with open_checkpoint(bare, tmp_path / "whole.json") as checkpoint:
        assert checkpoint.config.family == "ouro"


@pytest.mark.parametrize("family", SMALL)
def test_a_given_config_overrules_fields(family: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", SMALL[family], {"novel_loop_trick": 2, "rms_norm_eps": 0.5})
    (tmp_path / "mend.json").write_text(json.dumps({"novel_loop_trick": None, "rms_norm_eps": 1e-6}))
    assert_refused(ConfigError, "novel_loop_trick", folder)
    with open_checkpoint(folder, tmp_path / "mend.json") as checkpoint:
        assert checkpoint.config.rms_norm_eps == 1e-6
    (tmp_path / "mend.json").write_text('{"hidden_act": "relu"}')
    assert_refused(ConfigError, "mend.json over|config.json: hidden_act is 'relu'", folder, tmp_path / "mend.json")


def test_a_stored_rotary_table_is_none_of_theirs(tmp_path: Path) -> None:
    folder = changed(tmp_path, "ouro-small")
    with pytest.raises(ConfigError, match="--rope-table is stored, but ouro models store none"):
        open_checkpoint(folder, rope_table="stored")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    folder = in_shards(tmp_path, "nanbeige-small", torch.float16)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.kind == "sharded safetensors"
    (folder / "model-00001-of-00002.safetensors").unlink()
    assert_refused(CheckpointError, "shard model-00001-of-00002.safetensors is missing", folder)


def test_what_is_known_of_tokens(tmp_path: Path) -> None:
    with open_checkpoint(changed(tmp_path / "o", "ouro-small")) as checkpoint:
        known = checkpoint.special_tokens
        assert (known.wrong, known.begin, known.end) == ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    with open_checkpoint(changed(tmp_path / "n", "nanbeige-small")) as checkpoint:
        assert checkpoint.special_tokens is None
