"""``mythos-edge inline``: adds graphs of standard ops alone to a bundle."""

import argparse
from pathlib import Path

from mythos_edge.model.errors import BackendUnavailable
from mythos_edge.scripts.console import Console

HELP = "add graphs of standard ONNX ops alone to a bundle, for other engines"
EXAMPLE = "mythos-edge inline model.bundle"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path)


def run(args: argparse.Namespace, console: Console) -> int:
    try:
        from mythos_edge.exporter.portable import inline_bundle, portable_files
    except ImportError as error:
        message = f"inlining graphs needs {error.name}, which is not installed"
        raise BackendUnavailable(message, "pip install 'mythos-edge[export]'") from error
    bundle = inline_bundle(args.bundle, console.progress)
    files = portable_files(bundle.manifest.graphs)
    console.say(f"{bundle.path}: {', '.join(files.values())}: standard ops alone, weights in weights.safetensors")
    console.result({"bundle": str(bundle.path), "portable": files})
    return 0
