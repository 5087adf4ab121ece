"""An opened bundle: one folder with a manifest, where exporter and runtime meet. Standard library only.

A file may be a link out of the folder, as in a cache of downloads, if what it leads to has the sha256 that is listed.

A bundle may be replaced, and a target built again, while others read it (``bundle_writer`` says how). So what is opened
after the manifest was read is opened within ``Bundle.unchanged``, which compares the manifest again, afterwards: what
was opened is what this manifest lists, or a BundleError, after which ``made_of_bundle`` begins again. Non-goals: what a
manifest says (``manifest``), and writing a bundle (``bundle_writer``).
"""

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mythos_edge.model.bounded_files import open_regular, read_json
from mythos_edge.model.errors import BundleError, MythosEdgeError, OSErrorAs
from mythos_edge.model.foreign_files import foreign_kind
from mythos_edge.model.manifest import (
    MANIFEST_FILE,
    MOST_MANIFEST_BYTES,
    STANDARD_OPS,
    FileRecord,
    Manifest,
    TargetRecord,
    manifest_from_dict,
)

_HASH_CHUNK_BYTES = 4 << 20
# Of a bundle that is replaced again and again; each replacement takes longer than an opening.
_OPENINGS = 5
Made = TypeVar("Made")
# What makes files of the links that a cache of downloads is made of.
COPY_LINKS = "download it with `hf download REPOSITORY --local-dir FOLDER`, or copy it with `cp -rL`"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: where it is and what it says.

    With ``trust_engines`` TensorRT engines may be other files than those listed.
    """

    path: Path
    manifest: Manifest
    trust_engines: bool = False
    # By name of a link out of the folder: the file that was found to be the one listed, for copies of this, too.
    _followed: dict[str, tuple[object, ...]] = field(default_factory=dict, compare=False, repr=False)

    def target(self, name: str) -> TargetRecord:
        """The target of that name, with the presence and size of its own files checked.

        Raises BundleError when there is none, it was built from another bundle or a file of it is damaged.
        """
        targets, identity = self.manifest.targets, self.manifest.identity
        if name not in targets:
            known = ", ".join(targets) or "none"
            mend = "pack it from the full bundle" if self.manifest.is_packed else "mythos-edge build makes one"
            raise BundleError(f"{self.path}: has no target {name!r}, only {known}: {mend}")
        if targets[self.manifest.default_target].bundle != identity:
            raise BundleError(
                f"{self.path / MANIFEST_FILE}: config, dtype, max_context or source are not those of the export: "
                "export the bundle again"
            )
        if targets[name].bundle != identity:
            raise BundleError(
                f"{self.path}: target {name!r} was built from another version of this bundle: build it again"
            )
        self._check_files(name)
        return targets[name]

    def require_whole(self, purpose: str) -> None:
        """Raises BundleError for a bundle that was packed, from which nothing else can be made or told."""
        if self.manifest.is_packed:
            targets = ", ".join(self.manifest.targets)
            raise BundleError(f"{self.path}: was packed for {targets}: {purpose} with the bundle it was packed from")

    def at_absolute_path(self) -> "Bundle":
        """The same bundle, for work to come: another working folder does not move it."""
        return dataclasses.replace(self, path=self.path.absolute())

    def _check_files(self, target: str | None) -> None:
        """Raises BundleError as ``check_files`` does, or because the files are of another bundle by now."""
        try:
            check_files(self, self.manifest.shared_files if target is None else self.manifest.files_of(target))
        except BundleError:
            self.require_unchanged(target)
            raise

    def weights_identity(self, target: str) -> str:
        """Equal for targets whose caches mean the same: the same weights, rounded alike."""
        spec = self.manifest.targets[target]
        # By content: the names of files are others where a target was built again.
        own = sorted(record.sha256 for record in self.own_weights(target).values())
        parts: list[object] = [self.manifest.identity, own]
        if spec.is_native:
            # Its weights are inside of it.
            parts += [spec.compute_dtype, sorted(spec.weights.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def own_weights(self, target: str) -> dict[str, FileRecord]:
        """The files of weights that only the target has: rounded or narrowed ones."""
        return {name: record for name, record in self.manifest.files.items() if name.startswith(f"weights.{target}.")}

    def file(self, name: str) -> Path:
        """The path of a listed file.

        Raises BundleError when it is not listed, or is a link out of the folder to another file than the one listed.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}")
        if self.leads_out(name) and name not in _trusted(self):
            self._follow(name, self.path / name)
        return self.path / name

    def require_own_files(self) -> None:
        """Raises BundleError for a bundle of links out of its folder, which may be a cache that others share."""
        if any(self.leads_out(name) for name in self.manifest.shared_files):
            raise BundleError(
                f"{self.path}: is a bundle of links out of its folder, in which nothing is changed: {COPY_LINKS}"
            )

    def leads_out(self, name: str) -> bool:
        """Whether a listed file is a link out of the folder. Raises BundleError where that cannot be told."""
        try:
            return not (self.path / name).resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a link to itself is a RuntimeError before Python 3.13
            raise BundleError(f"{self.path}: file name {name[:80]!r} cannot be used: {error}") from None

    def _follow(self, name: str, link: Path) -> None:
        """Raises BundleError unless a link out of the folder leads to the file that is listed.

        Its size tells most others at once; the right one is read, once for each opened bundle.
        """
        listed = self.manifest.files[name]
        try:
            found = link.stat()
            file = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            marks = (*file, listed.sha256)
            if self._followed.get(name) == marks:
                return
            same = stat.S_ISREG(found.st_mode) and found.st_size == listed.bytes and sha256_of(link) == listed.sha256
        except FileNotFoundError:
            raise BundleError(f"{link}: is a link to a file that is missing: {COPY_LINKS}") from None
        except OSError as error:
            raise BundleError(f"{link}: cannot be read: {error.strerror}") from error
        if not same:
            raise BundleError(
                f"{link}: is a link out of the bundle's folder, to another file than the manifest lists: do not trust "
                f"this bundle, or {COPY_LINKS}"
            )
        self._followed[name] = marks

    @contextmanager
    def unchanged(self, target: str | None = None) -> Iterator[None]:
        """Holds what the block opens to this manifest: the shared files, and those of ``target``.

        Raises BundleError where the bundle on the disk is another one now, or the target was built again.
        """
        try:
            yield
        except (MythosEdgeError, OSError):
            # Where files were replaced, that is the reason, and not what came of it.
            self.require_unchanged(target)
            raise
        self.require_unchanged(target)

    def require_unchanged(self, target: str | None) -> None:
        """Raises BundleError where the bundle on the disk is another one now, or the target was built again."""
        mend = "while it was open: open it again"
        try:
            now = read_manifest(self.path)
        except BundleError as error:
            raise BundleError(f"{self.path}: the bundle was replaced or removed {mend}") from error
        if now.identity != self.manifest.identity or self.differs_from(now, None):
            raise BundleError(f"{self.path}: the bundle was replaced {mend}")
        if target is not None and self.differs_from(now, target):
            raise BundleError(f"{self.path}: target {target!r} was built again {mend}")

    def differs_from(self, now: Manifest, target: str | None) -> bool:
        """Whether the manifest ``now`` says otherwise of a target and its files, or of the shared files."""
        own = self.manifest
        if target is not None:
            names = own.files_of(target)
            return own.targets.get(target) != now.targets.get(target) or _differ(own, now, names)
        # Made again from the others at any time, which concerns nobody who has the bundle open.
        remade = {graph.file for name, graph in own.graphs.items() if name.endswith(STANDARD_OPS)}
        return _differ(own, now, own.shared_files - remade)


