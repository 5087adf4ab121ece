"""``mythos-edge inspect``: what a checkpoint, an ONNX file or a bundle holds, without running anything of it."""

import argparse
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mythos_edge.model.bundle import Bundle, has_manifest, open_bundle
from mythos_edge.model.errors import BackendUnavailable, CheckpointError, UsageError, unavailable
from mythos_edge.model.families.table import config_of
from mythos_edge.model.manifest import manifest_to_dict
from mythos_edge.runtime.caches import CachePlan, plan_cache
from mythos_edge.runtime.text import Tokenizer
from mythos_edge.scripts import arguments
from mythos_edge.scripts.console import Console

if TYPE_CHECKING:
    from mythos_edge.model.stored_checkpoint import Checkpoint

HELP = "show what a checkpoint, an .onnx file or a bundle holds"
EXAMPLE = "mythos-edge inspect model.bundle --json"

_ROPE_TABLES = {"config": "angles computed from the config", "stored": "the checkpoint's own table, as it stands there"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=arguments.path, help="a checkpoint, an .onnx file or a bundle's folder")
    arguments.add_checkpoint(parser, None)


def run(args: argparse.Namespace, console: Console) -> int:
    path = args.path
    if has_manifest(path):
        bundle = open_bundle(path)
        _show_bundle(console, bundle)
        found = _bundle(bundle)
    elif not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    else:
        found = _onnx(path) if path.suffix == ".onnx" else _checkpoint(args, console)
        _show(console, found)
    console.result(found)
    return 0


def _bundle(bundle: Bundle) -> dict[str, Any]:
    manifest, plan = bundle.manifest, _cache_plan(bundle)
    return {
        "kind": "bundle",
        "path": str(bundle.path),
        "family": manifest.family,
        "bytes": sum(record.bytes for record in manifest.files.values()),
        "end_tokens": [token.name for token in manifest.end_tokens],
        "end_ids": [token.id for token in manifest.end_tokens],
        **_added_to_prompt(bundle),
        "cache": {
            "slots": plan.slots,
            "bytes_per_token": plan.bytes_per_token,
            "window_bytes": plan.window_bytes,
            "pending_bytes_per_token": plan.pending_bytes_per_token,
            "bytes_at_max_context": plan.cache_bytes,
            "forms": {form: _bytes_of(_cache_plan(bundle, form)) for form in _caches(bundle)},
        },
        "rope_table": manifest.rope_table,
        "manifest": manifest_to_dict(manifest),
    }


def _added_to_prompt(bundle: Bundle) -> dict[str, list[str]]:
    """The tokens that the tokenizer puts before and after the text of a prompt; nothing where none can be asked."""
    name = bundle.manifest.tokenizer
    if name is None:
        return {}
    try:
        before, after = Tokenizer(bundle.file(name)).added_to_prompt()
    except BackendUnavailable:  # to look at a bundle needs no library
        return {}
    return {"prompt_begins_with": before, "prompt_ends_with": after}


def _tokenizer_line(bundle: Bundle) -> str:
    """The file, and what it puts around a prompt."""
    name, added = bundle.manifest.tokenizer, _added_to_prompt(bundle)
    if name is None or not added:
        return name or "none"
    words = zip(("begins with", "ends with"), added.values(), strict=True)
    around = [f"{where} {' '.join(tokens)}" for where, tokens in words if tokens]
    return f"{name}; a prompt {' and '.join(around) or 'gets no tokens beside its text'}"


def _cache_plan(bundle: Bundle, form: str = "fp32") -> CachePlan:
    """Of the whole context at the trained depth, with cached rows in ``form``."""
    model = bundle.manifest.model
    return plan_cache(model, model.max_depth, bundle.manifest.max_context, row_bytes=model.row_bytes(form))


def _caches(bundle: Bundle) -> tuple[str, ...]:
    """The forms in which the default target can keep cached rows."""
    return bundle.manifest.targets[bundle.manifest.default_target].caches


def _bytes_of(plan: CachePlan) -> dict[str, int]:
    return {
        "bytes_per_token": plan.bytes_per_token,
        "window_bytes": plan.window_bytes,
        "bytes_at_max_context": plan.cache_bytes,
    }


