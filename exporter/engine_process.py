"""Runs ``engine`` in a process of its own, watches it, and makes one error of whatever goes wrong in there.

What TensorRT says, at its most verbose, is added to a log file. Not here: what the engine is built from.
"""

import json
import os
import selectors
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import onnx

from mythos_edge.exporter import child_process
from mythos_edge.exporter.engine import EngineJob, EngineReport
from mythos_edge.model.errors import BuildError
from mythos_edge.model.machine import free_memory_bytes
from mythos_edge.model.output_files import remove_partials
from mythos_edge.plugins import trt_bindings

Progress = Callable[[str, float], None]
_HEARTBEAT_S = 1.0
# Measured with TensorRT for RTX 1.7.1: the process holds 0.34 GB before it reads a weight, and at its peak the 1b shape
# holds each byte of the weights 2.2 times (the step, 1.8 GB in fp16: 4.3 GB in all) to 2.8 times (its int4 prelude).
_BASE_BYTES = 400 << 20
_COPIES = 3.0
# How often the plan may hold a weight: experts once, a matrix once or in two orders, one for each profile.
_PLAN_COPIES = 1.5


def build_engine(job: EngineJob, log: Path, progress: Progress = lambda phase, fraction: None) -> EngineReport:
    """The engine of ``job`` at its place, or nothing there; what TensorRT said is added to ``log``.

    Raises BuildError, with the log if a process ran, and BackendUnavailable without the bindings.
    """
    require_memory(Path(job.graph))
    environment = {**os.environ, **trt_bindings.library_path_for_plugins(trt_bindings.load(job.flavour))}
    with log.open("ab") as errors:
        errors.write(f"== {Path(job.graph).name}\n".encode())
        errors.flush()
        process = child_process.start(
            "mythos_edge.exporter.engine",
            json.dumps(asdict(job)),
            stdout=subprocess.PIPE,
            stderr=errors,
            environment=environment,
        )
        try:
            last = _watch(process, Path(job.graph).stem, progress)
            code = process.wait()
        finally:
            child_process.end(process)
            remove_partials(Path(job.plan))  # a killed process could not
    if code == 0 and "done" in last:
        return EngineReport(**last["done"])
    raise BuildError(f"{Path(job.graph).name}: {_what_happened(code, last, log)}", log)


def require_memory(graph: Path) -> None:
    """Raises BuildError when an engine of this ONNX file would need more memory than is free (where that is known)."""
    needed, free = memory_needed(weight_bytes(graph)), free_memory_bytes()
    if free is not None and needed > free:
        raise BuildError(
            f"building {graph.stem} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
            "end other programs, round the weights, or build on a larger machine"
        )


def memory_needed(weights: int) -> int:
    """Bytes that the building process holds at its peak, from the bytes of the weights; an estimate."""
    return round(_BASE_BYTES + _COPIES * weights)


def plan_bytes(weights: int) -> int:
    """The most bytes a plan takes on disk, from the bytes of the weights; an estimate."""
    return round((16 << 20) + _PLAN_COPIES * weights)


def weight_bytes(graph: Path) -> int:
    """Bytes of all initializers of an ONNX file, those in files of their own among them."""
    model = onnx.load(str(graph), load_external_data=False)
    outside = 0
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            outside += int(entries.get("length", 0)) or (graph.parent / entries["location"]).stat().st_size
    return outside + graph.stat().st_size


def _watch(process: subprocess.Popen[bytes], name: str, progress: Progress) -> dict[str, Any]:
    """Passes on the phases that the process reports, again and again so that time is seen to pass; its last report."""
    last: dict[str, Any] = {"phase": "starting", "fraction": 0.0}
    assert process.stdout is not None
    progress(f"{name}: {last['phase']}", 0.0)
    for line in _lines(process.stdout):
        if line is not None:
            last = json.loads(line)
        if "phase" in last:
            progress(f"{name}: {last['phase']}", last["fraction"])
    return last


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Whole lines as they arrive until the stream ends, and None whenever nothing came for a while."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(_HEARTBEAT_S):
                yield None
                continue
            data = os.read(stream.fileno(), 1 << 16)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _what_happened(code: int, last: dict[str, Any], log: Path) -> str:
    if "error" in last:
        return str(last["error"])
    said = _last_words(log)
    if code == -signal.SIGKILL:
        return (
            "TensorRT's builder was killed by SIGKILL, as the system does when memory runs out: end other programs, "
            "round the weights, or build on a larger machine"
        )
    if code < 0:
        return f"TensorRT's builder was killed by {signal.Signals(-code).name}{said}"
    return f"TensorRT's builder ended with exit code {code}{said}"


def _last_words(log: Path) -> str:
    """The last line with an error in the log, to be put behind a message; empty if there is none."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (64 << 10)))
        lines = file.read().decode(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("[ERROR]", "[INTERNAL_ERROR]")) or "Error" in line[:40]]
    return f" after saying: {' '.join(said[-1].split())[:300]}" if said else ""
