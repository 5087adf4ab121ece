"""Opening checkpoints of every kind and family.

Not a loader: opening reads headers only (and some rows of a rotary table), and what a config or a file leaves open is
asked for, never guessed.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.families.family import Opening
from mythos_edge.model.families.table import FAMILIES
from mythos_edge.model.json_files import few, read_config_dict
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.tensor_files import read_tensor_file


def open_checkpoint(
    path: Path | str,
    config_path: Path | str | None = None,
    *,
    key: str | None = None,
    rope_table: str | None = None,
    tolerate: Collection[str] = (),
) -> Checkpoint:
    """The checkpoint at ``path`` (a file of any known kind, or a folder), checked tensor by tensor.

    ``config_path`` is a JSON file with the config, or with just the fields the checkpoint leaves open; it
    overrules the config stored in the checkpoint, which overrules a config.json beside it. ``key`` (dotted) is where
    the model's tensors are, if not under a key that trainers use. ``rope_table`` says what to compute with: the
    rotary table of the "config", or the one that is "stored"; without it they must agree, but for what ``tolerate``
    names ("real": the file has cosines only; "theta": it is of another rope_theta), which becomes a note.
    Raises CheckpointError for a missing, damaged, unsafe or foreign file; ConfigError when config fields are
    unknown or contradict the weights or the rotary table.
    """
    path = Path(path)
    stored = read_tensor_file(path, key)
    given = Path(config_path) if config_path else None
    beside = (path if path.is_dir() else path.parent) / "config.json"
    values, fault = _config_values([beside] if given is None else [beside, given])
    opening = Opening(path, stored, values, given, rope_table, tuple(tolerate))
    for family in FAMILIES.values():
        if family.recognises(stored.entries, values):
            opened: Checkpoint = family.open(opening)
            return opened
    if fault is not None:
        raise fault
    kind = f", its config says model_type {values['model_type']!r}" if "model_type" in values else ""
    raise CheckpointError(
        f"{path}: is of no family that is known ({', '.join(FAMILIES)}){kind}; the file holds {few(stored.entries)}"
    )


def _config_values(files: Sequence[Path]) -> tuple[dict[str, Any], ConfigError | None]:
    """The fields of configs, the last of which counts most, and why one of them cannot be read, if one cannot."""
    values: dict[str, Any] = {}
    fault = None
    for path in files:
        try:
            values |= read_config_dict(path) if path.exists() else {}
        except ConfigError as error:
            fault = error
    return values, fault