def _differ(own: Manifest, now: Manifest, names: Collection[str]) -> bool:
    return any(now.files.get(name) != own.files[name] for name in names)


def open_bundle(path: Path | str, hashes: bool = False, trust_engines: bool = False) -> Bundle:
    """The bundle at ``path``, with the presence and size of the shared files checked, and on request every sha256.

    A target's own files are checked by ``Bundle.target``: a damaged one keeps no other from running, and can be
    built again. With ``trust_engines`` TensorRT engines may be other files than those listed. Raises BundleError.
    """
    return made_of_bundle(path, lambda bundle: bundle, hashes, trust_engines)


def made_of_bundle(
    path: Path | str, make: Callable[[Bundle], Made], hashes: bool = False, trust_engines: bool = False
) -> Made:
    """The result of ``make`` of the bundle that ``open_bundle`` opens; again where that was replaced meanwhile."""
    for left in reversed(range(_OPENINGS)):
        marks = _marks(Path(path))
        bundle = Bundle(Path(path), read_manifest(Path(path)), trust_engines)
        try:
            bundle._check_files(None)
            if hashes:
                verify_hashes(bundle)
            return make(bundle)
        except BundleError:
            if not left or _marks(bundle.path) in (marks, None):
                raise
    raise AssertionError("the last opening returns or raises")


