"""Where the tensors of ``torch.save`` and safetensors files lie: headers only, weights are never read here.

Names are returned as stored; which mapping of a trainer's file is the model's, ``tensor_choice`` says. No code from a
file runs: pickles go through torch's ``weights_only`` unpickler, and the few extra names that are allowed give a class
of ours that does nothing.
"""

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mythos_edge.model.bounded_files import open_regular, parse_json, size_text
from mythos_edge.model.config import read_json_object
from mythos_edge.model.config_sources import CONFIG_KEYS
from mythos_edge.model.errors import CheckpointError
from mythos_edge.model.foreign_files import bin_shards, distributed_tensor, refuse_foreign_file, refuse_foreign_folder
from mythos_edge.model.pickle_bounds import check_pickle, check_pickle_size
from mythos_edge.model.tensor_choice import choose_tensors, under_prefix
from mythos_edge.model.zip_records import Record, zip_records

EXPECTED = (
    "expected a torch.save file (.pt, .pth, .bin), a .safetensors file, "
    "or a folder with model.safetensors or model.safetensors.index.json"
)
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
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
    """Tensors of a file or folder by stored name, and the trainer step and what may be the config stored with them.

    ``configs`` has the contents of the keys that may hold the config; ``notes`` are for people.
    """

    kind: str
    entries: Mapping[str, TensorEntry]
    configs: Mapping[str, Any] = field(default_factory=dict)
    step: int | None = None
    notes: tuple[str, ...] = ()


# numpy's codes of the types of a single number.
_NUMBER_CODES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


class _Inert:
    """Stands for a pickled object of ``_INERT_NAMES``, which need not be installed: keeps its fields, does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _OfNumpy(_Inert):
    """Stands for a pickled object of numpy: keeps what it would be made of, of which a scalar is a number."""

    def __init__(self, *parts: object) -> None:
        self.parts, self.state = parts, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def plain(self) -> int | float | bool | str:
        """The number that a scalar is, as Python's; for any other object words that say what it is."""
        match self.parts:
            case (_OfNumpy(parts=(str(code), *_), state=(_, "<" | "|", *_)), bytes(data)) if code in _NUMBER_CODES:
                if len(data) == np.dtype(code).itemsize:
                    number: int | float | bool = np.frombuffer(data, f"<{code}")[0].item()
                    return number
        return "an object of numpy"


# The reference's config, and what trainers store beside a model: their options, a best loss, a path, the state
# of numpy's random numbers.
_INERT_NAMES = (
    "open_mythos.main.MythosConfig",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
)
_NUMPY_NAMES = (
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def read_tensor_file(path: Path, key: str | None = None) -> TensorFile:
    """The tensors of a file or folder of any known kind; ``key`` (dotted) names the mapping, or the beginning of the
    names, that is the model's. Raises CheckpointError.
    """
    try:
        if path.is_dir():
            path = _model_in_folder(path)
        if path.is_file():
            refuse_foreign_file(path)
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            return _read_torch(path, key)
        found = _read_safetensors(path) if path.suffix == ".safetensors" else _read_sharded(path)
        return found if key is None else TensorFile(found.kind, under_prefix(found.entries, key, str(path)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file: {EXPECTED}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _model_in_folder(folder: Path) -> Path:
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    if (folder / "pytorch_model.bin.index.json").is_file():
        return folder / "pytorch_model.bin.index.json"
    refuse_foreign_folder(folder)
    found = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    there = f"give one of its files: {', '.join(found[:5])}" if found else EXPECTED
    raise CheckpointError(f"{folder}: no model in this folder: {there}")


def _read_safetensors(path: Path) -> TensorFile:
    return TensorFile("safetensors", _safetensors_entries(path))


def _read_sharded(index: Path) -> TensorFile:
    """Source: the index format of Hugging Face transformers, ``{"weight_map": {tensor: file name}}``."""
    weight_map = read_json_object(index, "the index", CheckpointError, _MOST_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: no weight_map of tensor names to file names")
    names_of: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, []).append(name)
    entries: dict[str, TensorEntry] = {}
    if any(shard.endswith(".bin") for shard in names_of):
        raise CheckpointError(f"{index}: the model is {bin_shards(index.parent)}")
    for shard, names in sorted(names_of.items()):
        # A name with folders could point anywhere on the machine.
        if shard != Path(shard).name or "\\" in shard:
            raise CheckpointError(f"{index}: shard {shard[:80]!r} is not a plain file name")
        if not (index.parent / shard).exists():
            raise CheckpointError(f"{index}: shard {shard} is missing: copy it beside the index")
        refuse_foreign_file(index.parent / shard, alone=False)
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


def _read_torch(path: Path, key: str | None) -> TensorFile:
    records = {record.offset: record.n_bytes for record in _checked_records(path)}
    loaded = _load_without_weights(path)
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a state dict")
    chosen = choose_tensors(loaded, key, str(path))
    kind = f"{{{chosen.path!r}: ...}} file" if chosen.path else "state dict"
    if chosen.path and not loaded.keys().isdisjoint(("optimizer", "muon", "adamw")):
        kind = "trainer .pt"
    entries = {name: _torch_entry(name, value, path, records) for name, value in chosen.tensors.items()}
    _check_total(entries.values(), path)
    step = loaded.get("step")
    configs = {name: _plain(loaded[name]) for name in CONFIG_KEYS if chosen.path and loaded.get(name) is not None}
    return TensorFile(kind, entries, configs, step if isinstance(step, int) else None, chosen.notes)


def _plain(stored: Any) -> Any:
    """A stored config with the fields of objects, in it and of it, as mappings."""
    if isinstance(stored, _OfNumpy):
        return stored.plain()
    fields = vars(stored) if isinstance(stored, _Inert) else stored
    return {name: _plain(value) for name, value in fields.items()} if isinstance(fields, Mapping) else fields


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without torch's log lines on what a distributed tensor lacks in this process; it is refused by name here."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _load_without_weights(path: Path) -> Any:
    """The pickled object with tensors on the device meta: shapes, strides and file offsets, but no tensor bytes."""
    allowed: list[Any] = [(_Inert, name) for name in _INERT_NAMES]
    allowed += [(_OfNumpy, name) for name in _NUMPY_NAMES]
    try:
        with torch.serialization.safe_globals(allowed), _quiet_torch():
            return torch.load(path, weights_only=True, map_location="meta")
    except Exception as error:  # a damaged pickle can fail in any way
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted and wanted[1].startswith("torch.distributed."):
            what = wanted[1].rpartition(".")[2]
            raise CheckpointError(f"{path}: a tensor in it {distributed_tensor(what)}") from error
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
    if type(value).__module__.startswith("torch.distributed."):
        raise CheckpointError(f"{path}: {name} {distributed_tensor(type(value).__name__)}")
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
