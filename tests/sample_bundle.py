"""A small bundle of made-up files whose manifest has one of everything."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mythos_edge.model.bundle_writer import BundleWriter
from mythos_edge.model.config import VARIANTS
from mythos_edge.model.manifest import (
    EndToken,
    EngineSpec,
    FileRecord,
    GoldenSample,
    GraphSpec,
    Manifest,
    Preset,
    Profile,
    Source,
    TargetSpec,
    TensorSpec,
)

CONTENTS = {
    "step.onnx": b"graph",
    "step.ort.onnx": b"lowered graph",
    "weights.safetensors": bytes(range(256)),
    "tok.json": b"{}",
}
RECORDS = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENTS.items()}


def sample_manifest(files: dict[str, FileRecord] = RECORDS, **changes: Any) -> Manifest:
    """One of everything, with ``changes`` to its fields."""
    engine = EngineSpec("rtx", "1.7.1", (86, 89), "", "step", 64, 16, (Profile(1, 1),), {"step": 2}, "ef" * 32)
    values: dict[str, Any] = {
        "config": VARIANTS["1b"],
        "dtype": "fp16",
        "max_context": 512,
        "graphs": {
            "step": GraphSpec(
                "step.onnx",
                (TensorSpec("h", "float32", ("B", "S", 2048)), TensorSpec("length", "int64", ())),
                (TensorSpec("h_next", "float32", ("B", "S", 2048)),),
            )
        },
        "targets": {
            "ort-cpu": TargetSpec(
                {"step": "step.ort.onnx"}, "fp32", "int4", 32, "rtn", ("head",), True, 10, 20, "cd" * 32, "a note", None
            ),
            "rtx-sm89-fp16": TargetSpec(
                {"step": "step.ort.onnx"}, "fp16", "none", 0, "none", (), False, 10, 20, "cd" * 32, "", engine
            ),
        },
        "files": files,
        "versions": {"torch": "2.13.0"},
        "source": Source("model.pt", "torch", "ab" * 32, None),
        "sample": GoldenSample((1, 2), 4, 0.99, (3, 1), (7, 8), (1.5, -2.0)),
        "tokenizer": "tok.json",
        "end_tokens": (EndToken(2, "</s>"),),
        "rope_table": "config",
        "presets": {"knee": Preset("ort-cpu", 8, 0.93, 0.01, 0.99, 2.5, 1.3)},
        "created": "2025-01-01T00:00:00Z",
    }
    return Manifest(**(values | changes))


def write_bundle(
    path: Path,
    contents: dict[str, bytes] = CONTENTS,
    make: Callable[[dict[str, FileRecord]], Manifest] = sample_manifest,
    force: bool = False,
) -> None:
    """Writes the files ``contents`` and what ``make`` says of them."""
    with BundleWriter(path, force) as writer:
        for name, data in contents.items():
            (writer.folder / name).write_bytes(data)
        writer.finish(make, known={})


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
