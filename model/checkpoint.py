"""Opening OpenMythos checkpoints of every kind under one set of names, and reading rows of their tensors.

Not a loader: opening reads headers only, ``read`` brings in just the rows asked for, and the optimizer
state of a trainer file is never touched. What a config or a file leaves open is asked for, never guessed.
"""

import re
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from mythos_edge.model.config import FIELD_NAMES, MythosConfig, config_from_dict, read_config_dict
from mythos_edge.model.errors import CheckpointError, ConfigError
from mythos_edge.model.shapes import (
    ROPE_TABLES,
    check_anchors,
    expected_shapes,
    few,
    inferred_fields,
    table_length,
)
from mythos_edge.model.tensor_files import TensorEntry, TensorFile, read_tensor_file

__all__ = ["Checkpoint", "TensorEntry", "expected_shapes", "open_checkpoint"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Put in by DDP, torch.compile, FSDP, activation checkpointing and trainers; no upstream name has such a part.
_WRAPPERS = frozenset({"module", "_orig_mod", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_COMPARE_BYTES = 16 << 20


class Checkpoint:
    """An open checkpoint: ``tensors`` by upstream name (without head and rope tables) and its ``config``.

    Tensors are read, not mapped, so resident memory holds no more than what ``read`` returned.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        config: MythosConfig,
        tensors: Mapping[str, TensorEntry],
        step: int | None = None,
    ) -> None:
        self.path = path
        self.kind = kind
        self.config = config
        self.tensors = tensors
        self.step = step
        self._files: dict[Path, FileIO] = {}
        self._lock = Lock()
        self._closed = False

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
        return self._read(self.tensors[name], start, stop)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, entry: TensorEntry, start: int, stop: int | None) -> Tensor:
        rows, *columns = entry.shape
        stop = rows if stop is None else stop
        assert 0 <= start <= stop <= rows, (entry.name, start, stop)
        row_bytes = entry.n_bytes // rows
        raw = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self._fill(raw.numpy().data, entry, entry.offset + start * row_bytes)
        return raw.view(entry.dtype).view(stop - start, *columns)

    def _fill(self, buffer: memoryview, entry: TensorEntry, offset: int) -> None:
        # Seek and readinto instead of os.pread: no second copy of the bytes, and Windows has no pread.
        with self._lock:
            assert not self._closed, "read after close"
            try:
                if entry.path not in self._files:
                    self._files[entry.path] = FileIO(entry.path, "r")
                file, filled = self._files[entry.path], 0
                file.seek(offset)
                while filled < len(buffer):
                    got = file.readinto(buffer[filled:])
                    if not got:
                        raise CheckpointError(
                            f"{entry.path}: ends inside {entry.name}: changed while open, or truncated"
                        )
                    filled += got
            except OSError as error:
                raise CheckpointError(f"{entry.path}: can not read {entry.name}: {error.strerror or error}") from error


def open_checkpoint(path: Path | str, config_path: Path | str | None = None) -> Checkpoint:
    """The checkpoint at ``path`` (a file of any known kind, or a folder), checked tensor by tensor.

    ``config_path`` is a JSON file with the config, or with just the fields the checkpoint leaves open; it
    overrules the config stored in the checkpoint, which overrules a config.json beside it.
    Raises CheckpointError for a missing, damaged, unsafe or foreign file; ConfigError when config fields are
    unknown or contradict the weights.
    """
    path = Path(path)
    stored = read_tensor_file(path)
    entries = _canonical(stored.entries, path)
    shapes = {name: entry.shape for name, entry in entries.items()}
    check_anchors(shapes, origin=str(path))
    config = _config(path, stored, shapes, Path(config_path) if config_path else None)
    for table in ROPE_TABLES:
        entries.pop(table, None)
    head = entries.pop("head.weight", None)
    _check_tensors(entries, config, path)
    checkpoint = Checkpoint(path, stored.kind, config, entries, stored.step)
    if head is not None:
        _check_tied(checkpoint, head)
    return checkpoint


def _canonical(stored: Mapping[str, TensorEntry], path: Path) -> dict[str, TensorEntry]:
    """The same tensors under upstream names."""
    entries: dict[str, TensorEntry] = {}
    origins: dict[str, str] = {}
    for stored_name, entry in stored.items():
        name = ".".join(part for part in stored_name.split(".") if part not in _WRAPPERS)
        if name in entries:
            raise CheckpointError(f"{path}: {origins[name]} and {stored_name} are both {name}: keep one model")
        if re.match(r"blocks\.\d+\.", name):
            raise CheckpointError(
                f"{path}: a moda.py checkpoint ({stored_name}), which is another model without a loop; "
                "expected one of open_mythos/main.py"
            )
        entries[name] = TensorEntry(name, entry.dtype, entry.shape, entry.path, entry.offset)
        origins[name] = stored_name
    return entries


def _config(
    path: Path, stored: TensorFile, shapes: Mapping[str, tuple[int, ...]], config_path: Path | None
) -> MythosConfig:
    """The merged config, checked against the weights; a weaker source only fills in what is missing."""
    sources: list[tuple[str, Mapping[str, Any]]] = []
    if config_path is not None:
        sources.append((str(config_path), read_config_dict(config_path)))
    if stored.config is not None:
        sources.append((f"cfg of {path}", stored.config))
    beside = (path if path.is_dir() else path.parent) / "config.json"
    given = {name for _, values in sources for name in values}
    # A complete config needs no help from a file that may be there for another reason.
    if not given.issuperset(FIELD_NAMES) and beside.is_file():
        sources.append((str(beside), read_config_dict(beside)))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for origin, values in sources:
        origins |= {name: origin for name in values if name not in merged}
        merged = {**values, **merged}
    inferred = inferred_fields(shapes, merged)
    length = table_length(shapes)
    defaults = inferred if length is None else inferred | {"max_seq_len": length}
    names = " over ".join(origin for origin, _ in sources) or str(path)
    config = config_from_dict({**defaults, **merged}, origin=names)
    for name, value in inferred.items():
        if getattr(config, name) != value:
            raise ConfigError(f"{origins[name]}: {name} is {getattr(config, name)!r}, but the weights have {value!r}")
    return config


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


def _check_tied(checkpoint: Checkpoint, head: TensorEntry) -> None:
    """Raise CheckpointError unless the head's values are the embedding's."""
    embed = checkpoint.tensors["embed.weight"]
    _check_tensor(head, embed.shape, checkpoint.path)
    if (head.path, head.offset, head.dtype) == (embed.path, embed.offset, embed.dtype):
        return
    rows, columns = embed.shape
    height = max(1, _COMPARE_BYTES // (8 * columns))
    try:
        for start in range(0, rows, height):
            stop = min(rows, start + height)
            pieces = [checkpoint._read(entry, start, stop).double() for entry in (head, embed)]
            if not torch.equal(*pieces):
                raise CheckpointError(
                    f"{checkpoint.path}: head.weight differs from embed.weight in rows {start}:{stop}; "
                    "untied heads are not supported"
                )
    except BaseException:
        checkpoint.close()
        raise
