"""Gives every reader of the package inputs that a stranger could have made, guided by what code they reach.

    python -m mythos_edge.scripts.lab.fuzz -n 1000000 --seed 0
    python -m mythos_edge.scripts.lab.fuzz --reader manifest --reader pickle -n 100000
    python -m mythos_edge.scripts.lab.fuzz --reader manifest --input FILE

Inputs are valid ones that were changed (``fuzz_mutations``); those that reach new lines of this package are changed
further. A reader must accept an input or raise an error of ours that is one line. It may take 5 s of the processor and
512 MB, touch nothing outside its folder, start nothing and connect to nobody. Each reader runs in a process of its
own, which is started again when an input ends it. Whatever breaks a rule is kept as a small file. Prints a table, then
one line of JSON. Linux only; needs the repository, as valid inputs are those of its tests.
"""

import argparse
import json
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

from mythos_edge.exporter.export import export_bundle
from mythos_edge.model.checkpoint import open_checkpoint
from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.scripts.console import printable_line
from mythos_edge.scripts.lab.fuzz_inputs import FIXTURES
from mythos_edge.scripts.lab.fuzz_readers import OUTSIDE, READERS, Reader, furnish

MOST_SECONDS, MOST_BYTES = 5.0, 512 << 20
# Of an error: what fits a terminal, with a path or two in it.
_MOST_MESSAGE = 2000
# Nothing heard for so long: the process hangs in native code.
_SILENT_S = 40.0
_TELL_EVERY_S = 1.0
_KEPT_OF_A_KIND = 2
# The descriptor through which a child tells: what libraries print is not of it.
_TOLD = 100
# What code an input reaches is looked at for one of so many, as that takes longer than most inputs.
_TRACED = 8
_PACKAGE = Path(__file__).resolve().parents[2]
_PATHS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
          "os.chown", "os.listdir", "os.scandir", "os.utime"}  # fmt: skip
_NEVER = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "socket.connect",
          "socket.bind", "socket.getaddrinfo", "socket.gethostby", "pty.", "urllib.", "ctypes.dlopen")  # fmt: skip


@dataclass
class Ran:
    """Figures of one reader: inputs by how they ended, and the worst of them."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    ended: int = 0
    worst_s: float = 0.0
    worst_mb: float = 0.0
    places: int = 0
    restarts: int = 0
    failures: dict[str, int] = field(default_factory=dict)


class _TooSlow(BaseException):
    """The time of an input is over."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Give every reader hostile inputs.")
    parser.add_argument("--reader", action="append", choices=READERS, help="a reader alone (default: all, by share)")
    parser.add_argument("-n", type=int, default=10_000, help="inputs of all readers together (default: 10000)")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--failures", type=Path, default=Path("out/fuzz"), help="where inputs that break a rule go")
    parser.add_argument("--input", type=Path, help="read this input alone, and show what comes of it")
    args = parser.parse_args(argv)
    names = args.reader or list(READERS)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "seed.bundle"
        if os.waitpid(_forked(lambda: _make_bundle(bundle), 1), 0)[1]:
            return 1
        if args.input is not None:
            _read_one(READERS[names[0]], args.input.read_bytes(), Path(folder), bundle)
            return 0
        total = sum(READERS[name].share for name in names)
        print(f"{'reader':18}{'inputs':>9}{'refused':>9}{'accepted':>10}{'ended':>7}{'worst s':>9}{'worst MB':>10}"
              f"{'places':>8}{'failures':>10}")  # fmt: skip
        found = {}
        for name in names:
            count = round(args.n * READERS[name].share / total)
            found[name] = ran = run(READERS[name], count, args.seed, bundle, args.failures)
            print(f"{name:18}{ran.inputs:9}{ran.refused:9}{ran.accepted:10}{ran.ended:7}{ran.worst_s:9.2f}"
                  f"{ran.worst_mb:10.1f}{ran.places:8}{sum(ran.failures.values()):10}", flush=True)  # fmt: skip
            for what, times in ran.failures.items():
                print(f"    {times} x {what}", flush=True)
    values = {name: asdict(ran) for name, ran in found.items()}
    failed = sum(sum(ran.failures.values()) for ran in found.values())
    inputs = sum(ran.inputs for ran in found.values())
    print(json.dumps({"seed": args.seed, "inputs": inputs, "failures": failed, "readers": values}))
    return 1 if failed else 0


