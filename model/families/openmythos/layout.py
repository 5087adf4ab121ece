"""The layout of OpenMythos weights: fused, interleaved and stacked as the graphs read them, from upstream's tensors."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.families.openmythos.loop import loop_frequencies
from mythos_edge.model.families.openmythos.rope_tables import cos_and_sin
from mythos_edge.model.layers import rope_table
from mythos_edge.model.recipes import (
    Parts,
    Pieces,
    Recipe,
    TensorReader,
    row_ranges,
    rows_in_turn,
    stacked,
    stored_table_of,
    vector,
)


def recipes(config: MythosConfig, max_context: int) -> list[Recipe]:
    """Every stored tensor of a model, in no particular order."""
    found = [stacked("embed", [("embed.weight", config.vocab_size)], config.dim, ("head",))]
    for index in range(config.prelude_layers):
        found += _block(config, f"prelude_blocks.{index}", f"prelude.{index}", ("prelude",))
    found += _block(config, "step.block", "recurrent.block", ())
    for index in range(config.coda_layers):
        found += _block(config, f"coda_blocks.{index}", f"coda.{index}", ("coda",))
    return found + _step(config) + [vector("norm.weight", "norm.weight", config.dim)] + _tables(config, max_context)


def _block(config: MythosConfig, name: str, source: str, parts: Parts) -> list[Recipe]:
    """A block that belongs to ``parts``; that of the loop step, which belongs to none, has experts."""
    norms = [
        vector(f"{name}.{part}.weight", f"{source}.{part}.weight", config.dim) for part in ("attn_norm", "ffn_norm")
    ]
    attention = _latent_attention if config.is_mla else _grouped_attention
    feed_forward = partial(_dense, parts=parts) if parts else _sparse_moe
    return (
        norms
        + attention(config, f"{name}.attn", f"{source}.attn", (*parts, "attention"))
        + feed_forward(config, f"{name}.ffn", f"{source}.ffn")
    )


def _latent_attention(c: MythosConfig, name: str, source: str, parts: Parts) -> list[Recipe]:
    latent_rows = c.kv_lora_rank + c.qk_rope_head_dim
    down = [(f"{source}.q_down.weight", c.q_lora_rank), (f"{source}.kv_down.weight", latent_rows)]
    up = [
        (f"{source}.q_up_nope.weight", c.n_heads * c.qk_nope_head_dim),
        (f"{source}.q_up_rope.weight", c.n_heads * c.qk_rope_head_dim),
    ]
    per_head = c.qk_nope_head_dim + c.v_head_dim
    kv_up = f"{source}.kv_up.weight"
    key_rows = partial(_head_rows, kv_up, c.n_heads, per_head, 0, c.qk_nope_head_dim)
    value_rows = partial(_head_rows, kv_up, c.n_heads, per_head, c.qk_nope_head_dim, per_head)
    return [
        stacked(f"{name}.qkv_down", down, c.dim, parts),
        vector(f"{name}.q_norm.weight", f"{source}.q_norm.weight", c.q_lora_rank),
        vector(f"{name}.kv_norm.weight", f"{source}.kv_norm.weight", c.kv_lora_rank),
        stacked(f"{name}.q_up", up, c.q_lora_rank, parts),
        # Multiplied head by head, which no kernel for rounded weights does; about a hundredth of a step's weights.
        Recipe(f"{name}.key_up", (c.n_heads, c.qk_nope_head_dim, c.kv_lora_rank), key_rows, True),
        Recipe(
            f"{name}.value_up",
            (c.n_heads, c.kv_lora_rank, c.v_head_dim),
            lambda reader: (head.T.contiguous() for head in value_rows(reader)),
            True,
        ),
        stacked(f"{name}.wo", [(f"{source}.wo.weight", c.dim)], c.n_heads * c.v_head_dim, parts),
    ]


def _grouped_attention(c: MythosConfig, name: str, source: str, parts: Parts) -> list[Recipe]:
    kv_dim = c.cache_width // 2
    qkv = [(f"{source}.wq.weight", c.dim), (f"{source}.wk.weight", kv_dim), (f"{source}.wv.weight", kv_dim)]
    return [
        stacked(f"{name}.qkv", qkv, c.dim, parts),
        stacked(f"{name}.wo", [(f"{source}.wo.weight", c.dim)], c.dim, parts),
    ]


def _dense(c: MythosConfig, name: str, source: str, parts: Parts) -> list[Recipe]:
    gate_up = [(f"{source}.gate.weight", c.dense_dim), (f"{source}.up.weight", c.dense_dim)]
    return [
        stacked(f"{name}.gate_up", gate_up, c.dim, parts),
        stacked(f"{name}.down", [(f"{source}.down.weight", c.dim)], c.dense_dim, parts),
    ]


def _sparse_moe(c: MythosConfig, name: str, source: str) -> list[Recipe]:
    routed = [f"{source}.routed_experts.{index}" for index in range(c.n_experts)]
    shared = [f"{source}.shared_experts.{index}" for index in range(c.n_shared_experts)]
    share = c.n_experts_per_tok / c.n_experts
    down = partial(rows_in_turn, [(f"{expert}.down.weight", c.dim) for expert in routed], c.expert_dim)
    stacks: dict[str, tuple[tuple[int, ...], Pieces]] = {
        "fc1": ((c.n_experts, 2 * c.expert_dim, c.dim), partial(_interleaved, routed, c)),
        "fc2": ((c.n_experts, c.dim, c.expert_dim), down),
    }
    made = [
        replace(stacked(f"{name}.router", [(f"{source}.router.weight", c.n_experts)], c.dim), role="router"),
        replace(vector(f"{name}.router_bias", f"{source}.router_bias", c.n_experts), role="router_bias"),
        *(Recipe(f"{name}.{role}", *stacks[role], True, share, ("experts",), role) for role in stacks),
    ]
    if shared:
        # Shared experts are summed, so side by side they are one SwiGLU with a wider hidden layer.
        width = c.expert_dim * c.n_experts_per_tok
        rows = [(f"{expert}.{part}.weight", width) for part in ("gate", "up") for expert in shared]
        shared_down = partial(_side_by_side, [f"{expert}.down.weight" for expert in shared], c.dim, c.shared_dim)
        made += [
            stacked(f"{name}.shared_gate_up", rows, c.dim, ("shared",)),
            Recipe(f"{name}.shared_down", (c.dim, c.shared_dim), shared_down, True, parts=("shared",)),
        ]
    return made


def _step(c: MythosConfig) -> list[Recipe]:
    source = "recurrent"
    return [
        vector("step.norm.weight", f"{source}.norm.weight", c.dim),
        stacked("step.lora.down", [(f"{source}.lora.down.weight", c.lora_rank)], c.dim),
        stacked("step.lora.scale", [(f"{source}.lora.scale.weight", c.max_loop_iters)], c.lora_rank),
        stacked("step.lora.up", [(f"{source}.lora.B", c.lora_rank)], c.dim),
        Recipe("step.decay", (c.dim,), _decay),
        vector("step.inject", f"{source}.injection.B", c.dim),
        stacked("step.halt_weight", [(f"{source}.act.halt.weight", 1)], c.dim),
        vector("step.halt_bias", f"{source}.act.halt.bias", 1),
    ]


def _tables(c: MythosConfig, max_context: int) -> list[Recipe]:
    frequencies = loop_frequencies(c.loop_dim)
    n_sin = len(frequencies)
    n_cos = c.loop_dim - n_sin
    shape = (max_context, c.rope_dim // 2)
    return [
        Recipe("rope.cos", shape, partial(_rotary, c, max_context, 0)),
        Recipe("rope.sin", shape, partial(_rotary, c, max_context, 1)),
        Recipe("step.table.sin_frequency", (n_sin,), lambda _: iter([frequencies])),
        Recipe("step.table.cos_frequency", (n_cos,), lambda _: iter([frequencies[:n_cos]])),
    ]


def _rotary(c: MythosConfig, max_context: int, part: int, reader: TensorReader) -> Iterator[Tensor]:
    """Cosines (``part`` 0) or sines (1) of the rotary table that the checkpoint is computed with."""
    table = stored_table_of(reader)
    if table is not None:
        table.check_length(max_context, "the checkpoint")
    for start, stop in row_ranges(max_context, c.rope_dim):
        if table is None:
            yield rope_table(c.rope_dim, stop, c.rope_theta, start)[part]
        else:
            yield cos_and_sin(reader.read(table.entry.name, start, stop))[part]


def _head_rows(source: str, heads: int, per_head: int, start: int, stop: int, reader: TensorReader) -> Iterator[Tensor]:
    """Rows ``start:stop`` of every head of a matrix that holds ``per_head`` rows a head."""
    for head in range(heads):
        yield reader.read(source, head * per_head + start, head * per_head + stop)


def _interleaved(experts: list[str], c: MythosConfig, reader: TensorReader) -> Iterator[Tensor]:
    for expert in experts:
        for start, stop in row_ranges(c.expert_dim, c.dim):
            gate = reader.read(f"{expert}.gate.weight", start, stop)
            yield torch.stack([gate, reader.read(f"{expert}.up.weight", start, stop)], dim=1)


def _side_by_side(sources: list[str], rows: int, columns: int, reader: TensorReader) -> Iterator[Tensor]:
    for start, stop in row_ranges(rows, columns):
        yield torch.cat([reader.read(source, start, stop) for source in sources], dim=1)


def _decay(reader: TensorReader) -> Iterator[Tensor]:
    """A of the injection. Source: ``LTIInjection.get_A``."""
    log_decay = reader.read("recurrent.injection.log_dt") + reader.read("recurrent.injection.log_A")
    yield torch.exp(-torch.exp(log_decay.float().clamp(-20, 20)))
