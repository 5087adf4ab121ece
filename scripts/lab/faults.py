"""One command line of mythos-edge in a fork of this process, with something that goes wrong at one of its steps.

A step is what Python reports before it does it (opening, making, renaming and removing below the workplace), and a read
of a file there. Not here: which commands, and what must be left (``break_it``).
"""

import builtins
import errno
import io
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos_edge.exporter import kept_graphs
from mythos_edge.scripts import cli

_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open")
_PATIENCE_S = 600.0
# Beside the workplace, on the same file system.
FILLER = "filler"
CACHE, TEMPORARY = "cache", "tmp"


@dataclass(frozen=True)
class Ran:
    """The exit code of a run (None: it was killed), what it said on stderr, its steps, and how long it took."""

    code: int | None
    said: str
    steps: int
    seconds: float


@dataclass(frozen=True)
class Fault:
    """A thing that goes wrong just before step ``step`` of a run; ``after_s`` kills it by the clock instead."""

    kind: str
    step: int = 0
    after_s: float | None = None
    source: Path = Path()
    seed: int = 0

    def strike(self, folder: Path) -> None:
        """Does it, in the process that runs. Raises OSError for an input or output error."""
        chance = random.Random(self.seed)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "full":
            _fill_disk(folder, left=chance.randrange(200_000))
        elif self.kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (chance.randrange(200_000), resource.RLIM_INFINITY))
        elif self.kind == "lose":
            files = sorted(self.source.iterdir()) if self.source.is_dir() else [self.source]
            chance.choice(files).unlink(missing_ok=True)
        elif self.kind == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class Running:
    """A command line at work in a process of its own in ``folder``, below which all its files are."""

    def __init__(self, argv: Sequence[str], folder: Path, fault: Fault | None = None) -> None:
        self._steps = mmap.mmap(-1, 8)
        self._said = os.memfd_create("said")
        self._fault, self._started = fault, time.monotonic()
        self._status: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _run_in_child(argv, folder, fault, self._said, self._steps)

    def has_ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def wait(self) -> Ran:
        """The run when it has ended. Raises TimeoutError for one that does not."""
        limit = _PATIENCE_S if self._fault is None or self._fault.after_s is None else self._fault.after_s
        while not self.has_ended():
            if time.monotonic() - self._started > limit:
                os.kill(self._pid, signal.SIGKILL)
                self._status = os.waitpid(self._pid, 0)[1]
                if limit == _PATIENCE_S:
                    raise TimeoutError(f"still ran after {limit:.0f} s")
                break
            time.sleep(0.002)
        assert self._status is not None
        seconds = time.monotonic() - self._started
        code = os.waitstatus_to_exitcode(self._status)
        with open(self._said, encoding="utf-8", errors="replace") as said:
            said.seek(0)
            words = said.read()
        steps = int.from_bytes(self._steps[:], "little")
        return Ran(None if code == -signal.SIGKILL else code, words, steps, seconds)


def _run_in_child(argv: Sequence[str], folder: Path, fault: Fault | None, said: int, steps: mmap.mmap) -> None:
    """Runs the command line and ends this process."""
    code = 70
    try:
        os.chdir(folder)
        os.environ[kept_graphs.VARIABLE] = str(folder / CACHE)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder / TEMPORARY)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        _watch(folder, fault, steps)
        code = cli.main(list(argv))
    except BaseException:  # the end of this process is the only way to tell
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _watch(folder: Path, fault: Fault | None, steps: mmap.mmap) -> None:
    """Counts the steps from now on, and lets the fault strike at its own."""
    count, striking = 0, False
    below = f"{folder}{os.sep}"

    def step() -> None:
        nonlocal count, striking
        if striking:
            return
        count += 1
        steps[:] = count.to_bytes(8, "little")
        if fault is not None and fault.after_s is None and count == fault.step:
            striking = True
            try:
                fault.strike(folder)
            finally:
                striking = False

    def heard(event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS and isinstance(args[0], str | bytes | os.PathLike) and _is_below(args[0], below):
            step()

    sys.addaudithook(heard)
    _watch_reads(lambda file: _is_below(_path_of(file), below), step)


def _watch_reads(concerns: Callable[[Any], bool], step: Callable[[], None]) -> None:
    """Makes every read of a file that ``concerns`` says yes to a step."""
    plain_open: Any = io.open

    class Watched(io.FileIO):
        def readinto(self, buffer: Any, /) -> int | None:
            step()
            return super().readinto(buffer)

        def readall(self) -> bytes:
            step()
            return super().readall()

        def read(self, size: int | None = -1, /) -> Any:
            step()
            return super().read(-1 if size is None else size)

    def watched_open(file: Any, mode: str = "r", buffering: int = -1, *given: Any, **named: Any) -> Any:
        if mode not in ("r", "rb", "rt") or named.get("opener") or not concerns(file):
            return plain_open(file, mode, buffering, *given, **named)
        closefd = named.pop("closefd", True)
        raw = Watched(file, "r", closefd)
        if mode == "rb":
            return raw if buffering == 0 else io.BufferedReader(raw)
        return io.TextIOWrapper(io.BufferedReader(raw), *given, **{k: v for k, v in named.items() if k != "opener"})

    io.open = builtins.open = watched_open


def _path_of(file: Any) -> str:
    if isinstance(file, int):
        try:
            return os.readlink(f"/proc/self/fd/{file}")
        except OSError:
            return ""
    return os.fsdecode(file)


def _is_below(path: str | bytes | os.PathLike[Any], below: str) -> bool:
    return os.path.abspath(os.fsdecode(path)).startswith(below)


def _fill_disk(folder: Path, left: int) -> None:
    """Leaves ``left`` bytes on the file system of ``folder``."""
    free = os.statvfs(folder)
    size = free.f_bavail * free.f_frsize - left
    filler = os.open(folder.with_name(FILLER), os.O_WRONLY | os.O_CREAT)
    try:
        if size > 0:
            os.posix_fallocate(filler, 0, size)
    finally:
        os.close(filler)
