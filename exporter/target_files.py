"""How the files of a built target come into a bundle: made beside, moved together, listed last.

Shared by every target builder. Not here: what the files are.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mythos_edge.model.bundle import TARGET, Bundle, TargetSpec, open_bundle, verify_hashes
from mythos_edge.model.bundle_writer import record_of, remove_partials, update_manifest
from mythos_edge.model.errors import BuildError


def weights_file(name: str, part: str = "") -> str:
    """A file of rounded or narrowed weights of a target, where it has one; ``part`` tells several apart."""
    return f"weights.{name}.{part + '.' if part else ''}safetensors"


def log_file(name: str) -> str:
    """The file with what the native builder said, where a target has one."""
    return f"build.{name}.log"


@contextmanager
def files_beside(bundle: Bundle, name: str, progress: Callable[[str, float], None]) -> Iterator[Path]:
    """A folder inside the bundle for files that are not whole yet, removed at the end with what is left in it.

    Raises BundleError when the export is not what it was: nothing sound can be built from it.
    """
    bundle.target(TARGET)
    verify_hashes(bundle, lambda file: progress("hashing the export", 0.0), bundle.manifest.files_of(TARGET))
    folder = bundle.path / f".{name}.partial-{os.getpid()}"
    try:
        remove_partials(bundle.path)
        folder.mkdir()
        yield folder
    except OSError as error:
        raise BuildError(f"{bundle.path}: can not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(bundle: Bundle, folder: Path, name: str, target: TargetSpec) -> Bundle:
    """The bundle with all files of ``folder`` moved into it and ``target`` recorded in place of one of that name.

    Raises BuildError when the bundle was exported anew meanwhile.
    """
    records = {file.name: record_of(file) for file in sorted(folder.iterdir())}
    # An interrupt from here on leaves a bundle without the target, not one whose files are of two builds.
    bundle = _without(_unchanged(bundle), name)
    for file in records:
        (folder / file).replace(bundle.path / file)
    others = bundle.manifest
    return update_manifest(bundle, targets={**others.targets, name: target}, files={**others.files, **records})


def _unchanged(bundle: Bundle) -> Bundle:
    """The bundle as it is now: a build takes minutes, in which presets may have been added."""
    now = open_bundle(bundle.path)
    if now.manifest.identity != bundle.manifest.identity:
        raise BuildError(f"{bundle.path}: was exported anew during the build: build again")
    return now


def _without(bundle: Bundle, name: str) -> Bundle:
    """The bundle without a target, its presets, and the files that only it uses, which stay on disk."""
    manifest = bundle.manifest
    if name not in manifest.targets:
        return bundle
    own = manifest.files_of(name)
    return update_manifest(
        bundle,
        targets={other: spec for other, spec in manifest.targets.items() if other != name},
        files={file: record for file, record in manifest.files.items() if file not in own},
        # They were measured with the weights that go.
        presets={preset: found for preset, found in manifest.presets.items() if found.target != name},
    )
