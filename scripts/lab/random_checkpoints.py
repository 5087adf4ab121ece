"""Writes folders of random weights in the shapes of published models, tensor by tensor, so that it needs little memory.

The weights are lively: activations stay of size 1, every part of a model counts, and gates differ between positions.
What a trained model would say, or how deep its positions go, is not to be told from them.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from mythos_edge.model.families.dory.config import FULL, SLIDING, DoryConfig
from mythos_edge.model.families.dory.opening import tensor_shapes as dory_shapes
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.looped_llama.config import NanbeigeConfig, OuroConfig, StackConfig
from mythos_edge.model.families.looped_llama.layout import tensor_shapes as stack_shapes
from mythos_edge.model.families.openmythos.config import VARIANTS, MythosConfig
from mythos_edge.model.families.openmythos.shapes import expected_shapes

DTYPES = {"fp32": ("F32", torch.float32), "fp16": ("F16", torch.float16), "bf16": ("BF16", torch.bfloat16)}
# Source: the files of ByteDance/Ouro-1.4B, Nanbeige/Nanbeige4.2-3B and nvidia/Dory1.0-4B.
OURO_1_4B = OuroConfig(
    vocab_size=49152,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=24,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    max_position_embeddings=65536,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    total_ut_steps=4,
    early_exit_threshold=1.0,
)
NANBEIGE_3B = NanbeigeConfig(
    vocab_size=166144,
    hidden_size=3072,
    intermediate_size=10752,
    num_hidden_layers=22,
    num_attention_heads=48,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=262144,
    rms_norm_eps=1e-5,
    rope_theta=7e7,
    num_loops=2,
    loop_loss_weights=(),
    skip_loop_final_norm=False,
)
DORY_4B = DoryConfig(
    vocab_size=131072,
    hidden_size=2560,
    intermediate_size=7168,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=262144,
    layer_types=(SLIDING, SLIDING, SLIDING, FULL) * 9,
    sliding_window=1024,
    sliding_theta=1e4,
    full_theta=1e7,
    initializer_range=0.0177,
    ngpt_alpha_init=0.05,
    n_input_layers=8,
    n_recurrent_layers=20,
    n_output_layers=8,
    n_recurrent_loops=2,
)
PUBLISHED: dict[str, Config] = {
    **VARIANTS,
    "ouro-1.4b": OURO_1_4B,
    "nanbeige-3b": NANBEIGE_3B,
    "dory-4b": DORY_4B,
}
# Mean and deviation of the values of a tensor whose name has this part, the first that fits; of other matrices the
# deviation follows from their width. Scales of Dory are in units of its ``initializer_range``: a layer's rate is 0.2.
_VALUES = (
    ("norm", 1.0, 0.1),
    ("embed_tokens", 0.0, 1.0),
    ("early_exit_gate.weight", 0.0, 0.012),
    ("early_exit_gate.bias", -1.5, 0.0),
    ("suv_", 1.0, 0.2),
    ("lambda_", 4 * 0.0177, 0.0177),
    ("sqk", 0.0177, 0.004),
    ("s_gate", 0.0177, 0.004),
    ("logit_scale", 0.0177, 0.002),
)
_OPENMYTHOS = 0.0, 0.02
_PIECE = 1 << 22


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint by name."""
    if isinstance(config, MythosConfig):
        return expected_shapes(config)
    if isinstance(config, StackConfig):
        return stack_shapes(config)
    assert isinstance(config, DoryConfig), config
    return dory_shapes(config)


def write_checkpoint(config: Config, folder: Path, dtype: str = "fp32", seed: int = 0) -> None:
    """A new folder with config.json and a model.safetensors of random weights, written piece by piece."""
    shapes, (stored, kind) = shapes_of(config), DTYPES[dtype]
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shapes.items():
        length = kind.itemsize * math.prod(shape)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [offset, offset + length]}
        offset += length
    folder.mkdir()
    named = {} if isinstance(config, MythosConfig) else {"model_type": config.family}
    (folder / "config.json").write_text(json.dumps(named | config.to_dict()))
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(_PIECE)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            mean, deviation = _OPENMYTHOS if isinstance(config, MythosConfig) else _mean_and_deviation(name, shape)
            for start in range(0, left := math.prod(shape), _PIECE):
                piece = noise[: left - start].normal_(mean, deviation, generator=generator)
                file.write(piece.to(kind).view(torch.uint8).numpy().data)


def _mean_and_deviation(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    for part, mean, deviation in _VALUES:
        if part in name:
            return mean, deviation
    return 0.0, shape[-1] ** -0.5
