"""Builds a target into a bundle: opened once, verified, written beside, moved in together, listed last.

``bundle_writer`` says how several builders of one bundle work at once. Non-goals: what the files of a target are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_edge.exporter.targets.spec import Progress, Target, Work, record_of
from mythos_edge.model import bundle_writer
from mythos_edge.model.bundle import Bundle, open_bundle, read_manifest, verify_hashes
from mythos_edge.model.bundle_writer import changing, free_name, install_files, recover
from mythos_edge.model.errors import BuildError, OSErrorAs
from mythos_edge.model.manifest import FileRecord, Manifest, TargetRecord
from mythos_edge.model.partial_folders import PartialFolder


@dataclass(frozen=True)
class Built:
    """The bundle with a target added, the target's name, and the reports of its build."""

    bundle: Bundle
    name: str
    reports: Mapping[str, Any]


def build(bundle: Path | Bundle, target: Target, progress: Progress = lambda phase, fraction: None) -> Built:
    """The bundle at a path, or one that is open, with ``target`` added, or made again.

    Nothing of the bundle changes before the target is whole. Raises BuildError, BundleError, BackendUnavailable without
    a builder that the target needs, and ExportError without room on the disk.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    target.check(opened)
    with files_beside(opened, target.name, progress) as folder:
        work = Work(opened, folder, target.name, progress, lambda file: _settled(opened, folder, file))
        written = target.write(work)
        record = record_of(target.kind, written, opened.manifest.identity)
        return Built(_install(opened, folder, target.name, record), target.name, written.reports)


@contextmanager
def files_beside(bundle: Bundle, name: str, progress: Progress) -> Iterator[Path]:
    """A folder inside the bundle for files that are not whole yet, removed at the end with what is left in it.

    Raises BundleError when the export is not what it was: nothing sound can be built from it; and for a bundle of
    links.
    """
    bundle.require_whole("build")
    bundle.target(bundle.manifest.default_target)
    bundle.require_own_files()
    verify_hashes(bundle, lambda share: progress("hashing the export", share), bundle.manifest.shared_files)
    with OSErrorAs(BuildError, f"{bundle.path}: cannot be written"):
        partial = PartialFolder(bundle.path, name, of_any=True, recover=lambda left: recover(left, bundle.path))
        try:
            yield partial.path
        finally:
            partial.remove()


def _settled(bundle: Bundle, folder: Path, file: str) -> str:
    """The name that a file of weights in ``folder`` will have in the bundle, which graphs may name from now on.

    It is renamed where the bundle has another file of that name: the target is built again.
    """
    now = read_manifest(bundle.path)
    if file not in now.files:
        return file
    name = free_name(now, file, bundle_writer.record_of(folder / file))
    (folder / file).rename(folder / name)
    return name


def _install(bundle: Bundle, folder: Path, name: str, target: TargetRecord) -> Bundle:
    """The bundle with all files of ``folder`` moved into it and ``target`` recorded in place of one of that name.

    One that is there stays whole, with its presets, until the new one is. Raises BuildError when the bundle was
    exported anew meanwhile, or the same target built.
    """

    def with_target(now: Manifest, names: Mapping[str, str], records: Mapping[str, FileRecord]) -> Manifest:
        # Graphs hold the names of weights.
        if any(names[file] != file for file in records if file.startswith("weights.")):
            raise BuildError(f"{bundle.path}: {name} was built by another process meanwhile: use it, or build again")
        replaced = now.files_of(name) if name in now.targets else set()
        graphs = {stage: names[file] for stage, file in target.graphs.items()}
        return dataclasses.replace(
            now,
            targets={**now.targets, name: dataclasses.replace(target, graphs=graphs)},
            files={file: record for file, record in now.files.items() if file not in replaced}
            | {names[file]: record for file, record in records.items()},
            # They were measured with the weights that go.
            presets={preset: found for preset, found in now.presets.items() if not (replaced and found.target == name)},
        )

    return install_into(bundle, folder, with_target)


def install_into(
    bundle: Bundle,
    folder: Path,
    change: Callable[[Manifest, Mapping[str, str], Mapping[str, FileRecord]], Manifest],
) -> Bundle:
    """The bundle with all files of ``folder`` moved into it, and the manifest that ``change`` makes of the present one.

    ``change`` also gets the name that each file will have and the record of each. Raises BuildError when the bundle
    was exported anew meanwhile.
    """
    records = {file.name: bundle_writer.record_of(file) for file in sorted(folder.iterdir())}
    with changing(bundle) as now:
        if now.identity != bundle.manifest.identity or bundle.differs_from(now, None):
            raise BuildError(f"{bundle.path}: was exported anew during the build: build again")
        names = {file: free_name(now, file, record) for file, record in records.items()}
        return install_files(bundle, folder, names, now, change(now, names, records))
