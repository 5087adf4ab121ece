"""Dory checkpoints for tests: the golden one in its three layouts, and random ones of transformers."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "fixtures" / "dory-small"
CONFIG: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
# What transformers reads of it, and writes.
_FIELDS = """
    architectures model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range tie_word_embeddings
    rope_parameters attention_bias mlp_bias sliding_window layer_types ngpt_alpha_init n_input_layers
    n_recurrent_layers n_output_layers n_recurrent_loops recurrent_kv_cache_mode
"""
PLAIN = {name: CONFIG[name] for name in _FIELDS.split()}
HALVED = PLAIN | {
    "layer_types": PLAIN["layer_types"][::2],
    **{f"n{part}_layers": PLAIN[f"n{part}_layers"] // 2 for part in ("um_hidden", "_input", "_recurrent", "_output")},
}
LAYOUTS = {"released": CONFIG, "saved": PLAIN, "memory": HALVED}
_OF_ATTENTION = ("self_attn.", "mixer.q", "mixer.k", "mixer.v", "mixer.o", "mixer.g_", "mixer.s_gate", "mixer.sqk")


def released_tensors() -> dict[str, Tensor]:
    """The tensors of the golden checkpoint under the names of the release."""
    return dict(load_file(GOLDEN / "model.safetensors"))


def in_layout(layout: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the release in another layout."""
    return {_renamed(layout, name): tensor for name, tensor in tensors.items()}


def checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """A folder that holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scatter(model: nn.Module, seed: int) -> None:
    """Gives a model weights with which every part of it counts, learned scales of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = parameter.ndim == 1
        base = next((size for part, size in (("suv", 1.0), ("lambda", 0.04), ("logit", 0.1)) if part in name), 0.0177)
        spread = base * (noise.sign() * (0.6 + noise.abs())) if is_scale else noise * parameter.shape[-1] ** -0.5
        parameter.data.copy_(spread)


def _renamed(layout: str, name: str) -> str:
    """The name in ``layout`` of a tensor of the release."""
    found = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name)
    if layout == "released":
        return name
    if found is None:
        return name.replace("backbone.embeddings", "model.embed_tokens") if layout == "memory" else name
    layer, rest = int(found[1]) // 2, found[2]
    block = "self_attn." if rest.startswith(_OF_ATTENTION) else "mlp."
    rest = {"attn_alpha": "lambda_1", "mlp_alpha": "lambda_2"}.get(rest, rest.replace("mixer.", block))
    if layout == "memory":
        return f"model.layers.{layer}.{rest.replace('.g_proj', '.gate_proj')}"
    return f"backbone.layers.{layer}.{rest}"
