"""Writing bundles, all or nothing, by several writers at once. Standard library only.

How a bundle is changed, in one place:

1. New files are made in a partial folder (``partial_folders``): beside a bundle that is exported, inside one that a
   target is added to. Its writer holds a lock on it for as long as it lives, so nobody takes it for a leftover.
2. An export swaps its folder with the old bundle, in one step where the system can (``swapped_folders``). A mount
   point, or the folder one works in, cannot be replaced: it is filled (``_fill``), the old files moved away, the new
   ones in, and the manifest last.
3. A change of a bundle (``changing``) holds the lock on its ``manifest.json``, reads what it says now, and replaces it
   as a whole. A target that is built again has its files under names that the old one does not use (``free_name``), so
   the old target stays whole until the manifest is replaced; then its files are removed.
4. What is moved into a bundle is written down before, in a journal in the partial folder. A writer that is killed
   leaves files that no manifest lists; the next one takes the dead one's lock, and the journal says what to remove.

So a reader sees the old or the new, and ``Bundle.unchanged`` tells it when they changed. Where a file system has no
locks, the last writer wins, and partial folders of killed ones stay. Not here: what a manifest says, and reading a
bundle (``bundle``).
"""

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Self

from mythos_edge.model.bounded_files import read_json
from mythos_edge.model.bundle import Bundle, check_files, has_manifest, read_manifest, sha256_of
from mythos_edge.model.errors import BundleError, ExportError, OSErrorAs
from mythos_edge.model.file_locks import locked
from mythos_edge.model.manifest import MANIFEST_FILE, MOST_MANIFEST_BYTES, FileRecord, Manifest, manifest_to_dict
from mythos_edge.model.partial_folders import PartialFolder, is_partial, partial_name, remove_partials
from mythos_edge.model.swapped_folders import swapped

# In a partial folder: the names that are moved into the bundle, or out of use there.
_JOURNAL = ".moves.json"
# In a partial folder: what was in a folder that is filled.
_OLD = ".old"
# In the root of every ext file system.
_NEVER_MOVED = "lost+found"
_LONGEST_NAME = 255
# A mount point that the system does not tell; a folder of a container's image.
_CANNOT_BE_REPLACED = (errno.EBUSY, errno.EXDEV)


