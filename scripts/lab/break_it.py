"""Breaks what writes files, at random points, and looks at what is left: the old or the new, whole, and no litter.

    python -m mythos_edge.scripts.lab.break_it                 # 200 kills of each job, 25 points of each other fault
    python -m mythos_edge.scripts.lab.break_it --points 5 --jobs save,pack --faults kill,full

A **job** is a command line that replaces something: a bundle, a target in one, a file. A **fault** falls at a step: a
file that is opened, renamed, removed or made, or a read of one; ``time`` kills by the clock. ``full`` fills a tmpfs,
``limit`` bounds the size of files (RLIMIT_FSIZE), ``lose`` removes an input, ``error`` is an EIO, ``twice`` runs three
writers at once, ``read`` a reader beside the writer. After each point what the job writes must be as it was before
or as an undisturbed run makes it, whole; a job that was not killed must be done, or have said in one line why not. Then
it is run again, undisturbed: it must leave the new one, and no other file anywhere in the workplace.

Each run is a fork of a process that has imported everything, so a point takes as long as the work alone. Linux only;
``full`` needs ``unshare -m``. Prints a table, and one line of JSON. Exits with 1 if a point left something else.

Not here: reads inside native code (ONNX Runtime maps files itself), and the loss of power.
"""

import argparse
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mythos_edge.exporter.kept_graphs import VARIABLE
from mythos_edge.model.bundle import open_bundle
from mythos_edge.model.errors import MythosEdgeError
from mythos_edge.model.manifest import MANIFEST_FILE
from mythos_edge.model.tensor_files import read_tensor_file
from mythos_edge.scripts import measuring
from mythos_edge.scripts.lab.faults import CACHE, FILLER, TEMPORARY, Fault, Ran, Running

