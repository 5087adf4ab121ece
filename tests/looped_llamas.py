"""Golden folders of looped Llamas, whole, changed, or in another form, and the states of every loop step."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.layout import load_network
from mythos_edge.model.network import Halting, LoopedNetwork, LoopState, Window

NOISE = 3  # times the reference's own float32 error


def golden_of(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name / "golden.npz") as file:
        return dict(file)


def weights_of(name: str) -> dict[str, Tensor]:
    return load_file(FIXTURES / name / "model.safetensors")


def changed(
    folder: Path,
    name: str,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor | None] | None = None,
) -> Path:
    """A copy of a golden folder with other fields in its config, and other tensors; None takes one away."""
    folder.mkdir(exist_ok=True)
    path = FIXTURES / name
    fields = {**json.loads((path / "config.json").read_text()), **(config or {})}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    if tensors is None:
        shutil.copy(path / "model.safetensors", folder)
        return folder
    made = weights_of(name) | tensors
    save_file({key: value for key, value in made.items() if value is not None}, folder / "model.safetensors")
    return folder


def in_shards(folder: Path, name: str, dtype: torch.dtype) -> Path:
    """The golden folder in ``dtype``, its tensors in two files with an index."""
    tensors = {key: value.to(dtype) for key, value in weights_of(name).items()}
    names = sorted(tensors)
    files = {key: f"model-0000{1 + 2 * index // len(names)}-of-00002.safetensors" for index, key in enumerate(names)}
    for file in set(files.values()):
        save_file({key: tensors[key] for key in names if files[key] == file}, folder / file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(FIXTURES / name / "config.json", folder)
    return folder


def network_of(path: Path, dtype: torch.dtype = torch.float32) -> LoopedNetwork:
    with open_checkpoint(path) as checkpoint:
        return load_network(checkpoint, dtype=dtype)


@torch.no_grad()
def loop_states(network: LoopedNetwork, ids: np.ndarray, threshold: float = 1.0, min_depth: int = 1) -> list[LoopState]:
    """The state after every loop step."""
    (batch, chunk), looped = ids.shape, network.looped
    window = Window(torch.tensor(0), torch.zeros(batch, dtype=torch.int64))
    nothing = torch.empty(batch, 0, looped.cache_width, dtype=next(network.parameters()).dtype)
    e, _ = network.prelude(torch.from_numpy(ids), window)
    zeros = torch.zeros(batch, chunk, dtype=torch.promote_types(e.dtype, torch.float32))
    state, states = LoopState(e, torch.zeros_like(e), zeros, zeros.to(torch.int64)), []
    halting = Halting(torch.tensor(threshold), torch.tensor(min_depth))
    for index in range(looped.max_depth):
        past = [nothing] * looped.step_slots
        state, rows = network.loop_step(state, e, torch.full((batch, chunk), index), halting, window, *past)
        assert len(rows) == looped.step_slots
        states.append(state)
    return states


def farthest(found: Tensor | np.ndarray, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, dtype=np.float64) - wanted).max())


class Shape(NamedTuple):
    """The shape of a Llama."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


def random_llama(shape: Shape, seed: int) -> LlamaForCausalLM:
    """A Llama of transformers with weights large enough to matter."""
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    torch.manual_seed(seed)
    llama = LlamaForCausalLM(config).eval()
    for parameter in llama.requires_grad_(False).parameters():
        parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(std=parameter.shape[1] ** -0.5)
    return llama


def save_llama(
    folder: Path,
    llama: LlamaForCausalLM,
    model_type: str,
    fields: Mapping[str, Any],
    more: Mapping[str, Tensor] | None = None,
) -> None:
    """Saves a Llama as the layers of a model of another type, with ``more`` tensors."""
    save_file({**llama.state_dict(), **(more or {})}, folder / "model.safetensors")
    config = {**llama.config.to_dict(), "model_type": model_type, "architectures": None, **fields}
    (folder / "config.json").write_text(json.dumps(config))


def angles_and_mask(llama: LlamaForCausalLM, h: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The rotary angles and the causal mask that the layers of a Llama want for the states ``h``."""
    chunk = h.shape[1]
    mask = torch.full((chunk, chunk), -torch.inf, dtype=h.dtype).triu(1)[None, None]
    return llama.model.rotary_emb(h, torch.arange(chunk)[None]), mask
