"""One bundle, several writers, any of which may be killed at any moment: nothing is lost, and nothing stays beside."""

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killed import at_each_step
from sample_bundle import CONTENTS, tree, write_bundle
from sample_target import NAME, build, content_of, make_buildable

from mythos_edge.exporter.targets import build as build_module
from mythos_edge.exporter.targets.spec import log_of
from mythos_edge.model import bundle_writer
from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import BundleWriter, recover, update_manifest
from mythos_edge.model.errors import BuildError, BundleError, ExportError
from mythos_edge.model.manifest import MANIFEST_FILE
from mythos_edge.model.partial_folders import remove_partials

TESTS = Path(__file__).parents[1]
NEW = {name: data[::-1] + b"new" for name, data in CONTENTS.items()} | {"extra": b"new"}


def _whole(path: Path) -> Bundle:
    """The bundle, of which every file is what its manifest says, and nothing else is there."""
    bundle = open_bundle(path, hashes=True)
    assert sorted(tree(path)) == sorted([*bundle.manifest.files, MANIFEST_FILE])
    return bundle


# --- at once ------------------------------------------------------------------------------------------------------

_ADDS = """
import sys, time
from pathlib import Path
from mythos_edge.model.bundle import (open_bundle)
from mythos_edge.model.manifest import (Preset)
from mythos_edge.model.bundle_writer import update_manifest
bundle = open_bundle(Path(sys.argv[1]))
print(flush=True)
sys.stdin.readline()
for number in range(10):
    preset = Preset("ort-cpu", 1, 0.5, 0.1, 0.9, 1.5, 2.0)
    update_manifest(bundle, presets=lambda now: {**now, f"{sys.argv[2]}-{number}": preset})
"""


