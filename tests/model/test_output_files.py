"""Outputs that are a file, a link, a device, a FIFO, an open descriptor, or no place to write to."""

import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from killed import at_each_step

from mythos_edge.model import file_locks, output_files
from mythos_edge.model.errors import UsageError
from mythos_edge.model.output_files import (
    check_output,
    check_output_folder,
    is_standard_output,
    remove_partials,
    writing,
)


def _write(path: Path, data: bytes = b"new") -> None:
    check_output(path, "it")
    with writing(path, "it") as file:
        file.write(data)


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    _write(tmp_path / "new")
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "new").read_bytes() == b"new"
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "usual"]


def test_a_replaced_file_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(0o640)
    _write(tmp_path / "old")
    assert (tmp_path / "old").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "old").stat().st_mode) == 0o640


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").write_bytes(b"old")
    (tmp_path / "second").symlink_to("far/file")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    _write(tmp_path / "first")
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "second").is_symlink()
    assert (tmp_path / "far" / "file").read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to("far/made")
    _write(tmp_path / "dangling")
    assert (tmp_path / "far" / "made").read_bytes() == b"new"
    assert sorted(file.name for file in (tmp_path / "far").iterdir()) == ["file", "made"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_there_stays_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "old").write_bytes(b"old")
    for name in ("old", "absent"):
        with pytest.raises(error):
            _write_half(tmp_path / name, error)
    assert [file.name for file in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def _write_half(path: Path, error: type[BaseException]) -> None:
    with writing(path, "it") as file:
        file.write(b"half")
        raise error


def test_devices_and_fifos_are_written_through(tmp_path: Path) -> None:
    null = os.stat(os.devnull)
    (tmp_path / "link").symlink_to(os.devnull)
    for path in (Path(os.devnull), tmp_path / "link"):
        _write(path)
    assert os.stat(os.devnull).st_rdev == null.st_rdev
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    reader.start()
    _write(fifo)
    reader.join(timeout=30)
    assert got == [b"new"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("mode", ["wb", "ab"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_open_descriptors_are_written_to_where_they_are(tmp_path: Path, name: str, mode: str) -> None:
    """An archive, whose writer likes to go back: not possible in a file that is appended to."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    program = """
import os, sys
from pathlib import Path
import numpy as np
from mythos_edge.model.output_files import check_output, is_standard_output, writing
path = Path(sys.argv[1])
assert is_standard_output(path)
check_output(path, "it")
os.write(1, b"before")
with writing(path, "it") as file:
    np.savez(file, a=np.arange(3))
os.write(1, b"behind")
"""
    output = tmp_path / "out"
    output.write_bytes(b"first:")
    inode = output.stat().st_ino
    with output.open(mode) as file:
        command = [sys.executable, "-c", program, tmp_path / name if name == "link" else name]
        subprocess.run(command, stdout=file, check=True, timeout=60)
    made = output.read_bytes()
    assert output.stat().st_ino == inode
    start = b"first:before" if mode == "ab" else b"before"
    assert made.startswith(start + b"PK")
    assert made.endswith(b"behind")
    (tmp_path / "cut").write_bytes(made.removeprefix(start).removesuffix(b"behind"))
    with np.load(tmp_path / "cut") as loaded:
        assert loaded["a"].tolist() == [0, 1, 2]


def test_only_where_this_process_prints_is_standard_output(tmp_path: Path) -> None:
    assert not is_standard_output(tmp_path / "absent")
    assert not is_standard_output(tmp_path)
    assert not is_standard_output(Path(os.devnull))


LONG = "n" * 300


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "is a folder"),
        ("to_folder", "is a folder"),
        ("absent/file", "No such file or directory"),
        ("file/below", "Not a directory"),
        ("read_only", "Permission denied"),
        ("loop", "Too many levels of symbolic links"),
        (LONG, "File name too long"),
        (f"{LONG}/file", "File name too long"),
        ("zero\0byte", "null byte"),
        ("/dev/fd/987", "Bad file descriptor"),
    ],
)
def test_no_place_to_write_is_known_before(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "to_folder").symlink_to("folder")
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "read_only").write_bytes(b"old")
    (tmp_path / "read_only").chmod(0o444)
    before = sorted(tmp_path.iterdir())
    if name == "read_only" and os.geteuid() == 0:
        reason = ""  # may write everything
    for attempt in (check_output, _write):
        if reason:
            with pytest.raises(UsageError) as caught:
                attempt(tmp_path / name, "the scores")
            assert str(caught.value).startswith(f"{tmp_path / name}: cannot write ")
            assert reason in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    for name in ("n" * 255, "ä" * 127):
        _write(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"new"


def test_a_full_device_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="/dev/full: cannot write it: No space left on device"):
        _write(Path("/dev/full"), b"x" * 100_000)
    with pytest.raises(UsageError, match="cannot write it: No space left"), writing(Path("/dev/full"), "it") as file:
        np.savez(file, a=np.arange(100_000))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(UsageError, match="cannot write it: File too large"), writing(tmp_path / "a", "it") as file:
            np.savez(file, a=np.arange(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_tried_out_and_not_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    for good in ("there", "link", "new", "new/below"):
        check_output_folder(tmp_path / good, "the curve")
    for name, reason in {
        "file": "Not a directory",
        "file/below": "Not a directory",
        LONG: "File name too long",
        f"a/{LONG}": "File name too long",
        "a\0b": "null byte",
    }.items():
        with pytest.raises(UsageError, match=f"cannot write the curve: .*{reason}"):
            check_output_folder(tmp_path / name, "the curve")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link", "there"]


_SAVES = """
from pathlib import Path
from mythos_edge.model.output_files import writing
with writing(Path(PLACE), "it") as file:
    file.write(b"new")
"""


@pytest.mark.parametrize("how", ["kill", "interrupt"])
@pytest.mark.parametrize("before", [b"old", None])
def test_whenever_a_writer_ends_the_next_one_leaves_nothing_beside(
    tmp_path: Path, before: bytes | None, how: str
) -> None:
    path = tmp_path / "saved"
    left = 0
    if before is not None:
        path.write_bytes(before)
    for _ in at_each_step(_SAVES.replace("PLACE", repr(str(path))), tmp_path, how):
        assert (path.read_bytes() if path.exists() else None) in (before, b"new")
        left += len([file for file in tmp_path.iterdir() if file != path])
        _write(path, b"next")
        assert list(tmp_path.iterdir()) == [path]
        path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert path.read_bytes() == b"new"
    assert left > 0 or how == "interrupt"


def test_a_writer_at_work_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    with writing(path, "it") as first:
        first.write(b"first")
        _write(path, b"second")
        remove_partials(path)
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / ("long [name] " * 5)
    begin = f".{path.name[:32]}.partial-"
    others = [tmp_path / name for name in ("a", f".{path.name}", ".long name.partial-01234567", f"{begin}12", begin)]
    for other in (*others, tmp_path / f"{begin}01234567"):
        other.touch()
    folder = tmp_path / f"{begin}89abcdef"
    folder.mkdir()
    remove_partials(path)
    assert sorted(tmp_path.iterdir()) == sorted([*others, folder])


def test_a_new_file_that_is_taken_for_a_leftover_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks for leftovers may see the file before its writer has locked it."""
    taken: list[Path] = []

    def first_taken(path: Path) -> int | None:
        if not taken:
            path.unlink()
        taken.append(path)
        return file_locks.try_lock(path) if len(taken) > 1 else None

    monkeypatch.setattr(output_files, "try_lock", first_taken)
    _write(tmp_path / "new")
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
    monkeypatch.setattr(output_files, "try_lock", lambda path: None)
    with pytest.raises(UsageError, match="cannot write it: File exists"), writing(tmp_path / "other", "it"):
        pass
