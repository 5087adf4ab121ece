"""``mythos-edge export``: a checkpoint becomes a bundle."""

import argparse
import gc
import time
from contextlib import suppress
from pathlib import Path

from mythos_edge.model.bundle import Bundle, open_bundle
from mythos_edge.model.bundle_writer import BundleWriter
from mythos_edge.model.errors import BundleError, unavailable
from mythos_edge.scripts import arguments
from mythos_edge.scripts.console import Console

HELP = "export a checkpoint to a bundle"
EXAMPLE = "mythos-edge export step_0001000.pt -o model.bundle --tokenizer tokenizer.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=arguments.path, help=".pt, .pth, .bin, .safetensors, or a folder with safetensors"
    )
    parser.add_argument("-o", "--output", type=arguments.path, required=True, metavar="BUNDLE", help="folder to write")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of an export, without its two places; optimum's command has the same options."""
    arguments.add_checkpoint(
        parser,
        "rotary angles as the config says, or the table in the file as the reference would use it "
        "(default: the config's, and the file's table must agree)",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="storage of large weights")
    parser.add_argument("--max-context", type=int, metavar="N", help="longest sequence (default: the checkpoint's)")
    tokenizers = parser.add_mutually_exclusive_group()
    tokenizers.add_argument(
        "--tokenizer",
        type=arguments.path,
        metavar="PATH",
        help="Hugging Face tokenizer.json, or its folder (default: the checkpoint's folder, where it is one)",
    )
    tokenizers.add_argument("--no-tokenizer", action="store_true", help="leave out the one in the checkpoint's folder")
    parser.add_argument(
        "--end-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="ends a text: a token of the tokenizer, or an id without one (repeatable; default: what the tokenizer's "
        "folder says in generation_config.json or tokenizer_config.json, else its special tokens of known names)",
    )
    parser.add_argument("--portable", action="store_true", help="add graphs of standard ops alone, for other engines")
    parser.add_argument("--force", action="store_true", help="replace an existing bundle, targets built in it too")


def run(args: argparse.Namespace, console: Console) -> int:
    collects = gc.isenabled()
    # To import torch and to trace make millions of objects that stay; looking at them all takes a fifth of the time.
    gc.disable()
    try:
        return _export(args, console)
    finally:
        if collects:
            gc.enable()


def _export(args: argparse.Namespace, console: Console) -> int:
    try:
        from mythos_edge.exporter.export import export_bundle
        from mythos_edge.exporter.tokenizer_files import tokenizer_beside
        from mythos_edge.model.checkpoint import open_checkpoint
    except ImportError as error:
        raise unavailable(error, "exporting", "pip install 'mythos-edge[export]'") from error

    BundleWriter(args.output, args.force)  # refuses a place that is taken, before the checkpoint is read
    lost = _built_targets(args.output)
    if lost:
        console.note(f"note: --force discards what was built in {args.output}, too: {', '.join(lost)}")
    started = time.perf_counter()
    beside = None if args.tokenizer is not None or args.no_tokenizer else tokenizer_beside(args.checkpoint)
    taken = beside if args.checkpoint.is_dir() else None
    console.progress("reading the checkpoint", 0.0)
    with open_checkpoint(args.checkpoint, args.config, key=args.key, rope_table=args.rope_table) as checkpoint:
        for note in checkpoint.notes:
            console.note(f"note: {note}")
        bundle = export_bundle(
            checkpoint,
            args.output,
            dtype=args.dtype,
            max_context=args.max_context,
            tokenizer=args.tokenizer or taken,
            end_tokens=args.end_token,
            force=args.force,
            portable=args.portable,
            progress=console.progress,
            note=lambda text: console.note(f"note: {text}"),
        )
    if taken is not None:
        console.note(f"note: {taken} is taken along: --no-tokenizer leaves it out")
    elif beside is not None:
        console.note(f"note: {beside} is not taken along: --tokenizer {beside} does")
    _tell(bundle, args, time.perf_counter() - started, console)
    return 0


def _tell(bundle: Bundle, args: argparse.Namespace, seconds: float, console: Console) -> None:
    manifest = bundle.manifest
    size = sum(record.bytes for record in manifest.files.values())
    note = manifest.targets[manifest.default_target].note
    if note:
        console.note(f"note: {note}")
    console.say(
        f"{bundle.path}: {size / 1e6:.1f} MB, {manifest.dtype}, context {manifest.max_context}, {seconds:.1f} s"
    )
    ends = ", ".join(map(str, manifest.end_tokens)) or "none: a text ends at --max-new-tokens"
    console.say(f"end tokens: {ends}")
    portable: dict[str, str] = {}
    if args.portable:
        # Imports onnx, which an export that finds its graphs kept needs for nothing else.
        from mythos_edge.exporter.portable import portable_files

        portable = portable_files(manifest.graphs)
        console.say(f"graphs of standard ops alone: {', '.join(portable.values())}")
    console.result(
        {
            "bundle": str(bundle.path),
            "bytes": size,
            "portable": portable,
            "dtype": manifest.dtype,
            "compute_dtype": manifest.targets[manifest.default_target].compute_dtype,
            "max_context": manifest.max_context,
            "end_tokens": [token.name for token in manifest.end_tokens],
            "rope_table": manifest.rope_table,
            "seconds": seconds,
        }
    )


def _built_targets(path: Path) -> list[str]:
    """The targets that a bundle at ``path`` has beside the one of every export, none where it cannot be read."""
    with suppress(BundleError):
        return list(open_bundle(path).manifest.targets)[1:]
    return []
