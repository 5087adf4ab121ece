"""Writing one output file: a regular file appears whole or not at all, and whatever else stands there is written to.

A link is followed. A device, a FIFO, ``/dev/stdout`` and other open descriptors are written through, never replaced.
A partial file is its writer's as long as that holds the lock on it; what a killed one left, the next writer of the same
file removes. Standard library only. Not here: bundles (``bundle_writer``), which are folders.
"""

import errno
import glob
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mythos_edge.model.errors import UsageError
from mythos_edge.model.file_locks import NO_LOCKS, try_lock, unlock

_DESCRIPTOR = re.compile(r"/(?:dev|proc/(?:self|thread-self|\d+))/fd/(\d+)")
_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_MOST_LINKS = 40
# Of the name of a file in its partial one, which must not become too long.
_NAME_CHARACTERS = 32
_TAG = re.compile(r"[0-9a-f]{8}")
# That are tried: who removes leftovers just now may hold the lock of a new partial file.
_NAMES = 20


@contextmanager
def writing(path: Path, what: str) -> Iterator[IO[bytes]]:
    """An open binary file whose content is at ``path`` when the block ends; ``what`` names it in errors.

    After an exception in the block there is what was there before, except where something is written through.
    Raises UsageError where it cannot be written.
    """
    place = _place_of(path, what)
    try:
        with place.beside() if place.is_replaced else place.through() as file:
            yield file
    except OSError as error:
        raise _refusal(path, what, error) from error


def remove_partials(path: Path) -> None:
    """Removes what killed writers of ``path`` have left beside it, and nothing of one that is at work."""
    for left in path.parent.glob(f"{glob.escape(_partial_name(path))}*"):
        with suppress(OSError):
            if not _TAG.fullmatch(left.name.removeprefix(_partial_name(path))) or not stat.S_ISREG(
                left.lstat().st_mode
            ):
                continue
            if (held := try_lock(left)) in (None, NO_LOCKS):
                continue
            try:
                left.unlink()
            finally:
                unlock(held)


def check_output(path: Path, what: str) -> None:
    """Raises UsageError where ``writing`` would: tried out, as that is better known before the work."""
    place = _place_of(path, what)
    try:
        place.try_out()
    except OSError as error:
        raise _refusal(path, what, error) from error


def check_output_folder(folder: Path, what: str) -> None:
    """Raises UsageError where no file can be written into ``folder``, nor the folder be made if it is missing."""
    try:
        parent = folder
        while not os.path.lexists(parent):
            parent = parent.parent
        _beside(parent / "x").try_out()
        if parent != folder:
            # Whether such names may be: the parents that are missing are made and removed again.
            made = [one for one in (folder, *folder.parents) if not one.exists()]
            try:
                folder.mkdir(parents=True)
            finally:
                for one in made:
                    with suppress(OSError):
                        one.rmdir()
    except (OSError, ValueError) as error:
        raise _refusal(folder, what, error) from error


def is_standard_output(path: Path) -> bool:
    """Whether what is written to ``path`` goes where this process prints, a terminal or device aside."""
    with suppress(OSError, ValueError):
        there, printed = os.stat(path), os.fstat(1)
        return os.path.samestat(there, printed) and not stat.S_ISCHR(there.st_mode)
    return False


@dataclass(frozen=True)
class _Place:
    """Where an output goes: through ``descriptor`` or what stands at ``path``, or beside it, to be renamed."""

    path: Path
    is_replaced: bool = False
    descriptor: int | None = None

    @contextmanager
    def through(self) -> Iterator[IO[bytes]]:
        if self.descriptor is not None:
            # Shares its position with whoever else writes there.
            opened = os.dup(self.descriptor)
        else:
            opened = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        with io.BufferedWriter(_Through(opened)) as file:
            yield file

    @contextmanager
    def beside(self) -> Iterator[IO[bytes]]:
        with self._partial_file() as (partial, file):
            with file:
                yield file
                self._keep_owner(file.fileno())
            partial.replace(self.path)

    def try_out(self) -> None:
        """Writes a byte to a partial file, which is removed again; OSError where it cannot be."""
        if self.descriptor is not None:
            os.write(self.descriptor, b"")
        if self.is_replaced:
            with self._partial_file() as (_, file), file:
                file.write(b"\0")

    @contextmanager
    def _partial_file(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """A new file beside the place, which nobody else removes; at the end it is gone, unless it was renamed."""
        remove_partials(self.path)
        partial, held = self.path, None
        try:
            for _ in range(_NAMES):
                partial = self.path.with_name(f"{_partial_name(self.path)}{secrets.token_hex(4)}")
                file = partial.open("xb")
                held = try_lock(partial)
                if held is not None:
                    break
                file.close()
            else:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(partial))
            yield partial, file
        finally:
            if partial != self.path:
                with suppress(OSError):
                    partial.unlink()
            if held is not None:
                unlock(held)

    def _keep_owner(self, descriptor: int) -> None:
        """Mode and owner of a file that is replaced stay."""
        with suppress(OSError):
            old = os.stat(self.path)
            os.chmod(descriptor, stat.S_IMODE(old.st_mode))
            os.chown(descriptor, old.st_uid, old.st_gid)


class _Through(io.RawIOBase):
    """A descriptor that can only be written to, one after the other: nobody must seek in what is written through."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def _place_of(path: Path, what: str) -> _Place:
    """The place of an output as ``path`` is now. Raises UsageError where nothing can be written."""
    try:
        descriptor = _descriptor_of(path)
        if descriptor is not None:
            return _Place(path, descriptor=descriptor)
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except FileNotFoundError:
        return _beside(path)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise _refusal(path, what, error) from error
    return _beside(path) if stat.S_ISREG(mode) else _Place(path)


def _beside(path: Path) -> _Place:
    return _Place(Path(os.path.realpath(path)), is_replaced=True)


def _partial_name(target: Path) -> str:
    return f".{target.name[:_NAME_CHARACTERS]}.partial-"


def _descriptor_of(path: Path) -> int | None:
    """The number of the open descriptor that ``path`` names, itself or through links."""
    current = os.path.abspath(path)
    for _ in range(_MOST_LINKS):
        found = _DESCRIPTOR.fullmatch(current)
        if found is not None or current in _STANDARD:
            return _STANDARD[current] if found is None else int(found[1])
        if not os.path.islink(current):
            return None
        current = os.path.normpath(os.path.join(os.path.dirname(current), os.readlink(current)))
    return None


def _refusal(path: Path, what: str, error: OSError | ValueError) -> UsageError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return UsageError(f"{path}: cannot write {what}: {reason}")
