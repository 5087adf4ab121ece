"""Writing a bundle is all or nothing: the old one, the new one or nothing, and never anything beside."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sample_bundle import CONTENTS, RECORDS, sample_manifest, tree, write_bundle

from mythos_edge.model import bundle_writer
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.bundle_writer import BundleWriter, require_free_space
from mythos_edge.model.errors import BundleError, ExportError
from mythos_edge.model.manifest import MANIFEST_FILE, FileRecord, Manifest


def test_a_written_bundle_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deep" / "some.bundle"
    write_bundle(path)
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

    monkeypatch.setattr(bundle_writer, "sha256_of", spy)
    records: dict[str, FileRecord] = {}

    def make(found: dict[str, FileRecord]) -> Manifest:
        records.update(found)
        return sample_manifest(found)

    with BundleWriter(tmp_path / "b") as writer:
        for name, data in CONTENTS.items():
            (writer.folder / name).write_bytes(data)
        writer.finish(make, known={"weights.safetensors": "12" * 32})
    assert sorted(read) == sorted(set(CONTENTS) - {"weights.safetensors"})
    assert records == {**RECORDS, "weights.safetensors": FileRecord(256, "12" * 32)}


def test_an_existing_bundle_is_refused_without_force(made: Path) -> None:
    before = tree(made)
    with pytest.raises(ExportError, match=r"exists: .* or pass --force"):
        BundleWriter(made)
    assert tree(made) == before


@pytest.mark.parametrize("force", [False, True])
def test_force_never_replaces_what_is_no_bundle(tmp_path: Path, force: bool) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"cat")
    file = tmp_path / "letter.txt"
    file.write_text("dear")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    odd = tmp_path / "odd"
    (odd / MANIFEST_FILE).mkdir(parents=True)
    before = tree(tmp_path)
    with pytest.raises(ExportError, match="is a link that leads to itself"):
        BundleWriter(loop, force=force)
    for path in (folder, file, odd):
        with pytest.raises(ExportError, match="exists") as caught:
            BundleWriter(path, force=force)
        assert "or pass --force" not in str(caught.value)
        assert ("is not a bundle" in str(caught.value)) == force
    assert tree(tmp_path) == before
    assert loop.is_symlink()


def test_force_replaces_a_bundle_and_an_empty_folder(made: Path, tmp_path: Path) -> None:
    (made / "leftover").write_text("of the old one")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ExportError, match="or pass --force"):
        BundleWriter(empty)
    for path in (made, empty):
        write_bundle(path, CONTENTS | {"extra": b"new"}, force=True)
        assert "extra" in open_bundle(path, hashes=True).manifest.files
        assert not (path / "leftover").exists()
    assert sorted(tmp_path.iterdir()) == sorted([made, empty])


def test_a_link_is_followed(made: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "current"
    link.symlink_to(made)
    with pytest.raises(ExportError, match=r"current exists: .* or pass --force"):
        BundleWriter(link)
    write_bundle(link, CONTENTS | {"extra": b"new"}, force=True)
    assert "extra" in open_bundle(made, hashes=True).manifest.files
    assert link.is_symlink()
    assert list(link.parent.iterdir()) == [link]
    assert sorted(tmp_path.iterdir()) == sorted([link.parent, made])


def test_a_link_to_nothing_is_followed_to_a_new_folder(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "deep" / "there")
    write_bundle(link)
    assert link.is_symlink()
    open_bundle(tmp_path / "deep" / "there", hashes=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_while_writing_is_not_replaced(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "b"

    def make(records: dict[str, FileRecord]) -> Manifest:
        path.mkdir()
        (path / "other").write_text("somebody else's")
        return sample_manifest(records)

    with pytest.raises(ExportError, match="exists"):
        write_bundle(path, make=make, force=force)
    assert tree(tmp_path) == {"b/other": b"somebody else's"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ExportError, SystemExit])
def test_leaving_early_leaves_nothing_and_the_old_bundle_as_it_was(made: Path, error: type[BaseException]) -> None:
    before = tree(made.parent)

    def make(records: dict[str, FileRecord]) -> Manifest:
        raise error("interrupted")

    with pytest.raises(error):
        write_bundle(made, make=make, force=True)
    assert tree(made.parent) == before
    assert list(made.parent.iterdir()) == [made]


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "new" / "folders" / "b") as writer:
        (writer.folder / "weights.safetensors").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []
    with BundleWriter(tmp_path / "b") as writer:
        (writer.folder / "weights.safetensors").write_bytes(b"half")
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_fails_leaves_the_old_bundle(made: Path) -> None:
    before = tree(made.parent)
    with pytest.raises(BundleError, match="does not list"):
        # The manifest needs files that were not written.
        write_bundle(made, {"weights.safetensors": b"w"}, force=True)
    assert tree(made.parent) == before


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
    monkeypatch.setattr(bundle_writer, "swapped", lambda one, other: False)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(made, CONTENTS | {"extra": b"new"}, force=True)
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
    write_bundle(tmp_path / "b")


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot write there") as caught, BundleWriter(tmp_path / "file" / "b"):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n" * 300, "new/" + "ä" * 128, "n\0n"])
def test_a_name_that_no_folder_can_have_is_one_line_before_the_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match=r"cannot be written: .*: choose another folder") as caught:
        BundleWriter(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    class Usage:
        free = 3_000_000

    def disk_usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage()

    monkeypatch.setattr(bundle_writer.shutil, "disk_usage", disk_usage)
    require_free_space(tmp_path / "a" / "b", 3_000_000)
    require_free_space(tmp_path, 0)
    assert asked == [tmp_path, tmp_path]
    with pytest.raises(ExportError, match="needs 5 MB, 3 MB are free: make room") as caught:
        require_free_space(tmp_path / "a", 5_000_000)
    assert "\n" not in str(caught.value)
