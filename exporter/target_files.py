"""How the files of a built target come into a bundle: made beside, moved together, listed last.

Shared by every target builder; ``bundle_writer`` says how several of them may work at once. Not here: what the files
are.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mythos_edge.model.bundle import Bundle, read_manifest, verify_hashes
from mythos_edge.model.bundle_writer import changing, free_name, install_files, record_of, recover
from mythos_edge.model.errors import BuildError
from mythos_edge.model.manifest import TARGET, FileRecord, Manifest, TargetSpec
from mythos_edge.model.partial_folders import PartialFolder


def weights_file(name: str, part: str = "") -> str:
    """A file of rounded or narrowed weights of a target, where it has one; ``part`` tells several apart."""
    return f"weights.{name}.{part + '.' if part else ''}safetensors"


def log_file(name: str) -> str:
    """The file with what the native builder said, where a target has one, as it is made."""
    return f"build.{name}.log"


def log_of(bundle: Bundle, name: str) -> Path | None:
    """The file with what the native builder of a target that is in the bundle said; None where it has none."""
    logs = sorted(file for file in bundle.manifest.files_of(name) if file.startswith(f"build.{name}."))
    return bundle.path / logs[0] if logs else None


@contextmanager
def files_beside(bundle: Bundle, name: str, progress: Callable[[str, float], None]) -> Iterator[Path]:
    """A folder inside the bundle for files that are not whole yet, removed at the end with what is left in it.

    Raises BundleError when the export is not what it was: nothing sound can be built from it; and for a bundle of
    links.
    """
    bundle.target(TARGET)
    bundle.require_own_files()
    verify_hashes(bundle, lambda file: progress("hashing the export", 0.0), bundle.manifest.files_of(TARGET))
    partial = None
    try:
        partial = PartialFolder(bundle.path, name, of_any=True, recover=lambda left: recover(left, bundle.path))
        yield partial.path
    except OSError as error:
        raise BuildError(f"{bundle.path}: cannot be written: {error.strerror or error}") from error
    finally:
        if partial is not None:
            partial.remove()


def settled(bundle: Bundle, folder: Path, file: str) -> str:
    """The name that a file of weights in ``folder`` will have in the bundle, which graphs may name from now on.

    It is renamed where the bundle has another file of that name: the target is built again.
    """
    now = read_manifest(bundle.path)
    if file not in now.files:
        return file
    name = free_name(now, file, record_of(folder / file))
    (folder / file).rename(folder / name)
    return name


def install(bundle: Bundle, folder: Path, name: str, target: TargetSpec) -> Bundle:
    """The bundle with all files of ``folder`` moved into it and ``target`` recorded in place of one of that name.

    One that is there stays whole, with its presets, until the new one is. Raises BuildError when the bundle was
    exported anew meanwhile, or the same target built.
    """

    def with_target(now: Manifest, names: Mapping[str, str], records: Mapping[str, FileRecord]) -> Manifest:
        # Graphs hold the names of weights.
        if any(names[file] != file for file in records if file.startswith("weights.")):
            raise BuildError(f"{bundle.path}: {name} was built by another process meanwhile: use it, or build again")
        replaced = now.files_of(name) - now.files_of(TARGET) if name in now.targets else set()
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
    records = {file.name: record_of(file) for file in sorted(folder.iterdir())}
    with changing(bundle) as now:
        if now.identity != bundle.manifest.identity or bundle.differs_from(now, TARGET):
            raise BuildError(f"{bundle.path}: was exported anew during the build: build again")
        names = {file: free_name(now, file, record) for file, record in records.items()}
        return install_files(bundle, folder, names, now, change(now, names, records))
