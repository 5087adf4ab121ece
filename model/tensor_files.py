"""Where the tensors of ``torch.save`` and safetensors files lie: headers only, weights are never read here.

Knows no model: names are returned as stored. No code from a file runs: pickles go through torch's
``weights_only`` unpickler with one extra name allowed, the reference's config dataclass.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mythos_edge.model.bounded_files import open_regular, parse_json, read_bounded, size_text
from mythos_edge.model.errors import CheckpointError
from mythos_edge.model.pickle_bounds import check_pickle, check_pickle_size
from mythos_edge.model.zip_records import Record, zip_records

EXPECTED = (
    "expected a torch.save file (.pt, .pth, .bin), a .safetensors file, "
    "or a folder with model.safetensors or model.safetensors.index.json"
)
# A tensor takes some 150 bytes of a header, and JSON unpacks to 30 times its size.
_MOST_HEADER_BYTES = 16_000_000
# Source: safetensors 0.8, safetensors/src/tensor.rs, enum Dtype.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where the contiguous row-major bytes of one tensor lie: ``offset`` bytes into ``path``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return self.n_elements * self.dtype.itemsize


@dataclass(frozen=True)
class TensorFile:
    """Tensors of a file or folder by stored name, and the config and trainer step stored with them."""

    kind: str
    entries: Mapping[str, TensorEntry]
    config: Mapping[str, Any] | None = None
    step: int | None = None


class _StoredConfig:
    """Receives the fields of a pickled ``open_mythos.main.MythosConfig``, which need not be installed."""


def read_tensor_file(path: Path) -> TensorFile:
    """The tensors of a file or folder of any known kind. Raises CheckpointError."""
    try:
        if path.is_dir():
            path = _model_in_folder(path)
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.name.endswith(".index.json"):
            return _read_sharded(path)
        return _read_torch(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file: {EXPECTED}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _model_in_folder(folder: Path) -> Path:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no model in this folder: {EXPECTED}")


def _read_safetensors(path: Path) -> TensorFile:
    return TensorFile("safetensors", _safetensors_entries(path))


def _read_sharded(index: Path) -> TensorFile:
    """Source: the index format of Hugging Face transformers, ``{"weight_map": {tensor: file name}}``."""
    content = read_bounded(index, _MOST_HEADER_BYTES, "an index")
    weight_map = _json_object(content, index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to file names")
    names_of: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, []).append(name)
    entries: dict[str, TensorEntry] = {}
    for shard, names in sorted(names_of.items()):
        # A name with folders could point anywhere on the machine.
        if shard != Path(shard).name or "\\" in shard:
            raise CheckpointError(f"{index}: shard {shard[:80]!r} is not a plain file name")
        if not (index.parent / shard).exists():
            raise CheckpointError(f"{index}: shard {shard} is missing: copy it beside the index")
        found = _safetensors_entries(index.parent / shard)
        for name in names:
            if name not in found:
                raise CheckpointError(f"{index}: {name} should be in {shard}, but is not there")
            entries[name] = found[name]
    return TensorFile("sharded safetensors", entries)


def _safetensors_entries(path: Path) -> dict[str, TensorEntry]:
    """Source: the safetensors format, 8 bytes header size (little endian), JSON header, tensor bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not safetensors: {size} bytes, header of {header_bytes}; copy it again"
            )
        if header_bytes > _MOST_HEADER_BYTES:
            raise CheckpointError(
                f"{path}: its header has {size_text(header_bytes)}, that of a model has at most "
                f"{size_text(_MOST_HEADER_BYTES)}: save the model's own tensors alone"
            )
        header = _json_object(file.read(header_bytes), path)
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    entries = {name: _safetensors_entry(name, info, path, start, size) for name, info in header.items()}
    _check_apart(entries.values(), path)
    return entries


