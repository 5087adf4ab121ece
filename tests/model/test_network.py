"""The eager model: shapes as annotated, causal, halting frozen. Its numbers are checked in test_parity."""

import dataclasses

import jaxtyping
import pytest
import torch

from mythos_edge.model.config import VARIANTS, MythosConfig
from mythos_edge.model.layers import swiglu
from mythos_edge.model.network import Network

CONFIG = dataclasses.replace(
    VARIANTS["1b"], vocab_size=50, dim=32, n_heads=4, n_kv_heads=2, kv_lora_rank=16, q_lora_rank=24,
    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_experts=4, n_experts_per_tok=2, expert_dim=16,
    max_loop_iters=5, lora_rank=4, max_seq_len=32, prelude_layers=1, coda_layers=1,
)  # fmt: skip
IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 35, 8, 9, 7, 9]])


def _network(config: MythosConfig = CONFIG) -> Network:
    torch.manual_seed(0)
    network = Network(config, max_context=32).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.3)
    return network.requires_grad_(False)


def test_annotated_shapes_are_checked_in_tests() -> None:
    """So that every other test that runs the model checks them too."""
    with pytest.raises(jaxtyping.TypeCheckError):
        swiglu(torch.zeros(2, 3), torch.zeros(8, 5), torch.zeros(3, 4))


@pytest.mark.parametrize("attn_type", ["mla", "gqa"])
def test_a_position_does_not_see_later_ones(attn_type: str) -> None:
    network = _network(dataclasses.replace(CONFIG, attn_type=attn_type))
    whole = network(IDS)
    start = network(IDS[:, :4])
    torch.testing.assert_close(whole.logits[:, :4], start.logits, rtol=1e-10, atol=1e-10)
    assert (whole.depth[:, :4] == start.depth).all()


def test_rows_of_a_batch_are_independent() -> None:
    network = _network()
    both = network(IDS)
    alone = network(IDS[1:])
    torch.testing.assert_close(both.logits[1:], alone.logits, rtol=1e-10, atol=1e-10)


def test_depth_is_where_the_halting_mass_reaches_the_threshold() -> None:
    network = _network()
    full = network(IDS, threshold=1e9)
    assert (full.depth == CONFIG.max_loop_iters).all()
    assert (network(IDS, threshold=1e-9).depth == 1).all()
    some = network(IDS, threshold=0.6)
    assert 1 <= int(some.depth.min()) < int(some.depth.max()) <= CONFIG.max_loop_iters
    # Steps after a position has halted leave its output alone.
    deeper = network(IDS, threshold=0.6, max_depth=CONFIG.max_loop_iters + 3)
    halted = some.depth < CONFIG.max_loop_iters
    assert (deeper.depth[halted] == some.depth[halted]).all()


def test_logit_rows_choose_positions() -> None:
    network = _network()
    some = network(IDS, logit_rows=torch.tensor([1, 5]))
    torch.testing.assert_close(some.logits, network(IDS).logits[:, [1, 5]], rtol=1e-12, atol=1e-12)
