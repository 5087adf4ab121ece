"""A bundle on the disk: what opening checks, and that its manifest is changed as a whole."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_bundle import CONTENTS, sample_manifest, tree, write_bundle

from mythos_edge.model import bundle as bundle_module
from mythos_edge.model import bundle_writer
from mythos_edge.model.bundle import open_bundle, sha256_of, verify_hashes
from mythos_edge.model.bundle_writer import update_manifest
from mythos_edge.model.errors import BundleError
from mythos_edge.model.manifest import MANIFEST_FILE, FileRecord, Preset


def test_an_opened_bundle_knows_its_files(made: Path) -> None:
    for opened in (open_bundle(made), open_bundle(str(made), hashes=True)):
        assert opened.path == made
        assert opened.manifest == sample_manifest()
        assert opened.file("weights.safetensors").read_bytes() == CONTENTS["weights.safetensors"]
        for name in ("unlisted.bin", MANIFEST_FILE, "../some.bundle/weights.safetensors"):
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
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
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


def test_progress_hears_of_every_part(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(bundle_module, "_HASH_CHUNK_BYTES", 7)
    verify_hashes(open_bundle(made), progress=told.append)
    assert told == sorted(told)
    assert (told[0], told[-1]) == (0, 1)
    sizes = [(made / name).stat().st_size for name in CONTENTS]
    assert len(set(told)) == 1 + sum(-(-size // 7) for size in sizes)


def test_the_hash_is_over_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "_HASH_CHUNK_BYTES", 7)
    for size in (0, 6, 7, 8, 100):
        data = bytes(range(size))
        (tmp_path / "x").write_bytes(data)
        assert sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_link_out_of_the_folder_is_taken_if_it_leads_to_the_file_that_is_listed(made: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    weights = made / "weights.safetensors"
    outside.write_bytes(CONTENTS["weights.safetensors"])
    weights.unlink()
    weights.symlink_to(outside)
    opened = open_bundle(made, hashes=True)
    assert opened.file("weights.safetensors") == weights
    for other in (CONTENTS["weights.safetensors"][::-1], b"of another size"):
        outside.write_bytes(other)
        for look in (lambda: open_bundle(made), lambda: opened.file("weights.safetensors")):
            with pytest.raises(
                BundleError, match=r"is a link out of the .*hf download .* --local-dir .*cp -rL"
            ) as told:
                look()
            assert "\n" not in str(told.value)
    outside.unlink()
    with pytest.raises(BundleError, match=r"weights\.safetensors: is a link to a file that is missing: .*cp -rL"):
        open_bundle(made)
    weights.unlink()
    (made / "real.bin").write_bytes(CONTENTS["weights.safetensors"])
    weights.symlink_to("real.bin")
    open_bundle(made, hashes=True)


def test_a_link_out_of_the_folder_is_read_once_for_an_opened_bundle(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made / "weights.safetensors").rename(tmp_path / "outside")
    (made / "weights.safetensors").symlink_to(tmp_path / "outside")
    read: list[Path] = []

    def spy(path: Path) -> str:
        read.append(path)
        return sha256_of(path)

    monkeypatch.setattr(bundle_module, "sha256_of", spy)
    opened = open_bundle(made)
    for one in (opened, opened, dataclasses.replace(opened, path=made.absolute())):
        one.file("weights.safetensors")
    assert read == [made / "weights.safetensors"]


@pytest.mark.parametrize("target", ["/dev/zero", "fifo"])
def test_a_link_to_what_is_no_file_is_refused_unread(made: Path, tmp_path: Path, target: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    (made / "weights.safetensors").unlink()
    (made / "weights.safetensors").symlink_to(tmp_path / target)
    with pytest.raises(BundleError, match="is a link out of"):
        open_bundle(made)


def test_a_linked_bundle_opens(made: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(made)
    open_bundle(tmp_path / "link", hashes=True)


def test_a_folder_beside_with_the_same_beginning_is_outside(made: Path) -> None:
    beside = made.with_name(made.name + "-evil")
    beside.mkdir()
    (beside / "weights.safetensors").write_bytes(CONTENTS["weights.safetensors"][::-1])
    (made / "weights.safetensors").unlink()
    (made / "weights.safetensors").symlink_to(beside / "weights.safetensors")
    with pytest.raises(BundleError, match="link out of"):
        open_bundle(made)


def _link_to_itself(made: Path) -> None:
    (made / "weights.safetensors").unlink()
    (made / "weights.safetensors").symlink_to("weights.safetensors")


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


# --- a bundle that is replaced while it is open -------------------------------------------------------------------


def test_what_is_opened_of_the_same_bundle_is_let_through(made: Path) -> None:
    opened = open_bundle(made)
    update_manifest(opened, presets={}, versions={"torch": "3"})
    for target in opened.manifest.targets:
        with opened.unchanged(target):
            pass


@pytest.mark.parametrize("force", ["another model", "another target", "gone"])
def test_what_is_opened_of_another_bundle_is_one_line(made: Path, force: str) -> None:
    opened = open_bundle(made)
    reason = {
        "another model": "the bundle was replaced while it was open: open it again",
        "another target": "target 'rtx-sm89-fp16' was built again while it was open: open it again",
        "gone": "the bundle was replaced or removed while it was open: open it again",
    }[force]
    if force == "another model":
        write_bundle(made, CONTENTS | {"weights.safetensors": bytes(256)}, force=True)
    elif force == "another target":
        targets = opened.manifest.targets
        changed = dataclasses.replace(targets["rtx-sm89-fp16"], step_bytes=3)
        update_manifest(opened, targets={**targets, "rtx-sm89-fp16": changed})
    else:
        shutil.rmtree(made)
    with pytest.raises(BundleError, match=reason), opened.unchanged("rtx-sm89-fp16"):
        pass
    # It is the reason of what fails meanwhile, too.
    with pytest.raises(BundleError, match=reason), opened.unchanged("rtx-sm89-fp16"):
        raise BundleError("step.onnx: ONNX Runtime cannot load it")
    if force == "another target":
        with opened.unchanged("ort-cpu"):
            pass


def test_a_failure_in_a_bundle_that_is_the_same_stays_what_it_is(made: Path) -> None:
    with pytest.raises(BundleError, match="cannot load it"), open_bundle(made).unchanged("ort-cpu"):
        raise BundleError("step.onnx: ONNX Runtime cannot load it")


# --- changing the manifest ----------------------------------------------------------------------------------------


def test_a_changed_manifest_is_on_disk_and_nothing_else_is(made: Path) -> None:
    before = tree(made)
    presets = {"calm": Preset("ort-cpu", 4, 0.5, 0.1, 0.9, 1.5, 2.0)}
    updated = update_manifest(open_bundle(made), presets=presets)
    assert updated.manifest == sample_manifest(presets=presets)
    assert open_bundle(made, hashes=True) == updated
    after = tree(made)
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


def test_a_manifest_that_cannot_be_written_leaves_the_old_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(made)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_writer, "_sync", full)
    with pytest.raises(BundleError, match="cannot write its manifest: No space left"):
        update_manifest(open_bundle(made), presets={})
    assert tree(made) == before


def test_a_change_that_contradicts_itself_is_refused(made: Path) -> None:
    before = tree(made)
    with pytest.raises(BundleError, match=r"does not list 'other\.json'"):
        update_manifest(open_bundle(made), tokenizer="other.json")
    assert tree(made) == before


def test_a_change_is_made_to_what_the_manifest_says_now(made: Path) -> None:
    """Two that opened the bundle before either changed it both leave what they added."""
    calm = Preset("ort-cpu", 4, 0.5, 0.1, 0.9, 1.5, 2.0)
    first, second = open_bundle(made), open_bundle(made)
    update_manifest(first, presets=lambda presets: {**presets, "first": calm})
    updated = update_manifest(second, presets=lambda presets: {**presets, "second": calm})
    assert list(updated.manifest.presets) == ["knee", "first", "second"]
    assert open_bundle(made) == updated


def test_a_change_of_what_became_another_model_is_refused(made: Path) -> None:
    opened = open_bundle(made)
    write_bundle(made, make=lambda files: sample_manifest(files, dtype="fp32"), force=True)
    before = tree(made)
    with pytest.raises(BundleError, match="was exported anew meanwhile"):
        update_manifest(opened, presets={})
    assert tree(made) == before
    shutil.rmtree(made)
    with pytest.raises(BundleError, match="was replaced or removed meanwhile"):
        update_manifest(opened, presets={})
