"""Opening OpenMythos checkpoints of every kind under one set of names, checked tensor by tensor.

Not a loader: opening reads headers only (and some rows of a rotary table), ``read`` brings in just the rows asked for,
and the optimizer state of a trainer file is never touched. What a config or a file leaves open is asked for, never
guessed; what is left out of either is said in ``notes``.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mythos_edge.model.entry_reader import EntryReader
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.families.family import Opening
from mythos_edge.model.families.openmythos.config import MythosConfig
from mythos_edge.model.families.openmythos.config_sources import ConfigSource, MergedFields
from mythos_edge.model.families.openmythos.rope_tables import (
    ROPE_TABLE_CHOICES,
    StoredTable,
    unknown_theta,
    unlike_the_config,
)
from mythos_edge.model.families.openmythos.shapes import (
    ROPE_TABLES,
    check_anchors,
    expected_shapes,
    inferred_fields,
    table_length,
    table_name,
)
from mythos_edge.model.json_files import read_config_dict
from mythos_edge.model.stored_checkpoint import Checkpoint
from mythos_edge.model.tensor_checks import check_tensor, check_tensors
from mythos_edge.model.tensor_choice import TENSOR_KEYS
from mythos_edge.model.tensor_files import TensorEntry, TensorFile

# Put in by DDP, torch.compile, FSDP, activation checkpointing and trainers; no upstream name has such a part.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", *TENSOR_KEYS})
# The counter of torch's AveragedModel, which is no tensor of the model.
_COUNTERS = frozenset({"n_averaged"})
_COMPARE_BYTES = 16 << 20


def open_openmythos(opening: Opening) -> Checkpoint:
    """The checkpoint, checked tensor by tensor; see ``model.checkpoint.open_checkpoint``."""
    path, stored = opening.path, opening.stored
    entries = _canonical(stored.entries, path)
    shapes = {name: entry.shape for name, entry in entries.items()}
    check_anchors(shapes, origin=str(path))
    reader = EntryReader()
    try:
        table = _table(path, shapes, entries, reader, opening.rope_table)
        fields = _fields(path, stored, shapes, opening.config_path)
        config = _config(path, fields, shapes, table, ignores_table=opening.rope_table == "config")
        different = (
            None if opening.rope_table or table is None else _judged(table, config, fields, path, opening.tolerate)
        )
        for name in ROPE_TABLES:
            entries.pop(name, None)
        head = entries.pop("head.weight", None)
        check_tensors(entries, expected_shapes(config), path, "an OpenMythos model")
        if table is not None and opening.rope_table != "config":
            table.check_width(config, str(path))
        _check_tied(reader, entries["embed.weight"], head, path, fields.wishes_untied)
    except BaseException:
        reader.close()
        raise
    unlike, note = different or (None, None)
    return Checkpoint(
        path,
        stored.kind,
        config,
        entries,
        stored.step,
        table=table,
        rope_table=opening.rope_table or "config",
        unlike_config=unlike,
        notes=(*stored.notes, *fields.notes, *([note] if note else [])),
        reader=reader,
    )


def _canonical(stored: Mapping[str, TensorEntry], path: Path) -> dict[str, TensorEntry]:
    """The same tensors under upstream names."""
    entries: dict[str, TensorEntry] = {}
    origins: dict[str, str] = {}
    for stored_name, entry in stored.items():
        name = ".".join(part for part in stored_name.split(".") if part not in _WRAPPERS)
        if name in _COUNTERS:
            continue
        if name in entries:
            raise CheckpointError(
                f"{path}: {origins[name]} and {stored_name} are both {name}: keep one model, or name one with --key"
            )
        if re.match(r"blocks\.\d+\.", name):
            raise CheckpointError(
                f"{path}: a moda.py checkpoint ({stored_name}), which is another model without a loop; "
                "expected one of open_mythos/main.py"
            )
        entries[name] = TensorEntry(name, entry.dtype, entry.shape, entry.path, entry.offset)
        origins[name] = stored_name
    return entries


def _table(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    entries: Mapping[str, TensorEntry],
    reader: EntryReader,
    wanted: str | None,
) -> StoredTable | None:
    """The rotary table of the file that its attention uses, checked unless the config's is wanted; None without one."""
    if wanted is not None and wanted not in ROPE_TABLE_CHOICES:
        raise ConfigError(f"--rope-table is {wanted!r}, expected one of {', '.join(ROPE_TABLE_CHOICES)}")
    name = table_name(shapes)
    if name not in entries:
        if wanted == "stored":
            raise CheckpointError(
                f"{path}: holds no rotary table {name}: --rope-table config, or save it with the rest"
            )
        return None
    table = StoredTable(entries[name], partial(reader.read, entries[name]))
    if wanted != "config":
        table.check(str(path))
    return table