def _safetensors_entry(name: str, info: Any, path: Path, start: int, size: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
        well_formed = isinstance(dtype, str) and all(
            type(value) is int and value >= 0 for value in (*shape, begin, end)
        )
    except (KeyError, TypeError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{path}: the header entry of {name} is malformed; copy the file again")
    if dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    entry = TensorEntry(name, _DTYPES[dtype], shape, path, start + begin)
    if end - begin != entry.n_bytes or start + end > size:
        raise CheckpointError(
            f"{path}: truncated or damaged: {name} should be {entry.n_bytes} bytes at {start + begin}, "
            f"the header says {end - begin} and the file has {size} in all: copy it again"
        )
    return entry


def _check_apart(entries: Iterable[TensorEntry], path: Path) -> None:
    """Raises CheckpointError for tensors that share bytes, which the safetensors format does not know."""
    placed = sorted((entry for entry in entries if entry.n_bytes), key=lambda entry: entry.offset)
    for before, entry in pairwise(placed):
        if entry.offset < before.offset + before.n_bytes:
            raise CheckpointError(
                f"{path}: {before.name} and {entry.name} share bytes: the file is damaged or made up; copy it again"
            )


def _json_object(text: bytes, path: Path) -> dict[str, Any]:
    try:
        values = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: bad JSON header: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: bad JSON header: expected an object, got {type(values).__name__}")
    return values


def _read_torch(path: Path) -> TensorFile:
    records = {record.offset: record.n_bytes for record in _checked_records(path)}
    loaded = _load_without_weights(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a state dict")
    tensors, kind = loaded, "state dict"
    for key in ("model", "state_dict"):
        if isinstance(loaded.get(key), Mapping):
            tensors, kind = loaded[key], f"{{{key!r}: ...}} file"
            break
    if tensors is not loaded and not loaded.keys().isdisjoint(("optimizer", "muon", "adamw")):
        kind = "trainer .pt"
    entries = {name: _torch_entry(name, value, path, records) for name, value in tensors.items()}
    _check_total(entries.values(), path)
    step = loaded.get("step")
    return TensorFile(kind, entries, _stored_config(loaded, path), step if isinstance(step, int) else None)


def _stored_config(loaded: Mapping[Any, Any], path: Path) -> Mapping[str, Any] | None:
    """Fields of ``cfg``, a pickled config dataclass or a dict; None without one."""
    stored = loaded.get("cfg")
    fields = vars(stored) if isinstance(stored, _StoredConfig) else stored
    if fields is None:
        return None
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
        raise CheckpointError(f"{path}: cfg is a {type(stored).__name__}, expected a MythosConfig or a dict")
    return fields


def _load_without_weights(path: Path) -> Any:
    """The pickled object with fake tensors: shapes, strides and file offsets, but no tensor bytes."""
    # map_location="meta" would be quicker, but before torch 2.11 it reads every byte of the file first.
    allowed: list[Any] = [(_StoredConfig, "open_mythos.main.MythosConfig")]
    try:
        with torch.serialization.safe_globals(allowed), FakeTensorMode():
            return torch.load(path, weights_only=True)
    except Exception as error:  # a damaged pickle can fail in any way
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted:
            raise CheckpointError(
                f"{path}: the pickle asks for the code {wanted[1]}, which was not run; "
                "expected tensors and plain values: save model.state_dict() again without it"
            ) from error
        # torch's own message ends in advice to drop the protection, so only its reason is passed on.
        text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        reason = text.splitlines()[0] if text else type(error).__name__
        raise CheckpointError(f"{path}: cannot be unpickled safely: {reason}") from error


def _torch_entry(name: Any, value: Any, path: Path, records: Mapping[int, int]) -> TensorEntry:
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{path}: {name!r} is a {type(value).__name__}, expected only named tensors in the state dict"
        )
    if value.layout is not torch.strided or value.is_quantized or not value.is_contiguous():
        raise CheckpointError(
            f"{path}: {name} is stored transposed, strided, sparse or quantized; save it with .contiguous()"
        )
    storage, itemsize = value.untyped_storage(), value.dtype.itemsize
    offset, inside = storage._checkpoint_offset, value.storage_offset() * itemsize
    # torch works these offsets out instead of looking them up, which a rewritten zip would mislead.
    if value.numel() and (offset is None or records.get(offset) != storage.nbytes()):
        raise CheckpointError(
            f"{path}: the bytes of {name} are not where torch.save puts them: "
            "load the file with torch.load(weights_only=True) and torch.save it again"
        )
    entry = TensorEntry(name, value.dtype, tuple(value.shape), path, (offset or 0) + int(inside))
    if value.numel() and inside + entry.n_bytes > storage.nbytes():
        raise CheckpointError(f"{path}: {name} reaches beyond its storage: the file is damaged")
    return entry


def _check_total(entries: Iterable[TensorEntry], path: Path) -> None:
    """Raises CheckpointError for tensors of many more bytes than the file has: a tied head may share its own."""
    total, size = sum(entry.n_bytes for entry in entries), path.stat().st_size
    if total > 2 * size:
        raise CheckpointError(
            f"{path}: its tensors have {size_text(total)}, the file {size_text(size)}: they share bytes; "
            "save each with .clone()"
        )


def _checked_records(path: Path) -> list[Record]:
    """The records of a torch.save file, none of which would unpack to more than a checkpoint has."""
    with open_regular(path) as file:
        start = file.read(4)
        if start != b"PK\x03\x04":
            raise CheckpointError(f"{path}: {_what_instead_of_zip(start)}")
        records = zip_records(file, path)
        for record in records:
            if record.name.endswith("/data.pkl") and record.name.count("/") == 1:
                _check_pickle(file, record, path)
    return records


def _check_pickle(file: BinaryIO, record: Record, path: Path) -> None:
    try:
        check_pickle_size(record.n_bytes)
        file.seek(record.offset)
        check_pickle(file.read(record.n_bytes))
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be unpickled safely: {error}: save model.state_dict() alone") from error


def _what_instead_of_zip(start: bytes) -> str:
    if start[:1] == b"\x80":
        return (
            "an old torch.save file without zip container: load it with torch.load(weights_only=True) "
            "and torch.save it again with torch 1.6 or newer"
        )
    return f"neither a torch.save nor a safetensors file: {EXPECTED}"