def _marks(path: Path) -> tuple[int, ...] | None:
    """Others for each manifest that is ever written to ``path``, whatever it says; None where there is none."""
    try:
        found = (path / MANIFEST_FILE).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of the bundle at ``path`` and looks at no other file. Raises BundleError."""
    manifest_path = path / MANIFEST_FILE
    if not has_manifest(path):
        what = "has no manifest.json" if path.is_dir() else "is no bundle folder" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}: make a bundle with mythos-edge export")
    try:
        values = read_json(manifest_path, MOST_MANIFEST_BYTES, "a manifest")
    except OSError as error:
        raise BundleError(f"{manifest_path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        known = _foreign(manifest_path)
        raise BundleError(f"{manifest_path}: {f'is {known}' if known else f'cannot be read: {error}'}") from error
    if not isinstance(values, dict):
        raise BundleError(f"{manifest_path}: expected a JSON object, got {type(values).__name__}")
    return manifest_from_dict(values, origin=str(manifest_path))


def has_manifest(path: Path) -> bool:
    """Whether ``path`` is a folder with a manifest. Raises BundleError when it does not let itself be looked into."""
    try:
        return stat.S_ISREG((path / MANIFEST_FILE).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise BundleError(f"{path}: cannot be read: {error.strerror}") from error


def _trusted(bundle: Bundle) -> set[str]:
    """The files that may differ from those listed."""
    engines = [spec for spec in bundle.manifest.targets.values() if bundle.trust_engines and spec.is_native]
    return {name for spec in engines for name in spec.graphs.values()}


def check_files(bundle: Bundle, names: Collection[str]) -> None:
    """Raises BundleError unless the files are there, can be read and have the sizes that are listed."""
    trusted = _trusted(bundle)
    for name in sorted(names):
        file, listed = bundle.file(name), bundle.manifest.files[name].bytes
        with OSErrorAs(BundleError, f"{file}: cannot be read"):
            size = _size(file)
        if size is None:
            raise BundleError(f"{file}: is missing: {_mend(bundle, name)}")
        if size != listed and name not in trusted and (known := _foreign(file)):
            raise BundleError(f"{file}: is {known}")
        if size != listed and name not in trusted:
            raise BundleError(f"{file}: has {size} bytes, the manifest says {listed}: {_mend(bundle, name)}")


def _foreign(file: Path) -> str | None:
    """The kind of a file that stands in place of another, such as a pointer to it, and what to do about it."""
    with open_regular(file) as opened:
        return foreign_kind(opened.read(512))


def _size(file: Path) -> int | None:
    """Bytes of a file that can be opened; None where there is none. Raises OSError."""
    if not file.is_file():
        return None
    # Native code that maps it would say less clearly that it may not.
    with file.open("rb") as opened:
        return os.fstat(opened.fileno()).st_size


def _mend(bundle: Bundle, name: str) -> str:
    """How a file is brought back, in words."""
    manifest = bundle.manifest
    if manifest.is_packed:
        return "pack the bundle again"
    exported = name in manifest.shared_files | manifest.files_of(manifest.default_target)
    return "export the bundle again" if exported else "build the target again"


def verify_hashes(
    bundle: Bundle, progress: Callable[[float], None] = lambda share: None, names: Collection[str] | None = None
) -> None:
    """Reads the files, all unless named, and compares each sha256; ``progress`` is told the share that is read.

    Raises BundleError.
    """
    names = set(bundle.manifest.files if names is None else names)
    check_files(bundle, names)
    records = {name: bundle.manifest.files[name] for name in sorted(names - _trusted(bundle))}
    total, before = max(1, sum(record.bytes for record in records.values())), 0
    progress(0.0)
    for name, record in records.items():

        def tell(read: int, before: int = before) -> None:
            progress((before + read) / total)

        with OSErrorAs(BundleError, f"{bundle.path / name}: cannot be read"):
            found = sha256_of(bundle.file(name), tell)
        before += record.bytes
        listed = record.sha256
        if found != listed:
            raise BundleError(
                f"{bundle.path / name}: has changed: sha256 {found[:12]}..., the manifest says {listed[:12]}...: "
                f"{_mend(bundle, name)}"
            )


def sha256_of(path: Path, progress: Callable[[int], None] = lambda read: None) -> str:
    """Hexadecimal sha256 of a file; ``progress`` is told the bytes that are read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_CHUNK_BYTES):
            digest.update(block)
            progress(file.tell())
    return digest.hexdigest()
