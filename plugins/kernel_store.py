"""The compiled kernels that travel with the package: machine code and PTX per GPU, checked against their manifest.

``scripts/build_kernels`` writes ``kernels/built``: one archive per compute capability and ``manifest.json``. Needs
neither Triton nor a GPU. Not here: which kernel a call wants (``launches``), how it gets onto a GPU (``cuda_driver``).
"""

import hashlib
import json
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mythos_edge.model.errors import BuildError
from mythos_edge.plugins.kernels.variants import VARIANTS

MANIFEST_NAME = "manifest.json"
# A wheel has no scripts/build_kernels.
_REINSTALL = "reinstall mythos-edge"
# Resolved: in an editable install this file is a link into the repository, where the archives are renewed.
_BUILT = Path(__file__).resolve().parent / "kernels" / "built"


@dataclass(frozen=True)
class Kernel:
    """One kernel's machine code for one GPU and what a launch needs to know.

    ``arguments`` are (name, type) in order; after them the kernel takes ``hidden_pointers`` pointers that may be null.
    """

    name: str
    entry: str
    cubin: bytes
    shared_bytes: int
    threads: int
    hidden_pointers: int
    arguments: tuple[tuple[str, str], ...]
    sha256: str


def archive_name(compute_capability: int) -> str:
    return f"sm_{compute_capability}.tar.xz"


def compute_capabilities() -> tuple[int, ...]:
    """The GPUs there are kernels for, as 10 * major + minor, ascending."""
    return tuple(sorted(map(int, _manifest(_BUILT)["gpus"])))


def manifest_sha256() -> str:
    """The digest that stands for all kernels: an engine records it."""
    return hashlib.sha256(_read(_BUILT / MANIFEST_NAME)).hexdigest()


def kernel(name: str, compute_capability: int) -> Kernel:
    """The kernel ``name`` for one GPU.

    Raises BuildError for a kernel or GPU there is none for, and when the archive is not the one of the manifest.
    """
    record = _record(name, compute_capability)
    cubin = _member(name, "cubin", compute_capability, record["sha256"])
    described = _manifest(_BUILT)["kernels"][name]
    return Kernel(
        name=name,
        entry=described["entry"],
        cubin=cubin,
        shared_bytes=record["shared_bytes"],
        threads=record["threads"],
        hidden_pointers=described["hidden_pointers"],
        arguments=tuple((argument, kind) for argument, kind in described["arguments"]),
        sha256=record["sha256"],
    )


def ptx(name: str, compute_capability: int) -> str:
    """The PTX the machine code was made from, in which tests look at what was compiled. Raises as ``kernel`` does."""
    record = _record(name, compute_capability)
    return _member(name, "ptx", compute_capability, record["ptx_sha256"]).decode("ascii")


def _record(name: str, compute_capability: int) -> dict[str, Any]:
    gpus = _manifest(_BUILT)["gpus"]
    known = ", ".join(sorted(gpus, key=int))
    if str(compute_capability) not in gpus:
        raise BuildError(
            f"no kernels for SM {compute_capability}, only for {known}: build for one of these, or use --target ort-cpu"
        )
    record = gpus[str(compute_capability)].get(name)
    if record is None:
        variant = VARIANTS.get(name)
        if variant is not None and compute_capability < variant.oldest:
            raise BuildError(
                f"the kernel {name} needs SM {variant.oldest} or newer, got SM {compute_capability}, which lacks bf16 "
                "or the shared memory: build with --dtype fp16, or with --target ort-cuda"
            )
        raise BuildError(f"no kernel {name} for SM {compute_capability}: {_REINSTALL}")
    found: dict[str, Any] = record
    return found


def _member(name: str, ending: str, compute_capability: int, sha256: str) -> bytes:
    content = _archive(_BUILT, compute_capability).get(f"{name}.{ending}")
    if content is None or hashlib.sha256(content).hexdigest() != sha256:
        path = _BUILT / archive_name(compute_capability)
        raise BuildError(f"{path}: {name}.{ending} is damaged or missing: {_REINSTALL}")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path}: cannot read: {error.strerror}: {_REINSTALL}") from error


@lru_cache(maxsize=2)
def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(_read(path))
        gpus, kernels = manifest["gpus"], manifest["kernels"]
    except (ValueError, TypeError, KeyError) as error:
        raise BuildError(f"{path}: damaged: {error}: {_REINSTALL}") from error
    return {"gpus": gpus, "kernels": kernels}


@lru_cache(maxsize=2)
def _archive(folder: Path, compute_capability: int) -> dict[str, bytes]:
    """All files of one archive; a model asks for a dozen of the hundred, and one stream packs them best."""
    path = folder / archive_name(compute_capability)
    contents = {}
    try:
        with tarfile.open(path, "r:xz") as archive:
            for member in archive:
                file = archive.extractfile(member)
                contents[member.name] = b"" if file is None else file.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise BuildError(f"{path}: cannot read: {error}: {_REINSTALL}") from error
    return contents
