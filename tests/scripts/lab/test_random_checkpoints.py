"""Random checkpoints are what they are named after: the published sizes, one dtype, and a model that can be opened."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.families.family import Config
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.scripts.lab.random_checkpoints import (
    DORY_4B,
    DTYPES,
    NANBEIGE_3B,
    OURO_1_4B,
    PUBLISHED,
    shapes_of,
    write_checkpoint,
)

# Of the tensor lists of the published files.
PARAMETERS = {"ouro-1.4b": 1_434_652_673, "nanbeige-3b": 4_169_800_704, "dory-4b": 3_975_229_440}
_STACK = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 32,
}
SMALL: dict[str, Config] = {
    "1b": replace(VARIANTS["1b"], vocab_size=40, dim=64, n_heads=2, kv_lora_rank=16, n_experts=4, expert_dim=8),
    "ouro-1.4b": replace(OURO_1_4B, **_STACK, num_key_value_heads=4, num_hidden_layers=2),
    "nanbeige-3b": replace(NANBEIGE_3B, **_STACK, num_key_value_heads=2, num_hidden_layers=2),
    "dory-4b": replace(
        DORY_4B,
        **_STACK,
        num_key_value_heads=2,
        layer_types=DORY_4B.layer_types[:4],
        n_input_layers=1,
        n_recurrent_layers=2,
        n_output_layers=1,
    ),
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_the_parameters_are_those_of_the_published_file(name: str, count: int) -> None:
    assert sum(math.prod(shape) for shape in shapes_of(PUBLISHED[name]).values()) == count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMALL)
def test_what_is_written_can_be_opened(name: str, dtype: str, tmp_path: Path) -> None:
    config = SMALL[name]
    write_checkpoint(config, tmp_path / "made", dtype)
    with open_checkpoint(tmp_path / "made") as opened:
        assert opened.config == config
        tensors = {stored: opened.read(stored) for stored in shapes_of(config)}
    assert {tensor.dtype for tensor in tensors.values()} == {DTYPES[dtype][1]}
    assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values())
    matrices = [tensor.float() for tensor in tensors.values() if tensor.numel() > 100]
    assert all(tensor.std() > 0 for tensor in matrices)
    # No two are made of the same numbers, and no rows are.
    assert len({tensor.flatten()[0].item() for tensor in matrices}) > len(matrices) / 2
    assert all(len(tensor.unique(dim=0)) == len(tensor) for tensor in matrices if tensor.ndim == 2)


def test_a_gate_differs_between_positions(tmp_path: Path) -> None:
    write_checkpoint(SMALL["ouro-1.4b"], tmp_path / "made")
    with open_checkpoint(tmp_path / "made") as opened:
        assert opened.read("model.early_exit_gate.bias").tolist() == [-1.5]
        assert opened.read("model.early_exit_gate.weight").std() > 0
