"""Looped Nanbeige against its golden folder, and against transformers' Llama run in a loop."""

from pathlib import Path

import pytest
import torch
from conftest import FIXTURES
from looped_llamas import (
    NOISE,
    Shape,
    angles_and_mask,
    changed,
    farthest,
    golden_of,
    in_shards,
    loop_states,
    network_of,
    random_llama,
    save_llama,
)
from torch import Tensor
from transformers import LlamaForCausalLM

from mythos_edge.model import rotary_recipes
from mythos_edge.model.eager_ops import EagerOps
from mythos_edge.model.network import LoopedNetwork, Window

NAME = "nanbeige-small"
GOLDEN = golden_of(NAME)
IDS = torch.from_numpy(GOLDEN["ids"])


@torch.no_grad()
def error_of(network: LoopedNetwork) -> float:
    return farthest(network(IDS).logits, GOLDEN["logits"])


def test_every_loop_step_and_the_logits_are_the_reference_s() -> None:
    network = network_of(FIXTURES / NAME)
    for state, wanted in zip(loop_states(network, GOLDEN["ids"]), GOLDEN["hidden_per_loop"], strict=True):
        assert farthest(state.h, wanted) <= NOISE * GOLDEN["fp32_error_hidden"]
        assert (state.halt_mass == 0).all()
    assert error_of(network) <= NOISE * GOLDEN["fp32_error"]


def test_shards_in_bfloat16_give_the_same(tmp_path: Path) -> None:
    """The golden weights have no more digits than bfloat16."""
    assert error_of(network_of(in_shards(tmp_path, NAME, torch.bfloat16))) <= NOISE * GOLDEN["fp32_error"]


def test_depth_is_the_number_of_loops(tmp_path: Path) -> None:
    with torch.no_grad():
        assert (network_of(FIXTURES / NAME)(IDS).depth == 2).all()
        weighted = changed(tmp_path, NAME, {"loop_loss_weights": [0.2, 0.3, 0.5]})
        assert (network_of(weighted)(IDS).depth == 4).all()


def tiled(self: EagerOps, q: Tensor, rows: Tensor, past: Tensor, window: Window, kv_heads: int, scale: float) -> Tensor:
    """Attention in which query head j reads kv head j modulo their number."""
    batch, chunk, heads, width = q.shape
    regrouped = q.unflatten(2, (-1, kv_heads)).transpose(2, 3).flatten(2, 3)
    made = grouped(self, regrouped, rows, past, window, kv_heads, scale)
    return made.unflatten(2, (kv_heads, -1)).transpose(2, 3).reshape(batch, chunk, heads, width)


grouped = EagerOps.grouped_query_attention


def test_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = NOISE * GOLDEN["fp32_error"]
    for index, fault in enumerate(({"rms_norm_eps": 1e-6}, {"rope_theta": 1e7}, {"skip_loop_final_norm": True})):
        assert error_of(network_of(changed(tmp_path / str(index), NAME, fault))) > 100 * allowed, fault
    with monkeypatch.context() as patch:
        patch.setattr(rotary_recipes, "in_pairs", lambda rows, head_dim: rows)
        assert error_of(network_of(FIXTURES / NAME)) > 100 * allowed
    monkeypatch.setattr(EagerOps, "grouped_query_attention", tiled)
    assert error_of(network_of(FIXTURES / NAME)) > 100 * allowed


# The shape of a Llama, loops, and whether the norm between them is skipped.
SHAPES = {
    "one kv head": (Shape(48, 80, 2, 4, 1, 10), 2, False),
    "as many kv heads": (Shape(40, 56, 1, 5, 5, 8), 3, True),
    "wide heads": (Shape(24, 32, 3, 4, 2, 24), 2, True),
}


@torch.no_grad()
def looped_logits(llama: LlamaForCausalLM, loops: int, skip: bool) -> Tensor:
    """Nanbeige's own code: the layers of a Llama in a loop, with its norm in between."""
    model = llama.model
    h = model.embed_tokens(IDS)
    angles, mask = angles_and_mask(llama, h)
    for index in range(loops):
        for layer in model.layers:
            h = layer(h, attention_mask=mask, position_embeddings=angles)
        h = h if skip and index < loops - 1 else model.norm(h)
    return llama.lm_head(h)


@pytest.mark.parametrize("name", SHAPES)
def test_random_configs_against_transformers(name: str, tmp_path: Path) -> None:
    shape, loops, skip = SHAPES[name]
    llama = random_llama(shape, sorted(SHAPES).index(name))
    fields = {"num_loops": loops, "loop_loss_weights": [], "skip_loop_final_norm": skip}
    save_llama(tmp_path, llama, "nanbeige", fields)
    with torch.no_grad():
        found = network_of(tmp_path, torch.float64)(IDS).logits
        wanted = looped_logits(llama.double(), loops, skip)
    # Norms and softmax of transformers are float32 in every dtype.
    assert farthest(found, wanted.numpy()) < 2e-6 * wanted.abs().max()
