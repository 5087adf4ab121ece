"""The tensors a config implies, and the config fields that tensors imply. Reads no files and no weights."""

import re
from collections.abc import Mapping
from typing import Any

from mythos_edge.model.errors import CheckpointError
from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.json_files import few

Shapes = Mapping[str, tuple[int, ...]]

# The reference's buffers; a model uses the one of its attention (``rope_tables``), the other one changes nothing.
ROPE_TABLES = ("freqs_cis", "freqs_cis_mla")

_BLOCK = "recurrent.block"
# The tensors config fields are read from, with their number of axes.
_ANCHORS = {
    "embed.weight": 2,
    "recurrent.lora.scale.weight": 2,
    f"{_BLOCK}.attn.wo.weight": 2,
    f"{_BLOCK}.ffn.router.weight": 2,
    f"{_BLOCK}.ffn.routed_experts.0.gate.weight": 2,
}
_MLA_ANCHORS = {
    f"{_BLOCK}.attn.kv_norm.weight": 1,
    **{f"{_BLOCK}.attn.{part}.weight": 2 for part in ("q_down", "q_up_nope", "q_up_rope", "kv_down")},
}
_GQA_ANCHORS = {f"{_BLOCK}.attn.{part}.weight": 2 for part in ("wq", "wk", "wv")}


def expected_shapes(config: MythosConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint by upstream name; the optional head and rope tables are left out.

    Source: OpenMythos 8c68c1f, ``open_mythos/main.py`` ``OpenMythos.state_dict``.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, config.dim)}
    for part, layers in (("prelude", config.prelude_layers), ("coda", config.coda_layers)):
        for index in range(layers):
            shapes |= _block(config, f"{part}.{index}")
            shapes |= _expert(f"{part}.{index}.ffn", config.dim, config.dense_dim)
    shapes |= _block(config, _BLOCK) | _moe(config, f"{_BLOCK}.ffn") | _step(config)
    return shapes | {"norm.weight": (config.dim,)}


def check_anchors(shapes: Shapes, *, origin: str) -> None:
    """Raise CheckpointError when a tensor that ``inferred_fields`` relies on is absent or malformed."""
    anchors = _ANCHORS | (_MLA_ANCHORS if _is_mla(shapes) else _GQA_ANCHORS)
    missing = [name for name in anchors if name not in shapes]
    if missing:
        raise CheckpointError(
            f"{origin}: not a whole OpenMythos model: missing {few(missing)}; the file holds {few(shapes)}"
        )
    for name, axes in anchors.items():
        if len(shapes[name]) != axes or 0 in shapes[name]:
            raise CheckpointError(
                f"{origin}: {name} has shape {shapes[name]}, expected {axes} axes, none of them empty"
            )


