"""A small bundle of made-up files whose manifest has one of everything."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mythos_edge.model.bundle_writer import BundleWriter
from mythos_edge.model.families.openmythos.config import VARIANTS
from mythos_edge.model.manifest import (
    ChatTemplate,
    EndToken,
    FileRecord,
    GoldenSample,
    GraphSpec,
    Manifest,
    Preset,
    Source,
    TargetRecord,
    TensorSpec,
)
from mythos_edge.model.target_options import EngineSpec, OrtOptions, Profile

CONTENTS = {
    "step.onnx": b"graph",
    "step.ort.onnx": b"lowered graph",
    "step.rtx.engine": b"engine",
    "weights.safetensors": bytes(range(256)),
    "tok.json": b"{}",
    "chat.jinja": b"{{ messages }}",
}
STATE = (
    TensorSpec("h", "float32", ("batch", "chunk", 2048)),
    TensorSpec("out", "float32", ("batch", "active", 2048)),
    TensorSpec("halt_mass", "float32", ("batch", "active")),
    TensorSpec("depth", "int64", ("batch", "active")),
)
RECORDS = {name: FileRecord(len(data), hashlib.sha256(data).hexdigest()) for name, data in CONTENTS.items()}


def sample_manifest(files: dict[str, FileRecord] = RECORDS, **changes: Any) -> Manifest:
    """One of everything, with ``changes`` to its fields."""
    engine = EngineSpec("rtx", "1.7.1", (86, 89), "", "step", 64, 16, (Profile(1, 1),), {"step": 2}, "ef" * 32)
    values: dict[str, Any] = {
        "family": VARIANTS["1b"].family,
        "model": VARIANTS["1b"].looped,
        "config": VARIANTS["1b"].to_dict(),
        "dtype": "fp16",
        "max_context": 512,
        "graphs": {
            "step": GraphSpec(
                "step.onnx",
                (
                    *STATE,
                    TensorSpec("e", "float32", ("batch", "chunk", 2048)),
                    TensorSpec("step_index", "int64", ("batch", "chunk")),
                    TensorSpec("threshold", "float32", ()),
                    TensorSpec("min_depth", "int64", ()),
                    TensorSpec("length", "int64", ()),
                    TensorSpec("first", "int64", ("batch",)),
                    TensorSpec("past_0", "float32", ("batch", "context", 288)),
                ),
                (
                    *(replace(tensor, name=f"{tensor.name}_next") for tensor in STATE),
                    TensorSpec("rows_0", "float32", ("batch", "chunk", 288)),
                ),
            )
        },
        "targets": {
            "ort-cpu": TargetRecord(
                kind="ort-cpu",
                graphs={"step": "step.ort.onnx"},
                compute_dtype="fp32",
                weights={"experts": "int4", "head": "fp32"},
                fixed_bytes=10,
                step_bytes=20,
                bundle="cd" * 32,
                summary="int4 in blocks of 32",
                note="a note",
                options=asdict(OrtOptions("int4", 32, "rtn", True, False)),
            ),
            "rtx-sm89-fp16": TargetRecord(
                kind="tensorrt",
                graphs={"step": "step.rtx.engine"},
                compute_dtype="fp16",
                weights={"experts": "fp16", "head": "fp16"},
                fixed_bytes=10,
                step_bytes=20,
                bundle="cd" * 32,
                summary="fp16",
                note="",
                options=json.loads(json.dumps(asdict(engine))),
            ),
        },
        "files": files,
        "versions": {"torch": "2.13.0"},
        "source": Source("model.pt", "torch", "ab" * 32, None),
        "sample": GoldenSample((1, 2), 4, 0.99, (3, 1), (7, 8), (1.5, -2.0)),
        "tokenizer": "tok.json",
        "end_tokens": (EndToken(2, "</s>"),),
        "chat_template": ChatTemplate("chat.jinja", "<s>", "</s>"),
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
