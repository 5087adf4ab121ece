"""The eager model: shapes as annotated, causal, halting frozen. Its numbers are checked in test_parity."""

import dataclasses

import jaxtyping
import pytest
import torch

from mythos_edge.model.eager_ops import chosen_experts, swiglu
from mythos_edge.model.families.openmythos.config import VARIANTS, MythosConfig
from mythos_edge.model.families.openmythos.network import Network

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


def test_of_equal_experts_the_first_are_chosen_and_the_margin_says_how_clear_it_was() -> None:
    biased = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 1.0, 2.0, 0.0, 4.0]])
    chosen, margin = chosen_experts(biased, 3)
    assert chosen.tolist() == [[1, 3, 2], [0, 1, 2], [0, 4, 2]]
    assert margin.tolist() == [0.0, 0.0, 1.0]
    assert chosen_experts(biased, 5)[1].tolist() == [float("inf")] * 3


def test_a_pass_tells_what_its_router_chose() -> None:
    network = _network()
    scored = network(IDS)
    shape = (*IDS.shape, CONFIG.max_loop_iters)
    assert scored.router_margin.shape == shape
    assert scored.experts.shape == (*shape, CONFIG.n_experts_per_tok)
    assert (scored.router_margin > 0).all()
    start = network(IDS[:, :2], max_depth=1)
    torch.testing.assert_close(start.router_margin, scored.router_margin[:, :2, :1])
    torch.testing.assert_close(start.experts, scored.experts[:, :2, :1])
    network.step.block.ffn.router.zero_()
    network.step.block.ffn.router_bias.zero_()
    tied = network(IDS)
    assert (tied.router_margin == 0).all()
    assert (tied.experts == torch.arange(CONFIG.n_experts_per_tok)).all()
