"""``mythos-edge inspect``: what a checkpoint, an ONNX file or a bundle holds, without running anything of it."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from mythos_edge.model.bundle import has_manifest, manifest_to_dict, open_bundle
from mythos_edge.model.errors import BackendUnavailable, BundleError, UsageError
from mythos_edge.runtime.caches import plan_cache
from mythos_edge.scripts.console import Console

HELP = "show what a checkpoint, an .onnx file or a bundle holds"
EXAMPLE = "mythos-edge inspect model.bundle --json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path)
    parser.add_argument("--config", type=Path, metavar="JSON", help="config fields a checkpoint does not tell")


def run(args: argparse.Namespace, console: Console) -> int:
    path = args.path
    if has_manifest(path):
        found = _bundle(path)
    elif not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    elif path.suffix == ".onnx":
        found = _onnx(path)
    else:
        found = _checkpoint(path, args.config)
    _show(console, found)
    console.result(found)
    return 0


def _bundle(path: Path) -> dict[str, Any]:
    manifest = open_bundle(path).manifest
    plan = plan_cache(manifest.config, manifest.config.max_loop_iters, manifest.max_context)
    return {
        "kind": "bundle",
        "path": str(path),
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "cache": {
            "slots": plan.slots,
            "bytes_per_token": plan.bytes_per_token,
            "pending_bytes_per_token": plan.pending_bytes_per_token,
            "bytes_at_max_context": plan.cache_bytes,
        },
        "manifest": manifest_to_dict(manifest),
    }


def _checkpoint(path: Path, config: Path | None) -> dict[str, Any]:
    try:
        from mythos_edge.model.checkpoint import open_checkpoint
    except ImportError as error:
        message = f"reading a checkpoint needs {error.name}, which is not installed"
        raise BackendUnavailable(message, "pip install 'mythos-edge[export]'") from error

    with open_checkpoint(path, config) as checkpoint:
        dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in checkpoint.tensors.values()})
        return {
            "kind": "checkpoint",
            "path": str(path),
            "format": checkpoint.kind,
            "step": checkpoint.step,
            "parameters": checkpoint.n_parameters,
            "bytes": checkpoint.total_bytes,
            "tensors": len(checkpoint.tensors),
            "dtypes": dtypes,
            "config": checkpoint.config.to_dict(),
        }


def _onnx(path: Path) -> dict[str, Any]:
    try:
        import onnx
    except ImportError as error:
        raise BackendUnavailable("reading .onnx needs onnx", "pip install 'mythos-edge[export]'") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's DecodeError is not public
        raise BundleError(f"{path}: not an ONNX file, or damaged: {' '.join(str(error).split())}") from error
    weights = [tensor for tensor in model.graph.initializer if tensor.external_data]
    files = {entry.value for tensor in weights for entry in tensor.external_data if entry.key == "location"}
    return {
        "kind": "onnx",
        "path": str(path),
        "ir_version": model.ir_version,
        "opsets": {item.domain or "ai.onnx": item.version for item in model.opset_import},
        "inputs": [_value(value) for value in model.graph.input],
        "outputs": [_value(value) for value in model.graph.output],
        "functions": [f"{function.domain}::{function.name}" for function in model.functions],
        "nodes": dict(Counter(node.op_type for node in model.graph.node).most_common()),
        "external_weights": len(weights),
        "external_files": sorted(files),
    }


def _value(value: Any) -> dict[str, Any]:
    import onnx

    kind = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return {
        "name": value.name,
        "dtype": onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name,
        "shape": shape,
    }


def _show(console: Console, values: Any, indent: int = 0) -> None:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            console.say(f"{'  ' * indent}{name}:")
            _show(console, value, indent + 1)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            console.say(f"{'  ' * indent}{name}:")
            for item in value:
                console.say("  " * (indent + 1) + "  ".join(str(part) for part in item.values()))
        else:
            console.say(f"{'  ' * indent}{name}: {value}")
