"""Folders of files that are not whole yet: made beside where they belong, and removed once their writer is gone.

A folder ``.<name>.partial-<pid>`` is its writer's as long as the writer holds the lock on the file ``.lock`` beside it:
a pid means nothing to another host or container on the same volume. Who can take that lock removes what is left over.
A folder without one is an older mythos-edge's, and is judged by its pid, as that did. Standard library only.
"""

import glob
import os
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mythos_edge.model.file_locks import NO_LOCKS, try_lock, unlock

_MARK = ".partial-"
_LOCK = ".lock"
# A name has 255 bytes at most, and what is added to it has some.
_LONGEST_NAME = 180
# That are tried beside the one of the pid alone.
_NAMES = 20


class PartialFolder:
    """A new folder for what belongs to ``name`` in ``parent``, which nobody else removes before ``remove``.

    Folders of ``name`` that are left over are removed first, with ``of_any`` those of every name; ``recover`` is told
    each of them before. Raises OSError.
    """

    def __init__(
        self,
        parent: Path,
        name: str,
        *,
        of_any: bool = False,
        recover: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self._recover = recover
        remove_partials(parent, None if of_any else name, recover)
        parent.mkdir(parents=True, exist_ok=True)
        # Another container may have the same pid, and a folder of it that is in use. And who removes leftovers just
        # now may hold the lock that was made here: often, where several do.
        for tag in ("", *(f"-{secrets.token_hex(4)}" for _ in range(_NAMES))):
            self.path = parent / f"{partial_name(name)}{tag}"
            self._lock = try_lock(_lock_of(self.path), create=True)
            if self._lock is not None:
                try:
                    self.path.mkdir()
                    return
                except FileExistsError:
                    self._let_go()
                except BaseException:
                    self._let_go()
                    raise
        raise FileExistsError(17, "exists already", str(self.path))

    def remove(self) -> None:
        """Recovers and removes what is left of it, which is nothing where it was renamed; again is nothing, too."""
        if self._lock is None:
            return
        with suppress(OSError):
            self._recover(self.path)
        shutil.rmtree(self.path, ignore_errors=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            with suppress(OSError):
                _lock_of(self.path).unlink(missing_ok=True)
            unlock(self._lock)
            self._lock = None


def partial_name(name: str) -> str:
    """The name of this process's partial folder of ``name``, where that is free."""
    return f".{_short(name)}{_MARK}{os.getpid()}"


def is_partial(path: Path) -> bool:
    """Whether a path is named as a partial folder, or its lock."""
    return path.name.startswith(".") and _MARK in path.name


def remove_partials(
    parent: Path, name: str | None = None, recover: Callable[[Path], None] = lambda folder: None
) -> None:
    """Removes the partial folders of ``name`` in ``parent``, or all, whose writers are gone; see ``PartialFolder``."""
    found = parent.glob(f".{'*' if name is None else glob.escape(_short(name))}{_MARK}*")
    for folder in sorted({path.with_name(path.name.removesuffix(_LOCK)) for path in found}):
        has_lock = _lock_of(folder).exists()
        if not has_lock and not (folder.is_dir() and not folder.is_symlink() and _pid_is_free(folder)):
            continue
        # It may have gone meanwhile, or not be ours to write to.
        with suppress(OSError):
            _remove_left(folder, has_lock, recover)


def _remove_left(folder: Path, has_lock: bool, recover: Callable[[Path], None]) -> None:
    """Removes a folder if nobody holds its lock; one without a lock is locked against others who find it."""
    lock = try_lock(_lock_of(folder), create=not has_lock)
    if lock is None or (lock == NO_LOCKS and has_lock):
        return
    try:
        recover(folder)
        shutil.rmtree(folder, ignore_errors=True)
        _lock_of(folder).unlink(missing_ok=True)
    finally:
        unlock(lock)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _pid_is_free(folder: Path) -> bool:
    """Whether the pid in the name is of no process of this machine, or of this one."""
    pid = folder.name.rpartition(_MARK)[2]
    return pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid)))


def _short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:_LONGEST_NAME])


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
