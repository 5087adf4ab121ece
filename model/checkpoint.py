"""Opening OpenMythos checkpoints of every kind under one set of names, and reading rows of their tensors.

Not a loader: opening reads headers only (and some rows of a rotary table), ``read`` brings in just the rows asked for,
and the optimizer state of a trainer file is never touched. What a config or a file leaves open is asked for, never
guessed; what is left out of either is said in ``notes``.
"""

import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mythos_edge.model.config import MythosConfig, read_config_dict
from mythos_edge.model.config_sources import ConfigSource, MergedFields
from mythos_edge.model.entry_reader import EntryReader
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.rope_tables import ROPE_TABLE_CHOICES, StoredTable, unknown_theta, unlike_the_config
from mythos_edge.model.shapes import (
    ROPE_TABLES,
    check_anchors,
    expected_shapes,
    few,
    inferred_fields,
    table_length,
    table_name,
)
from mythos_edge.model.tensor_choice import TENSOR_KEYS
from mythos_edge.model.tensor_files import TensorEntry, TensorFile, read_tensor_file

__all__ = ["Checkpoint", "TensorEntry", "expected_shapes", "open_checkpoint"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Put in by DDP, torch.compile, FSDP, activation checkpointing and trainers; no upstream name has such a part.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", *TENSOR_KEYS})
# The counter of torch's AveragedModel, which is no tensor of the model.
_COUNTERS = frozenset({"n_averaged"})
_COMPARE_BYTES = 16 << 20


class Checkpoint:
    """An open checkpoint: ``tensors`` by upstream name (without head and rope tables) and its ``config``.

    ``table`` is the rotary table that the file holds, ``rope_table`` says whether that ("stored") or the config's
    ("config") is computed with, ``unlike_config`` whether they differ ("real" or "theta"). ``notes`` are for people.
    Tensors are read, not mapped, so resident memory holds no more than what ``read`` returned.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        config: MythosConfig,
        tensors: Mapping[str, TensorEntry],
        step: int | None = None,
        *,
        table: StoredTable | None = None,
        rope_table: str = "config",
        unlike_config: str | None = None,
        notes: tuple[str, ...] = (),
        reader: EntryReader | None = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.config = config
        self.tensors = tensors
        self.step = step
        self.table = table
        self.rope_table = rope_table
        self.unlike_config = unlike_config
        self.notes = notes
        self._reader = EntryReader() if reader is None else reader

    @property
    def stored_table(self) -> StoredTable | None:
        """The rotary table to compute with, where it is the file's own; None where it is the config's."""
        return self.table if self.rope_table == "stored" else None

    @property
    def n_parameters(self) -> int:
        """Elements of all tensors; the tied head counts once."""
        return sum(entry.n_elements for entry in self.tensors.values())

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the file's dtypes; the tied head counts once."""
        return sum(entry.n_bytes for entry in self.tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start:stop`` of a tensor along its first axis, fresh memory in the file's dtype.

        Raises CheckpointError when the file has become shorter or unreadable since it was opened.
        """
        stored = self.stored_table
        entry = stored.entry if stored is not None and name == stored.entry.name else self.tensors[name]
        return self._reader.read(entry, start, stop)

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
    entries = _canonical(stored.entries, path)
    shapes = {name: entry.shape for name, entry in entries.items()}
    check_anchors(shapes, origin=str(path))
    reader = EntryReader()
    try:
        table = _table(path, shapes, entries, reader, rope_table)
        fields = _fields(path, stored, shapes, Path(config_path) if config_path else None)
        config = _config(path, fields, shapes, table, ignores_table=rope_table == "config")
        different = None if rope_table or table is None else _judged(table, config, fields, path, tolerate)
        for name in ROPE_TABLES:
            entries.pop(name, None)
        head = entries.pop("head.weight", None)
        _check_tensors(entries, config, path)
        if table is not None and rope_table != "config":
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
        rope_table=rope_table or "config",
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


def _check_tensors(entries: Mapping[str, TensorEntry], config: MythosConfig, path: Path) -> None:
    expected = expected_shapes(config)
    unknown = [name for name in entries if name not in expected]
    if unknown:
        raise CheckpointError(f"{path}: unknown tensors {few(unknown)}; expected an OpenMythos model only")
    missing = [name for name in expected if name not in entries]
    if missing:
        raise CheckpointError(f"{path}: missing tensors {few(missing)}; save the whole state dict")
    for name, shape in expected.items():
        _check_tensor(entries[name], shape, path)


def _check_tensor(entry: TensorEntry, shape: tuple[int, ...], path: Path) -> None:
    if entry.shape != shape:
        raise CheckpointError(f"{path}: {entry.name} has shape {entry.shape}, expected {shape}")
    if entry.dtype not in _DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise CheckpointError(f"{path}: {entry.name} has dtype {entry.dtype}, expected one of {known}")


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
    _check_tensor(head, embed.shape, path)
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