def _make_bundle(bundle: Path) -> None:
    """A small bundle whose tokenizer knows every id of its model as a number."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    with open_checkpoint(FIXTURES / "gqa-small") as checkpoint:
        size = checkpoint.config.looped.vocab_size
        tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(size)}, unk_token="0"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(bundle.parent / "tokenizer.json"))
        export_bundle(checkpoint, bundle, tokenizer=bundle.parent / "tokenizer.json")


def run(reader: Reader, count: int, seed: str, bundle: Path, failures: Path) -> Ran:
    """Gives ``count`` inputs to a reader, in as many processes as it takes."""
    total, kinds = Ran(), Counter[str]()
    with tempfile.TemporaryDirectory() as work:
        while total.inputs < count:
            job = {
                "name": reader.name,
                "start": total.inputs,
                "count": count,
                "seed": seed,
                "bundle": str(bundle),
                "work": work,
            }
            told, why = _watched(job)
            for name in ("inputs", "refused", "accepted", "ended"):
                setattr(total, name, getattr(total, name) + told.get(name, 0))
            total.worst_s = max(total.worst_s, told.get("worst_s", 0.0))
            total.worst_mb = max(total.worst_mb, told.get("worst_mb", 0.0))
            total.places = max(total.places, told.get("places", 0))
            kinds.update(told.get("failures", {}))
            for what, data in told.get("kept", []):
                _keep(failures, reader, what, bytes.fromhex(data))
            if total.inputs >= count and why is None:
                break
            total.restarts += 1
            if why is not None:
                kinds[why] += 1
                current = Path(work) / "current"
                _keep(failures, reader, why, current.read_bytes() if current.exists() else b"")
                total.inputs = int((Path(work) / "number").read_text() or 0) + 1
    total.failures = dict(kinds)
    return total


def _keep(folder: Path, reader: Reader, what: str, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in folder.glob(f"{reader.name}-*"))
    (folder / f"{reader.name}-{number}").write_bytes(data)
    with (folder / "failures.txt").open("a", encoding="utf-8") as file:
        file.write(f"{reader.name}-{number}: {what}\n")


def _watched(job: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The last figures of a child, and why it ended before its time, if it did."""
    reading, writing = os.pipe()
    child = _forked(lambda: _child(**job), writing)
    os.close(writing)
    told: dict[str, Any] = {}
    why = None
    with os.fdopen(reading, "rb") as lines:
        while True:
            if not select.select([lines], [], [], _SILENT_S)[0]:
                os.kill(child, signal.SIGKILL)
                why = f"hangs: nothing in {_SILENT_S:g} s"
            line = lines.readline()
            if not line.endswith(b"\n"):
                break
            kept = told.get("kept", [])
            told = json.loads(line)
            told["kept"] = kept + told["kept"]
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if why is None and code < 0:
        why = f"died of {signal.Signals(-code).name}"
    elif why is None and code > 0:
        why = f"ended with exit code {code}"
    return told, why