def _show_bundle(console: Console, bundle: Bundle) -> None:
    manifest, plan = bundle.manifest, _cache_plan(bundle)
    source, size = manifest.source, sum(record.bytes for record in manifest.files.values())
    step = "" if source.step is None else f", step {source.step}"
    window = f" and {plan.window_bytes / 1e6:.1f} MB of layers with a window" if plan.window_bytes else ""
    cache = f"{plan.bytes_per_token / 1e3:.1f} kB a token{window}, {plan.cache_bytes / 1e6:.1f} MB when full"
    forms = _caches(bundle)
    when_full = [f"{_cache_plan(bundle, form).cache_bytes / 1e6:.1f} MB in {form}" for form in forms[1:]]
    cache += f" ({', '.join(when_full)})" if when_full else ""
    for name, text in {
        "bundle": f"{bundle.path}, {size / 1e6:.1f} MB, from {source.name} ({source.kind}{step}), {manifest.created}",
        "family": manifest.family,
        **config_of(manifest).described(),
        "stored as": manifest.dtype,
        "context": f"{manifest.max_context} tokens; caches of {cache}",
        "rotary": _ROPE_TABLES[manifest.rope_table],
        "tokenizer": _tokenizer_line(bundle),
        "chat": "no template: messages are texts, one after the other"
        if manifest.chat_template is None
        else "template",
        "text ends": ", ".join(map(str, manifest.end_tokens)) or "at --max-new-tokens: the bundle has no end tokens",
        "presets": ", ".join(f"{name} ({one.target})" for name, one in manifest.presets.items()) or "none",
        "graphs": ", ".join(manifest.graphs),
    }.items():
        console.field(name, text, 11)
    width = max(len("target"), *map(len, manifest.targets))
    console.say(f"\n{'target':{width}}  MB a token  MB a loop step  MB of files")
    for name in manifest.targets:
        _show_target(console, bundle, name, width)


def _show_target(console: Console, bundle: Bundle, name: str, width: int) -> None:
    """A target's two lines: the bytes are those of weights read, and of files that the target does not share."""
    spec, files = bundle.manifest.targets[name], bundle.manifest.files
    own = sum(files[file].bytes for file in {*spec.graphs.values(), *bundle.own_weights(name)})
    console.say(f"{name:{width}}  {spec.fixed_bytes / 1e6:10.1f}  {spec.step_bytes / 1e6:14.1f}  {own / 1e6:11.1f}")
    console.field("", spec.summary, 4)


def _checkpoint(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    path = args.path
    try:
        from mythos_edge.model.checkpoint import open_checkpoint
        from mythos_edge.model.tensor_files import EXPECTED
    except ImportError as error:
        raise unavailable(error, "reading a checkpoint", "pip install 'mythos-edge[export]'") from error

    try:
        opened = open_checkpoint(path, args.config, key=args.key, tolerate=("real", "theta"))
    except CheckpointError as error:
        if str(error).endswith(EXPECTED):
            raise CheckpointError(f"{error}; or a bundle's folder, or an .onnx file") from error
        raise
    with opened as checkpoint:
        for note in checkpoint.notes:
            console.note(f"note: {note}")
        dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in checkpoint.tensors.values()})
        return {
            "kind": "checkpoint",
            "path": str(path),
            "family": checkpoint.config.family,
            "format": checkpoint.kind,
            "step": checkpoint.step,
            "parameters": checkpoint.n_parameters,
            "bytes": checkpoint.total_bytes,
            "tensors": len(checkpoint.tensors),
            "dtypes": dtypes,
            "stored_rope_table": _table(checkpoint),
            "config": checkpoint.config.to_dict(),
        }


def _table(checkpoint: "Checkpoint") -> dict[str, Any] | None:
    """The rotary table that a checkpoint holds, and whether it is the config's; None without one."""
    table = checkpoint.table
    if table is None:
        return None
    shape, theta = list(table.entry.shape), table.theta()
    as_config = checkpoint.unlike_config is None
    return {"name": table.entry.name, "dtype": table.dtype, "shape": shape, "theta": theta, "as_config": as_config}


def _onnx(path: Path) -> dict[str, Any]:
    try:
        from mythos_edge.exporter.graph_difference import read_graph
    except ImportError as error:
        raise unavailable(error, "reading .onnx", "pip install 'mythos-edge[export]'") from error
    model = read_graph(path)
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
