"""Opening Dory checkpoints of every layout under one set of names, those of the model of transformers in memory."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.families.dory.config import DoryConfig
from mythos_edge.model.families.dory.config_reading import config_from_dict, notes_on
from mythos_edge.model.families.family import Opening
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.tensor_checks import check_tensors
from mythos_edge.model.tensor_files import TensorEntry

_BLOCK = re.compile(r"(backbone|model)\.layers\.(\d{1,6})\.(.+)")
# The released layout counts the attention and the MLP of a layer apart; its names of either -> those in memory.
_RELEASED = (
    {f"mixer.{name}": f"self_attn.{name}" for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")}
    | {"mixer.o_proj.weight": "self_attn.o_proj.weight", "mixer.g_proj.weight": "self_attn.gate_proj.weight"}
    | {"mixer.sqk": "self_attn.sqk", "mixer.s_gate": "self_attn.s_gate", "attn_alpha": "lambda_1"},
    {f"mixer.{name}_proj.weight": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    | {"mixer.suv_gate": "mlp.suv_gate", "mixer.suv_up": "mlp.suv_up", "mlp_alpha": "lambda_2"},
)
_SAVED = {"self_attn.g_proj.weight": "self_attn.gate_proj.weight"}
_EMBEDDINGS = {"backbone.embeddings.weight": "model.embed_tokens.weight"}


def open_dory(opening: Opening) -> Checkpoint:
    """The checkpoint, checked tensor by tensor; see ``model.checkpoint.open_checkpoint``."""
    path, stored = opening.path, opening.stored
    if opening.rope_table == "stored":
        raise ConfigError(f"{path}: --rope-table is stored, but Dory models store none: leave it out")
    origin = opening.config_origin()
    config = config_from_dict(opening.config_values, origin)
    entries = _renamed(stored.entries, path)
    check_tensors(entries, tensor_shapes(config), path, "those of a Dory model")
    notes = (*stored.notes, *notes_on(opening.config_values, origin))
    return Checkpoint(path, stored.kind, config, entries, stored.step, notes=notes)


def _renamed(stored: Mapping[str, TensorEntry], path: Path) -> dict[str, TensorEntry]:
    """The same tensors under the names in memory."""
    entries: dict[str, TensorEntry] = {}
    for stored_name, entry in stored.items():
        name = _name_in_memory(stored_name)
        if name in entries:
            raise CheckpointError(
                f"{path}: {entries[name].name} and {stored_name} are both {name}: keep one layout of the model"
            )
        # Keeps the stored name, which errors say.
        entries[name] = entry
    return entries


def _name_in_memory(stored: str) -> str:
    """The name in memory of a tensor of any layout; an unknown one is left as it is."""
    found = _BLOCK.fullmatch(stored)
    if found is None:
        return _EMBEDDINGS.get(stored, stored)
    base, number, rest = found[1], int(found[2]), found[3]
    if base == "model":
        return stored
    released = _RELEASED[number % 2].get(rest)
    if released is not None:
        return f"model.layers.{number // 2}.{released}"
    return stored if rest.startswith("mixer.") else f"model.layers.{number}.{_SAVED.get(rest, rest)}"


def tensor_shapes(config: DoryConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint by its name in memory."""
    return dict(_expected(config))


def _expected(c: DoryConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    yield "lm_head.weight", (c.vocab_size, c.hidden_size)
    yield "lm_head.logit_scale", (c.vocab_size,)
    attention = {"q": c.query_dim, "k": c.kv_dim, "v": c.kv_dim, "gate": c.query_dim}
    for place in range(len(c.layer_types)):
        layer = f"model.layers.{place}"
        for matrix, rows in attention.items():
            yield f"{layer}.self_attn.{matrix}_proj.weight", (rows, c.hidden_size)
        yield f"{layer}.self_attn.o_proj.weight", (c.hidden_size, c.query_dim)
        for name in ("self_attn.sqk", "self_attn.s_gate"):
            yield f"{layer}.{name}", (c.query_dim,)
        for half in ("gate", "up"):
            yield f"{layer}.mlp.{half}_proj.weight", (c.intermediate_size, c.hidden_size)
            yield f"{layer}.mlp.suv_{half}", (c.intermediate_size,)
        yield f"{layer}.mlp.down_proj.weight", (c.hidden_size, c.intermediate_size)
        for name in ("lambda_1", "lambda_2"):
            yield f"{layer}.{name}", (c.hidden_size,)
