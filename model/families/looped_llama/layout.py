"""The layout of looped Llamas: their tensors with names and shapes, and how the bundle's are made of them."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

from mythos_edge.model.families.looped_llama.config import StackConfig
from mythos_edge.model.recipes import Recipe, TensorReader, rows_in_turn, stacked, vector
from mythos_edge.model.rotary_recipes import heads_in_pairs, rotary_recipes


def tensor_shapes(c: StackConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint by name.

    Source: transformers, ``LlamaForCausalLM``; ByteDance/Ouro-1.4B, ``modeling_ouro.py`` ``OuroForCausalLM``.
    """
    dim, hidden = c.hidden_size, c.intermediate_size
    q_rows, kv_rows = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, dim)}
    for index in range(c.num_hidden_layers):
        layer = f"model.layers.{index}"
        rows = {"q": q_rows, "k": kv_rows, "v": kv_rows}
        shapes |= {f"{layer}.self_attn.{part}_proj.weight": (rows[part], dim) for part in rows}
        shapes[f"{layer}.self_attn.o_proj.weight"] = (dim, q_rows)
        shapes |= {f"{layer}.mlp.{part}_proj.weight": (hidden, dim) for part in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (dim, hidden)
        shapes |= {f"{layer}.{norm}.weight": (dim,) for norm in _norms(c).values()}
    shapes |= {"model.norm.weight": (dim,), "lm_head.weight": (c.vocab_size, dim)}
    if c.gated:
        shapes |= {"model.early_exit_gate.weight": (1, dim), "model.early_exit_gate.bias": (1,)}
    return shapes


def recipes(c: StackConfig, max_context: int) -> list[Recipe]:
    """Every stored tensor of a model, in no particular order."""
    made = [stacked("embed", [("model.embed_tokens.weight", c.vocab_size)], c.hidden_size, ("embedding",))]
    for index in range(c.num_hidden_layers):
        made += _layer(c, f"layers.{index}", f"model.layers.{index}")
    made.append(vector("norm.weight", "model.norm.weight", c.hidden_size))
    made.append(stacked("head", [("lm_head.weight", c.vocab_size)], c.hidden_size, ("head",)))
    if c.gated:
        made.append(stacked("gate_weight", [("model.early_exit_gate.weight", 1)], c.hidden_size))
        made.append(vector("gate_bias", "model.early_exit_gate.bias", 1))
    return made + rotary_recipes("rope", c.head_dim, c.rope_theta, max_context)


def _norms(c: StackConfig) -> dict[str, str]:
    """The norms of a layer by their names in the network."""
    norms = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if c.post_norms:
        norms |= {"attn_post_norm": "input_layernorm_2", "ffn_post_norm": "post_attention_layernorm_2"}
    return norms


def _layer(c: StackConfig, name: str, source: str) -> list[Recipe]:
    dim, hidden, q_rows = c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim
    qkv = Recipe(
        f"{name}.attn.qkv",
        ((c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim, dim),
        partial(_queries_keys_values, c, f"{source}.self_attn"),
        narrow=True,
        parts=("attention",),
    )
    gate_up = [(f"{source}.mlp.{part}_proj.weight", hidden) for part in ("gate", "up")]
    return [
        *(vector(f"{name}.{norm}.weight", f"{source}.{theirs}.weight", dim) for norm, theirs in _norms(c).items()),
        qkv,
        stacked(f"{name}.attn.wo", [(f"{source}.self_attn.o_proj.weight", dim)], q_rows, ("attention",)),
        stacked(f"{name}.gate_up", gate_up, dim, ("mlp",)),
        stacked(f"{name}.down", [(f"{source}.mlp.down_proj.weight", dim)], hidden, ("mlp",)),
    ]


def _queries_keys_values(c: StackConfig, source: str, reader: TensorReader) -> Iterator[Tensor]:
    for part, heads in (("q", c.num_attention_heads), ("k", c.num_key_value_heads)):
        yield from heads_in_pairs(f"{source}.{part}_proj.weight", heads, c.head_dim, reader)
    values = [(f"{source}.v_proj.weight", c.num_key_value_heads * c.head_dim)]
    yield from rows_in_turn(values, c.hidden_size, reader)
