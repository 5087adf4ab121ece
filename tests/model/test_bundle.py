"""The bundle: what a manifest must look like, what opening checks, and that writing is all or nothing."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mythos_edge.model import bundle as bundle_module
from mythos_edge.model.bundle import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    BundleWriter,
    EngineSpec,
    FileRecord,
    GoldenSample,
    GraphSpec,
    Manifest,
    Preset,
    Profile,
    Source,
    TargetSpec,
    TensorSpec,
    manifest_from_dict,
    manifest_to_dict,
    open_bundle,
    require_free_space,
    sha256_of,
    update_manifest,
    verify_hashes,
)
from mythos_edge.model.config import VARIANTS
from mythos_edge.model.errors import BundleError, ExportError

CONTENTS = {
    "step.onnx": b"graph",
    "step.ort.onnx": b"lowered graph",
    "weights.bin": bytes(range(256)),
    "tok.json": b"{}",
}
RECORDS = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENTS.items()}


def _manifest(files: dict[str, FileRecord] = RECORDS, **changes: Any) -> Manifest:
    engine = EngineSpec("rtx", "1.7.1", (86, 89), "", "step", 64, 16, (Profile(1, 1),), {"step": 2}, "ef" * 32)
    values: dict[str, Any] = {
        "config": VARIANTS["1b"],
        "dtype": "float16",
        "max_context": 512,
        "graphs": {
            "step": GraphSpec(
                "step.onnx",
                (TensorSpec("h", "float32", ("B", "S", 2048)), TensorSpec("length", "int64", ())),
                (TensorSpec("h_next", "float32", ("B", "S", 2048)),),
            )
        },
        "targets": {
            "ort-cpu": TargetSpec(
                {"step": "step.ort.onnx"}, "fp32", "int4", 32, "rtn", ("head",), True, 10, 20, "cd" * 32, "a note", None
            ),
            "rtx-sm89-fp16": TargetSpec(
                {"step": "step.ort.onnx"}, "fp16", "none", 0, "none", (), False, 10, 20, "cd" * 32, "", engine
            ),
        },
        "files": files,
        "versions": {"torch": "2.13.0"},
        "source": Source("model.pt", "torch", "ab" * 32, None),
        "sample": GoldenSample((1, 2), 4, 0.99, (3, 1), (7, 8), (1.5, -2.0)),
        "tokenizer": "tok.json",
        "presets": {"knee": Preset("ort-cpu", 8, 0.93, 0.01, 0.99, 2.5, 1.3)},
        "created": "2025-01-01T00:00:00Z",
    }
    return Manifest(**(values | changes))


def _as_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a reader finds it: plain JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(manifest_to_dict(manifest)))
    return values


def _changed(*path: str | int, value: Any) -> dict[str, Any]:
    values = _as_json(_manifest())
    place: Any = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return values


def _read(values: dict[str, Any]) -> Manifest:
    return manifest_from_dict(values, origin="here.json")


def _write_bundle(
    path: Path,
    contents: dict[str, bytes] = CONTENTS,
    make: Callable[[dict[str, FileRecord]], Manifest] = _manifest,
    force: bool = False,
) -> None:
    with BundleWriter(path, force) as writer:
        for name, data in contents.items():
            (writer.folder / name).write_bytes(data)
        writer.finish(make, known={})


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "some.bundle"
    _write_bundle(path)
    return path


# --- the manifest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer": None},
        {"source": Source("m", "safetensors", "0" * 64, 1200)},
        {"graphs": {}, "targets": {}},
        {"versions": {}},
        {"sample": GoldenSample((), 1, 0.5, (), (), ())},
    ],
)
def test_a_manifest_survives_the_way_through_json(changes: dict[str, Any]) -> None:
    manifest = _manifest(**changes)
    values = _as_json(manifest)
    assert values["schema_version"] == SCHEMA_VERSION
    assert _read(values) == manifest


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ((), "manifest"),
        (("source",), "manifest.source"),
        (("sample",), "manifest.sample"),
        (("graphs", "step"), "manifest.graphs.step"),
        (("graphs", "step", "inputs", 1), "manifest.graphs.step.inputs"),
        (("targets", "ort-cpu"), "manifest.targets.ort-cpu"),
        (("files", "weights.bin"), "manifest.files.weights.bin"),
    ],
)
def test_unknown_and_missing_fields_are_refused_at_every_level(path: tuple[str | int, ...], where: str) -> None:
    values = _as_json(_manifest())
    place: Any = values
    for key in path:
        place = place[key]
    names = [name for name in place if name != "schema_version"]
    for name in names:
        kept = place.pop(name)
        with pytest.raises(BundleError, match="missing field") as caught:
            _read(values)
        assert f"{where} has missing field {name!r}" in str(caught.value)
        place[name] = kept
    assert _read(values) == _manifest()
    place["surprise"] = 1
    with pytest.raises(BundleError, match="unknown field 'surprise'") as caught:
        _read(values)
    assert str(caught.value).startswith(f"here.json: {where} ")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dtype",), 16),
        (("dtype",), None),
        (("max_context",), "512"),
        (("max_context",), 512.0),
        (("max_context",), True),
        (("graphs",), []),
        (("graphs", "step"), "step.onnx"),
        (("graphs", "step", "inputs"), {}),
        (("graphs", "step", "inputs", 0), "h"),
        (("graphs", "step", "inputs", 0, "shape"), "BSD"),
        (("graphs", "step", "inputs", 0, "shape", 0), 1.5),
        (("graphs", "step", "inputs", 0, "shape", 0), None),
        (("graphs", "step", "inputs", 0, "shape", 0), True),
        (("graphs", "step", "file"), None),
        (("targets", "ort-cpu", "graphs", "step"), 3),
        (("files", "weights.bin", "bytes"), "256"),
        (("files", "weights.bin", "bytes"), 256.0),
        (("files", "weights.bin"), None),
        (("versions", "torch"), 2.13),
        (("source", "step"), 1.5),
        (("source", "step"), False),
        (("sample", "ids"), 1),
        (("sample", "ids", 0), "1"),
        (("sample", "threshold"), "0.99"),
        (("sample", "threshold"), True),
        (("sample", "top_logits", 0), None),
        (("tokenizer",), 0),
        (("created",), 20250101),
        (("config",), []),
        (("config", "dim"), "2048"),
        (("config", "n_experts_per_tok"), 1000),
        (("config", "surprise"), 1),
    ],
)
def test_a_wrong_type_is_named_with_its_place(path: tuple[str | int, ...], value: Any) -> None:
    with pytest.raises(BundleError) as caught:
        _read(_changed(*path, value=value))
    message = str(caught.value)
    assert message.startswith("here.json: ")
    assert "\n" not in message
    last_name = [part for part in path if isinstance(part, str)][-1]
    assert last_name in message


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    with pytest.raises(BundleError, match=r"newer mythos-edge .* upgrade"):
        # Its fields may be others: the version comes first.
        _read({"schema_version": SCHEMA_VERSION + 1, "other": 1})


@pytest.mark.parametrize("version", [None, "1", 1.0, True])
def test_a_schema_version_that_is_no_number_is_refused(version: Any) -> None:
    with pytest.raises(BundleError, match="schema_version"):
        _read(_changed("schema_version", value=version))
    without = _as_json(_manifest())
    del without["schema_version"]
    with pytest.raises(BundleError, match="schema_version is None"):
        _read(without)


@pytest.mark.parametrize("sha", ["", "ab" * 31, "ab" * 33, "AB" * 32, "g" * 64, "ab" * 31 + " a", "０" * 64])
def test_a_hash_must_be_64_small_hexadecimal_digits(sha: str) -> None:
    with pytest.raises(BundleError, match=r"files\.weights\.bin\.sha256 .* 64 hexadecimal digits"):
        _read(_changed("files", "weights.bin", "sha256", value=sha))


@pytest.mark.parametrize("name", ["step.onnx", "step.ort.onnx", "tok.json"])
def test_every_file_in_use_must_be_listed(name: str) -> None:
    values = _as_json(_manifest())
    del values["files"][name]
    with pytest.raises(BundleError, match="files does not list") as caught:
        _read(values)
    assert repr(name) in str(caught.value)


UNSAFE = ["../x", "/etc/x", "a/../../x", "a/../x", "..", ".", "", "C:\\x", "C:x", "a\\..\\x", "x\0y", MANIFEST_FILE]


@pytest.mark.parametrize("name", UNSAFE)
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    listed = {**RECORDS, name: RECORDS["step.onnx"]}
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        _manifest(listed)
    values = _as_json(_manifest())
    values["files"][name] = values["files"]["step.onnx"]
    with pytest.raises(BundleError, match="leaves the bundle's folder"):
        _read(values)
    for place in (("graphs", "step", "file"), ("targets", "ort-cpu", "graphs", "step"), ("tokenizer",)):
        with pytest.raises(BundleError, match="leaves the bundle's folder"):
            _read(_changed(*place, value=name))


@pytest.mark.parametrize("name", ["../../x", *UNSAFE])
def test_names_of_targets_that_would_lead_their_files_out_of_the_folder_are_refused(name: str) -> None:
    values = _as_json(_manifest())
    values["targets"][name] = values["targets"]["ort-cpu"]
    with pytest.raises(BundleError, match=r"target name .* leaves the bundle's folder"):
        _read(values)


def test_a_file_in_a_subfolder_is_fine() -> None:
    listed = {**RECORDS, "parts/a..b.bin": RECORDS["step.onnx"]}
    assert "parts/a..b.bin" in _read(_as_json(_manifest(listed))).files


# --- opening ------------------------------------------------------------------------------------------------------


def test_an_opened_bundle_knows_its_files(made: Path) -> None:
    for opened in (open_bundle(made), open_bundle(str(made), hashes=True)):
        assert opened.path == made
        assert opened.manifest == _manifest()
        assert opened.file("weights.bin").read_bytes() == CONTENTS["weights.bin"]
        for name in ("unlisted.bin", MANIFEST_FILE, "../some.bundle/weights.bin"):
            with pytest.raises(BundleError, match="lists no file"):
                opened.file(name)


def test_unlisted_files_in_the_folder_are_left_alone(made: Path) -> None:
    (made / "notes.txt").write_text("mine")
    assert "notes.txt" not in open_bundle(made, hashes=True).manifest.files


def test_what_is_no_bundle_is_told_apart(tmp_path: Path, made: Path) -> None:
    with pytest.raises(BundleError, match=r"does not exist.*mythos-edge export"):
        open_bundle(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="is no bundle folder"):
        open_bundle(tmp_path / "file")
    (made / MANIFEST_FILE).unlink()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        open_bundle(made)
    (made / MANIFEST_FILE).mkdir()
    with pytest.raises(BundleError, match=r"has no manifest\.json"):
        open_bundle(made)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "can not be read"),
        (b"{", "can not be read"),
        (b"\xff\xfe", "can not be read"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"{}", "schema_version is None"),
    ],
)
def test_a_damaged_manifest_is_one_error(made: Path, content: bytes, what: str) -> None:
    (made / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(BundleError, match=what) as caught:
        open_bundle(made)
    assert str(made / MANIFEST_FILE) in str(caught.value)


def test_a_missing_file_and_another_size_are_found_at_once(made: Path) -> None:
    (made / "step.onnx").write_bytes(b"graph!")
    with pytest.raises(BundleError, match=r"step\.onnx: has 6 bytes, the manifest says 5"):
        open_bundle(made)
    (made / "step.onnx").unlink()
    with pytest.raises(BundleError, match=r"step\.onnx: is missing"):
        open_bundle(made)
    (made / "step.onnx").mkdir()
    with pytest.raises(BundleError, match=r"step\.onnx: is missing"):
        open_bundle(made)


@pytest.mark.parametrize("name", CONTENTS)
def test_a_changed_byte_is_found_by_the_hashes_only(made: Path, name: str) -> None:
    changed = bytearray(CONTENTS[name])
    changed[-1] ^= 1
    (made / name).write_bytes(changed)
    opened = open_bundle(made)
    with pytest.raises(BundleError, match="has changed") as caught:
        verify_hashes(opened)
    assert str(made / name) in str(caught.value)
    with pytest.raises(BundleError, match="has changed"):
        open_bundle(made, hashes=True)


def test_progress_hears_of_every_file(made: Path) -> None:
    told: list[str] = []
    verify_hashes(open_bundle(made), progress=told.append)
    assert sorted(told) == sorted(CONTENTS)


def test_the_hash_is_over_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_HASH_CHUNK_BYTES", 7)
    for size in (0, 6, 7, 8, 100):
        data = bytes(range(size))
        (tmp_path / "x").write_bytes(data)
        assert sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(CONTENTS["weights.bin"])
    weights = made / "weights.bin"
    weights.unlink()
    weights.symlink_to(outside)
    with pytest.raises(BundleError, match="link out of the bundle's folder"):
        open_bundle(made)
    weights.unlink()
    (made / "real.bin").write_bytes(CONTENTS["weights.bin"])
    weights.symlink_to("real.bin")
    open_bundle(made, hashes=True)


def test_a_linked_bundle_opens(made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made)
    open_bundle(tmp_path / "link", hashes=True)


def test_a_folder_beside_with_the_same_beginning_is_outside(made: Path) -> None:
    beside = made.with_name(made.name + "-evil")
    beside.mkdir()
    (beside / "weights.bin").write_bytes(CONTENTS["weights.bin"])
    (made / "weights.bin").unlink()
    (made / "weights.bin").symlink_to(beside / "weights.bin")
    with pytest.raises(BundleError, match="link out of"):
        open_bundle(made)


def _link_to_itself(made: Path) -> None:
    (made / "weights.bin").unlink()
    (made / "weights.bin").symlink_to("weights.bin")


def _long_name(made: Path) -> None:
    _edit_manifest(made, lambda values: values["files"].update({"n" * 300: values["files"]["step.onnx"]}))


def _name_that_is_no_utf8(made: Path) -> None:
    _edit_manifest(made, lambda values: values["files"].update({"\ud800": values["files"]["step.onnx"]}))


def _huge_number(made: Path) -> None:
    _edit_manifest(made, lambda values: values["sample"].update({"threshold": 10**400}))


def _deep_json(made: Path) -> None:
    (made / MANIFEST_FILE).write_text("[" * 100_000)


def _edit_manifest(made: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads((made / MANIFEST_FILE).read_text())
    edit(values)
    (made / MANIFEST_FILE).write_text(json.dumps(values))


@pytest.mark.parametrize("damage", [_link_to_itself, _long_name, _name_that_is_no_utf8, _huge_number, _deep_json])
def test_a_hostile_bundle_is_a_bundle_error_and_nothing_else(made: Path, damage: Callable[[Path], None]) -> None:
    damage(made)
    with pytest.raises(BundleError):
        open_bundle(made)


# --- writing ------------------------------------------------------------------------------------------------------


def test_a_written_bundle_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "some.bundle"
    _write_bundle(path)
    assert sorted(file.name for file in path.iterdir()) == sorted([*CONTENTS, MANIFEST_FILE])
    assert list(path.parent.iterdir()) == [path]
    assert open_bundle(path, hashes=True).manifest.files == RECORDS


def test_nothing_stands_at_the_final_place_before_finish(tmp_path: Path) -> None:
    path = tmp_path / "some.bundle"
    with BundleWriter(path) as writer:
        assert writer.folder.is_dir()
        assert writer.folder.parent == path.parent
        assert not path.exists()


def test_known_hashes_are_used_and_the_others_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def spy(path: Path) -> str:
        read.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(bundle_module, "sha256_of", spy)
    records: dict[str, FileRecord] = {}

    def make(found: dict[str, FileRecord]) -> Manifest:
        records.update(found)
        return _manifest(found)

    with BundleWriter(tmp_path / "b") as writer:
        for name, data in CONTENTS.items():
            (writer.folder / name).write_bytes(data)
        writer.finish(make, known={"weights.bin": "12" * 32})
    assert sorted(read) == sorted(set(CONTENTS) - {"weights.bin"})
    assert records == {**RECORDS, "weights.bin": FileRecord(256, "12" * 32)}


def test_an_existing_bundle_is_refused_without_force(made: Path) -> None:
    before = _tree(made)
    with pytest.raises(ExportError, match=r"exists: .* or pass --force"):
        BundleWriter(made)
    assert _tree(made) == before


@pytest.mark.parametrize("force", [False, True])
def test_force_never_replaces_what_is_no_bundle(tmp_path: Path, force: bool) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    file = tmp_path / "letter.txt"
    file.write_text("dear")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    odd = tmp_path / "odd"
    (odd / MANIFEST_FILE).mkdir(parents=True)
    before = _tree(tmp_path)
    for path in (folder, file, dangling, odd):
        with pytest.raises(ExportError, match="exists") as caught:
            BundleWriter(path, force=force)
        assert "or pass --force" not in str(caught.value)
        assert ("is not a bundle" in str(caught.value)) == force
    assert _tree(tmp_path) == before
    assert dangling.is_symlink()


def test_force_replaces_a_bundle_and_an_empty_folder(made: Path, tmp_path: Path) -> None:
    (made / "leftover").write_text("of the old one")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ExportError, match="or pass --force"):
        BundleWriter(empty)
    for path in (made, empty):
        _write_bundle(path, CONTENTS | {"extra": b"new"}, force=True)
        assert "extra" in open_bundle(path, hashes=True).manifest.files
        assert not (path / "leftover").exists()
    assert sorted(tmp_path.iterdir()) == sorted([made, empty])


def test_force_on_a_linked_bundle_leaves_nothing_beside(made: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current"
    link.symlink_to(made)
    _write_bundle(link, CONTENTS | {"extra": b"new"}, force=True)
    assert "extra" in open_bundle(link, hashes=True).manifest.files
    assert list(link.parent.iterdir()) == [link]


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_while_writing_is_not_replaced(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "b"

    def make(records: dict[str, FileRecord]) -> Manifest:
        path.mkdir()
        (path / "other").write_text("somebody else's")
        return _manifest(records)

    with pytest.raises(ExportError, match="exists"):
        _write_bundle(path, make=make, force=force)
    assert _tree(tmp_path) == {"b/other": b"somebody else's"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ExportError, SystemExit])
def test_leaving_early_leaves_nothing_and_the_old_bundle_as_it_was(made: Path, error: type[BaseException]) -> None:
    before = _tree(made.parent)

    def make(records: dict[str, FileRecord]) -> Manifest:
        raise error("interrupted")

    with pytest.raises(error):
        _write_bundle(made, make=make, force=True)
    assert _tree(made.parent) == before
    assert list(made.parent.iterdir()) == [made]


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "new" / "folders" / "b") as writer:
        (writer.folder / "weights.bin").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []
    with BundleWriter(tmp_path / "b") as writer:
        (writer.folder / "weights.bin").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_fails_leaves_the_old_bundle(made: Path) -> None:
    before = _tree(made.parent)
    with pytest.raises(BundleError, match="does not list"):
        # The manifest needs files that were not written.
        _write_bundle(made, {"weights.bin": b"w"}, force=True)
    assert _tree(made.parent) == before


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_move_leaves_one_whole_bundle(
    made: Path, monkeypatch: pytest.MonkeyPatch, number: int, after: bool
) -> None:
    """An interrupt just before or after one of the two renames: the old or the new bundle, and nothing else."""
    rename, calls = Path.rename, []

    def interrupted(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) != number:
            return rename(path, target)
        if after:
            rename(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _write_bundle(made, CONTENTS | {"extra": b"new"}, force=True)
    monkeypatch.undo()
    assert ("extra" in open_bundle(made, hashes=True).manifest.files) == (number == 2 and after)
    assert list(made.parent.iterdir()) == [made]


def _dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["some.bundle", "model[1]"])
def test_leftovers_of_dead_writers_are_removed_and_others_kept(tmp_path: Path, name: str) -> None:
    dead = tmp_path / f".{name}.partial-{_dead_pid()}"
    own = tmp_path / f".{name}.partial-{os.getpid()}"
    alive = tmp_path / f".{name}.partial-{os.getppid()}"
    unlike = [
        tmp_path / f".{name}.partial-x",
        tmp_path / f".other.partial-{_dead_pid()}",
        tmp_path / f"{name}.partial-1",
    ]
    for folder in (dead, own, alive, *unlike):
        folder.mkdir()
        (folder / "half.bin").write_bytes(b"half")
    with BundleWriter(tmp_path / name) as writer:
        assert not dead.exists()
        assert list(writer.folder.iterdir()) == []
        for folder in (alive, *unlike):
            assert (folder / "half.bin").is_file()


def test_a_leftover_with_an_impossible_pid_is_no_error(tmp_path: Path) -> None:
    (tmp_path / f".b.partial-{10**30}").mkdir()
    _write_bundle(tmp_path / "b")


def test_a_place_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="can not write there") as caught, BundleWriter(tmp_path / "file" / "b"):
        pass
    assert "\n" not in str(caught.value)


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    class Usage:
        free = 3_000_000

    def disk_usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage()

    monkeypatch.setattr(bundle_module.shutil, "disk_usage", disk_usage)
    require_free_space(tmp_path / "a" / "b", 3_000_000)
    require_free_space(tmp_path, 0)
    assert asked == [tmp_path, tmp_path]
    with pytest.raises(ExportError, match="needs 5 MB, 3 MB are free: make room") as caught:
        require_free_space(tmp_path / "a", 5_000_000)
    assert "\n" not in str(caught.value)


# --- changing the manifest ----------------------------------------------------------------------------------------


def test_a_changed_manifest_is_on_disk_and_nothing_else_is(made: Path) -> None:
    before = _tree(made)
    presets = {"calm": Preset("ort-cpu", 4, 0.5, 0.1, 0.9, 1.5, 2.0)}
    updated = update_manifest(open_bundle(made), presets=presets)
    assert updated.manifest == _manifest(presets=presets)
    assert open_bundle(made, hashes=True) == updated
    after = _tree(made)
    assert after.pop(MANIFEST_FILE) != before.pop(MANIFEST_FILE)
    assert after == before


def test_a_file_that_was_added_is_named_by_the_change(made: Path) -> None:
    bundle = open_bundle(made)
    record = FileRecord(3, hashlib.sha256(b"new").hexdigest())
    files = {**bundle.manifest.files, "step.new.onnx": record}
    target = dataclasses.replace(bundle.manifest.targets["ort-cpu"], graphs={"step": "step.new.onnx"})
    changes = {"targets": {**bundle.manifest.targets, "new": target}, "files": files}
    with pytest.raises(BundleError, match=r"step\.new\.onnx: is missing"):
        update_manifest(bundle, **changes)
    assert open_bundle(made) == bundle
    (made / "step.new.onnx").write_bytes(b"new")
    assert update_manifest(bundle, **changes).file("step.new.onnx").read_bytes() == b"new"


def test_a_manifest_that_can_not_be_written_leaves_the_old_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _tree(made)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "_sync", full)
    with pytest.raises(BundleError, match="can not write its manifest: No space left"):
        update_manifest(open_bundle(made), presets={})
    assert _tree(made) == before


def test_a_change_that_contradicts_itself_is_refused(made: Path) -> None:
    before = _tree(made)
    with pytest.raises(BundleError, match=r"does not list 'other\.json'"):
        update_manifest(open_bundle(made), tokenizer="other.json")
    assert _tree(made) == before