def _forked(work: Callable[[], object], told: int) -> int:
    """The number of a process that does the work, with all that is imported here; what it tells goes to ``told``.

    Nothing runs in this process that a fork would break: whatever starts threads is done in such a process.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        errors = os.fdopen(os.dup(2), "w")
        os.dup2(told, _TOLD)
        with open(os.devnull, "wb") as nowhere:
            for descriptor in (1, 2):
                os.dup2(nowhere.fileno(), descriptor)
        try:
            work()
            code = 0
        except BaseException:  # to be seen, and nothing of this process is to go on here
            traceback.print_exc(file=errors)
            errors.flush()
    finally:
        os._exit(code)


# --- in the child -------------------------------------------------------------------------------------------------


class _Coverage:
    """The pairs of lines of this package, one run after the other, in any thread."""

    def __init__(self) -> None:
        self._ours: dict[CodeType, bool] = {}
        self.seen: set[tuple[CodeType, int, int]] = set()
        self._lines: dict[FrameType, int] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            file = code.co_filename
            ours = self._ours[code] = "mythos_edge" in file and "/lab/" not in file
        return self._local(code) if ours else None

    def _local(self, code: CodeType) -> Callable[..., Any]:
        before, seen = 0, self.seen

        def local(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal before
            seen.add((code, before, frame.f_lineno))
            before = frame.f_lineno
            return local

        return local

    @contextmanager
    def on(self) -> Iterator[None]:
        sys.settrace(self.trace)
        try:
            yield
        finally:
            sys.settrace(None)


class _Guard:
    """Hears of every file, process and connection, and notes what an input may not have."""

    def __init__(self, folder: Path, starts: bool, follows: bool) -> None:
        self._within = os.path.realpath(folder) + os.sep
        # Modules are imported when they are needed first.
        roots = {sys.prefix, sys.base_prefix, str(_PACKAGE), *sys.path, *filter(None, (os.environ.get("PYTHONPATH"),))}
        self._code = tuple(os.path.realpath(root) + os.sep for root in roots if root)
        self._starts = starts
        # What may be read besides.
        self._more = {os.path.realpath(folder.parent / OUTSIDE)} if follows else set()
        self.active, self.found = False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in _PATHS:
            for path in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
                if isinstance(path, str | bytes | os.PathLike) and not self._allowed(event, path, arguments):
                    self.found.append(f"{event} of {os.fsdecode(path)[:100]}")
        elif event.startswith(_NEVER) and not self._starts:
            self.found.append(f"{event} {arguments[:1]!r:.100}")

    def _allowed(self, event: str, path: Any, arguments: tuple[Any, ...]) -> bool:
        try:
            place = os.path.realpath(os.fsdecode(path))
        except (OSError, ValueError):
            return True  # no such name can be opened
        if (place + os.sep).startswith(self._within):
            return True
        writes = event == "open" and len(arguments) > 2 and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        reads = event in ("open", "os.listdir", "os.scandir") and not writes
        if place == os.devnull or (reads and place in self._more):
            return True
        return reads and place.startswith((*self._code, "/proc/self/", "/sys/devices/system/", "/usr/share/zoneinfo"))


class _Child:
    """One reader at work."""

    def __init__(self, name: str, seed: str, bundle: Path, work: Path) -> None:
        self._reader, self._seed, self._work = READERS[name], seed, work
        folder = Path(tempfile.mkdtemp(dir=work))
        furnish(folder)
        self._read, self._seeds = self._reader.open(folder, bundle)
        self._corpus = [*self._seeds, *(path.read_bytes() for path in sorted((work / "kept").glob("*")))]
        self._ran, self._coverage = Ran(), _Coverage()
        self._kept: list[tuple[str, str]] = []
        self._kinds = Counter[str]()
        self._guard = _Guard(folder, self._reader.ends, self._reader.follows)
        threading.settrace(self._coverage.trace)
        for number in (signal.SIGPROF, signal.SIGALRM):
            signal.signal(number, _too_slow)
        (work / "kept").mkdir(exist_ok=True)

    def run(self, start: int, count: int) -> None:
        for data in self._seeds:
            self._one(data)  # imports what is imported late
        self._corpus_coverage()
        self._ran, self._kinds = Ran(), Counter()
        self._kept.clear()
        baseline = _peak_bytes()
        told = time.monotonic()
        current, number = (os.open(self._work / name, os.O_RDWR | os.O_CREAT) for name in ("current", "number"))
        for at in range(start, count):
            data = self._next(at)
            for descriptor, content in ((current, data), (number, str(at).encode())):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, content, 0)
            self._one(data, traced=at % _TRACED == 0)
            self._ran.inputs += 1
            grown = _peak_bytes() - baseline
            self._ran.worst_mb = max(self._ran.worst_mb, grown / 2**20)
            if grown > MOST_BYTES:
                self._fail(f"took {grown >> 20} MB", data)
                self._tell()
                os._exit(0)  # the next one begins with as little memory as this one did
            if time.monotonic() > told + _TELL_EVERY_S:
                told = time.monotonic()
                self._tell()
        self._tell()

    def _corpus_coverage(self) -> None:
        for data in self._corpus[len(self._seeds) :]:
            self._one(data)

    def _next(self, at: int) -> bytes:
        random = Random(f"{self._seed}/{self._reader.name}/{at}")
        pool = self._seeds if random.random() < 0.2 else self._corpus
        return self._reader.mutate(random, random.choice(pool), random.choice(self._corpus))

    def _one(self, data: bytes, traced: bool = True) -> None:
        before = len(self._coverage.seen)
        self._guard.found.clear()
        started = time.process_time()
        # Of the processor, for others may keep it busy; who waits for something is ended, too.
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, 4 * MOST_SECONDS)
        try:
            what = self._outcome(data, traced)
        except _TooSlow:
            what = None if self._reader.ends else f"took longer than {MOST_SECONDS:g} s"
            self._ran.ended += 1
        finally:
            for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(timer, 0)
            self._guard.active = False
        self._ran.worst_s = max(self._ran.worst_s, time.process_time() - started)
        if what is None and self._guard.found:
            what = f"touched what is not its own: {self._guard.found[0]}"
        if what is not None:
            self._fail(what, data)
        self._ran.places = len(self._coverage.seen)
        if self._ran.places > before and len(data) < 200_000:
            self._corpus.append(data)
            (self._work / "kept" / f"{len(self._corpus):06}-{os.getpid()}").write_bytes(data)

    def _outcome(self, data: bytes, traced: bool) -> str | None:
        """Reads an input; says which rule that broke, if any."""
        try:
            self._guard.active = True
            with self._coverage.on() if traced else nullcontext():
                self._read(data)
            self._ran.accepted += 1
        except MythosEdgeError as error:
            self._ran.refused += 1
            message = printable_line(str(error))
            controls = any(unicodedata.category(one) == "Cc" for one in message)
            # Characters that would harm a terminal are shown by several, which are not counted.
            if not message or len(str(error)) > _MOST_MESSAGE or controls:
                return f"told badly ({len(message)} characters): {_place_of(error)} {message[:60]}"
        except _TooSlow:
            raise
        except BaseException as error:  # all that is no error of ours is what is looked for
            return f"raised {type(error).__name__} at {_place_of(error)}: {' '.join(str(error).split())[:100]}"
        return None

    def _fail(self, what: str, data: bytes) -> None:
        what = printable_line(what).encode(errors="backslashreplace").decode()
        kind = what.partition(": ")[0]
        self._kinds[kind] += 1
        if self._kinds[kind] <= _KEPT_OF_A_KIND:
            self._kept.append((what, data.hex()))

    def _tell(self) -> None:
        ran = asdict(self._ran) | {"failures": dict(self._kinds), "kept": self._kept}
        with os.fdopen(os.dup(_TOLD), "wb") as file:
            file.write(json.dumps(ran).encode() + b"\n")
        self._kept.clear()


def _place_of(error: BaseException) -> str:
    """The last line of this package that an error passed."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/lab/" not in frame.filename]
    ours = [frame for frame in frames if "mythos_edge" in frame.filename] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise _TooSlow


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _child(name: str, start: int, count: int, seed: str, bundle: str, work: str) -> None:
    child = _Child(name, seed, Path(bundle), Path(work))
    own = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    # Peaks are measured; this keeps the machine from harm, and a template's memory as its process does.
    most = own + MOST_BYTES * (1 if READERS[name].ends else 3)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    child.run(start, count)


def _read_one(reader: Reader, data: bytes, folder: Path, bundle: Path) -> None:
    (folder / "one").mkdir()
    furnish(folder / "one")
    read, _ = reader.open(folder / "one", bundle)
    started = time.perf_counter()
    try:
        print(f"accepted: {read(data)}")
    except MythosEdgeError as error:
        print(f"refused: {printable_line(str(error))}")
    print(f"{time.perf_counter() - started:.2f} s, peak {_peak_bytes() >> 20} MB")


if __name__ == "__main__":
    sys.exit(main())
