"""Writing bundles, all or nothing: files are made in a folder beside and moved into place at the end.

Standard library only. Not here: what a manifest says, and reading a bundle (``bundle``).
"""

import dataclasses
import glob
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from mythos_edge.model.bundle import (
    MANIFEST_FILE,
    Bundle,
    FileRecord,
    Manifest,
    check_files,
    has_manifest,
    manifest_to_dict,
    sha256_of,
)
from mythos_edge.model.errors import BundleError, ExportError


class BundleWriter:
    """Makes a bundle in ``folder``, beside its final place; leaving the block without ``finish`` removes it all.

    Raises ExportError when ``path`` exists and is not a bundle that ``force`` allows to replace.
    """

    def __init__(self, path: Path, force: bool = False) -> None:
        self._path, self._force = path, force
        self._check_place()
        self.folder = path.parent / f".{path.name}.partial-{os.getpid()}"
        self._made_parents: list[Path] = []

    def __enter__(self) -> Self:
        try:
            remove_partials(self._path.parent, self._path.name)
            self._made_parents = [parent for parent in self._path.parents if not parent.exists()]
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise ExportError(f"{self._path.parent}: can not write there: {error.strerror}") from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()

    def finish(self, make_manifest: Callable[[dict[str, FileRecord]], Manifest], known: Mapping[str, str]) -> None:
        """Writes the manifest over all files and moves the folder into place.

        ``known`` holds the sha256 of files that need not be read again.
        """
        records = {}
        for file in sorted(self.folder.iterdir()):
            records[file.name] = record_of(file, known.get(file.name))
        _write_manifest(make_manifest(records), self.folder / MANIFEST_FILE)
        self._check_place()
        old = self._path.with_name(f"{self.folder.name}-old")
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
                _remove(old)

    def _check_place(self) -> None:
        path = self._path
        if not path.exists() and not path.is_symlink():
            return
        replaceable = path.is_dir() and (has_manifest(path) or not any(path.iterdir()))
        if not self._force:
            mend = "choose another folder" + (" or pass --force" if replaceable else "")
            raise ExportError(f"{path} exists: {mend}")
        if not replaceable:
            raise ExportError(
                f"{path} exists and is not a bundle, so --force does not replace it: choose another folder"
            )


def remove_partials(folder: Path, name: str | None = None) -> None:
    """Removes ``.<name>.partial-<pid>`` folders, of any name without one, whose writers were killed meanwhile."""
    for partial in folder.glob(f".{'*' if name is None else glob.escape(name)}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(partial, ignore_errors=True)


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


def update_manifest(bundle: Bundle, **changes: Any) -> Bundle:
    """The bundle with fields of its manifest changed, on disk too: the old manifest stays until the new one is whole.

    Files that the changes name must be in the folder already. Raises BundleError, and then nothing has changed.
    """
    updated = dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, **changes))
    files, known = updated.manifest.files, bundle.manifest.files
    check_files(updated, {name for name, record in files.items() if record != known.get(name)})
    partial = bundle.path / f".{MANIFEST_FILE}.partial-{os.getpid()}"
    try:
        _write_manifest(updated.manifest, partial)
        partial.replace(bundle.path / MANIFEST_FILE)
    except OSError as error:
        raise BundleError(f"{bundle.path}: can not write its manifest: {error.strerror}") from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return updated


def _write_manifest(manifest: Manifest, path: Path) -> None:
    path.write_text(json.dumps(manifest_to_dict(manifest), indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _remove(path: Path) -> None:
    """A folder with all there is in it, or a link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
