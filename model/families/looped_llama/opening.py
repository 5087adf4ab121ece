"""Opening the folders of looped Llamas, checked tensor by tensor. Reads headers only."""

import re

from mythos_edge.model.errors import ConfigError
from mythos_edge.model.families.family import Opening
from mythos_edge.model.families.looped_llama.config import StackConfig
from mythos_edge.model.families.looped_llama.config_fields import config_from_fields
from mythos_edge.model.families.looped_llama.layout import tensor_shapes
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.tensor_checks import check_tensors

# A buffer that some copies store; it follows from the config.
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


def open_looped_llama(kind: type[StackConfig], opening: Opening) -> Checkpoint:
    """The checkpoint, checked tensor by tensor; see ``model.checkpoint.open_checkpoint``."""
    path, notes = opening.path, list(opening.stored.notes)
    if opening.rope_table == "stored":
        raise ConfigError(f"{path}: --rope-table is stored, but {kind.family} models store none: leave it out")
    config = config_from_fields(kind, opening.config_values, opening.config_origin(), notes.append)
    entries = {name: entry for name, entry in opening.stored.entries.items() if not _FREQUENCIES.search(name)}
    if len(entries) < len(opening.stored.entries):
        notes.append(f"{path}: its rotary frequencies (inv_freq) are left out: they are made from rope_theta")
    whose = f"those of {kind.family} with {config.num_hidden_layers} layers"
    check_tensors(entries, tensor_shapes(config), path, whose)
    return Checkpoint(
        path,
        opening.stored.kind,
        config,
        entries,
        opening.stored.step,
        notes=tuple(notes),
        special_tokens=config.special_tokens,
    )
