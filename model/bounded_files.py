"""Files that others made, read within bounds: regular files only, and no more bytes than their kind can have.

Standard library only. Whatever is refused here is an OSError whose ``strerror`` says why, or a ValueError for text that
is no JSON, so a reader needs no other handling than for a missing file. Not here: what a file means.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

# Absent where files never block, as on Windows.
_WITHOUT_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_OTHER_KINDS = {
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}


def open_regular(path: Path | str) -> BinaryIO:
    """The regular file at ``path``, open for reading. Never waits, as for the writer of a pipe.

    Raises OSError for a folder, pipe, socket or device too.
    """
    # Opening a device can do something, so it is looked at before; what counts is what was opened.
    _check_regular(os.stat(path), path)
    descriptor = os.open(path, os.O_RDONLY | _WITHOUT_WAITING)
    try:
        _check_regular(os.fstat(descriptor), path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path | str, most: int, what: str) -> bytes:
    """All bytes of a regular file that is ``what`` (as in "a config"). Raises OSError for more than ``most``."""
    with open_regular(path) as file:
        check_size(file, most, what)
        # Some files of /proc have no size, and a file may grow.
        data = file.read(most + 1)
    if len(data) > most:
        raise _too_large(f"more than {size_text(most)}", most, what)
    return data


def check_size(file: BinaryIO, most: int, what: str) -> None:
    """Raises OSError for an open file of more than ``most`` bytes, which is more than ``what`` can have."""
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise _too_large(size_text(size), most, what)


def require_file(path: Path | str, most: int, what: str) -> None:
    """Raises OSError unless ``path`` is a regular file of at most ``most`` bytes: before a library reads it itself."""
    with open_regular(path) as file:
        check_size(file, most, what)


def read_json(path: Path | str, most: int, what: str) -> Any:
    """The JSON value in a regular file of at most ``most`` bytes. Raises OSError and ValueError."""
    return parse_json(read_bounded(path, most, what))


def parse_json(data: bytes) -> Any:
    """The JSON value in ``data``, with or without a byte order mark.

    Raises ValueError for what is no JSON, is nested too deeply, or has a key twice, of which one would be lost.
    """
    try:
        return json.loads(data, object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def size_text(n_bytes: int) -> str:
    """Bytes in the largest unit that keeps the number at 1 or more, as in ``23.4 GB``."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes} bytes"


def _check_regular(found: os.stat_result, path: Path | str) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind == stat.S_IFDIR:
        raise IsADirectoryError(errno.EISDIR, f"{os.strerror(errno.EISDIR)}, expected a file", str(path))
    if kind != stat.S_IFREG:
        what = _OTHER_KINDS.get(kind, "is no regular file")
        raise OSError(errno.EINVAL, f"{what}, expected a file: write its content to a file first", str(path))


def _too_large(size: str, most: int, what: str) -> OSError:
    return OSError(errno.EFBIG, f"has {size}, {what} has at most {size_text(most)}")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name[:80]!r} stands there twice")
        values[name] = value
    return values