def inferred_fields(shapes: Shapes, known: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields that ``shapes`` decide, after ``check_anchors``; ``known`` may help (``n_heads`` of GQA).

    A field that the shapes leave open, or decide inconsistently, is left out: it is asked for, never guessed.
    """
    experts = f"{_BLOCK}.ffn"
    expert_dim = shapes[f"{experts}.routed_experts.0.gate.weight"][0]
    shared_gate = shapes.get(f"{experts}.shared_experts.0.gate.weight", ())
    vocab_size, dim = shapes["embed.weight"]
    max_loop_iters, lora_rank = shapes["recurrent.lora.scale.weight"]
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "dim": dim,
        "max_loop_iters": max_loop_iters,
        "lora_rank": lora_rank,
        "prelude_layers": _count(shapes, "prelude"),
        "coda_layers": _count(shapes, "coda"),
        "n_experts": shapes[f"{experts}.router.weight"][0],
        "n_shared_experts": _count(shapes, f"{experts}.shared_experts"),
        "expert_dim": expert_dim,
        "n_experts_per_tok": _ratio(shared_gate[0], expert_dim) if shared_gate else None,
    }
    fields |= _mla_fields(shapes) if _is_mla(shapes) else _gqa_fields(shapes, dim, known)
    return {name: value for name, value in fields.items() if value is not None}


def table_length(shapes: Shapes) -> int | None:
    """Positions covered by a stored rope table; None without one. It decides nothing but a default."""
    table = _table_shape(shapes)
    return table[0] if table else None


def table_name(shapes: Shapes) -> str:
    """The name of the rope table that the attention of these tensors uses."""
    return ROPE_TABLES[1 if _is_mla(shapes) else 0]


def _is_mla(shapes: Shapes) -> bool:
    return f"{_BLOCK}.attn.kv_down.weight" in shapes


def _mla_fields(shapes: Shapes) -> dict[str, Any]:
    attention = f"{_BLOCK}.attn"
    latent = shapes[f"{attention}.kv_norm.weight"][0]
    rope = shapes[f"{attention}.kv_down.weight"][0] - latent
    heads = _ratio(shapes[f"{attention}.q_up_rope.weight"][0], rope)
    return {
        "attn_type": "mla",
        "kv_lora_rank": latent,
        "q_lora_rank": shapes[f"{attention}.q_down.weight"][0],
        "qk_rope_head_dim": rope if rope > 0 else None,
        "n_heads": heads,
        "qk_nope_head_dim": _ratio(shapes[f"{attention}.q_up_nope.weight"][0], heads),
        "v_head_dim": _ratio(shapes[f"{attention}.wo.weight"][1], heads),
    }


def _gqa_fields(shapes: Shapes, dim: int, known: Mapping[str, Any]) -> dict[str, Any]:
    # The width of a head shows only in the rope table, which may be absent.
    table = _table_shape(shapes)
    table_heads = _ratio(dim, 2 * table[1]) if table else None
    heads = table_heads or known.get("n_heads")
    head_dim = _ratio(dim, heads)
    kv_heads = _ratio(shapes[f"{_BLOCK}.attn.wk.weight"][0], head_dim)
    return {"attn_type": "gqa", "n_heads": table_heads, "n_kv_heads": kv_heads}


def _table_shape(shapes: Shapes) -> tuple[int, ...] | None:
    table = shapes.get(table_name(shapes), ())
    pairs = len(table) == 3 and table[2] == 2
    return table if (len(table) == 2 or pairs) and 0 not in table else None


def _ratio(whole: int, part: Any) -> int | None:
    """``whole / part`` when it is a whole number above 0."""
    if not isinstance(part, int) or part <= 0 or whole <= 0 or whole % part:
        return None
    return whole // part


def _count(shapes: Shapes, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, shapes) if match})


def _block(c: MythosConfig, name: str) -> dict[str, tuple[int, ...]]:
    norms = {f"{name}.attn_norm.weight": (c.dim,), f"{name}.ffn_norm.weight": (c.dim,)}
    attention: dict[str, tuple[int, ...]]
    if c.is_mla:
        attention = {
            "q_down": (c.q_lora_rank, c.dim),
            "q_norm": (c.q_lora_rank,),
            "q_up_nope": (c.n_heads * c.qk_nope_head_dim, c.q_lora_rank),
            "q_up_rope": (c.n_heads * c.qk_rope_head_dim, c.q_lora_rank),
            "kv_down": (c.kv_lora_rank + c.qk_rope_head_dim, c.dim),
            "kv_norm": (c.kv_lora_rank,),
            "kv_up": (c.n_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
            "wo": (c.dim, c.n_heads * c.v_head_dim),
        }
    else:
        kv_rows = c.n_kv_heads * c.head_dim
        attention = {
            "wq": (c.dim, c.dim),
            "wk": (kv_rows, c.dim),
            "wv": (kv_rows, c.dim),
            "wo": (c.dim, c.dim),
        }
    return norms | {f"{name}.attn.{part}.weight": shape for part, shape in attention.items()}


def _moe(c: MythosConfig, name: str) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.router.weight": (c.n_experts, c.dim),
        f"{name}.router_bias": (c.n_experts,),
    }
    for index in range(c.n_experts):
        shapes |= _expert(f"{name}.routed_experts.{index}", c.dim, c.expert_dim)
    for index in range(c.n_shared_experts):
        shapes |= _expert(f"{name}.shared_experts.{index}", c.dim, c.expert_dim * c.n_experts_per_tok)
    return shapes


def _expert(name: str, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    parts = {"gate": (hidden, dim), "up": (hidden, dim), "down": (dim, hidden)}
    return {f"{name}.{part}.weight": shape for part, shape in parts.items()}


def _step(c: MythosConfig) -> dict[str, tuple[int, ...]]:
    parts: dict[str, tuple[int, ...]] = {
        "injection.log_A": (c.dim,),
        "injection.log_dt": (1,),
        "injection.B": (c.dim,),
        "act.halt.weight": (1, c.dim),
        "act.halt.bias": (1,),
        "lora.down.weight": (c.lora_rank, c.dim),
        "lora.B": (c.lora_rank, c.dim),
        "lora.scale.weight": (c.max_loop_iters, c.lora_rank),
        "norm.weight": (c.dim,),
    }
    return {f"recurrent.{part}": shape for part, shape in parts.items()}