_CHECKPOINT = Path(__file__).parents[1] / "assets" / "carry_adder.pt"
_INPUTS = tuple(f"{when}.{kind}" for when in ("old", "new") for kind in ("pt", "npy", "jsonl"))
# Points unless told otherwise: kills at a step and by the clock, 200 together, and of every other fault.
_KILLS, _OTHERS = 100, 25
_TMPFS_BYTES = 64 << 20
_OWN_MOUNTS = "MYTHOS_EDGE_OWN_MOUNTS"
# What the verbs import when they begin.
_IMPORTED = ("exporter.export", "exporter.bundle_graphs", "exporter.pack", "exporter.targets.build", "runtime.session",
             "exporter.lowering.ort_cpu", "runtime.backends.ort_cpu", "scripts.model_stats")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command line in which ``{}`` is what differs between the ``old`` run and the ``new``, and what it touches."""

    words: str
    old: str
    new: str
    source: str
    places: tuple[str, ...]
    # A file that a later run goes on with holds what was done.
    grows: bool = False

    def argv(self, value: str) -> list[str]:
        return self.words.format(value).split()


JOBS = {
    "export": Job("export {} -o out.bundle --force", "old.pt", "new.pt", "new.pt", ("out.bundle",)),
    "build": Job("build built.bundle --weights int8 --block {}", "64", "32", "built.bundle", ("built.bundle",)),
    "pack": Job(
        "pack source.bundle --target {} -o packed.bundle --force",
        "ort-cpu", "ort-cpu-int8", "source.bundle", ("packed.bundle",),
    ),
    "save": Job(
        "generate source.bundle --ids {} --max-new-tokens 2 --seed 1 --save-session saved.npz",
        "1,2,3", "4,5,6,7", "source.bundle", ("saved.npz",),
    ),
    "score": Job(
        "score source.bundle --ids {} -o scores.npz --stats stats.json",
        "old.npy", "new.npy", "source.bundle", ("scores.npz", "stats.json"),
    ),
    "prompts": Job(
        "generate source.bundle --file {} -o results.jsonl --batch 1 --max-new-tokens 2",
        "old.jsonl", "new.jsonl", "source.bundle", ("results.jsonl",), grows=True,
    ),
}  # fmt: skip
FAULTS = ("kill", "time", "full", "limit", "lose", "error", "twice", "read")


class Broken(Exception):
    """A point left what it must not; the message says what."""


def main(argv: list[str] | None = None) -> int:
    """Breaks the jobs; returns the exit code."""
    parser = argparse.ArgumentParser(description="Break what writes files, at random points.")
    parser.add_argument(
        "--points", type=int, metavar="N", help="of each fault (default: kill and time 100, the others 25)"
    )
    parser.add_argument("--jobs", default=",".join(JOBS), help="default: all")
    parser.add_argument("--faults", default=",".join(FAULTS), help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jobs, faults = args.jobs.split(","), args.faults.split(",")
    for given, known in ((jobs, JOBS), (faults, FAULTS)):
        if stray := [one for one in given if one not in known]:
            parser.error(f"{stray[0]!r} is none of {', '.join(known)}")
    with tempfile.TemporaryDirectory() as name, _tmpfs(Path(name), "full" in faults) as (fast, has_tmpfs):
        if not has_tmpfs and "full" in faults:
            print("no tmpfs can be mounted here: full is left out, limit stands for it")
            faults.remove("full")
        for module in _IMPORTED:
            importlib.import_module(f"mythos_edge.{module}")
        importlib.import_module("onnxruntime")
        workshop = Workshop(fast, jobs, random.Random(args.seed))
        print("| job | fault | points | left the old | left the new | said why | broken |")
        print("|---|---|---:|---:|---:|---:|---:|", flush=True)
        rows = []
        for job, fault in itertools.product(jobs, faults):
            row = workshop.break_job(job, fault, args.points or (_KILLS if fault in ("kill", "time") else _OTHERS))
            rows.append(row)
            figures = (row.points, row.old, row.new, row.said, len(row.broken))
            print(f"| {job} | {fault} | {' | '.join(map(str, figures))} |", flush=True)
    broken = [line for row in rows for line in row.broken]
    print(*broken, sep="\n", end="\n" if broken else "")
    print(json.dumps({"machine": measuring.machine(), "seed": args.seed, "rows": [vars(row) for row in rows]}))
    return 1 if broken else 0


@dataclass
class Row:
    """The counts of what the points of one fault left of one job, and the points that broke it."""

    job: str
    fault: str
    points: int
    old: int = 0
    new: int = 0
    said: int = 0
    broken: list[str] = field(default_factory=list)


class Workshop:
    """The old state of some jobs, and a workplace in which they are run, over and over."""

    def __init__(self, folder: Path, jobs: Sequence[str], chance: random.Random) -> None:
        self._pristine, self._work, self._chance = folder / "pristine", folder / "work", chance
        self._pristine.mkdir()
        (self._pristine / TEMPORARY).mkdir()
        kept = Path(os.environ.get(VARIABLE) or self._pristine)
        if kept.is_dir() and kept != self._pristine:
            shutil.copytree(kept, self._pristine / CACHE)
        else:
            (self._pristine / CACHE).mkdir()
        _make_inputs(self._pristine)
        _undisturbed(["export", "old.pt", "-o", "source.bundle"], self._pristine)
        if {"build", "pack"} & set(jobs):
            _undisturbed(["build", "source.bundle", "--weights", "int8"], self._pristine)
        shutil.copytree(self._pristine / "source.bundle", self._pristine / "built.bundle")
        for name in jobs:
            _undisturbed(JOBS[name].argv(JOBS[name].old), self._pristine)

    def break_job(self, name: str, kind: str, points: int) -> Row:
        """The row of ``points`` points of one fault."""
        job, row = JOBS[name], Row(name, kind, points)
        self._restore(job)
        old = _marks_of(job, self._work)
        usual = _undisturbed(job.argv(job.new), self._work)
        new, tree = _marks_of(job, self._work), _tree(job, self._work)
        for _ in range(points):
            self._restore(job)
            fault = Fault(
                kind="kill" if kind == "time" else kind,
                step=self._chance.randint(1, usual.steps),
                after_s=self._chance.random() * usual.seconds * 1.1 if kind == "time" else None,
                source=self._work / job.source,
                seed=self._chance.randrange(1 << 30),
            )
            try:
                self._point(job, fault, old, new, row)
                self._again(job, fault, new, tree)
            except (Broken, TimeoutError) as error:
                row.broken.append(f"{name}, {fault}: {error}")
        return row

    def _point(self, job: Job, fault: Fault, old: list[str], new: list[str], row: Row) -> None:
        """Runs the job with the fault, and looks at what is left."""
        if fault.kind == "twice":
            runs = [Running(job.argv(value), self._work) for value in (job.new, job.old, job.new)]
            rans = [running.wait() for running in runs]
        elif fault.kind == "read":
            rans = [_read_beside(job, self._work, (old, new))]
        else:
            rans = [Running(job.argv(job.new), self._work, fault).wait()]
        for ran in rans:
            _check_said(ran)
            row.said += ran.code not in (None, 0)
        if fault.kind == "lose" and job.source in job.places:
            return  # What was lost is a part of the old one.
        found = _marks_of(job, self._work)
        for one, before, after in zip(found, old, new, strict=True):
            if one not in (before, after) and not (job.grows and after.startswith(one) and one.startswith(before)):
                raise Broken(f"left neither the old nor the new: {one[:200]!r}")
        if fault.kind != "twice" and rans[0].code == 0 and found != new:
            raise Broken("said that it is done, and is not")
        row.new += found == new
        row.old += found == old

    def _again(self, job: Job, fault: Fault, new: list[str], tree: list[str]) -> None:
        """Runs the job undisturbed: the new one must be there, and nothing else."""
        self._work.with_name(FILLER).unlink(missing_ok=True)
        if fault.kind == "lose":
            self._put_back(job.source, job)
        ran = Running(job.argv(job.new), self._work).wait()
        if ran.code != 0:
            raise Broken(f"cannot be done again: {ran.said[-300:]}")
        if (found := _marks_of(job, self._work)) != new:
            raise Broken(f"is another when done again: {str(found)[:200]}")
        if (left := _tree(job, self._work)) != tree:
            raise Broken(f"left beside: {sorted(set(left) - set(tree)) or 'less than there was'}")

    def _put_back(self, name: str, job: Job) -> None:
        """Brings the files of an input back that were lost, but none that the job itself has replaced."""
        lost = self._pristine / name
        if lost.is_dir() and name not in job.places:
            shutil.copytree(lost, self._work / name, dirs_exist_ok=True)
        elif lost.is_dir():
            shutil.rmtree(self._work / name)
            shutil.copytree(lost, self._work / name)
        else:
            shutil.copy(lost, self._work / name)

    def _restore(self, job: Job) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir()
        for name in {*job.places, job.source, CACHE, TEMPORARY, *_INPUTS}:
            there = self._pristine / name
            (shutil.copytree if there.is_dir() else shutil.copy)(there, self._work / name)


def _make_inputs(folder: Path) -> None:
    data = bytearray(_CHECKPOINT.read_bytes())
    (folder / "old.pt").write_bytes(data)
    for name, entry in read_tensor_file(_CHECKPOINT).entries.items():
        if "norm" not in name and "freqs" not in name:
            data[entry.offset] ^= 1
    (folder / "new.pt").write_bytes(data)
    lines = [json.dumps({"ids": [number, 2, 3]}) + "\n" for number in range(1, 5)]
    for name, count in (("old", 2), ("new", 4)):
        np.save(folder / f"{name}.npy", np.arange(1, 2 * count + 1)[None])
        (folder / f"{name}.jsonl").write_text("".join(lines[:count]))


def _undisturbed(argv: Sequence[str], folder: Path) -> Ran:
    ran = Running(argv, folder).wait()
    if ran.code != 0:
        raise Broken(f"{' '.join(argv)}: {ran.said}")
    return ran


def _check_said(ran: Ran) -> None:
    """Raises Broken for a run that ended by itself in another way than done or with one line of error."""
    errors = [line for line in ran.said.splitlines() if line.startswith("error: ")]
    if ran.code not in (None, 0) and (ran.code != 1 or len(errors) != 1 or "internal error" in errors[0]):
        raise Broken(f"ended with {ran.code} and said {ran.said[-500:]!r}")


def _marks_of(job: Job, folder: Path) -> list[str]:
    """Marks of the content of each place of a job. Raises Broken for one that is not whole."""
    try:
        return [_mark_of(folder / place) for place in job.places]
    except (MythosEdgeError, OSError, ValueError) as error:
        raise Broken(f"is not whole: {error}") from error


def _mark_of(place: Path) -> str:
    if place.is_dir():
        manifest = open_bundle(place, hashes=True).manifest
        targets = {name: spec.options for name, spec in manifest.targets.items()}
        return json.dumps([manifest.source.sha256, targets], sort_keys=True)
    data = place.read_bytes()
    if place.suffix != ".jsonl":
        return hashlib.sha256(data).hexdigest()
    # What is half a line is cut off by the next run.
    results = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    return "".join(f"{one['prompt_sha256']} {one['ids']}\n" for one in results)


def _tree(job: Job, folder: Path) -> list[str]:
    """All files and folders; of a bundle, whose files may have other names, those that its manifest does not list."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    for name in {*job.places, job.source}:
        if (folder / name).is_dir():
            listed = {*open_bundle(folder / name).manifest.files, MANIFEST_FILE}
            found -= {f"{name}/{file}" for file in listed}
    return sorted(found)


