"""Keeps graphs that took seconds to make in the user's cache folder, under all that they depend on.

An entry is one file: a digest, then a zip of the graphs, without weights, and the key they were kept under. It appears
whole or not at all, so several processes may write at once; one that is damaged, or was kept under another key, is made
again. MYTHOS_EDGE_CACHE names another folder, or is ``off``.
"""

import hashlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mythos_edge.model.bounded_files import read_bounded
from mythos_edge.model.errors import UsageError
from mythos_edge.model.families.table import FAMILIES
from mythos_edge.model.output_files import writing
from mythos_edge.model.user_cache import cache_folder
from mythos_edge.model.versions import UNKNOWN, version_of

VARIABLE = "MYTHOS_EDGE_CACHE"
LIBRARIES = ("mythos-edge", "torch", "onnx", "onnx-ir", "onnxscript")
# An entry of the demo has about 0.1 MB; the oldest go where all together have more than the second.
_MOST_ENTRY_BYTES, _MOST_BYTES = 16 << 20, 64 << 20
# The rooms whose code takes part in what a graph looks like.
_ROOMS = ("model", "plugins", "exporter")
_ENDING = ".graphs"
# Entries, and what a killed process left of one; nothing else in the folder is touched.
_OURS = re.compile(rf"[0-9a-f]{{64}}{re.escape(_ENDING)}|\.[0-9a-f]{{32}}\.partial-[0-9a-f]+")


@dataclass(frozen=True)
class Graphs:
    """ONNX files by name, and what else is known of them, as JSON values by name."""

    files: dict[str, bytes]
    facts: dict[str, Any] = field(default_factory=dict)


def kept(
    what: str,
    depends_on: Mapping[str, Any],
    make: Callable[[], Graphs],
    note: Callable[[str], None] = lambda text: None,
) -> Graphs:
    """The graphs kept under ``what`` and all that they depend on, or those that ``make`` returns, which are kept now.

    ``depends_on`` holds JSON values; versions of libraries and our own code are added to it. ``note`` is told when
    graphs cannot be kept.
    """
    try:
        folder = _folder()
        surroundings = _surroundings()
    except UsageError as error:
        note(f"the graphs are not kept for the next export: {error}")
        folder = None
    if folder is None:
        return make()
    key = json.dumps({"what": what, **depends_on, **surroundings}, sort_keys=True).encode()
    path = folder / f"{hashlib.sha256(key).hexdigest()}{_ENDING}"
    found = _read(path, key)
    if found is None:
        found = make()
        _write(path, _packed(found, key), note)
    return found


def _folder() -> Path | None:
    given = os.environ.get(VARIABLE, "")
    if given == "off":
        return None
    return Path(given).absolute() if given else cache_folder() / "graphs"


def versions() -> dict[str, str]:
    """The versions of the libraries that make graphs."""
    return {name: version_of(name) for name in LIBRARIES}


def _surroundings() -> dict[str, Any]:
    """The versions of all libraries that make graphs, and a digest of our own code and the families'.

    Raises UsageError where it cannot be told which library makes them; our own is known by its code.
    """
    digest, root, found = hashlib.sha256(), Path(__file__).parent.parent, versions()
    ours = [file for room in _ROOMS for file in sorted((root / room).rglob("*.py"))]
    modules = (sys.modules.get(type(family).__module__) for family in FAMILIES.values())
    families = {Path(file) for file in (getattr(module, "__file__", None) for module in modules) if file}
    for file in [*ours, *sorted(families - set(ours))]:
        digest.update(f"{file.relative_to(root) if file in ours else file}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    unknown = [name for name in LIBRARIES[1:] if found[name] == UNKNOWN]
    if unknown:
        raise UsageError(f"the version of {unknown[0]} is not known")
    return {"versions": {"python": list(sys.version_info[:2]), **found}, "code": digest.hexdigest()}


def _packed(graphs: Graphs, key: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("key.json", key)
        archive.writestr("facts.json", json.dumps(graphs.facts))
        for name, content in graphs.files.items():
            archive.writestr(f"files/{name}", content)
    body = data.getvalue()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _read(path: Path, key: bytes) -> Graphs | None:
    try:
        digest, _, body = read_bounded(path, _MOST_ENTRY_BYTES, "kept graphs").partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        if archive.read("key.json") != key:
            return None
        names = [name.removeprefix("files/") for name in archive.namelist() if name.startswith("files/")]
        files = {name: archive.read(f"files/{name}") for name in names}
        facts = json.loads(archive.read("facts.json"))
    # What was used last is kept longest.
    with suppress(OSError):
        os.utime(path)
    return Graphs(files, facts)


def _write(path: Path, data: bytes, note: Callable[[str], None]) -> None:
    if len(data) > _MOST_ENTRY_BYTES:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path, "the graphs of this export") as file:
            file.write(data)
        _make_room(path)
    except (OSError, UsageError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).rpartition(": ")[2]
        note(
            f"{path.parent}: the graphs cannot be kept there for the next export: {reason}: "
            f"set {VARIABLE} to a folder that can be written, or to off"
        )


def _make_room(newest: Path) -> None:
    """Removes the entries that were not used for longest, so that all together have no more than they may."""
    found = []
    for file in newest.parent.iterdir():
        if _OURS.fullmatch(file.name) and file != newest:
            with suppress(OSError):  # another process may remove it as well
                status = file.lstat()
                found.append((status.st_mtime, status.st_size, file))
    room = _MOST_BYTES - newest.stat().st_size
    for _, size, file in sorted(found, reverse=True):
        room -= size
        if room < 0:
            with suppress(OSError):
                file.unlink()
