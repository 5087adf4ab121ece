"""Ouro against its golden folder: states of every loop step, gate, exit steps and logits; and faults are seen."""

from pathlib import Path

import numpy as np
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
from mythos_edge.model.families.looped_llama.network import Network
from mythos_edge.model.network import LoopedNetwork

NAME = "ouro-small"
GOLDEN = golden_of(NAME)
IDS = torch.from_numpy(GOLDEN["ids"])
GATE = "model.early_exit_gate"


@pytest.fixture(scope="module")
def network() -> LoopedNetwork:
    return network_of(FIXTURES / NAME)


def test_every_loop_step_is_the_reference_s(network: LoopedNetwork) -> None:
    survival = np.ones(GOLDEN["ids"].shape)
    for index, state in enumerate(loop_states(network, GOLDEN["ids"])):
        assert farthest(state.h, GOLDEN["hidden_per_loop"][index]) <= NOISE * GOLDEN["fp32_error_hidden"]
        survival *= 1 - GOLDEN["gate"][index]
        assert farthest(state.halt_mass, 1 - survival) <= NOISE * GOLDEN["fp32_error_gate"]


@pytest.mark.parametrize("index", range(len(GOLDEN["thresholds"])))
def test_depths_and_logits_at_every_threshold(network: LoopedNetwork, index: int) -> None:
    with torch.no_grad():
        found = network(IDS, threshold=float(GOLDEN["thresholds"][index]))
    assert (found.depth.numpy() == GOLDEN["exit_step"][index] + 1).all()
    assert farthest(found.logits, GOLDEN["logits_at"][index]) <= NOISE * GOLDEN["fp32_error"]


def test_by_default_every_position_takes_every_loop_step(network: LoopedNetwork) -> None:
    with torch.no_grad():
        found = network(IDS)
    assert (found.depth == int(GOLDEN["n_loops"])).all()
    assert farthest(found.logits, GOLDEN["logits"]) <= NOISE * GOLDEN["fp32_error"]


def test_a_threshold_of_one_is_never_reached(tmp_path: Path) -> None:
    """The reference's sums round to 1 after gates such as these, and it halts a loop step early."""
    network = network_of(changed(tmp_path, NAME, tensors={"model.early_exit_gate.bias": torch.tensor([40.0])}))
    states = loop_states(network, GOLDEN["ids"])
    assert all(0.999 < state.halt_mass.min() <= state.halt_mass.max() < 1 for state in states)
    assert (states[-1].depth == len(states)).all()
    assert (loop_states(network, GOLDEN["ids"], threshold=0.9999)[-1].depth == 1).all()


def test_a_decision_is_as_clear_as_the_reference_says(network: LoopedNetwork) -> None:
    """The last loop step decides nothing, and none does at a threshold of 1."""
    for threshold, wanted in zip(GOLDEN["thresholds"], GOLDEN["exit_margin"], strict=True):
        with torch.no_grad():
            margin = network(IDS, threshold=float(threshold)).margin
        assert torch.isinf(margin[..., -1]).all()
        if threshold == 1:
            assert torch.isinf(margin).all()
        else:
            assert float(margin.min()) == pytest.approx(wanted, abs=NOISE * GOLDEN["fp32_error_gate"])


def test_mass_counts_from_the_least_depth_on(network: LoopedNetwork) -> None:
    states = loop_states(network, GOLDEN["ids"], threshold=0.3, min_depth=3)
    assert (states[1].halt_mass == 0).all()
    assert farthest(states[2].halt_mass, GOLDEN["gate"][2]) <= NOISE * GOLDEN["fp32_error_gate"]
    assert (states[-1].depth >= 3).all()