def _read_beside(job: Job, folder: Path, known: tuple[list[str], list[str]]) -> Ran:
    """Runs the job while this process reads what it writes, over and over. Raises Broken when that is disturbed."""
    running = Running(job.argv(job.new), folder)
    while not running.has_ended():
        found = _marks_of(job, folder)
        for one, *whole in zip(found, *known, strict=True):
            if one not in whole and not job.grows:
                raise Broken(f"a reader found neither the old nor the new: {one[:200]!r}")
    return running.wait()


@contextlib.contextmanager
def _tmpfs(folder: Path, wanted: bool) -> Iterator[tuple[Path, bool]]:
    """A folder for the work, and whether it is a small file system of its own."""
    fast = folder / "small"
    fast.mkdir()
    mounted = False
    if wanted and os.environ.get(_OWN_MOUNTS):
        options = f"size={_TMPFS_BYTES}"
        mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(fast)]
        mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    try:
        yield fast, mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(fast)], check=False, capture_output=True)


def _with_own_mounts(argv: Sequence[str]) -> None:
    """Begins this program again where its mounts are seen by nobody else and go with it, if that can be."""
    tried = shutil.which("unshare") and subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True)
    if tried and tried.returncode == 0:
        os.environ[_OWN_MOUNTS] = "1"
        os.execvp("unshare", ["unshare", "-m", sys.executable, "-m", "mythos_edge.scripts.lab.break_it", *argv])


if __name__ == "__main__":
    if not os.environ.get(_OWN_MOUNTS):
        _with_own_mounts(sys.argv[1:])
    sys.exit(main())