class BundleWriter:
    """Makes a bundle in ``folder``, beside its final place; leaving the block without ``finish`` removes it all.

    ``path`` may be a link, which is followed, or a folder that cannot be replaced, which is filled. Raises ExportError
    when it exists and is not a bundle that ``force`` allows to replace.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        self._shown, self._force = path, force
        try:
            self._path = Path(os.path.realpath(path))
            if any(len(os.fsencode(name)) > _LONGEST_NAME for name in self._path.parts):
                raise OSError(errno.ENAMETOOLONG, "a name in it is too long")
            self._fills = _is_fixed(self._path)
            self._parent = self._path if self._fills else self._path.parent
            # Before it is looked at what is there: a killed writer may have left an old bundle half moved away.
            remove_partials(self._parent, self._path.name, self._recover)
            self._check_place()
        except (OSError, ValueError) as error:  # a name that is too long, or has a zero byte in it
            reason = getattr(error, "strerror", None) or error
            raise ExportError(f"{str(path)[:80]!r} cannot be written: {reason}: choose another folder") from None
        self.folder = self._parent / partial_name(self._path.name)
        self._partial: PartialFolder | None = None
        self._made_parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            self._made_parents = [parent for parent in self._path.parents if not parent.exists()]
            self._partial = PartialFolder(self._parent, self._path.name, recover=self._recover)
        except OSError as error:
            self._remove_parents()
            raise ExportError(f"{self._shown.parent}: cannot write there: {error.strerror}") from error
        self.folder = self._partial.path
        return self

    def __exit__(self, *_: object) -> None:
        assert self._partial is not None
        self._partial.remove()
        self._remove_parents()

    def finish(self, make_manifest: Callable[[dict[str, FileRecord]], Manifest], known: Mapping[str, str]) -> None:
        """Writes the manifest over all files and moves the folder into place.

        ``known`` holds the sha256 of files that need not be read again.
        """
        records = {}
        for file in sorted(self.folder.iterdir()):
            records[file.name] = record_of(file, known.get(file.name))
        _write_manifest(make_manifest(records), self.folder / MANIFEST_FILE)
        # What changes the old bundle is let finish, and what comes after finds that it is another one.
        with locked(self._path / MANIFEST_FILE) if has_manifest(self._path) else nullcontext():
            self._check_place()
            if self._fills:
                _fill(self.folder, self._path)
                return
            try:
                self._replace()
            except OSError as error:
                if error.errno not in _CANNOT_BE_REPLACED:
                    self._check_place()
                    raise
                _fill(self.folder, self._path)

    def _replace(self) -> None:
        # What is in the partial folder then is the old bundle, and goes as whatever else is left in it.
        if swapped(self.folder, self._path):
            return
        old = _old_beside(self.folder)
        try:
            if self._path.exists():
                self._path.rename(old)
            self.folder.rename(self._path)
        except BaseException:
            # Ctrl-C may fall just after a rename, so what was done is read from the disk.
            if self.folder.exists() and old.exists():
                old.rename(self._path)
            raise
        finally:
            if not self.folder.exists():
                shutil.rmtree(old, ignore_errors=True)

    def _recover(self, left: Path) -> None:
        recover(left, self._path)

    def _remove_parents(self) -> None:
        for parent in self._made_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def _check_place(self) -> None:
        path, shown = self._path, self._shown
        if not os.path.lexists(path):
            return
        if path.is_symlink():
            raise ExportError(f"{shown}: is a link that leads to itself: choose another folder")
        is_folder = path.is_dir()
        empty = is_folder and not _content(path)
        if empty and self._fills:
            return
        replaceable = empty or (is_folder and has_manifest(path))
        if not self._force:
            mend = "choose another folder" + (" or pass --force" if replaceable else "")
            raise ExportError(f"{shown} exists: {mend}")
        if not replaceable:
            raise ExportError(
                f"{shown} exists and is not a bundle, so --force does not replace it: choose another folder"
            )


def _is_fixed(path: Path) -> bool:
    """Whether a folder cannot be replaced by another: a mount point, or where this process works."""
    if not path.is_dir():
        return False
    with suppress(OSError):
        here = Path.cwd()
        if path == here or path in here.parents:
            return True
    if path.is_mount():
        return True
    # A folder that is mounted again, of the same file system: only Linux tells.
    with suppress(OSError):
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        return str(path).replace("\\", r"\134").replace(" ", r"\040").replace("\t", r"\011") in mounts
    return False


def _content(folder: Path) -> list[Path]:
    """Lists what in a folder belongs to somebody: not what a killed or another writer has there."""
    return [path for path in folder.iterdir() if not is_partial(path) and path.name != _NEVER_MOVED]


# --- moving files, and taking it back -----------------------------------------------------------------------------


def _fill(partial: Path, folder: Path) -> None:
    """Moves what is in ``partial`` into ``folder`` in place of what is there, without a manifest meanwhile."""
    new, old = sorted(partial.iterdir(), key=_is_manifest), sorted(_content(folder), key=_is_manifest)
    kept = partial / _OLD
    _write_journal(partial, [path.name for path in new])
    kept.mkdir()
    try:
        for path in reversed(old):
            path.rename(kept / path.name)
        for path in new:
            path.rename(folder / path.name)
    finally:
        _settle(partial, folder)


def recover(left: Path, folder: Path) -> None:
    """Takes back, or to its end, what a writer of ``folder`` with the partial folder ``left`` was at; often nothing.

    Raises OSError.
    """
    old = _old_beside(left)
    if old.exists() and not os.path.lexists(folder):
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    if (left / _JOURNAL).exists():
        with locked(folder / MANIFEST_FILE) if has_manifest(folder) else nullcontext():
            _settle(left, folder)


def _settle(left: Path, folder: Path) -> None:
    """Removes what the journal of ``left`` names and no manifest lists; without a manifest the old files come back."""
    try:
        listed = {*read_json(folder / MANIFEST_FILE, MOST_MANIFEST_BYTES, "a manifest")["files"], MANIFEST_FILE}
    except FileNotFoundError:
        listed = set()
    except (ValueError, LookupError, TypeError):
        return  # A manifest that nobody can read says nothing about files.
    for name in _journal(left):
        # What is still to be moved has not taken the place of anything.
        if name not in listed and not (left / name).exists():
            (folder / name).unlink(missing_ok=True)
    if not listed and (left / _OLD).is_dir():
        for path in sorted((left / _OLD).iterdir(), key=_is_manifest):
            path.rename(folder / path.name)


def _journal(partial: Path) -> list[str]:
    """The names of a journal; none where it was not written to its end, before anything was moved."""
    try:
        names = read_json(partial / _JOURNAL, MOST_MANIFEST_BYTES, "a journal")
    except (OSError, ValueError):
        return []
    # It is read from a folder that others may write to.
    return [name for name in names if isinstance(name, str) and PurePosixPath(name).name == name]


def _write_journal(partial: Path, names: Collection[str]) -> None:
    (partial / _JOURNAL).write_text(json.dumps(sorted(names)), encoding="utf-8")
    _sync(partial / _JOURNAL)


def _old_beside(partial: Path) -> Path:
    """Where the old folder is while the new one takes its place."""
    return partial.with_name(f"{partial.name}-old")


def _is_manifest(path: Path) -> bool:
    return path.name == MANIFEST_FILE


# --- changing a bundle --------------------------------------------------------------------------------------------


def update_manifest(bundle: Bundle, *, held_to: str | None = None, **changes: Any) -> Bundle:
    """The bundle with fields of its manifest changed, on disk too: the old manifest stays until the new one is whole.

    A change is the field's new value, or a function of its present one, for others may have changed it since
    ``bundle`` was opened. What was found out about the target ``held_to`` is not written of another of that name. Files
    that the changes name must be in the folder already. Raises BundleError, and then nothing has changed.
    """
    with changing(bundle) as now:
        if now.identity != bundle.manifest.identity:
            raise BundleError(f"{bundle.path}: was exported anew meanwhile: begin again")
        if held_to is not None:
            bundle.require_unchanged(held_to)
        new = {name: change(getattr(now, name)) if callable(change) else change for name, change in changes.items()}
        beside = bundle.path / partial_name(MANIFEST_FILE)
        with OSErrorAs(BundleError, f"{bundle.path}: cannot write its manifest"):
            return _replace_manifest(bundle, now, dataclasses.replace(now, **new), beside)


def install_files(bundle: Bundle, partial: Path, names: Mapping[str, str], now: Manifest, manifest: Manifest) -> Bundle:
    """The bundle with files of ``partial`` moved into it, each to its name, and ``manifest`` in place of ``now``.

    To be called within ``changing``. No name may be one that ``now`` lists for another content. Files that
    ``manifest`` lists no more are removed. Raises BundleError and OSError, and then all is as it was.
    """
    _write_journal(partial, {*names.values(), *set(now.files) - set(manifest.files)})
    try:
        for file, name in names.items():
            (partial / file).replace(bundle.path / name)
        return _replace_manifest(bundle, now, manifest, partial / f".{MANIFEST_FILE}")
    finally:
        _settle(partial, bundle.path)


def free_name(manifest: Manifest, name: str, record: FileRecord) -> str:
    """``name``, or where the bundle has another file of that name, one with the beginning of its own hash in it."""
    if manifest.files.get(name) in (None, record):
        return name
    path = PurePosixPath(name)
    return f"{path.stem}.{record.sha256[:12]}{path.suffix}"


@contextmanager
def changing(bundle: Bundle) -> Iterator[Manifest]:
    """Gives the manifest on the disk, and keeps everybody else from changing it meanwhile. Raises BundleError."""
    with ExitStack() as held:
        try:
            held.enter_context(locked(bundle.path / MANIFEST_FILE))
            # Whoever holds the lock is the only one, so what others have left is nobody's.
            for left in bundle.path.glob(f".{MANIFEST_FILE}.partial-*"):
                left.unlink(missing_ok=True)
            now = read_manifest(bundle.path)
        except FileNotFoundError as error:
            raise BundleError(f"{bundle.path}: was replaced or removed meanwhile: begin again") from error
        except OSError as error:
            raise BundleError(f"{bundle.path}: cannot be changed: {error.strerror}") from error
        yield now


def _replace_manifest(bundle: Bundle, now: Manifest, manifest: Manifest, beside: Path) -> Bundle:
    """The bundle with ``manifest`` in place of ``now``; it is written to ``beside`` first."""
    updated = dataclasses.replace(bundle, manifest=manifest)
    check_files(updated, {name for name, record in manifest.files.items() if record != now.files.get(name)})
    try:
        _write_manifest(manifest, beside)
        beside.replace(bundle.path / MANIFEST_FILE)
    finally:
        with suppress(OSError):
            beside.unlink()
    return updated


def record_of(file: Path, sha256: str | None = None) -> FileRecord:
    """Size and hash of a file, which is on the disk after this; ``sha256`` if it is known already."""
    _sync(file)
    return FileRecord(file.stat().st_size, sha256 or sha256_of(file))


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Raises ExportError when the disk that will hold ``folder`` (or its nearest parent) has less than needed."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ExportError(
            f"{folder}: the bundle needs {needed_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free: "
            "make room or choose another disk"
        )


def _write_manifest(manifest: Manifest, path: Path) -> None:
    path.write_text(json.dumps(manifest_to_dict(manifest), indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
