"""Memory and time of an export, against copying the checkpoint's file, and of building targets.

    python -m mythos_edge.scripts.lab.bench_export --shape demo
    python -m mythos_edge.scripts.lab.bench_export --shape 1b --folder /some/disk
    python -m mythos_edge.scripts.lab.bench_export --shape ouro-1.4b --stored bf16 --dtype bf16 -r 1

Takes the demo's checkpoint, or writes one of random weights in the shape of a named model; copies it, exports it with
no graphs kept and again with those of the first time, and watches each with all its child processes. Prints a table,
then one line of JSON. Linux only: it reads /proc.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mythos_edge.exporter.kept_graphs import VARIABLE
from mythos_edge.exporter.targets.build import build
from mythos_edge.exporter.targets.table import target_from
from mythos_edge.model.bounded_files import size_text
from mythos_edge.model.bundle_writer import require_free_space
from mythos_edge.scripts import measuring
from mythos_edge.scripts.demo import CHECKPOINT
from mythos_edge.scripts.lab.random_checkpoints import DTYPES, PUBLISHED, shapes_of, write_checkpoint

_DEMO = Path(str(CHECKPOINT))
_COPY_BYTES = 16 << 20
# What engines are built with.
_ENGINES: dict[str, Any] = {"dtype": "fp16", "max_rows": 64, "max_context": 1024}
_POLL_S = 0.05


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure an export's memory and time.")
    parser.add_argument("--shape", choices=("demo", *PUBLISHED), default="1b")
    parser.add_argument("--stored", choices=DTYPES, default="fp32", help="dtype of the checkpoint that is written")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the bundle")
    parser.add_argument("--folder", type=Path, default=None, help="where to write (default: a temporary folder)")
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--build", default="", metavar="NAMES", help="to build too: int8,int4,rtx-sm89")
    args = parser.parse_args(argv)
    builds: dict[str, list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        checkpoint, stored = _checkpoint(args.shape, args.stored, folder)
        size = stored.stat().st_size
        os.environ[VARIABLE] = str(folder / "kept")
        copies: list[float] = []
        firsts: list[float] = []
        agains: list[float] = []
        peaks: list[int] = []
        for _ in range(args.repetitions):
            copies.append(_timed_copy(stored, folder / "copy"))
            export = ["export", str(checkpoint), "-o", str(folder / "bundle"), "--dtype", args.dtype, "--force"]
            for times in (firsts, agains):
                seconds, peak = _watched(export)
                times.append(seconds)
                peaks.append(peak)
            shutil.rmtree(folder / "kept")
            for target in filter(None, args.build.split(",")):
                for what, cost in _built(folder / "bundle", target).items():
                    builds.setdefault(what, []).append(cost)
            shutil.rmtree(folder / "bundle")
    for what, made in builds.items():
        seconds, peak = statistics.median(one[0] for one in made), max(one[1] for one in made)
        print(f"build {what}: {seconds:.1f} s" + (f", peak resident {peak / 1e9:.2f} GB" if peak else ""))
    copied, first, again = (statistics.median(times) for times in (copies, firsts, agains))
    report = {
        "shape": args.shape,
        "stored": args.stored,
        "dtype": args.dtype,
        "checkpoint_gb": size / 1e9,
        "copy_s": copies,
        "first_export_s": firsts,
        "next_export_s": agains,
        "ratio": first / copied,
        "peak_rss_gb": [peak / 1e9 for peak in peaks],
        "builds": builds,
        "machine": measuring.machine(),
    }
    print("| shape | checkpoint | copy, s | first export, s | next export, s | first / copy | peak resident, all |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {args.shape} {args.dtype} | {size_text(size)} | {copied:.1f} | {first:.1f} | {again:.1f} | "
        f"{first / copied:.2f}x | {max(peaks) / 1e9:.2f} GB |"
    )
    print(json.dumps(report))
    return 0


def _checkpoint(shape: str, stored: str, folder: Path) -> tuple[Path, Path]:
    """The checkpoint of a shape, and the file that has its weights."""
    if shape == "demo":
        return _DEMO, _DEMO
    config = PUBLISHED[shape]
    # Of 4 bytes a value, as the bundle may store them: the checkpoint, its copy and the bundle.
    require_free_space(folder, 3 * 4 * sum(math.prod(sizes) for sizes in shapes_of(config).values()))
    write_checkpoint(config, folder / "checkpoint", stored)
    return folder / "checkpoint", folder / "checkpoint" / "model.safetensors"


def _timed_copy(source: Path, target: Path) -> float:
    """Seconds to copy through user space and reach the disk, as an export must; the copy is removed."""
    started = time.perf_counter()
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, _COPY_BYTES)
        writer.flush()
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def _watched(verb: list[str]) -> tuple[float, int]:
    """Seconds of a command line, and the largest resident memory of its process and children together, bytes."""
    started, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", "mythos_edge.scripts.cli", *verb]) as process:
        while process.poll() is None:
            peak = max(peak, sum(_resident_bytes(pid) for pid in _family(process.pid)))
            time.sleep(_POLL_S)
    if process.returncode != 0:
        raise SystemExit(f"{verb[0]} ended with status {process.returncode}")
    return time.perf_counter() - started, peak


def _built(bundle: Path, target: str) -> dict[str, tuple[float, int]]:
    """Seconds and peak resident bytes of building a target; of each engine and of what comes before, where it has them.

    The peak of an engine is that of the process which builds it; 0 where there was none. The time of the last engine
    includes moving all of them into the bundle.
    """
    if target in ("fp32", "int8", "int4"):
        return {target: _watched(["build", str(bundle), "--weights", target])}
    begun: dict[str, float] = {}

    def note(phase: str, fraction: float) -> None:
        begun.setdefault(phase.partition(":")[0], time.perf_counter())

    reports = build(bundle, target_from(target, _ENGINES), note).reports
    ends = [*list(begun.values())[1:], time.perf_counter()]
    return {
        f"{target} {part}": (end - start, reports[part]["peak_bytes"] if part in reports else 0)
        for (part, start), end in zip(begun.items(), ends, strict=True)
    }


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(member for child in children for member in _family(int(child)))]


def _resident_bytes(pid: int) -> int:
    """Proportional share: pages of a file or library that several processes map count once."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    sys.exit(main())
