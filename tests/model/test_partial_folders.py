"""A partial folder is its writer's while the writer lives, wherever that is, and nobody's afterwards."""

import errno
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mythos_edge.model import file_locks
from mythos_edge.model.partial_folders import PartialFolder, is_partial, remove_partials

_PID = 2**22 + 7  # beyond what Linux gives: no process of this machine
_WRITER = f"""
import os, subprocess, sys
from pathlib import Path
os.getpid = lambda: {_PID}
from mythos_edge.model.partial_folders import PartialFolder
folder = PartialFolder(Path(sys.argv[1]), "b")
(folder.path / "half").write_text("half")
child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
print(folder.path, child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], Path]]]:
    """Starts a writer whose pid says nothing here, as one of another container; what it starts outlives it."""
    writers, children = [], []

    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        writers.append(process)
        assert process.stdout is not None
        path, child = process.stdout.readline().split()
        children.append(int(child))
        return process, Path(path)

    yield start
    for process in writers:
        process.kill()
        process.communicate(timeout=30)
    for child in children:
        subprocess.run(["kill", str(child)], check=True)


def test_a_writer_of_another_container_keeps_its_folder_until_it_is_killed(
    tmp_path: Path, elsewhere: Callable[[], tuple[subprocess.Popen[str], Path]]
) -> None:
    writer, folder = elsewhere()
    assert folder.name == f".b.partial-{_PID}"
    remove_partials(tmp_path)
    remove_partials(tmp_path, "b")
    own = PartialFolder(tmp_path, "b")
    assert (folder / "half").read_text() == "half"
    own.remove()
    writer.kill()
    writer.wait(30)
    # What it had started is still there, and holds nothing.
    remove_partials(tmp_path, "b")
    assert list(tmp_path.iterdir()) == []


def test_equal_pids_of_two_containers_do_not_meet(
    tmp_path: Path, elsewhere: Callable[[], tuple[subprocess.Popen[str], Path]]
) -> None:
    (_, first), (_, second) = elsewhere(), elsewhere()
    assert first != second
    assert all((folder / "half").is_file() and is_partial(folder) for folder in (first, second))


def test_two_of_one_process_do_not_meet(tmp_path: Path) -> None:
    first, second = PartialFolder(tmp_path, "b"), PartialFolder(tmp_path, "b")
    assert first.path.is_dir()
    assert second.path.is_dir()
    assert first.path != second.path
    for folder in (first, second, second):
        folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_is_recovered_before_it_is_removed(tmp_path: Path) -> None:
    for name in (".a.partial-1", ".b.partial-1-abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.lock").touch()
    seen: list[str] = []
    PartialFolder(tmp_path, "b", recover=lambda left: seen.append(left.name)).remove()
    assert seen[0] == ".b.partial-1-abcd"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.partial-1", ".a.partial-1.lock"]
    PartialFolder(tmp_path, "b", of_any=True).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_without_a_folder_is_removed_and_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / ".b.partial-1.lock").touch()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo").touch()
    (tmp_path / ".b.partial-999999999").symlink_to(mine)
    remove_partials(tmp_path)
    assert (mine / "photo").is_file()
    assert not (tmp_path / ".b.partial-1.lock").exists()


def test_a_folder_with_a_very_long_name_has_a_partial_one(tmp_path: Path) -> None:
    name = "ä" * 127
    folder = PartialFolder(tmp_path, name)
    assert folder.path.is_dir()
    folder.remove()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_without_locks_nothing_of_others_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    class NoLocks:
        LOCK_EX, LOCK_NB = 2, 4

        @staticmethod
        def flock(opened: int, what: int) -> None:
            raise OSError(number, "no locks here")

    (tmp_path / ".b.partial-1").mkdir()
    (tmp_path / ".b.partial-1.lock").touch()
    monkeypatch.setattr(file_locks, "fcntl", None if number is None else NoLocks)
    folder = PartialFolder(tmp_path, "b")
    assert folder.path.is_dir()
    folder.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.partial-1", ".b.partial-1.lock"]


def test_who_finds_a_leftover_first_removes_it_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes the lock, removes everything and lets go, between the opening of the lock file and its locking."""
    left = tmp_path / ".b.partial-1"
    left.mkdir()
    (tmp_path / ".b.partial-1.lock").touch()
    flock = file_locks.fcntl.flock

    def late(opened: int, what: int) -> None:
        (tmp_path / ".b.partial-1.lock").unlink(missing_ok=True)
        (left / "of a new writer").write_text("kept")
        flock(opened, what)

    monkeypatch.setattr(file_locks.fcntl, "flock", late)
    remove_partials(tmp_path)
    assert (left / "of a new writer").is_file()


def test_a_writer_whose_new_locks_others_look_into_takes_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who removes leftovers locks what it finds, for a moment also a lock that was made just now."""
    met = []

    def try_lock(path: Path, create: bool = False) -> int | None:
        met.append(path)
        return None if len(met) <= 4 else file_locks.try_lock(path, create)

    monkeypatch.setattr("mythos_edge.model.partial_folders.try_lock", try_lock)
    own = PartialFolder(tmp_path, "b")
    assert own.path.is_dir()
    assert len(set(met)) == 5
    own.remove()
    assert list(tmp_path.iterdir()) == []
