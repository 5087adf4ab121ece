"""The layout of Dory weights: fused as the graphs read them, and the learned scales as they multiply.

A scale is stored by the checkpoint in units of what it was initialised with; what it multiplies by is worked out once,
here, and kept in float32.
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from mythos_edge.model.families.dory.config import DoryConfig
from mythos_edge.model.recipes import Parts, Recipe, TensorReader, rows_in_turn, stacked
from mythos_edge.model.rotary_recipes import heads_in_pairs, in_pairs, rotary_recipes

Formula = Callable[[Tensor], Tensor]


def recipes(config: DoryConfig, max_context: int) -> list[Recipe]:
    """Every stored tensor of a model, in no particular order."""
    c = config
    found = [
        stacked("embed", [("model.embed_tokens.weight", c.vocab_size)], c.hidden_size, ("embedding",)),
        stacked("head", [("lm_head.weight", c.vocab_size)], c.hidden_size, ("head",)),
        _scale("logit_scale", c.vocab_size, ["lm_head.logit_scale"], lambda scale: scale / c.initializer_range),
    ]
    for stage, places in c.sections.items():
        for index, place in enumerate(places):
            found += _layer(c, f"layers.{stage}.{index}", f"model.layers.{place}", stage)
    for kind, theta in c.thetas.items():
        found += rotary_recipes(f"ropes.{kind}", c.head_dim, theta, max_context)
    return found


def _layer(c: DoryConfig, name: str, source: str, stage: str) -> list[Recipe]:
    parts = () if stage == "step" else (stage,)

    def rate(weight: Tensor) -> Tensor:
        return (weight * (c.ngpt_alpha_init / c.initializer_range)).abs()

    return [
        *_attention(c, f"{name}.attn", f"{source}.self_attn", (*parts, "attention")),
        _scale(f"{name}.attn_rate", c.hidden_size, [f"{source}.lambda_1"], rate),
        *_feed_forward(c, f"{name}.mlp", f"{source}.mlp", parts or ("mlp",)),
        _scale(f"{name}.mlp_rate", c.hidden_size, [f"{source}.lambda_2"], rate),
    ]


def _attention(c: DoryConfig, name: str, source: str, parts: Parts) -> list[Recipe]:
    def query_scale(sqk: Tensor) -> Tensor:
        scale: Tensor = (sqk * (c.head_dim**0.5 / c.initializer_range)).square()
        return in_pairs(scale, c.head_dim)

    def gate_scale(s_gate: Tensor) -> Tensor:
        scale: Tensor = (s_gate * (c.hidden_size**0.25 / c.initializer_range)).square()
        return scale

    shape = (2 * c.query_dim + 2 * c.kv_dim, c.hidden_size)
    return [
        Recipe(f"{name}.qkvg", shape, partial(_queries_to_gate, c, source), True, parts=parts),
        stacked(f"{name}.wo", [(f"{source}.o_proj.weight", c.hidden_size)], c.query_dim, parts),
        _scale(f"{name}.query_scale", c.query_dim, [f"{source}.sqk"], query_scale),
        _scale(f"{name}.gate_scale", c.query_dim, [f"{source}.s_gate"], gate_scale),
    ]


def _feed_forward(c: DoryConfig, name: str, source: str, parts: Parts) -> list[Recipe]:
    halves = [(f"{source}.{half}_proj.weight", c.intermediate_size) for half in ("gate", "up")]
    scales = [f"{source}.suv_{half}" for half in ("gate", "up")]
    return [
        stacked(f"{name}.gate_up", halves, c.hidden_size, parts),
        stacked(f"{name}.down", [(f"{source}.down_proj.weight", c.hidden_size)], c.intermediate_size, parts),
        _scale(f"{name}.scale", 2 * c.intermediate_size, scales, lambda suv: suv * c.hidden_size**0.5),
    ]


def _queries_to_gate(c: DoryConfig, source: str, reader: TensorReader) -> Iterator[Tensor]:
    """Rows of queries, keys, values and gate; those that are rotated by head, in pairs."""
    for matrix, heads in (("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads)):
        yield from heads_in_pairs(f"{source}.{matrix}.weight", heads, c.head_dim, reader)
    rest = [(f"{source}.v_proj.weight", c.kv_dim), (f"{source}.gate_proj.weight", c.query_dim)]
    yield from rows_in_turn(rest, c.hidden_size, reader)


def _scale(name: str, size: int, sources: list[str], formula: Formula) -> Recipe:
    """A vector that multiplies, by its ``formula`` in float64 from the vectors of the checkpoint."""

    def pieces(reader: TensorReader) -> Iterator[Tensor]:
        for source in sources:
            yield formula(reader.read(source).double()).float()

    return Recipe(name, (size,), pieces)
