import dataclasses
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mythos_edge.model.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from mythos_edge.model.config import FIELD_NAMES
from mythos_edge.model.errors import CheckpointError, ConfigError
from oracle import open_mythos_main
from safetensors.torch import save_file
from torch import Tensor

TINY: dict[str, Any] = {
    "vocab_size": 19,
    "dim": 24,
    "n_heads": 3,
    "n_kv_heads": 1,
    "max_seq_len": 16,
    "max_loop_iters": 3,
    "prelude_layers": 1,
    "coda_layers": 2,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 5,
    "n_experts": 4,
    "n_shared_experts": 1,
    "n_experts_per_tok": 2,
    "expert_dim": 7,
    "lora_rank": 2,
}
# What no tensor shape tells.
OPEN_FIELDS = {"act_threshold": 0.99, "rope_theta": 500000.0}
WITHOUT_EXTRAS = ("head.weight", "freqs_cis", "freqs_cis_mla")

Weights = dict[str, Tensor]


@cache
def _model(attn_type: str, **changes: Any) -> Any:
    main = open_mythos_main()
    torch.manual_seed(0)
    return main.OpenMythos(main.MythosConfig(**(TINY | {"attn_type": attn_type} | changes)))


def _weights(attn_type: str = "mla", **changes: Any) -> Weights:
    """The upstream state dict, with head and rope tables."""
    return dict(_model(attn_type, **changes).state_dict())


def _bare(attn_type: str = "mla", **changes: Any) -> Weights:
    """The state dict as safetensors files have it."""
    weights = _weights(attn_type, **changes)
    return {name: value for name, value in weights.items() if name not in WITHOUT_EXTRAS}


def _fields(attn_type: str = "mla") -> dict[str, Any]:
    return dataclasses.asdict(_model(attn_type).cfg)


def _write_config(folder: Path, values: Mapping[str, Any] | None = None, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(_fields() if values is None else values))
    return path


def _saved(folder: Path, content: Any, name: str = "model.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def _safetensors_folder(folder: Path, weights: Weights, config: Mapping[str, Any] | None = None) -> Path:
    save_file(weights, folder / "model.safetensors")
    _write_config(folder, config)
    return folder


def _trainer(weights: Weights, **more: Any) -> dict[str, Any]:
    return {"step": 7, "model": weights, "cfg": _model("mla").cfg, "vocab_size": 19, **more}


def _assert_same(checkpoint: Checkpoint, weights: Weights) -> None:
    assert set(checkpoint.tensors) == set(weights) - set(WITHOUT_EXTRAS)
    for name in checkpoint.tensors:
        got = checkpoint.read(name)
        assert got.dtype == weights[name].dtype
        assert torch.equal(got, weights[name]), name


def _assert_refused(
    error: type[Exception], words: str, path: Path, config_path: Path | None = None
) -> None:
    """Opening fails with one line that holds every one of ``words`` (separated by ``|``)."""
    with pytest.raises(error) as caught:
        open_checkpoint(path, config_path).close()
    message = str(caught.value)
    assert "\n" not in message
    for word in words.split("|"):
        assert word in message, message


# --- every kind of file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_trainer_file(tmp_path: Path, attn_type: str) -> None:
    model = _model(attn_type)
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "step": 123,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cfg": model.cfg,
        "vocab_size": 19,
    }
    with open_checkpoint(_saved(tmp_path, content, "step_0000123.pt")) as checkpoint:
        assert (checkpoint.kind, checkpoint.step) == ("trainer .pt", 123)
        fields = dataclasses.asdict(model.cfg)
        assert checkpoint.config.to_dict() == {name: fields[name] for name in FIELD_NAMES}
        _assert_same(checkpoint, _weights(attn_type))


def test_first_trainer_version_with_muon_and_adamw(tmp_path: Path) -> None:
    moments = {"state": {0: {"momentum_buffer": torch.zeros(5)}}}
    content = _trainer(_weights(), muon=moments, adamw=moments)
    # Fields that were added to the reference's config later.
    content["cfg"] = open_mythos_main().MythosConfig(**_fields())
    del content["cfg"].__dict__["dropout"], content["cfg"].__dict__["max_output_tokens"]
    with open_checkpoint(_saved(tmp_path, content)) as checkpoint:
        assert checkpoint.kind == "trainer .pt"
        _assert_same(checkpoint, _weights())


