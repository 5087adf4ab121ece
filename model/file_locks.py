"""Locks between processes, of containers and hosts that share a volume too; a lock ends with the process that holds it.

``flock`` on a file that is open for writing, which NFS can do as well (not on a folder). What holds a lock is the open
file, which no program that is started inherits, so the children of a killed writer hold nothing.

Where there are no locks (a file system without them, a system that is not POSIX) ``try_lock`` says NO_LOCKS, and what
asked for the lock does what is safe without: nobody's leftovers are removed, and a manifest is changed unlocked.
Standard library only.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

# In place of an open file's number.
NO_LOCKS = -1
# Any other error is one of the file, and raised.
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EINTR)
_UNKNOWN = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF)
# Longer than any change of a manifest takes, which is what is waited for.
_PATIENCE_S = 60.0
_PAUSE_S = 0.02


def try_lock(path: Path, create: bool = False) -> int | None:
    """The number of an open file that holds the lock on ``path``, to be given back with ``unlock``.

    None where another holds it, or the file is not the one at ``path`` any more; NO_LOCKS where there are none.
    ``create`` makes an empty file where there is none. Raises OSError.
    """
    if fcntl is None:
        return NO_LOCKS
    flags = os.O_CREAT if create else 0
    try:
        opened = os.open(path, os.O_RDWR | flags, 0o644)
    except OSError as error:
        # It may be replaced in a folder that can be written to, for which its own mode does not count.
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM) or create:
            raise
        opened = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(path, opened):
            return opened
    except OSError as error:
        if error.errno in _UNKNOWN:
            os.close(opened)
            return NO_LOCKS
        if error.errno not in _TAKEN:
            os.close(opened)
            raise
    except BaseException:
        os.close(opened)
        raise
    os.close(opened)
    return None


def unlock(held: int) -> None:
    """Gives a lock back."""
    if held != NO_LOCKS:
        with suppress(OSError):
            os.close(held)


@contextmanager
def locked(
    path: Path, *, create: bool = False, patience_s: float | None = None, waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Holds the lock on a file, also where others keep replacing it by a rename; ``create`` makes an absent one.

    ``waiting`` is called once where another process holds it. Raises TimeoutError where one holds it for
    ``patience_s`` (by default longer than any change of a manifest takes), and OSError.
    """
    patience_s, told = _PATIENCE_S if patience_s is None else patience_s, False
    until = time.monotonic() + patience_s
    while (held := try_lock(path, create)) is None:
        if not told:
            waiting()
            told = True
        if time.monotonic() > until:
            raise TimeoutError(errno.ETIMEDOUT, f"another process has held its lock for {patience_s:.0f} s")
        time.sleep(_PAUSE_S)
    try:
        yield
    finally:
        unlock(held)


def _is_at(path: Path, opened: int) -> bool:
    """Whether a path still leads to the file that was opened there: it may have been replaced, or removed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(opened))
    except FileNotFoundError:
        return False