def _fields(
    path: Path, stored: TensorFile, shapes: Mapping[str, tuple[int, ...]], config_path: Path | None
) -> MergedFields:
    """Lists the sources of the config. Once it is complete a weaker one changes nothing; what it says is noted."""
    merged = MergedFields()

    def add(origin: str, content: Any, dedicated: bool) -> None:
        merged.add(ConfigSource(origin, content, dedicated), inferred_fields(shapes, merged.values))

    if config_path is not None:
        add(str(config_path), read_config_dict(config_path), True)
    for name, content in stored.configs.items():
        add(f"{name} of {path}", content, False)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if beside.is_file() and not _is_same(beside, config_path):
        try:
            content = read_config_dict(beside)
        except ConfigError as error:
            if not merged.complete:
                raise
            merged.notes.append(f"{error}; the config is complete without it")
        else:
            add(str(beside), content, True)
    return merged


def _is_same(beside: Path, config_path: Path | None) -> bool:
    return config_path is not None and beside.samefile(config_path)


def _config(
    path: Path,
    fields: MergedFields,
    shapes: Mapping[str, tuple[int, ...]],
    table: StoredTable | None,
    *,
    ignores_table: bool,
) -> MythosConfig:
    """The config that the fields make with what weights and rotary table tell, checked against the weights."""
    length = table_length(shapes)
    if ignores_table and "n_heads" in fields.values:
        # The table's width tells the heads of GQA; it has no say against the config where it is not wanted.
        shapes = {name: shape for name, shape in shapes.items() if name not in ROPE_TABLES}
    inferred = inferred_fields(shapes, fields.values)
    defaults: dict[str, Any] = inferred if length is None else inferred | {"max_seq_len": length}
    if table is not None and "rope_theta" not in fields.values and not table.malformed:
        theta = table.theta()
        if theta is not None:
            defaults = defaults | {"rope_theta": theta}
            fields.notes.append(f"rope_theta is {theta!r}, which the rotary table {table.entry.name} was made with")
        elif fault := unknown_theta(table, str(path)):
            raise fault
    config = fields.config(defaults, str(path))
    for name, value in inferred.items():
        if getattr(config, name) != value:
            raise ConfigError(
                f"{fields.origins[name]}: {name} is {getattr(config, name)!r}, but the weights have {value!r}"
            )
    return config


def _judged(
    table: StoredTable, config: MythosConfig, fields: MergedFields, path: Path, tolerate: Collection[str]
) -> tuple[str, str] | None:
    """How the stored table differs from the config's and a note on it; None where it does not.

    Raises ConfigError for a difference that is not tolerated.
    """
    table.check_width(config, str(path))
    found = unlike_the_config(table, config, fields.origins.get("rope_theta", str(path)), str(path))
    if found is None:
        return None
    kind, error = found
    if kind not in tolerate:
        raise error
    return kind, str(error)


def _check_tied(
    reader: EntryReader, embed: TensorEntry, head: TensorEntry | None, path: Path, wishes_untied: str | None
) -> None:
    """Raise CheckpointError unless the head's values are the embedding's, or there is no head and none is promised."""
    if head is None:
        if wishes_untied is not None:
            raise CheckpointError(
                f"{path}: {wishes_untied} says that tie_word_embeddings is false, but there is no head.weight: "
                "save the whole state dict"
            )
        return
    check_tensor(head, embed.shape, path)
    if (head.path, head.offset, head.dtype) == (embed.path, embed.offset, embed.dtype):
        return
    rows, columns = embed.shape
    height = max(1, _COMPARE_BYTES // (8 * columns))
    for start in range(0, rows, height):
        stop = min(rows, start + height)
        if not torch.equal(*(reader.read(entry, start, stop).double() for entry in (head, embed))):
            raise CheckpointError(
                f"{path}: head.weight differs from embed.weight in rows {start}:{stop}; untied heads are not supported"
            )
