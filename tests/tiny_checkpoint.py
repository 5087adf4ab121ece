"""Checkpoints of the reference's own smallest model, in every form they are stored in."""

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.scripts.lab.reference import open_mythos

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
def tiny_model(attn_type: str, **changes: Any) -> Any:
    main = open_mythos()
    torch.manual_seed(0)
    return main.OpenMythos(main.MythosConfig(**(TINY | {"attn_type": attn_type} | changes)))


def stored_weights(attn_type: str = "mla", **changes: Any) -> Weights:
    """The upstream state dict, with head and rope tables."""
    return dict(tiny_model(attn_type, **changes).state_dict())


def bare(attn_type: str = "mla", **changes: Any) -> Weights:
    """The state dict as safetensors files have it."""
    weights = stored_weights(attn_type, **changes)
    return {name: value for name, value in weights.items() if name not in WITHOUT_EXTRAS}


def config_fields(attn_type: str = "mla") -> dict[str, Any]:
    return dataclasses.asdict(tiny_model(attn_type).cfg)


def write_config(folder: Path, values: Mapping[str, Any] | None = None, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(config_fields() if values is None else values))
    return path


def saved(folder: Path, content: Any, name: str = "model.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def safetensors_folder(folder: Path, weights: Weights, config: Mapping[str, Any] | None = None) -> Path:
    save_file(weights, folder / "model.safetensors")
    write_config(folder, config)
    return folder


def sharded(folder: Path) -> Path:
    names = list(bare())
    files = {name: f"model-0000{index % 2 + 1}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: bare()[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    write_config(folder)
    return folder


def trainer_content(weights: Weights, **more: Any) -> dict[str, Any]:
    """What the reference's trainer saves, and ``more`` or in place of it."""
    return {"step": 7, "model": weights, "cfg": tiny_model("mla").cfg, "vocab_size": 19, **more}


class Evil:
    """Makes the folder ``trace`` when it is unpickled by something that runs what a pickle says."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def assert_same(checkpoint: Checkpoint, weights: Weights) -> None:
    assert set(checkpoint.tensors) == set(weights) - set(WITHOUT_EXTRAS)
    for name in checkpoint.tensors:
        got = checkpoint.read(name)
        assert got.dtype == weights[name].dtype
        assert torch.equal(got, weights[name]), name


def assert_refused(error: type[Exception], words: str, path: Path, config_path: Path | None = None) -> None:
    """Opening fails with one line that holds every one of ``words`` (separated by ``|``)."""
    with pytest.raises(error) as caught:
        open_checkpoint(path, config_path).close()
    message = str(caught.value)
    assert "\n" not in message
    for word in words.split("|"):
        assert word in message, message