def test_a_halted_position_keeps_its_output_and_moves_on(network: LoopedNetwork) -> None:
    states, free = (loop_states(network, GOLDEN["ids"], threshold) for threshold in (0.5, 1.0))
    halted = states[0].halt_mass >= 0.5
    assert 0 < halted.sum() < halted.numel()
    assert torch.equal(states[-1].out[halted], states[0].h[halted])
    assert all(torch.equal(one.h, other.h) for one, other in zip(states, free, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_checkpoints_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    network = network_of(in_shards(tmp_path, NAME, dtype))
    kept = network_of(FIXTURES / NAME).layers[1].gate_up.to(dtype).float()
    assert torch.equal(network.layers[1].gate_up, kept)


@torch.no_grad()
def error_of(network: LoopedNetwork) -> float:
    return farthest(network(IDS).logits, GOLDEN["logits"])


def test_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = NOISE * GOLDEN["fp32_error"]
    assert error_of(network_of(changed(tmp_path, NAME, {"rms_norm_eps": 1e-5}))) > 100 * allowed
    with monkeypatch.context() as patch:
        patch.setattr(rotary_recipes, "in_pairs", lambda rows, head_dim: rows)
        assert error_of(network_of(FIXTURES / NAME)) > 100 * allowed
    without = network_of(FIXTURES / NAME)
    for layer in without.layers:
        layer.post_norms = False
    assert error_of(without) > 100 * allowed


def test_a_gate_in_bfloat16_is_seen(network: LoopedNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Network._halt

    def rounded(self: Network, state: object, h: Tensor, *others: object) -> object:
        return whole(self, state, h.bfloat16().float(), *others)

    monkeypatch.setattr(Network, "_halt", rounded)
    mass = loop_states(network, GOLDEN["ids"])[0].halt_mass
    assert farthest(mass, GOLDEN["gate"][0]) > 100 * NOISE * GOLDEN["fp32_error_gate"]


# The shape of a Llama, loop steps, and the threshold of the config.
SHAPES = {
    "one kv head": (Shape(48, 80, 2, 4, 1, 10), 3, 0.6),
    "as many kv heads": (Shape(40, 56, 1, 5, 5, 8), 4, 0.9),
    "wide heads": (Shape(24, 32, 3, 4, 2, 24), 2, 1.0),
}
POST_NORMS = ("input_layernorm_2", "post_attention_layernorm_2")


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def looped(llama: LlamaForCausalLM, own: dict[str, Tensor], loops: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Logits and depths of the paper's loop over the attention and feed-forward of a Llama."""
    h = llama.model.embed_tokens(IDS)
    angles, mask = angles_and_mask(llama, h)
    survival, depth, chosen = torch.ones(IDS.shape), torch.zeros(IDS.shape, dtype=torch.int64), torch.zeros_like(h)
    for index in range(loops):
        for number, layer in enumerate(llama.model.layers):
            after_attention, after_mlp = (own[f"model.layers.{number}.{norm}.weight"] for norm in POST_NORMS)
            x = layer.input_layernorm(h)
            attended = layer.self_attn(x, position_embeddings=angles, attention_mask=mask)[0]
            h = h + rms(attended, after_attention)
            h = h + rms(layer.mlp(layer.post_attention_layernorm(h)), after_mlp)
        h = llama.model.norm(h)
        survival = survival * (1 - torch.sigmoid(h @ own[f"{GATE}.weight"][0].double() + own[f"{GATE}.bias"]))
        last = torch.full(IDS.shape, index == loops - 1)
        halts = (depth == 0) & (last if threshold >= 1 else last | (1 - survival >= threshold))
        depth[halts], chosen[halts] = index + 1, h[halts]
    return llama.lm_head(chosen), depth


@pytest.mark.parametrize("name", SHAPES)
def test_random_configs_against_parts_of_transformers(name: str, tmp_path: Path) -> None:
    shape, loops, threshold = SHAPES[name]
    llama = random_llama(shape, sorted(SHAPES).index(name))
    norms = [f"model.layers.{number}.{norm}.weight" for number in range(shape.layers) for norm in POST_NORMS]
    own = {norm: torch.empty(shape.hidden).uniform_(0.5, 1.5) for norm in norms}
    own |= {f"{GATE}.weight": torch.randn(1, shape.hidden) * 0.2, f"{GATE}.bias": torch.tensor([-0.5])}
    save_llama(tmp_path, llama, "ouro", {"total_ut_steps": loops, "early_exit_threshold": threshold}, own)
    with torch.no_grad():
        found = network_of(tmp_path, torch.float64)(IDS)
        logits, depth = looped(llama.double(), own, loops, threshold)
    assert (found.depth == depth).all()
    assert (len(depth.unique()) > 1) == (threshold < 1)
    # Norms and softmax of transformers are float32 in every dtype.
    assert farthest(found.logits, logits.numpy()) < 2e-6 * logits.abs().max()