def test_fsdp_file_with_head_stored_apart(tmp_path: Path) -> None:
    weights = _weights()
    weights["head.weight"] = weights["embed.weight"].clone()
    with open_checkpoint(_saved(tmp_path, _trainer(weights, optimizer={}))) as checkpoint:
        _assert_same(checkpoint, weights)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights},
        lambda weights: {"state_dict": weights},
        lambda weights: {"model": weights, "cfg": _model("mla").cfg},
        lambda weights: {"model": weights, "cfg": _fields()},
    ],
)
@pytest.mark.parametrize("name", ["model.pth", "model.bin"])
def test_state_dict_shells(tmp_path: Path, wrap: Callable[[Weights], Any], name: str) -> None:
    _write_config(tmp_path, OPEN_FIELDS)
    with open_checkpoint(_saved(tmp_path, wrap(_weights()), name)) as checkpoint:
        assert checkpoint.step is None
        _assert_same(checkpoint, _weights())


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.model.module."],
)
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    _write_config(tmp_path)
    path = _saved(tmp_path, {prefix + name: value for name, value in _weights().items()})
    with open_checkpoint(path) as checkpoint:
        _assert_same(checkpoint, _weights())


def test_wrapper_inside_a_name(tmp_path: Path) -> None:
    _write_config(tmp_path)
    renamed = {name.replace("block.", "block._fsdp_wrapped_module."): t for name, t in _weights().items()}
    with open_checkpoint(_saved(tmp_path, renamed)) as checkpoint:
        _assert_same(checkpoint, _weights())


def test_parameters_and_cuda_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    weights = {n: torch.nn.Parameter(t, requires_grad=False) for n, t in _bare().items()}
    path = _saved(tmp_path, _trainer(weights))
    with open_checkpoint(path) as checkpoint:
        _assert_same(checkpoint, _bare())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_in_both_formats(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in _bare().items()}
    for path in (_safetensors_folder(tmp_path, weights), _saved(tmp_path, weights)):
        with open_checkpoint(path) as checkpoint:
            _assert_same(checkpoint, weights)


def test_safetensors_file_and_folder(tmp_path: Path) -> None:
    folder = _safetensors_folder(tmp_path, _bare())
    for path in (folder, folder / "model.safetensors"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.kind == "safetensors"
            assert checkpoint.n_parameters == sum(value.numel() for value in _bare().values())
            assert checkpoint.total_bytes == 4 * checkpoint.n_parameters
            _assert_same(checkpoint, _bare())


def test_safetensors_with_head_and_rope_tables(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in _weights().items()}
    with open_checkpoint(_safetensors_folder(tmp_path, weights)) as checkpoint:
        _assert_same(checkpoint, weights)


def _sharded(folder: Path) -> Path:
    names = list(_bare())
    files = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: _bare()[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    _write_config(folder)
    return folder


def test_sharded_safetensors(tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    for path in (folder, folder / "model.safetensors.index.json"):
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.kind == "sharded safetensors"
            _assert_same(checkpoint, _bare())


# --- reading ------------------------------------------------------------------------------------------------


def test_read_returns_row_ranges_in_fresh_memory(tmp_path: Path) -> None:
    embed = _bare()["embed.weight"]
    for path in (_safetensors_folder(tmp_path, _bare()), _saved(tmp_path, _weights())):
        with open_checkpoint(path) as checkpoint:
            assert torch.equal(checkpoint.read("embed.weight", 3, 11), embed[3:11])
            assert torch.equal(checkpoint.read("embed.weight", 17), embed[17:])
            assert checkpoint.read("embed.weight", 5, 5).shape == (0, 24)
            checkpoint.read("embed.weight").zero_()
            assert torch.equal(checkpoint.read("embed.weight"), embed)


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    weights = _bare()
    together = torch.arange(48.0)
    weights["norm.weight"], weights["recurrent.norm.weight"] = together[:24], together[24:]
    _write_config(tmp_path)
    with open_checkpoint(_saved(tmp_path, weights)) as checkpoint:
        _assert_same(checkpoint, weights)


def test_file_cut_while_open(tmp_path: Path) -> None:
    folder = _safetensors_folder(tmp_path, _bare())
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 20_000)
        with pytest.raises(CheckpointError, match="ends inside"):
            for name in checkpoint.tensors:
                checkpoint.read(name)


def test_optimizer_state_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte the process reads from the file is recorded; none may lie in the optimizer's tensors."""
    marker = torch.full((50_000,), 1234.5)
    path = _saved(tmp_path, _trainer(_bare(), optimizer={"state": {0: {"exp_avg": marker}}}))
    start = path.read_bytes().index(marker.numpy().tobytes())
    ranges = _recorded_reads(path, monkeypatch)
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name)
    touched = [(at, n) for at, n in ranges if at < start + marker.nbytes and at + n > start]
    # File objects read ahead and the zip directory is searched from the end, but by no more than 64 KiB.
    assert sum(n for _, n in touched) <= 70_000
    assert sum(n for _, n in ranges) > sum(value.nbytes for value in _bare().values())


def _recorded_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    raise NotImplementedError