def test_eight_writers_at_once_lose_nothing(made: Path) -> None:
    before = _whole(made).manifest
    writers = [
        subprocess.Popen([sys.executable, "-c", _ADDS, str(made), str(index)], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for index in range(8)
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    for writer in writers:
        writer.communicate("go\n", timeout=60)
        assert writer.returncode == 0
    after = _whole(made).manifest
    wanted = {f"{index}-{number}" for index in range(8) for number in range(10)}
    assert set(after.presets) == wanted | set(before.presets)


_BUILDS_OVER_AND_OVER = """
import sys
import time
from pathlib import Path
from sample_target import build
sys.stdin.readline()
for number in range(5):
    build(Path(sys.argv[1]), f"{sys.argv[2]}-{number}", sys.argv[2])
"""


def test_six_builds_at_once_over_and_over_leave_every_target(made: Path) -> None:
    """Each of a target of its own, and again over itself: none takes another's files for leftovers, none is lost."""
    make_buildable(made)
    names = [f"ort-cpu-{index}" for index in range(6)]
    builders = [
        subprocess.Popen([sys.executable, "-c", _BUILDS_OVER_AND_OVER, str(made), name], stdin=subprocess.PIPE,
                         text=True, env={**os.environ, "PYTHONPATH": str(TESTS)})
        for name in names
    ]  # fmt: skip
    for builder in builders:
        assert builder.stdin is not None
        builder.stdin.write("go\n")
        builder.stdin.flush()
    for builder in builders:
        builder.communicate(timeout=120)
        assert builder.returncode == 0
    bundle = _whole(made)
    assert set(bundle.manifest.targets) == {"ort-cpu", *names}
    assert [content_of(bundle, name) for name in names] == [f"{name}-4" for name in names]


def test_a_bundle_without_locks_can_be_changed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos_edge.model.file_locks.fcntl", None)
    assert update_manifest(open_bundle(made), presets={}).manifest.presets == {}
    assert _whole(made).manifest.presets == {}


def test_a_manifest_that_is_held_for_long_is_one_line(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos_edge.model.file_locks._PATIENCE_S", 0.1)
    opened = open_bundle(made)
    with (
        bundle_writer.changing(opened),
        pytest.raises(BundleError, match="cannot be changed: another process has held its lock"),
    ):
        update_manifest(opened, presets={})
    update_manifest(opened, presets={})


@pytest.mark.parametrize("next_one", ["a change", "a build"])
def test_what_a_killed_change_left_is_removed_by_the_next(made: Path, next_one: str) -> None:
    make_buildable(made)
    (made / f".{MANIFEST_FILE}.partial-1").write_text("{")
    if next_one == "a change":
        update_manifest(open_bundle(made), presets={})
    else:
        build(made, "new")
    _whole(made)


# --- a target that is built again ---------------------------------------------------------------------------------

_BUILDS = """
from pathlib import Path
from sample_target import build
build(Path(PLACE), "new")
"""


@pytest.fixture
def built(made: Path) -> Path:
    """A bundle with a target and a preset of it, beside one of another target."""
    make_buildable(made)
    bundle = build(made, "old")
    own = dataclasses.replace(bundle.manifest.presets["knee"], target=NAME)
    update_manifest(bundle, presets=lambda presets: {**presets, "own": own})
    return made


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_a_build_over_another_loses_nothing_whenever_it_ends(built: Path, how: str) -> None:
    before = Path(shutil.copytree(built, built.with_name("before")))
    ends = set()
    for _ in at_each_step(_BUILDS.replace("PLACE", repr(str(built))), built.parent, how):
        found = content_of(open_bundle(built, hashes=True))
        # What it left is removed by the next build of whatever target.
        remove_partials(built, recover=lambda left: recover(left, built))
        bundle = _whole(built)
        assert content_of(bundle) == found
        assert set(bundle.manifest.presets) == ({"knee", "own"} if found == "old" else {"knee"})
        ends.add(found)
        shutil.rmtree(built)
        shutil.copytree(before, built)
    assert ends == {"old", "new"}
    assert content_of(_whole(built)) == "new"
    # A third is free to take the names of the first.
    assert content_of(build(built, "old again")) == "old again"
    assert f"step.{NAME}.onnx" in _whole(built).manifest.files


def test_a_target_without_a_log_has_none(built: Path) -> None:
    bundle = open_bundle(built)
    assert log_of(bundle, NAME) == built / f"build.{NAME}.log"
    assert log_of(bundle, "ort-cpu") is None


def test_a_build_of_the_same_is_the_same_and_mends_what_is_damaged(built: Path) -> None:
    before = open_bundle(built).manifest.files
    (built / f"weights.{NAME}.safetensors").write_text("damaged")
    (built / f"step.{NAME}.onnx").unlink()
    assert build(built, "old").manifest.files == before
    _whole(built)


@pytest.mark.parametrize("content", ["slower", "faster"])
def test_the_same_target_built_by_two_at_once_is_of_one_of_them(
    made: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    make_buildable(made)

    def overtaken(bundle: Bundle, folder: Path, file: str) -> str:
        monkeypatch.undo()
        name = build_module._settled(bundle, folder, file)
        build(made, "faster")
        return name

    monkeypatch.setattr(build_module, "_settled", overtaken)
    if content == "slower":
        with pytest.raises(BuildError, match=f"{NAME} was built by another process meanwhile: use it, or build again"):
            build(made, content)
    else:
        build(made, content)
    assert content_of(_whole(made)) == "faster"


def test_an_export_during_a_build_ends_the_build(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def exported(bundle: Bundle, folder: Path, file: str) -> str:
        monkeypatch.undo()
        name = build_module._settled(bundle, folder, file)
        kept = Path(shutil.copytree(folder, built.with_name("kept")))
        write_bundle(built, NEW, force=True)
        # As where the folder is filled, in which partial folders stay.
        shutil.copytree(kept, folder)
        return name

    monkeypatch.setattr(build_module, "_settled", exported)
    with pytest.raises(BuildError, match="was exported anew during the build: build again"):
        build(built, "new")
    assert set(_whole(built).manifest.files) == set(NEW)


# --- an export ----------------------------------------------------------------------------------------------------

_EXPORTS = """
from pathlib import Path
from sample_bundle import CONTENTS, write_bundle
NEW = {name: data[::-1] + b"new" for name, data in CONTENTS.items()} | {"extra": b"new"}
write_bundle(Path(PLACE), NEW, force=True)
"""


# As where the system cannot swap two folders in one step.
_NO_SWAP = """
from mythos_edge.model import bundle_writer
bundle_writer.swapped = lambda one, other: False
"""


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("place", [".", "beside", "beside, in two steps"])
def test_an_export_over_another_loses_nothing_whenever_it_ends(
    made: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    how: str,
) -> None:
    """Beside it is replaced; the folder one works in is filled, as a mount point is."""
    (made / "leftover").write_text("of the old one")
    before = Path(shutil.copytree(made, tmp_path_factory.mktemp("before") / "some.bundle"))
    ends = set()
    program = _EXPORTS.replace("PLACE", repr("." if place == "." else str(made)))
    program = _NO_SWAP + program if place == "beside, in two steps" else program
    for _ in at_each_step(program, made if place == "." else tmp_path, how):
        # The next export takes up what a killed one was at, even where it then does nothing.
        if made.exists():
            monkeypatch.chdir(made if place == "." else tmp_path)
        with BundleWriter(Path() if place == "." else made, force=True):
            pass
        found = open_bundle(made, hashes=True).manifest.files
        ends.add("extra" in found)
        assert set(tree(made)) == {*found, MANIFEST_FILE, *({"leftover"} if "extra" not in found else ())}
        assert list(tmp_path.iterdir()) == [made]
        for path in made.iterdir():
            path.unlink()
        shutil.copytree(before, made, dirs_exist_ok=True)
    assert ends == {True, False}
    assert set(_whole(made).manifest.files) == set(NEW)


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_an_export_into_an_empty_folder_that_is_filled_leaves_a_bundle_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lost+found").mkdir()
    for _ in at_each_step(_EXPORTS.replace("PLACE", "'.'").replace(", force=True", ""), tmp_path, how):
        whole = (tmp_path / MANIFEST_FILE).exists()
        with BundleWriter(Path(), force=whole):
            pass
        assert whole == (tmp_path / MANIFEST_FILE).exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
            ["lost+found", *([*NEW, MANIFEST_FILE] if whole else ())]
        )
        for path in tmp_path.iterdir():
            if path.name != "lost+found":
                path.unlink()
    open_bundle(tmp_path, hashes=True)


@pytest.mark.parametrize("number", [16, 18])
def test_a_bundle_that_the_system_does_not_let_be_renamed_is_filled(
    made: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """EBUSY: a mount point that nothing told before. EXDEV: a folder of a container's image."""
    rename = Path.rename

    def fixed(path: Path, target: Path) -> Path:
        if path == made:
            raise OSError(number, "cannot be renamed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fixed)
    monkeypatch.setattr(bundle_writer, "swapped", lambda one, other: False)
    inode = made.stat().st_ino
    write_bundle(made, NEW, force=True)
    assert set(_whole(made).manifest.files) == set(NEW)
    assert made.stat().st_ino == inode
    assert list(made.parent.iterdir()) == [made]


def test_a_folder_one_works_in_is_filled_if_it_is_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    write_bundle(Path("."))
    _whole(tmp_path / "b")
    assert Path.cwd().samefile(tmp_path / "b")
    with pytest.raises(ExportError, match=r"^\. exists: choose another folder or pass --force"):
        BundleWriter(Path("."))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExportError, match=r"^\. exists and is not a bundle"):
        BundleWriter(Path("."), force=True)


_MOUNTED = """
set -e
mkdir place source
mount --bind source place
printf %s "$1" > program.py
"$2" program.py
test ! -e place/lost
mountpoint -q place
ls -A place
"""


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="mounting needs root; a folder that cannot be renamed is tested above without",
)
@pytest.mark.parametrize("kind", ["mount --bind source place", "mount -t tmpfs none place"])
def test_a_mount_point_is_filled(tmp_path: Path, kind: str) -> None:
    program = _EXPORTS.replace("PLACE", "'place'").replace(", force=True", "")
    ran = subprocess.run(
        ["unshare", "-m", "bash", "-c", _MOUNTED.replace("mount --bind source place", kind), "-",
         program + program.replace("NEW)", "CONTENTS, force=True)"), sys.executable],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.split()) == sorted([*CONTENTS, MANIFEST_FILE])


_READS = """
import sys
import time
from pathlib import Path
from mythos_edge.model.bundle import open_bundle
place, found = Path(sys.argv[1]), set()
print(flush=True)
while not Path(sys.argv[2]).exists():
    found.add("extra" in open_bundle(place).manifest.files)
print(*sorted(found))
"""


def test_a_reader_finds_the_old_or_the_new_bundle_at_any_moment(made: Path, tmp_path: Path) -> None:
    end = tmp_path / "end"
    reader = subprocess.Popen(
        [sys.executable, "-c", _READS, str(made), str(end)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    for number in range(150):
        write_bundle(made, CONTENTS if number % 2 else NEW, force=True)
        time.sleep(0.01)
    end.touch()
    output, errors = reader.communicate(timeout=60)
    assert (output.split(), errors) == (["False", "True"], "")
