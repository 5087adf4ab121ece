"""Where the records of a ``torch.save`` file lie: of a zip file only what torch.save itself writes.

Standard library only; no record is read but the few bytes that name the byte order. torch would unpack a compressed
record whole, and read one that several names share as often as it is named, so both are refused here.
"""

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mythos_edge.model.bounded_files import size_text
from mythos_edge.model.errors import CheckpointError

# A record takes some 100 bytes of the directory, and a checkpoint has one a tensor.
_MOST_DIRECTORY_BYTES = 16_000_000
_SAVE_AGAIN = "load the file with torch.load(weights_only=True) and torch.save it again"
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class Record:
    """The bytes of one record: ``offset`` bytes into the file."""

    name: str
    offset: int
    n_bytes: int


def zip_records(file: BinaryIO, path: Path) -> list[Record]:
    """The records of an open zip file, in the file's order. ``path`` names it in errors.

    Raises CheckpointError for a damaged file, a compressed or encrypted record, and records that share bytes.
    """
    try:
        listed = zip_directory(file)
    except ValueError as error:
        raise CheckpointError(f"{path}: truncated or damaged ({error}): copy the file again") from error
    for info in listed:
        packed = info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size
        if packed or info.flag_bits & 1:
            raise CheckpointError(
                f"{path}: the record {info.filename[:80]!r} is compressed or encrypted, which torch.save never does: "
                f"{_SAVE_AGAIN}"
            )
    records = _placed(file, sorted(listed, key=lambda info: info.header_offset), path)
    _check_byte_order(file, records, path)
    return records


def zip_directory(file: BinaryIO) -> list[zipfile.ZipInfo]:
    """The records that an open zip file lists. Raises ValueError for a damaged or an endless list."""
    try:
        with zipfile.ZipFile(_BoundedReads(file)) as archive:
            return archive.infolist()
    # What zipfile raises for headers that contradict themselves.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, struct.error) as error:
        raise ValueError(str(error)) from error


def _placed(file: BinaryIO, listed: list[zipfile.ZipInfo], path: Path) -> list[Record]:
    end, names, records = 0, set(), []
    size = os.fstat(file.fileno()).st_size
    for info in listed:
        shown = info.filename[:80]
        if not 0 <= info.header_offset <= size:
            # Before anything is read there, which no file may have.
            raise CheckpointError(_beyond(path, shown, "begins", info.header_offset, size))
        record = Record(info.filename, _data_offset(file, info), info.file_size)
        if record.name in names or info.header_offset < end:
            raise CheckpointError(
                f"{path}: the record {shown!r} is there twice or shares bytes with another: {_SAVE_AGAIN}"
            )
        end = record.offset + record.n_bytes
        if end > size:
            raise CheckpointError(_beyond(path, shown, "ends", end, size))
        names.add(record.name)
        records.append(record)
    return records


def _beyond(path: Path, name: str, reaches: str, byte: int, size: int) -> str:
    return (
        f"{path}: truncated or damaged: the record {name!r} {reaches} at byte {byte}, the file at {size}: copy it again"
    )


def _check_byte_order(file: BinaryIO, records: list[Record], path: Path) -> None:
    for record in records:
        if record.name.endswith("/byteorder") and record.name.count("/") == 1:
            file.seek(record.offset)
            if file.read(min(record.n_bytes, 16)) != b"little":
                raise CheckpointError(f"{path}: big-endian tensors; save it again on a little-endian machine")


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Source: the zip format, local file header: 30 bytes, then a name and an extra field of any size."""
    file.seek(info.header_offset + 26)
    sizes = file.read(4)
    name, extra = int.from_bytes(sizes[:2], "little"), int.from_bytes(sizes[2:], "little")
    return info.header_offset + _LOCAL_HEADER_BYTES + name + extra


class _BoundedReads:
    """The file as zipfile reads it, which takes the directory in one piece, however long it says it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, count: int = -1) -> bytes:
        most = _MOST_DIRECTORY_BYTES
        data = self._file.read(count if 0 <= count <= most else most + 1)
        if len(data) > most:
            raise zipfile.BadZipFile(f"its directory is longer than {size_text(most)}")
        return data
